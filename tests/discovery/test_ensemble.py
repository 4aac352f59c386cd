"""Ensembles: what they are of one member, of equal ones, of any order; and that a file repeats them."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base import checkpoint
from mechinterp.circuit_file.verify.verification import verify
from mechinterp.discovery.ensemble import parse_members
from mechinterp.graphs.scores import Scores
from tests.support.models_tiny import SHAPES, pairs, tiny

HOW = ("rank", "mean", "calibrated")


def members(name: str = "gpt2", level: str = "edge") -> list[Scores]:
    model, some = tiny(name), pairs(3, padded=True)
    graph = mi.build_graph(model, level=level)
    return [mi.score_edges(model, graph, some, method=method) for method in ("eap-ig", "relp", "eap")]


def order(scores: Scores, *, by: str) -> list[int]:
    graph = scores.graph
    values = scores.values[tuple(graph.first_of_unit.T)]
    return (values.abs() if by == "magnitude" else values).argsort(descending=True, stable=True).tolist()


def above_rounding(scores: Scores) -> int:
    """How many units have a place: the others' order is rounding."""
    size = scores.values[tuple(scores.graph.first_of_unit.T)].abs()
    return int((size > 1e-4 * size.max()).sum())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("level", ["edge", "node"])
def test_equal_members_keep_their_order(how: str, level: str) -> None:
    one, *_ = members(level=level)
    same = mi.ensemble_scores([one, one, one], how=how)
    n = above_rounding(one)
    assert order(same, by="magnitude")[:n] == order(one, by="magnitude")[:n]
    strong = one.values.abs() > 1e-3 * one.values.abs().max()
    assert torch.equal(same.values[strong].sign(), one.values[strong].sign())


@pytest.mark.parametrize("how", HOW)
def test_a_weight_of_zero_leaves_a_member_out(how: str) -> None:
    first, second, _ = members()
    alone = mi.ensemble_scores([first, second], how=how, weights=(1, 0))
    n = above_rounding(first)
    assert order(alone, by="magnitude")[:n] == order(first, by="magnitude")[:n]
    doubled = mi.ensemble_scores([first, second], how=how, weights=(2, 2))
    assert torch.equal(doubled.values, mi.ensemble_scores([first, second], how=how).values)
    if how == "mean":
        assert torch.allclose(alone.values, first.values, rtol=1e-12)


@pytest.mark.parametrize("how", HOW)
def test_the_order_of_the_members_is_nothing(how: str) -> None:
    some, weights = members("llama"), (1.0, 2.0, 3.0)
    expected = mi.ensemble_scores(some, how=how, weights=weights)
    for places in permutations(range(3)):
        found = mi.ensemble_scores([some[i] for i in places], how=how, weights=[weights[i] for i in places])
        torch.testing.assert_close(found.values, expected.values, rtol=1e-12, atol=1e-15)


def test_the_numbers_of_a_hand_made_ensemble() -> None:
    one, *_ = members(level="node")
    graph, n = one.graph, one.graph.n_units
    first = tuple(graph.first_of_unit.T)

    def made(values: list[float]) -> Scores:
        units = torch.tensor(values + [0.0] * (n - len(values)), dtype=torch.float64)
        table = torch.where(graph.possible, units[graph.unit.clamp(min=0)], 0.0)
        return replace(one, total=table * one.count)

    a, b = made([4.0, -2.0, 1.0, 1e-9]), made([-1.0, -1.0, 3.0, 0.0])
    found = {how: mi.ensemble_scores([a, b], how=how, weights=[3, 1]).values[first][:4].tolist() for how in HOW}
    # places: 1, -2/3, 1/3, 0 (rounding) and -1/2, -1/2 (a tie), 1, 0; the votes: +, -, +, none
    assert found["rank"] == pytest.approx([0.75 + 0.125, -(0.5 + 0.125), 0.25 + 0.25, 0])
    assert found["mean"] == pytest.approx([2.75, -1.75, 1.5, 7.5e-10])
    sizes = (21 / n) ** 0.5, (11 / n) ** 0.5
    expected = [0.75 * x / sizes[0] + 0.25 * y / sizes[1] for x, y in zip([4, -2, 1], [-1, -1, 3], strict=True)]
    assert found["calibrated"][:3] == pytest.approx(expected)
    b = made([-4.0, 0.0, 0.0, 0.0])
    assert float(mi.ensemble_scores([a, b], how="rank").values[first][0]) == pytest.approx(1)  # a tied vote is +


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_the_method_is_its_members_combined_in_any_batches(name: str) -> None:
    model, some = tiny(name), pairs(5, padded=True)
    graph = mi.build_graph(model)
    text, weights = "eap-ig:steps=2:schedule=midpoint,eap", "2,1"
    settings: dict[str, Any] = {"method": "ensemble", "methods": text, "weights": weights}
    for how in ("rank", "calibrated"):
        whole = mi.score_edges(model, graph, some, how=how, batch_size=5, **settings)
        parts = mi.score_edges(model, graph, some, how=how, batch_size=2, **settings)
        # Places move by less than this where scores move in their last digits.
        torch.testing.assert_close(parts.values, whole.values, rtol=1e-3, atol=2e-3)
        one = mi.score_edges(model, graph, some, method="eap-ig", steps=2, schedule="midpoint")
        other = mi.score_edges(model, graph, some, method="eap")
        joined = mi.ensemble_scores([one, other], how=how, weights=(2, 1))
        assert torch.equal(joined.values, whole.values)
        assert dict(joined.parameters) == dict(whole.parameters) and joined.cost == whole.cost
    assert whole.cost == {"forwards": one.cost["forwards"] + other.cost["forwards"], "backwards": 3 * 5}


