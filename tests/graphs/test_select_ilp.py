"""Selection by integer programming: the best of all circuits of a size, found by trying all of them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.graphs import select_ilp as ilp
from mechinterp.graphs.circuit import on_paths
from mechinterp.graphs.graph import Graph, build_graph, graph_of
from mechinterp.graphs.scores import Scores
from mechinterp.graphs.select import select
from mechinterp.graphs.select_ilp import best_edges
from mechinterp.models.layout import Dims
from tests.support.models_tiny import SHAPES, tiny


def small(layers: int, heads: int, kv_heads: int, mlp: bool, split: bool = False) -> Graph:
    dims = Dims(layers, heads, kv_heads, 4, 4, 9, 9, 9, has_mlp=mlp, parallel=False, causal=True)
    return graph_of(dims, split_input=split)


TINY = {
    "one layer": (1, 1, 1, True),
    "two layers": (2, 1, 1, False),
    "two heads that share k and v": (1, 2, 1, True),
    "split input": (1, 1, 1, False, True),
}


@functools.cache
def circuits(name: str) -> torch.Tensor:
    """Every set of edges of which each lies on a path, `[circuit, edge]`."""
    graph = small(*TINY[name])
    found: list[torch.Tensor] = []
    for bits in range(1, 2**graph.n_edges):
        mask = torch.zeros_like(graph.possible)
        mask[graph.possible] = torch.tensor([bool(bits >> i & 1) for i in range(graph.n_edges)])
        if torch.equal(on_paths(graph, mask), mask):
            found.append(mask[graph.possible])
    return torch.stack(found).double()


def scores_of(graph: Graph, seed: int, *, whole: bool = False) -> Scores:
    values = torch.randn(graph.possible.shape, generator=torch.Generator().manual_seed(seed))
    values = values.round() if whole else values  # whole numbers: ties, and many zeros
    return Scores(graph, torch.where(graph.possible, values, 0.0), 1, "test", "logit_diff", "corrupt")


def total(scores: Scores, kept: torch.Tensor, by: str) -> float:
    values = scores.values.double()
    return float((values.abs() if by == "magnitude" else values)[kept].sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("by", "whole"), [("value", False), ("magnitude", False), ("value", True)])
def test_no_circuit_of_the_size_has_a_higher_total(name: str, by: str, whole: bool) -> None:
    graph, every = small(*TINY[name]), circuits(name)
    for seed in range(3):
        scores = scores_of(graph, seed, whole=whole)
        strength = scores.values[graph.possible].double()
        totals = every @ (strength.abs() if by == "magnitude" else strength)
        for n in range(1, graph.n_edges + 1):
            circuit = select(graph, scores, edges=n, rule="ilp", by=by)
            assert circuit.n_edges == circuit.n_selected == n
            assert total(scores, circuit.kept, by) == pytest.approx(float(totals[every.sum(1) == n].max()), abs=1e-6)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("by", ["value", "magnitude"])
def test_it_is_never_worse_than_the_other_rules_at_their_size(name: str, by: str) -> None:
    graph = build_graph(tiny(name))
    scores, better = scores_of(graph, 5), 0
    for rule, n in (("greedy", 12), ("greedy", 40), ("top", 60)):
        other = select(graph, scores, edges=n, rule=rule, by=by)
        ours = select(graph, scores, edges=other.n_edges, rule="ilp", by=by)
        assert ours.n_edges == other.n_edges and torch.equal(on_paths(graph, ours.kept), ours.kept)
        gain = total(scores, ours.kept, by) - total(scores, other.kept, by)
        assert gain > -1e-6
        better += gain > 1e-6
    assert better > 0


def test_what_is_recorded_selects_the_same_again() -> None:
    graph = build_graph(tiny("llama"))
    scores = scores_of(graph, 1)
    circuit = select(graph, scores, edges="10%", rule="ilp", by="value")
    assert dict(circuit.selection) == {"rule": "ilp", "by": "value", "edges": graph.n_edges // 10}
    again: dict[str, Any] = dict(circuit.selection)
    assert torch.equal(select(graph, scores, **again).kept, circuit.kept)


def test_a_solution_between_two_corners_is_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    solve, asked = ilp.milp, list[bool]()

    def between(cost: Any, *, integrality: Any, **more: Any) -> Any:
        found = solve(cost, integrality=integrality, **more)
        asked.append(bool(integrality[0]))
        if not asked[-1]:
            found.x = found.x * 0 + 0.5
        return found

    monkeypatch.setattr(ilp, "milp", between)
    graph = small(*TINY["two layers"])
    strength = scores_of(graph, 2).values.abs()
    kept = best_edges(graph, strength, 5)
    monkeypatch.undo()
    assert asked == [False, True] and torch.equal(kept, best_edges(graph, strength, 5))


def test_what_is_not_proven_is_refused() -> None:
    graph = small(6, 8, 8, True)
    with pytest.raises(mi.InputError, match=r"did not prove within 0\.001 seconds .* 50 edges"):
        select(graph, scores_of(graph, 0), edges=50, rule="ilp", time_limit=0.001)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("inf"), float("nan")])
def test_a_time_limit_that_is_none_is_refused(limit: float) -> None:
    graph = small(*TINY["one layer"])
    with pytest.raises(mi.InputError, match="time_limit"):
        select(graph, scores_of(graph, 0), edges=2, rule="ilp", time_limit=limit)
