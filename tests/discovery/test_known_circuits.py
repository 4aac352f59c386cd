"""Models whose circuit is known: it must be found exactly, under the ablation that defines it."""

from __future__ import annotations

import pytest
import torch

from mechinterp.discovery.method import score_edges
from mechinterp.engines.edge_patching import run_edges
from mechinterp.graphs.graph import build_graph
from mechinterp.graphs.select import select
from mechinterp.tasks.metrics import get_metric
from tests.support.known_circuits import MORE, NAMES, known

EFFECT = 1e-3
"""The truth's own threshold: an edge counts when it moves an output by more."""
FIRST_ORDER_SUFFICES = (
    "detect_pattern_abc",
    "frac_prevs_causal",
    "pair_balance",
    "reverse_published",
    "shift_by_1",
    "xproportion_published",
)
"""The other two (hist, sort) compare counts by steps of a ReLU, whose slope where it is flat is 0."""


def found(name: str, method: str, replacement: str, **parameters: object) -> tuple[set[str], set[str], set[str]]:
    """Edges that matter, by our method; the truth under resampling; the truth under zero."""
    this = known(name)
    graph = build_graph(this.model, split_input=True)
    scores = score_edges(
        this.model,
        graph,
        this.pairs,
        method=method,
        metric="l2_to_clean",
        batch_size=64,
        replacement=replacement,
        **parameters,
    )
    edges = {edge for edge, score in scores.to_dict().items() if score > EFFECT}
    return edges, this.truth("derived_resample"), this.truth("derived_zero")


def test_there_are_eight() -> None:
    assert len(NAMES) == 8


@pytest.mark.parametrize("name", NAMES)
def test_the_models_compute_what_they_were_compiled_to(name: str) -> None:
    this = known(name)
    logits = this.model.run(this.pairs.clean).logits
    torch.testing.assert_close(logits[:, 1:], this.clean_logits[:, 1:], rtol=0, atol=5e-6)  # float32


@pytest.mark.parametrize("name", NAMES)
def test_exact_finds_the_circuit_under_resampling(name: str) -> None:
    edges, resample, _ = found(name, "exact", "corrupt")
    assert edges == resample


@pytest.mark.parametrize("name", NAMES)
def test_exact_finds_the_circuit_under_zero(name: str) -> None:
    edges, resample, zero = found(name, "exact", "zero")
    assert edges == zero
    assert edges != resample  # a method is to be held against the truth of its own ablation, not the other


def test_there_are_39_further_programs() -> None:
    assert len(MORE) == 39 and not set(MORE) & set(NAMES)


@pytest.mark.parametrize("name", ["hist_of_hist", "shift_by_3_causal", "sort_unique"])
def test_further_programs_have_the_circuits_that_were_derived_without_this_package(name: str) -> None:
    """The truths of all: `python -m benchmarks.ground_truth --more exact`."""
    edges, resample, _ = found(name, "exact", "corrupt")
    assert edges == resample
    edges, _, zero = found(name, "exact", "zero")
    assert edges == zero != resample
    this = known(name)
    torch.testing.assert_close(
        this.model.run(this.pairs.clean).logits[:, 1:], this.clean_logits[:, 1:], rtol=0, atol=5e-6
    )  # float32
    graph = build_graph(this.model, split_input=True)
    nothing = run_edges(this.model, graph, this.pairs, graph.possible, metric="l2_to_clean")
    assert float(nothing.mean()) > EFFECT  # otherwise an empty circuit would do


@pytest.mark.parametrize("name", FIRST_ORDER_SUFFICES)
def test_integrated_gradients_find_the_circuit_under_resampling(name: str) -> None:
    edges, resample, _ = found(name, "eap-ig", "corrupt", steps=10)
    assert edges == resample


@pytest.mark.parametrize("name", NAMES)
def test_the_known_circuit_alone_does_all_and_less_does_not(name: str) -> None:
    this = known(name)
    graph = build_graph(this.model, split_input=True)
    metric = get_metric("l2_to_clean")
    truth = graph.mask_of(sorted(this.truth("derived_resample")))
    without = [truth & ~graph.mask_of([edge]) for edge in sorted(this.truth("derived_resample"))]
    cuts = torch.stack([graph.possible & ~kept for kept in [truth, *without]])
    distance = run_edges(this.model, graph, this.pairs, cuts, metric=metric).mean(1)
    assert float(distance[0]) < 1e-5  # float32
    assert float(distance[1:].min()) > EFFECT


def test_selection_of_as_many_edges_as_the_truth_has_is_the_truth() -> None:
    this = known("pair_balance")
    graph = build_graph(this.model, split_input=True)
    scores = score_edges(this.model, graph, this.pairs, method="exact", metric="l2_to_clean", batch_size=64)
    truth = this.truth("derived_resample")
    assert set(select(graph, scores, edges=len(truth)).edges) == truth
    assert set(select(graph, scores, threshold=EFFECT).edges) == truth
