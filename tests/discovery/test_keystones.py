"""Keystones: exact numbers where the estimate has the wrong sign, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

import mechinterp as mi
from mechinterp.discovery.keystones import keystones
from mechinterp.discovery.method import METHODS
from mechinterp.engines.edge_patching import run_edges
from mechinterp.graphs.graph import Graph
from mechinterp.models.hook_manager import HookManager
from tests.support.models_tiny import build, pairs, tiny

WRONG = {"llama": 2, "gemma2": 0}
"""Seeds of random models in which `eap` gives the edge from the input to the first MLP the wrong sign."""
METHODS_WITH_THEM = ("eap", "eap-ig", "clean-corrupted", "eap-gp", "relp", "cd-edges", "gim")


def drop_of(model: HookManager, graph: Graph, examples: mi.Pairs, edge: str) -> float:
    """What the metric falls by when this edge alone is cut, by a plain patched run."""
    cut = torch.zeros_like(graph.possible)
    reader, writer = graph.edge_index(edge)
    cut[reader, writer] = True
    whole, without = (run_edges(model, graph, examples, mask, metric="logit_diff") for mask in (cut & False, cut))
    return float((whole - without).double().mean())


@pytest.mark.parametrize("name", WRONG)
def test_a_keystone_with_the_wrong_sign_is_repaired(name: str) -> None:
    model, examples = build(name, seed=WRONG[name]), pairs(4, 5)
    graph = mi.build_graph(model)
    guessed = mi.score_edges(model, graph, examples, method="eap")
    repaired = mi.score_edges(model, graph, examples, method="eap", keystones=True, batch_size=3)
    first = [edge for edge in graph.edge_names() if edge.startswith(("input->a0.", "input->m0"))]
    assert len(first) == len(keystones(graph)) == 9  # four queries, two keys, two values, the MLP
    for edge in first[::4]:
        measured = drop_of(model, graph, examples, edge)
        assert repaired.values[graph.edge_index(edge)].item() == pytest.approx(measured, rel=1e-5, abs=1e-7)
    rest = graph.possible.clone()
    for edge in first:
        rest[graph.edge_index(edge)] = False
    torch.testing.assert_close(repaired.values[rest], guessed.values[rest], rtol=1e-5, atol=1e-7)  # other batches

    keystone = graph.edge_index("input->m0")
    assert guessed.values[keystone] < 0 < repaired.values[keystone]
    chosen = [mi.select(graph, scores, edges=60, by="value") for scores in (guessed, repaired)]
    assert ["input->m0" in circuit.edges for circuit in chosen] == [False, True]
    assert repaired.cost["forwards"] == guessed.cost["forwards"] + 4 * (1 + 9)


@pytest.mark.slow
def test_every_estimate_takes_the_same_exact_numbers() -> None:
    model, examples = tiny("gpt2"), pairs(3, 5, padded=True)
    graph = mi.build_graph(model)
    units = torch.isin(graph.unit, torch.tensor(keystones(graph))) & graph.possible
    exact = mi.score_edges(model, graph, examples, method="exact").values[units]
    for method in METHODS_WITH_THEM:
        found = mi.score_edges(model, graph, examples, method=method, keystones=True)
        torch.testing.assert_close(found.values[units], exact, rtol=1e-6, atol=1e-9)
    known = {name for name, method in METHODS.importable().items() if "keystones" in method.settings}
    assert known == set(METHODS_WITH_THEM)


def test_scores_with_keystones_add_up_and_nodes_have_none() -> None:
    model, examples = tiny("gpt2"), pairs(4, 5, positions={"a": [1, 2, 1, 2], "end": [4, 4, 4, 4]})
    graph = mi.build_graph(model, positions=("a", "end"))
    whole, *parts = (
        mi.score_edges(model, graph, some, method="eap", keystones=True)
        for some in (examples, examples[:1], examples[1:])
    )
    torch.testing.assert_close((parts[0] + parts[1]).values, whole.values, rtol=1e-5, atol=1e-7)
    with pytest.raises(mi.InputError, match="Keystones are edges"):
        nodes = mi.build_graph(model, level="node")
        mi.score_edges(model, nodes, examples, method="eap", keystones=True)
