"""Selection: exactly the best edges, less those on no path."""

from __future__ import annotations

import itertools

import pytest
import torch

import mechinterp as mi
from mechinterp.graphs.circuit import Circuit, on_paths
from mechinterp.graphs.graph import Graph, build_graph
from mechinterp.graphs.scores import Scores
from mechinterp.graphs.select import EmptyCircuit, select, unit_count
from tests.support.models_tiny import tiny


def scores_of(graph: Graph, values: torch.Tensor) -> Scores:
    return Scores(graph, torch.where(graph.possible, values, 0.0), 1, "test", "logit_diff", "corrupt")


@pytest.fixture(scope="module", params=["gpt2", "llama", "neox"])
def graph(request: pytest.FixtureRequest) -> Graph:
    return build_graph(tiny(request.param))


@pytest.fixture
def scores(graph: Graph) -> Scores:
    return scores_of(graph, torch.randn(graph.possible.shape, generator=torch.Generator().manual_seed(3)))


def paths_by_force(graph: Graph, mask: torch.Tensor) -> torch.Tensor:
    """The edges on a path from an input to the logits, by walking every edge from both ends until nothing changes."""
    edges = [(int(r), int(w)) for r, w in mask.nonzero()]
    last = len(graph.readers) - 1
    reached, useful = set(range(graph.n_inputs)), {last}
    for _ in range(len(graph.writers) + 1):
        for r, w in edges:
            if w in reached:
                reached |= set(graph.feeds[r].nonzero().flatten().tolist())
            if r in useful:
                useful |= set(graph.feeds[:, w].nonzero().flatten().tolist())
    out = torch.zeros_like(mask)
    for r, w in edges:
        out[r, w] = w in reached and r in useful
    return out


def test_on_paths_is_the_fixed_point_found_by_force(graph: Graph) -> None:
    generator = torch.Generator().manual_seed(0)
    changed = 0
    for share in (0.02, 0.05, 0.1, 0.3):
        for _ in range(6):
            mask = (torch.rand(graph.possible.shape, generator=generator) < share) & graph.possible
            kept = on_paths(graph, mask)
            assert torch.equal(kept, paths_by_force(graph, mask))
            changed += int((kept != mask).sum())
    assert changed > 0


@pytest.mark.parametrize("by", ["value", "magnitude"])
def test_top_takes_the_best_and_keeps_both_counts(graph: Graph, scores: Scores, by: str) -> None:
    n = graph.n_edges // 3
    circuit = select(graph, scores, edges=n, by=by)
    ordered = scores.values.abs() if by == "magnitude" else scores.values
    limit = ordered[graph.possible].sort(descending=True).values[n - 1]
    best = (ordered >= limit) & graph.possible
    assert circuit.n_selected == n == int(best.sum())
    assert torch.equal(circuit.kept, on_paths(graph, best))
    assert circuit.n_edges < n and len(circuit.edges) == circuit.n_edges


def test_a_threshold_takes_what_is_above_it(graph: Graph, scores: Scores) -> None:
    circuit = select(graph, scores, threshold=0.3, by="value")
    assert circuit.n_selected == int(((scores.values > 0.3) & graph.possible).sum())
    assert all(scores.values[graph.edge_index(name)] > 0.3 for name in circuit.edges)


def test_dangling_nodes_are_dropped(graph: Graph) -> None:
    """EAP-IG's issue 16: a node without an outgoing edge is in no circuit."""
    names = ["input->a0.h0<q>", "a0.h0->a1.h0<q>", "input->logits"]
    kept = on_paths(graph, graph.mask_of(names))
    assert Circuit(graph, kept, 3).edges == ("input->logits",)


def test_greedy_is_connected_to_the_logits(graph: Graph, scores: Scores) -> None:
    circuit = select(graph, scores, edges=25, rule="greedy", by="magnitude")
    strength = scores.values.abs()
    chosen = torch.zeros_like(graph.possible)
    opened = {len(graph.readers) - 1}
    for _ in range(25):  # the slow way: the best edge into what is open, every time
        options = [
            (float(strength[r, w]), -r, -w)
            for r, w in itertools.product(opened, range(len(graph.writers)))
            if graph.possible[r, w] and not chosen[r, w]
        ]
        _, r, w = max(options)
        chosen[-r, -w] = True
        opened |= set(graph.feeds[:, -w].nonzero().flatten().tolist())
    assert torch.equal(circuit.kept, on_paths(graph, chosen))


