"""Circuits as sets of edges: made by name, combined and asked, always on paths from the input to the logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.graphs.circuit import Circuit, on_paths
from tests.support.models_tiny import pairs, tiny

GRAPH = mi.build_graph(tiny("gpt2"))
NODES = mi.build_graph(tiny("gpt2"), level="node")
A = Circuit.from_edges(GRAPH, ["input->L0H1<v>", "a0.h1->logits", "input->m1", "m1->logits"])
B = Circuit.from_edges(GRAPH, ["input->0.1<v>", "a0.h1->a1.h0<q>", "a1.h0->logits"])


def test_edges_are_kept_if_they_are_on_a_path() -> None:
    assert A.edges == ("a0.h1->logits", "input->a0.h1<v>", "input->m1", "m1->logits")
    stray = Circuit.from_edges(GRAPH, ["input->m0", "m1->logits", "input->m1"])
    assert stray.edges == ("input->m1", "m1->logits") and stray.n_selected == 3
    whole = Circuit.from_edges(GRAPH, GRAPH.edge_names())
    assert torch.equal(whole.kept, GRAPH.possible) and len(whole) == GRAPH.n_edges


def test_set_operations_are_those_of_the_edges() -> None:
    a, b = set(A.edges), set(B.edges)
    assert set((A | B).edges) == a | b
    assert (A & B).edges == () and (A & B).n_selected == 1 and bool(A & B)  # input->a0.h1<v> leads nowhere by itself
    assert set((A - B).edges) == {"input->m1", "m1->logits"} and (A - B).n_selected == len(a - b) == 3
    every = Circuit.from_edges(GRAPH, GRAPH.edge_names())
    for one in (A | B, A & B, A - B, every - A, every & B):
        assert torch.equal(one.kept, on_paths(GRAPH, one.kept))
    assert (A | A).digest() == A.digest() == (every & A).digest()


def test_what_is_in_a_circuit_is_asked_by_any_name() -> None:
    for name in ("a0.h1", "L0H1", "0.1", "input", "logits", "m1", "input->L0H1<v>", "a0.h1->logits"):
        assert name in A
    assert "a0.h2" not in A and "m1->logits" not in B
    for wrong in ("a7.h0", "m9", "attention", "a0.h1->input", "a0.h1->a9.h0<q>"):
        with pytest.raises(InputError):
            _ = wrong in A


def test_nodes_bring_all_edges_between_them() -> None:
    circuit = Circuit.from_nodes(GRAPH, ["L0H1", "a1.h0"])
    between = {name for name in GRAPH.edge_names() if set(_ends(name)) <= {"input", "a0.h1", "a1.h0", "logits"}}
    assert set(circuit.edges) == between and circuit.nodes == ("input", "a0.h1", "a1.h0", "logits")
    chosen = Circuit.from_nodes(NODES, ["L0H1", "a1.h0"])
    assert chosen.nodes == circuit.nodes and chosen.n_units == 3 and set(chosen.edges) == between
    both = chosen | Circuit.from_nodes(NODES, ["m2"])
    assert torch.equal(both.kept, on_paths(NODES, both.members)) and "m2" in both
    assert (both - chosen).nodes == ("input", "m2", "logits")
    placed = mi.build_graph(tiny("gpt2"), level="node", positions=["end"], answers="end")
    assert "a0.h1@end" in Circuit.from_nodes(placed, ["L0H1@end"]) and "a0.h1" in Circuit.from_nodes(
        placed, ["0.1@end"]
    )


def _ends(name: str) -> tuple[str, str]:
    writer, _, reader = name.partition("->")
    return writer, reader.partition("<")[0]


def test_what_cannot_be_made_is_said() -> None:
    with pytest.raises(InputError, match="named twice"):
        Circuit.from_edges(GRAPH, ["m1->logits", "m1->logits"])
    with pytest.raises(InputError, match=r"use Circuit\.from_nodes"):
        Circuit.from_edges(NODES, ["m1->logits"])
    with pytest.raises(InputError, match=r"Unknown node 'a0\.h9'"):
        Circuit.from_nodes(GRAPH, ["L0H9"])
    with pytest.raises(InputError, match=r"Unknown node 'a0\.h9'"):
        Circuit.from_nodes(NODES, ["L0H9"])
    with pytest.raises(InputError, match="two graphs"):
        _ = A | Circuit.from_nodes(NODES, ["m1"])
    placed = mi.build_graph(tiny("gpt2"), positions=["end"], answers="end")
    with pytest.raises(InputError, match="edges at named positions"):
        Circuit.from_nodes(placed, ["m1"])


def test_a_circuit_by_hand_is_evaluated_saved_and_drawn(tmp_path: Path) -> None:
    model = tiny("gpt2")
    result = mi.evaluate(model, A | B, pairs())
    mi.save_circuit(tmp_path / "hand.circuit.json", A | B, model=model, result=result)
    assert mi.load_circuit(tmp_path / "hand.circuit.json").edges == (A | B).edges
    assert repr(A) == f"Circuit(4 of {GRAPH.n_edges} edges, 4 selected (rule=edges))"
    assert "<td>4 of" in A._repr_html_() and "a0.h1" in A._repr_html_()
    assert A.plot().data
