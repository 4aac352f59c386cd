"""`mattr`: the gates and their gradient, a planted order found, the same result however it is run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base import checkpoint
from mechinterp.base.errors import InputError
from mechinterp.discovery import gate_learning
from mechinterp.discovery.matryoshka import TopKGates, hard_top_k, soft_top_k
from mechinterp.engines.edge_patching import run_edges
from mechinterp.graphs.scores import Scores
from tests.support.hand_circuits import HAND
from tests.support.models_tiny import pairs, snapshot, tiny

SHORT: dict[str, Any] = {"learning_steps": 4, "drawings": 2, "runs": 2}
STRENGTH = torch.tensor([0.3, -1.2, 2.0, 0.3, -0.4, 1.1, -3.0], dtype=torch.float64)
SIZES = torch.tensor([1.0, 2.6, 6.5], dtype=torch.float64)


def ranked(scores: Scores) -> list[str]:
    """The edges, the strongest first."""
    values = scores.to_dict()
    return sorted(values, key=lambda name: -values[name])


# -- gates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.02, 0.5, 5.0])
def test_soft_gates_sum_to_the_size_and_keep_the_order(temperature: float) -> None:
    gates = soft_top_k(STRENGTH, SIZES, temperature)
    # 60 halvings of an interval of a few hundred leave less than 1e-12 of the threshold.
    torch.testing.assert_close(gates.sum(1), SIZES, rtol=0, atol=1e-9)
    assert bool(((gates >= 0) & (gates <= 1)).all())
    order = STRENGTH.argsort()
    assert bool((gates[:, order].diff(dim=1) >= 0).all()) and torch.equal(gates[:, 0], gates[:, 3])
    # All gates have one threshold: log(g / (1 - g)) * temperature is the strength minus it.
    inside = (gates > 1e-6) & (gates < 1 - 1e-6)
    for row, chosen in zip(gates, inside, strict=True):
        shift = (STRENGTH - temperature * torch.logit(row))[chosen]
        torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-6)


def test_a_cold_gate_is_a_hard_one() -> None:
    strength = torch.tensor([0.5, -1.2, 2.0, 0.3, -0.4], dtype=torch.float64)
    sizes = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(
        soft_top_k(strength, sizes, 1e-3), hard_top_k(strength, sizes).double(), rtol=0, atol=1e-9
    )


def test_hard_gates_keep_the_strongest_and_the_first_of_ties() -> None:
    kept = hard_top_k(STRENGTH, torch.tensor([1.0, 2.4, 2.6, 7.0], dtype=torch.float64))
    assert kept.sum(1).tolist() == [1, 2, 3, 7]
    assert [set(row.nonzero()[:, 0].tolist()) for row in kept[:3]] == [{2}, {2, 5}, {0, 2, 5}]  # not {2, 3, 5}


@pytest.mark.parametrize("hard", [False, True])
def test_the_gradient_of_the_gates_is_that_of_the_soft_ones(hard: bool) -> None:
    """Central differences of `soft_top_k`, whose threshold moves with the strengths."""
    weight = torch.randn(len(SIZES), len(STRENGTH), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    strength = STRENGTH.clone().requires_grad_()
    gates = TopKGates.apply(strength, SIZES, 0.5, hard)
    expected = hard_top_k(STRENGTH, SIZES).double() if hard else soft_top_k(STRENGTH, SIZES, 0.5)
    assert isinstance(gates, torch.Tensor) and torch.equal(gates, expected)
    (found,) = torch.autograd.grad((gates * weight).sum(), [strength])
    step = 1e-5
    for i in range(len(STRENGTH)):
        moved = step * torch.nn.functional.one_hot(torch.tensor(i), len(STRENGTH)).double()
        up, down = (soft_top_k(STRENGTH + by, SIZES, 0.5) for by in (moved, -moved))
        slope = float(((up - down) * weight).sum()) / (2 * step)
        assert float(found[i]) == pytest.approx(slope, abs=1e-7)  # second order in the step, and the bisection's end
    # The sums are fixed, so weights that are the same for all gates give none.
    (none,) = torch.autograd.grad(TopKGates.apply(strength, SIZES, 0.5, hard).sum(), [strength])  # type: ignore[union-attr]
    assert float(none.abs().max()) < 1e-12 < float(found.abs().max())


# -- orders ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["kl", "metric"])
@pytest.mark.parametrize("name", HAND)
def test_a_planted_circuit_comes_first(name: str, objective: str) -> None:
    """From no order at all."""
    this = HAND[name]()
    asked = {"runs": 1, "learning_steps": 60, "drawings": 4, "warm_start": "none", "objective": objective}
    scores = mi.score_edges(this.model, this.graph, this.pairs, method="mattr", **asked)
    assert set(ranked(scores)[: len(this.truth)]) == this.truth
    assert not this.truth <= set(this.graph.edge_names()[: len(this.truth)])  # not the order that it begins with


def test_it_begins_with_the_order_of_the_warm_start() -> None:
    model, some = tiny("gpt2"), pairs(3)
    graph = mi.build_graph(model)
    first = mi.score_edges(model, graph, some, method="eap")
    asked = {"learning_steps": 1, "lr": 0.0, "runs": 1, "drawings": 1}
    found = mi.score_edges(model, graph, some, method="mattr", warm_start="eap", **asked)
    order = sorted(graph.edge_names(), key=lambda name: -abs(first.to_dict()[name]))
    assert ranked(found) == order != list(graph.edge_names())
    values = [found.to_dict()[name] for name in order]
    n = len(order)
    assert values == pytest.approx([math.log((n + 1) / rank) for rank in range(1, n + 1)])
    none = mi.score_edges(model, graph, some, method="mattr", warm_start="none", **asked)
    assert tuple(ranked(none)) == tuple(graph.edge_names())
    # What the warm start cost is in the cost.
    extra = {name: found.cost[name] - none.cost[name] for name in none.cost}
    assert extra == first.cost and not found.additive


@pytest.mark.slow
def test_learning_lowers_the_divergence_of_small_circuits() -> None:
    """The loss itself, at sizes from 4 to all, of the hard circuits in the learned order and in the first one."""
    model, some = tiny("gpt2"), pairs(6)
    graph = mi.build_graph(model)
    clean = run_edges(model, graph, some, torch.zeros_like(graph.possible)).log_softmax(-1)

    def divergence(order: list[str]) -> float:
        total = 0.0
        for size in (4, 8, 16, 32, 64):
            logits = run_edges(model, graph, some, graph.possible & ~graph.mask_of(order[:size]))
            total += float((clean.exp() * (clean - logits.log_softmax(-1))).sum(-1).mean())
        return total

    asked = {"runs": 1, "learning_steps": 40, "drawings": 4, "examples": 6}
    learned = mi.score_edges(model, graph, some, method="mattr", **asked)
    first = mi.score_edges(model, graph, some, method="eap-ig")
    names = sorted(graph.edge_names(), key=lambda name: -abs(first.to_dict()[name]))
    assert divergence(ranked(learned)) < 0.8 * divergence(names)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_runs_on_examples_drawn_again_are_averaged() -> None:
    model, some = tiny("gpt2"), pairs(4)
    graph = mi.build_graph(model)
    one = mi.score_edges(model, graph, some, method="mattr", **{**SHORT, "runs": 1})
    assert one.samples is None
    two = mi.score_edges(model, graph, some, method="mattr", **SHORT)
    assert two.samples is not None and two.samples.shape == (2, graph.n_edges)
    assert not torch.equal(two.samples[0], two.samples[1])
    mean = two.values[graph.possible].double()
    torch.testing.assert_close(two.samples.mean(0), mean, rtol=0, atol=1e-5)  # scores are float32 or better
    ranks = (graph.n_edges + 1) / two.samples.exp()
    for row in ranks:  # each run is an order
        torch.testing.assert_close(row.sort().values, torch.arange(1, graph.n_edges + 1).double(), rtol=0, atol=1e-6)


def test_the_runs_are_those_on_the_drawn_examples_alone() -> None:
    """Run i learns from row i of the drawing; on the same examples four times over, both runs give the same."""
    model, some = tiny("gpt2"), pairs(2)
    alike = some[[0, 0, 0, 0]]
    graph = mi.build_graph(model)
    asked = {"learning_steps": 3, "lr": 0.0, "drawings": 2}
    two = mi.score_edges(model, graph, alike, method="mattr", runs=2, **asked)
    assert two.samples is not None and torch.equal(two.samples[0], two.samples[1])
    assert two.cost["backwards"] - 5 * 4 == 2 * 3 * 2 * 4  # eap-ig's 5 an example; runs x steps x drawings x examples


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 5])
def test_a_killed_run_goes_on_to_the_same_order(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY_SECONDS", 0.0)
    model, some = tiny("gpt2"), pairs(3, 5)
    graph = mi.build_graph(model, level="node")
    whole = mi.score_edges(model, graph, some, method="mattr", **SHORT)

    def killed(done: int, total: int) -> None:
        assert total == 8  # two runs of four steps
        if done == at:
            raise Killed

    state = tmp_path / "state"
    with pytest.raises(Killed):
        mi.score_edges(model, graph, some, method="mattr", resume=state, progress=killed, **SHORT)
    calls: list[int] = []
    again = mi.score_edges(
        model, graph, some, method="mattr", resume=state, progress=lambda done, _: calls.append(done), **SHORT
    )
    assert calls[0] == at and torch.equal(again.values, whole.values) and again.cost == whole.cost
    assert again.samples is not None and whole.samples is not None and torch.equal(again.samples, whole.samples)
    assert not state.exists()


@pytest.mark.slow
def test_the_same_however_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = tiny("gpt2"), pairs(5, padded=True)
    graph = mi.build_graph(model)
    before = snapshot(model.bridge)
    runs = [mi.score_edges(model, graph, some, method="mattr", batch_size=size, **SHORT) for size in (32, 32, 3)]
    monkeypatch.setattr(gate_learning, "KEPT_BYTES", 0)
    runs.append(mi.score_edges(model, graph, some, method="mattr", **SHORT))
    assert snapshot(model.bridge) == before
    for other in runs[1:]:  # float64: no two strengths are so near that rounding would exchange their ranks
        assert torch.equal(runs[0].values, other.values) and runs[0].cost == other.cost
    assert not torch.equal(runs[0].values, mi.score_edges(model, graph, some, method="mattr", seed=1, **SHORT).values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "graph_of"),
    [
        ("llama", {"level": "node"}),
        ("llama", {}),  # grouped queries: an edge into a shared key or value is one edge
        ("gemma2", {}),
        ("gpt2", {"positions": ["end"]}),
        ("gpt2", {"level": "node", "positions": ["end"]}),
        ("gpt2", {"level": "node", "neurons": {0: (0, 3)}}),
        ("attention-only", {"level": "node"}),
    ],
    ids=str,
)
def test_every_graph_is_ordered_by_units(shape: str, graph_of: dict[str, Any]) -> None:
    model = tiny(shape)
    named = {"positions": {"end": [6] * 4}} if "positions" in graph_of else {}
    some = pairs(4, **named)
    graph = mi.build_graph(model, **graph_of)
    scores = mi.score_edges(model, graph, some, method="mattr", **SHORT)
    assert scores.samples is not None and scores.samples.shape == (2, graph.n_edges)
    values, units = scores.values[graph.possible], graph.unit[graph.possible]
    by_unit = [values[units == unit] for unit in range(graph.n_units)]
    assert all(len(one.unique()) == 1 for one in by_unit)  # chosen together, ranked together
    assert len(torch.stack([one[0] for one in by_unit]).unique()) > graph.n_units / 2  # means of two ranks may tie
    assert float(values.min()) > 0 and not bool(scores.values[~graph.possible].any())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runs": 0}, "runs"),
        ({"smallest": 0}, "smallest"),
        ({"temperature": 0.0}, "temperature"),
        ({"warm_start": "eapp"}, "warm_start"),
        ({"objective": "metric", "metric": "accuracy", "warm_start": "none"}, "gradient"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any], message: str) -> None:
    model = tiny("gpt2")
    with pytest.raises(InputError, match=message):
        mi.score_edges(model, mi.build_graph(model), pairs(3), method="mattr", **settings)
