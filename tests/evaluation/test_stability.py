"""Several circuits: how much they overlap, and how faithful each is on other pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.evaluation.stability import stability
from mechinterp.evaluation.transfer import transfer
from mechinterp.graphs.circuit import Circuit, on_paths
from tests.support.models_tiny import pairs, small_cut, tiny


def circuit_of(seed: int, share: float = 0.5, name: str = "gpt2") -> Circuit:
    graph = mi.build_graph(tiny(name))
    kept = on_paths(graph, small_cut(graph, share, seed))
    return Circuit(graph, kept, int(kept.sum()))


def test_frequencies_and_overlaps_are_those_of_the_sets() -> None:
    circuits = [circuit_of(i, 0.2 + 0.1 * i) for i in range(4)]
    found = stability(circuits, ["a", "b", "c", "d"])
    edges, nodes = [set(c.edges) for c in circuits], [set(c.nodes) for c in circuits]
    frame = found.to_frame().set_index("edge")
    assert set(frame.index) == set.union(*edges)
    assert all(frame.frequency[e] == sum(e in some for some in edges) / 4 for e in frame.index)
    assert {e.partition("->")[0] for e in frame.index} == set(frame.writer)
    of_nodes = found.nodes_frame().set_index("node").frequency
    assert set(of_nodes.index) == set.union(*nodes)
    assert all(of_nodes[n] == sum(n in some for some in nodes) / 4 for n in of_nodes.index)
    for row in found.overlap().itertuples():
        i, j = "abcd".index(row.a), "abcd".index(row.b)
        assert row.edge_jaccard == pytest.approx(len(edges[i] & edges[j]) / len(edges[i] | edges[j]))
        assert row.node_jaccard == pytest.approx(len(nodes[i] & nodes[j]) / len(nodes[i] | nodes[j]))
    assert found.mean_edge_jaccard == pytest.approx(found.overlap().edge_jaccard.mean())
    assert found.mean_node_jaccard == pytest.approx(found.overlap().node_jaccard.mean())
    assert set(circuits[0].graph.edge_name(*at) for at in found.core().nonzero().tolist()) == set.intersection(*edges)
    half = {e for e in frame.index if frame.frequency[e] >= 0.5}
    assert set(circuits[0].graph.edge_name(*at) for at in found.core(0.5).nonzero().tolist()) == half


def test_a_circuit_overlaps_fully_with_itself_and_random_ones_overlap_as_expected() -> None:
    twice = stability([circuit_of(0), circuit_of(0)])
    assert twice.mean_edge_jaccard == twice.mean_node_jaccard == 1 and twice.to_frame().frequency.eq(1).all()
    graph = mi.build_graph(tiny("gpt2"))
    order = [torch.randperm(graph.n_edges, generator=torch.Generator().manual_seed(i))[:60] for i in range(12)]
    masks = [torch.zeros(graph.n_edges, dtype=torch.bool).index_fill(0, rows, True) for rows in order]
    random = [Circuit(graph, torch.zeros_like(graph.possible).masked_scatter(graph.possible, m), 60) for m in masks]
    found = stability(random)
    # 66 couples; for each, the number of common edges varies by about 5 around its mean of 60 * 60 / n.
    assert found.mean_edge_jaccard == pytest.approx(found.expected_edge_jaccard, rel=0.1)


@pytest.mark.slow
def test_transfer_is_evaluate_on_every_pairs_with_the_overlap() -> None:
    model, circuits = tiny("gpt2"), {"x": circuit_of(0, 0.5), "y": circuit_of(1, 0.7)}
    tasks = {"x": pairs(3), "y": pairs(4, 6, seed=8)}
    settings: dict[str, Any] = {"replacement": "mean", "n_random": 1, "seed": 3}
    found = transfer(model, circuits, tasks, **settings)
    frame = found.to_frame().set_index(["circuit", "pairs"])
    assert set(frame.index) == {(c, t) for c in circuits for t in tasks}
    for (name, task), row in frame.iterrows():
        expected = mi.evaluate(model, circuits[name], tasks[task], **settings)
        assert (row.faithfulness, row.kl, row.edges) == (expected.faithfulness, expected.kl, expected.n_edges)
        assert (row.low, row.high) == expected.faithfulness_ci
        assert row.random_max == max(expected.random_faithfulness)
        mine, native = set(circuits[name].edges), set(circuits[task].edges)
        assert row.jaccard == pytest.approx(len(mine & native) / len(mine | native))
        assert row.shared == pytest.approx(len(mine & native) / len(mine))
    assert frame.jaccard["x", "x"] == frame.shared["y", "y"] == 1
    unnamed = transfer(model, {"x": circuits["x"]}, {"other": tasks["y"]}, n_random=0).to_frame()
    assert unnamed[["jaccard", "shared", "random_mean"]].isna().all().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stability([circuit_of(0)]), "at least two"),
        (lambda: stability([circuit_of(0), circuit_of(0, name="llama")]), "of another graph"),
        (lambda: stability([circuit_of(0), circuit_of(1)], ["a", "a"]), "different names"),
        (lambda: stability([circuit_of(0), Circuit(circuit_of(0).graph, circuit_of(0).kept & False, 0)]), "no edges"),
        (lambda: stability([circuit_of(0), circuit_of(1)]).core(0.0), "share must be"),
        (lambda: transfer(tiny("gpt2"), {}, {"x": pairs(3)}), "at least one circuit"),
        (
            lambda: transfer(tiny("gpt2"), {"a": circuit_of(0), "b": circuit_of(0, name="llama")}, {"x": pairs(3)}),
            "different graphs",
        ),
    ],
)
def test_invalid_arguments_are_refused_with_one_clear_line(call: Any, message: str) -> None:
    with pytest.raises(mi.InputError, match=message):
        call()