def test_ties_go_to_the_first_edge_of_the_model(graph: Graph) -> None:
    flat = scores_of(graph, torch.ones(graph.possible.shape))
    first = graph.edge_names()[:5]
    with pytest.raises(EmptyCircuit):  # the first edges all go into layer 0
        select(graph, flat, edges=5)
    assert all(name.startswith("input->a0") for name in first)
    assert select(graph, flat, edges=graph.n_edges).n_edges == graph.n_edges
    # All into the logits first, then a tie of all others: of these the first few, which are on a path.
    into_logits = torch.zeros(graph.possible.shape)
    into_logits[-1] = 1
    circuit = select(graph, scores_of(graph, into_logits), edges=len(graph.writers) + 5)
    assert {name for name in circuit.edges if not name.endswith("->logits")} == set(first)


@pytest.mark.parametrize("ratio", [0.0, 0.29, 0.75, 1.0])
def test_a_ratio_of_the_edges_are_the_best_helpers(graph: Graph, scores: Scores, ratio: float) -> None:
    scores = scores_of(graph, scores.values + 0.5)  # so that there are 100 helpers
    circuit = select(graph, scores, edges=100, ratio=ratio)
    values = scores.to_dict()
    helpers = sorted((n for n in values if values[n] > 0), key=lambda n: -values[n])[: round(100 * ratio)]
    rest = sorted(set(values) - set(helpers), key=lambda n: -abs(values[n]))
    chosen = graph.mask_of([*helpers, *rest[: 100 - len(helpers)]])
    assert circuit.n_selected == 100 and torch.equal(circuit.kept, on_paths(graph, chosen))
    assert len(helpers) == round(100 * ratio)
    again: dict[str, object] = dict(circuit.selection)
    assert again.pop("ratio") == ratio
    assert torch.equal(select(graph, scores, ratio=ratio, **again).kept, circuit.kept)  # type: ignore[arg-type]
    plain = select(graph, scores, edges=100, by="magnitude" if ratio == 0 else "value")
    assert torch.equal(plain.kept, circuit.kept) == (ratio in (0, 1))


def test_a_ratio_takes_what_helpers_there_are_and_fills_up_by_magnitude(graph: Graph, scores: Scores) -> None:
    harmful = scores_of(graph, -scores.values.abs())
    assert torch.equal(
        select(graph, harmful, edges=100, ratio=1.0).kept, select(graph, harmful, edges=100, by="magnitude").kept
    )


@pytest.mark.parametrize(("share", "part"), [("5%", 0.05), ("0.5 %", 0.005), ("100%", 1.0), ("0.001%", 0.0)])
def test_a_share_of_the_edges_is_recorded_as_their_number(
    graph: Graph, scores: Scores, share: str, part: float
) -> None:
    circuit = select(graph, scores, edges=share, rule="ilp")
    assert circuit.selection["edges"] == unit_count(graph, share) == max(1, int(part * graph.n_edges))
    assert type(circuit.selection["edges"]) is int


def test_scores_are_not_changed(graph: Graph, scores: Scores) -> None:
    before = scores.total.clone()
    circuit = select(graph, scores, edges=40)
    circuit.kept[:] = False
    assert torch.equal(scores.total, before) and bool(graph.possible.any())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either edges"),
        ({"edges": 3, "threshold": 1.0}, "only one"),
        ({"edges": 0}, "whole number"),
        ({"edges": True}, "whole number"),
        ({"edges": 10**6}, "whole number"),
        ({"edges": 3, "by": "size"}, "order 'size'"),
        ({"edges": 3, "rule": "toop"}, "Did you mean 'top'"),
        ({"threshold": float("nan")}, "threshold is a number; got nan"),
        ({"threshold": 1e9}, "lies on a path"),
        ({"threshold": 0.1, "rule": "greedy"}, "takes edges="),
        ({"threshold": 0.1, "rule": "ilp"}, "takes edges="),
        ({"edges": "0%"}, "share above 0"),
        ({"edges": "101%"}, "share above 0"),
        ({"edges": "5"}, "share above 0"),
        ({"edges": "-5%"}, "share above 0"),
        ({"edges": 9, "ratio": 1.1}, "from 0 to 1"),
        ({"edges": 9, "ratio": float("nan")}, "from 0 to 1"),
        ({"edges": 9, "ratio": 0.5, "rule": "ilp"}, "rule='top'"),
        ({"threshold": 0.1, "ratio": 0.5}, "edges= only"),
        ({"edges": 9, "ratio": 0.5, "by": "value"}, "leave by= out"),
    ],
)
def test_nonsense_is_refused(graph: Graph, scores: Scores, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(mi.InputError, match=words):
        select(graph, scores, **arguments)  # type: ignore[arg-type]


def test_scores_of_another_graph_and_scores_that_are_no_numbers_are_refused(graph: Graph) -> None:
    other = build_graph(tiny("attention-only"))
    with pytest.raises(mi.InputError, match="another graph"):
        select(graph, scores_of(other, torch.ones(other.possible.shape)), edges=3)
    with pytest.raises(mi.InputError, match="NaN"):
        scores_of(graph, torch.full(graph.possible.shape, torch.nan))
