"""Bases judged by sufficiency, necessity and sparse control: what the whole state, and a perfect dictionary, reach."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.judge_bases import feature_weights_of, greedy_changes, in_units_of
from mechinterp.base.bootstrap import bootstrap_interval
from mechinterp.base.errors import InputError
from mechinterp.features.activations import Identity
from mechinterp.features.dictionary import sae
from mechinterp.features.neurons import neuron_basis
from mechinterp.features.supervised import supervised_basis
from tests.support.models_tiny import D_MODEL, pairs, tiny

TRAIN, TEST = pairs(12, seed=5), pairs(4)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_whole_state_is_sufficient_necessary_and_in_control():
    basis = neuron_basis("resid_pre.1", D_MODEL, label="every coordinate")
    found = mi.judge_bases(tiny("gpt2"), TRAIN, TEST, basis, changes=(1, D_MODEL), controls=("pca", "random"))
    rows = found.frame.set_index("basis")
    whole = rows.loc["every coordinate"]
    for column in ("sufficiency", "necessity", f"control@{D_MODEL}"):
        assert whole[column] == pytest.approx(1, abs=1e-6), column
    assert whole["fvu"] < 1e-12 and abs(whole["control@1"] - 1) > 1e-3
    assert rows.loc["pca", "features"] == D_MODEL and rows.loc["pca", "sufficiency"] == pytest.approx(1, abs=1e-6)


def test_a_dictionary_that_writes_nothing_is_worth_nothing():
    model = tiny("gpt2")
    states = [model.run(t, record=["resid_pre.1"]).values["resid_pre.1"][:, -1] for t in (TRAIN.clean, TRAIN.corrupt)]
    mean = torch.cat(states).mean(0)
    nothing = sae("resid_pre.1", 0 * drawn(D_MODEL, 3), 0 * drawn(3, D_MODEL), b_dec=mean)
    row = mi.judge_bases(model, TRAIN, TEST, nothing, controls=()).frame.iloc[0]
    assert row["sufficiency"] == pytest.approx(0, abs=1e-9) and row["necessity"] == pytest.approx(0, abs=1e-9)
    assert row["control@16"] == pytest.approx(0, abs=1e-9) and row["active"] == 0


def test_a_supervised_dictionary_changes_one_attribute_with_two_features():
    """Additive states: the old value off and the new one on is the other state, and no other feature helps."""
    directions = {name: drawn(4, 9, seed=i) for i, name in enumerate(("who", "where"))}
    labels = {"who": [f"w{i % 4}" for i in range(16)], "where": [f"p{i // 4}" for i in range(16)]}
    states = torch.stack([directions["who"][i % 4] + directions["where"][i // 4] for i in range(16)]) + 2
    basis = supervised_basis("resid_pre.1", states, labels)
    x, other = states[:4], states[4:8]  # the same people elsewhere
    code, there = basis.encode(x).values, basis.encode(other).values
    for row, ids in enumerate(greedy_changes(basis, code, there, other - x, 5)):
        assert sorted(ids) == sorted([basis.feature("where", "p0"), basis.feature("where", "p1")]), row
        values = code[row].clone()
        values[ids] = there[row][ids]
        torch.testing.assert_close(values @ basis.writes(), other[row] - basis.b_dec)


def test_the_first_change_is_the_best_of_all_and_changes_never_lead_away():
    basis = sae("resid_pre.1", drawn(9, 20), drawn(20, 9, seed=1))
    x, other = drawn(6, 9, seed=2), drawn(6, 9, seed=3)
    code, there = basis.encode(x).values, basis.encode(other).values
    for row, ids in enumerate(greedy_changes(basis, code, there, other - x, 8)):
        moves = (there - code)[row][:, None] * basis.writes()
        distances = (other[row] - x[row] - moves).norm(dim=1)
        assert ids[0] == int(distances.argmin()) and len(set(ids)) == len(ids)
        left = [(other[row] - x[row] - moves[ids[:k]].sum(0)).norm() for k in range(len(ids) + 1)]
        assert all(b < a for a, b in pairwise(left))


def test_weights_add_up_to_1():
    basis = sae("resid_pre.1", drawn(9, 20), drawn(20, 9, seed=1))
    values = basis.encode(drawn(6, 9, seed=2)).values
    weights = feature_weights_of(basis, values)
    torch.testing.assert_close(weights.sum(1), torch.ones(6, dtype=torch.float64))


def test_every_attribute_and_control_has_its_row():
    basis = sae("resid_pre.1", drawn(D_MODEL, 10), drawn(10, D_MODEL, seed=1), label="mine")
    labels = {"parity": [str(i % 2) for i in range(12)]}
    tests = {"a": TEST, "b": pairs(4, seed=9)}
    found = mi.judge_bases(tiny("gpt2"), TRAIN, tests, basis, attributes=labels, changes=(2,))
    kinds = ["mine", "supervised", "neurons", "pca", "random"]
    assert found.frame["basis"].tolist() == 2 * kinds and found.frame["attribute"].tolist() == ["a"] * 5 + ["b"] * 5
    assert set(found.about) == {"a", "b"} and not found.frame.isna().any().any()
    with pytest.raises(InputError, match="needs `attributes`"):
        mi.judge_bases(tiny("gpt2"), TRAIN, TEST, basis)
    with pytest.raises(InputError, match="one and the same site"):
        mi.judge_bases(tiny("gpt2"), TRAIN, TEST, [basis, sae("resid_pre.2", drawn(D_MODEL, 3), drawn(3, D_MODEL))])


def test_a_dictionary_that_normalises_its_input_is_judged_in_its_own_units():
    """Its features write in units of each token's scale, by which its choices and shares must not change."""
    W = drawn(D_MODEL, 10)
    W = W / W.norm(dim=0)
    normalised = sae("resid_pre.1", W, W.T.contiguous(), normalize="layer_norm", label="mine")
    x, other = drawn(4, D_MODEL, seed=2) * 7, drawn(4, D_MODEL, seed=3) * 7
    weights = feature_weights_of(normalised, normalised.encode(x).values)
    torch.testing.assert_close(weights.sum(1), torch.ones(4, dtype=torch.float64))
    site = normalised.sites_out[0]
    code, there = normalised.encode(x), normalised.encode(other)
    first = greedy_changes(normalised, code.values, there.values, in_units_of(code, other - x), 1)
    for row, (k,) in enumerate(first):
        moved: list[float] = []
        for i in range(10):
            values = code.values.clone()
            values[row, i] = there.values[row, i]
            move = normalised.decode(code.with_values(values))[site] - normalised.decode(code)[site]
            moved.append(float((other - x - move)[row].norm()))
        assert moved[k] == pytest.approx(min(moved))


