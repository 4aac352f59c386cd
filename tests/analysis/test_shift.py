"""SHIFT on a model with planted features: the cue's feature is ablated, and the probe tells the label again."""

from __future__ import annotations

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.features.activations import JumpRelu
from mechinterp.features.dictionary import sae
from tests.support.toy_superposition import N_FEATURES, planted

LABEL, CUE = 0, 1


def toy():
    """120 tokens: half have the label's feature, half the cue's, stronger; each has one of the other features, too."""
    generator = torch.Generator().manual_seed(0)
    amounts = torch.zeros(120, N_FEATURES)
    rows = torch.arange(120)
    label, cue = rows % 2 == 0, rows % 4 < 2
    amounts[rows, 2 + rows % 22] = torch.rand(120, generator=generator) + 0.5
    amounts[label, LABEL], amounts[cue, CUE] = 0.8, 1.6
    made = planted(amounts=amounts)
    basis = sae("resid_pre.0", made.directions.T.contiguous(), made.directions, activation=JumpRelu(torch.tensor(0.45)))
    every = mi.LabelledPrompts(rows[:, None], label, cue)
    same = label == cue
    return made.model, basis, mi.LabelledPrompts(rows[same][:, None], label[same], cue[same]), every


def test_ablating_the_cue_frees_the_probe_and_random_features_do_not():
    model, basis, train, every = toy()
    name = f"resid_pre.0.f{CUE}"
    by_name = mi.shift_probe(model, train, every, "resid_pre.0", basis, [name], balanced=every, draws=2)
    by_rule = mi.shift_probe(model, train, every, "resid_pre.0", basis, lambda _: [CUE], draws=0)
    assert by_name.frame[:3].equals(by_rule.frame) and by_name.ablated == by_rule.ablated == (name,)
    rows = by_name.frame.set_index("probe")
    assert rows.loc["before", "worst_group"] < 0.3 and rows.loc["before", "follows_cue"] > 0.7
    assert rows.loc["retrained", "worst_group"] > 0.95 and rows.loc["retrained", "follows_cue"] < 0.05
    assert rows.loc["random retrained", "worst_group"] < rows.loc["retrained", "worst_group"] - 0.3
    assert rows.loc["balanced", "worst_group"] > 0.95
    assert by_name.groups == {(a, b): 30 for a in (False, True) for b in (False, True)}


def test_what_cannot_be_measured_is_refused():
    model, basis, train, every = toy()
    with pytest.raises(InputError, match="all four groups"):
        mi.shift_probe(model, train, train, "resid_pre.0", basis, [f"resid_pre.0.f{CUE}"])
    with pytest.raises(InputError, match="nothing to ablate"):
        mi.shift_probe(model, train, every, "resid_pre.0", basis, lambda _: [])
    with pytest.raises(InputError, match=r"Only 10 other features .* are active, so 13 cannot be drawn"):
        mi.shift_probe(model, train, every, "resid_pre.0", basis, lambda _: range(N_FEATURES - 11))
    with pytest.raises(InputError, match="at all positions"):
        mi.shift_probe(model, train, every, "resid_pre.0", basis, ["resid_pre.0.err"])
    with pytest.raises(InputError, match="both labels"):
        mi.LabelledPrompts(["a", "b"], torch.tensor([True, True]), torch.tensor([True, False]))
    with pytest.raises(InputError, match="for each of the 2 prompts"):
        mi.LabelledPrompts(["a", "b"], torch.tensor([True]), torch.tensor([True]))