def test_shards_of_a_mean_add_up_and_others_do_not() -> None:
    model, some = tiny("gpt2"), pairs(4)
    graph = mi.build_graph(model)
    for how in HOW:
        settings: dict[str, Any] = {"method": "ensemble", "methods": "eap,relp", "how": how}
        one, other = (mi.score_edges(model, graph, some[rows], **settings) for rows in (slice(0, 1), slice(1, 4)))
        if how == "mean":
            whole = mi.score_edges(model, graph, some, **settings)
            torch.testing.assert_close((one + other).values, whole.values, rtol=1e-9, atol=1e-12)
        else:
            with pytest.raises(mi.InputError, match="cannot be added"):
                _ = one + other


def test_a_file_repeats_it(tmp_path: Path) -> None:
    model, some = tiny("gpt2"), pairs(3)
    graph = mi.build_graph(model, level="node")
    parts = [
        mi.score_edges(model, graph, some, method="eap-ig", steps=3),
        mi.score_edges(model, graph, some, method="cd-edges", attention="gradient"),
        mi.score_edges(model, graph, some, method="acdc", tau=0.05),
    ]
    scores = mi.ensemble_scores(parts, how="rank", weights=(1, 0.5, 2))
    assert scores.parameters["methods"] == "eap-ig:steps=3,cd-edges:attention=gradient,acdc:tau=0.05"
    path = tmp_path / "together.circuit.json"
    mi.save_circuit(path, mi.select(graph, scores, nodes=10), model=model)
    verification = verify(path, model=model, rescore=True)
    assert verification.ok, str(verification)


def test_a_killed_ensemble_goes_on_at_the_member_that_it_had_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "EVERY_SECONDS", 0.0)
    model, some = tiny("gpt2"), pairs(3)
    graph = mi.build_graph(model)
    settings: dict[str, Any] = {"method": "ensemble", "methods": "eap,relp,cd-edges"}
    whole = mi.score_edges(model, graph, some, **settings)

    def kill(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mi.score_edges(model, graph, some, resume=tmp_path / "state", progress=kill, **settings)
    told: list[int] = []
    again = mi.score_edges(
        model, graph, some, resume=tmp_path / "state", progress=lambda d, t: told.append(d), **settings
    )
    assert min(told) >= 1000 and torch.equal(again.values, whole.values) and again.cost == whole.cost


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": "eap"}, "2 to 16"),
        ({"methods": ",".join(["eap"] * 17)}, "2 to 16"),
        ({"methods": "eap,epa"}, "Did you mean 'eap'"),
        ({"methods": "eap,ensemble"}, "member of an ensemble"),
        ({"methods": "eap,eap-ig:steps"}, "METHOD:NAME=VALUE"),
        ({"methods": "eap,eap-ig:steps=0"}, "steps must be"),
        ({"methods": "eap,eap-ig:stops=2"}, "no parameter 'stops'"),
        ({"methods": "eap,eap-ig:replacement=zero"}, "leave replacement= out"),
        ({"methods": "eap,eap-ig-activations", "replacement": "zero"}, "replacement 'zero'"),
        ({"weights": "1,1"}, "one weight"),
        ({"weights": "1,1,x"}, "separated by commas"),
        ({"weights": "1,1,-1"}, "one weight"),
        ({"weights": "1,1,nan"}, "one weight"),
        ({"weights": "0,0,0"}, "one weight"),
        ({"how": "median"}, "how 'median'"),
    ],
)
def test_bad_settings_get_one_clear_line(settings: dict[str, Any], message: str) -> None:
    model = tiny("gpt2")
    with pytest.raises(mi.InputError, match=message):
        mi.score_edges(model, mi.build_graph(model), pairs(2), method="ensemble", **settings)


def test_members_that_do_not_belong_together_are_refused() -> None:
    model, some = tiny("gpt2"), pairs(3)
    graph, nodes = mi.build_graph(model), mi.build_graph(model, level="node")
    eap, *_ = members()
    mine = mi.score_edges(model, graph, some, method="eap")
    for other, message in (
        (mi.score_edges(model, nodes, some, method="eap"), "different graphs"),
        (mi.score_edges(model, graph, some, method="eap", metric="prob_diff"), "different metrics"),
        (mi.score_edges(model, graph, some, method="eap", replacement="zero"), "different replacements"),
        (mi.score_edges(model, graph, some[:2], method="eap"), "different numbers"),
        (eap, "different examples"),
        (replace(mine, total=torch.zeros_like(mine.total)), "scores every edge 0"),
        (mi.ensemble_scores([mine, mine]), "cannot be a member"),
        (mi.stable_scores(model, graph, some, method="eap", resamples=3).scores, "could not be repeated"),
    ):
        with pytest.raises(mi.InputError, match=message):
            mi.ensemble_scores([mine, other])
    with pytest.raises(mi.InputError, match="2 to 16"):
        mi.ensemble_scores([mine])
    with pytest.raises(mi.InputError, match="take one of"):
        mi.score_edges(model, nodes, some, method="ensemble", methods="eap,cd")


def test_the_text_of_the_members_is_read_as_it_is_written() -> None:
    assert parse_members("eap-ig:steps=3,acdc:tau=0.05:order=score") == [
        ("eap-ig", {"steps": 3}),
        ("acdc", {"tau": 0.05, "order": "score"}),
    ]