def test_where_the_state_does_nothing_there_is_nothing_to_be_sufficient_for():
    """At an earlier token the metric does not read the last layer: 0 / 0 is not a share, and a line says so."""
    basis = neuron_basis("resid_post.2", D_MODEL, label="every coordinate")
    found = mi.judge_bases(tiny("gpt2"), TRAIN, TEST, basis, position=0, changes=(1,), controls=("random",))
    shares = found.frame[["sufficiency", "necessity", "control@1", "sufficiency_low", "necessity_high"]]
    assert bool(shares.isna().all().all())
    assert "does not change the metric" in repr(found)


def test_shares_have_intervals_of_the_examples():
    """The percentiles of a bootstrap over examples, which contain the share; all 1 for the whole state."""
    W = drawn(D_MODEL, D_MODEL - 2)
    bases = [
        neuron_basis("resid_pre.1", D_MODEL, label="whole"),
        sae("resid_pre.1", torch.linalg.pinv(W.T), W.T.contiguous(), activation=Identity(), label="part"),
    ]
    found = mi.judge_bases(tiny("gpt2"), TRAIN, TRAIN, bases, changes=(1,), controls=())
    for row in found.frame.to_dict("records"):
        for share in ("sufficiency", "necessity"):
            low, high = row[f"{share}_low"], row[f"{share}_high"]
            assert low <= row[share] + 1e-9 and row[share] <= high + 1e-9
            assert (high - low < 1e-6) == (row["basis"] == "whole")


@pytest.mark.parametrize("test", [TRAIN[:3], TEST, TRAIN])
def test_effects_that_are_not_told_from_0_are_named(test: mi.Pairs):
    """Shares of an effect whose interval over the examples holds 0 say nothing, however large the effect is."""
    model = tiny("gpt2")
    rows = torch.arange(len(test))
    states = [model.run(t, record=["resid_pre.1"]).values["resid_pre.1"][:, -1] for t in (TRAIN.clean, TRAIN.corrupt)]
    mean = torch.cat(states).mean(0)

    def emptied(value):
        return torch.cat([value[:, :-1], mean.expand_as(value[:, -1:])], 1)

    ends = []
    for edits in ([], [mi.Intervention("resid_pre.1", emptied)]):
        logits = model.run(test.clean, interventions=edits).logits
        assert logits is not None
        ends.append(logits[rows, -1, test.right[:, 0]] - logits[rows, -1, test.wrong[:, 0]])
    low, high = bootstrap_interval(lambda t: t.mean((1, 2)), (ends[0] - ends[1])[:, None])
    found = mi.judge_bases(model, TRAIN, test, neuron_basis("resid_pre.1", D_MODEL), controls=())
    assert (found.about[""]["effect_low"], found.about[""]["effect_high"]) == pytest.approx((low, high))
    assert (low <= 0 <= high) == ("is not told apart from 0" in repr(found))
