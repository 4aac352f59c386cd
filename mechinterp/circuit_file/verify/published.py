"""What `verify` asks of a published circuit, whose edges no scores give again."""

from __future__ import annotations

import torch

from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.circuit_file.verify.claims import Ledger
from mechinterp.graphs.circuit import Circuit, on_paths


def check_published(circuit: Circuit, document: CircuitFile, ledger: Ledger) -> None:
    """Record that every edge is on a path and, where nodes were chosen, that no such edge out of one is missing."""
    graph, kept = circuit.graph, circuit.kept
    chosen = kept
    if graph.level == "node":
        chosen = graph.possible & torch.isin(graph.unit, graph.unit[kept].unique())
    differ = (on_paths(graph, chosen) != kept).nonzero().tolist()
    names = sorted(graph.edge_name(r, w) for r, w in differ)
    ledger.equal("paths", f"{len(names)} edges differ", "0 edges differ", f"first {names[0]}" if names else "")
    if graph.level == "edge":
        ledger.equal("selection.n_selected", document.selection.n_selected, int(chosen.sum()))
