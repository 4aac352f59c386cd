"""Data for the two charts of the page: faithfulness against size, scores by layer and head."""

from __future__ import annotations

from typing import Any

from mechinterp.base.canonical_json import six_digits
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.sites import split_position

MAX_POINTS = 1000


def curve_view(document: CircuitFile) -> dict[str, Any] | None:
    """The points of the curve, the circuit with its interval, and random circuits; None without an evaluation."""
    if not document.evaluation:
        return None
    entry, curve = document.evaluation[0], document.curve
    points = sorted({(p.n_edges, p.faithfulness) for p in curve.points}) if curve else []
    return {
        "points": points[:MAX_POINTS],
        "pairs": curve.pairs if curve else "",
        "n_graph": entry.n_edges_graph,
        "circuit": {
            "n_edges": entry.n_edges,
            "value": entry.faithfulness,
            "ci": entry.faithfulness_ci,
            "level": entry.ci_level,
            "pairs": entry.pairs,
        },
        "random": entry.random_faithfulness[:MAX_POINTS],
    }


def heat_view(circuit: Circuit) -> dict[str, Any] | None:
    """For each layer the name and score of every head and the MLP, in the circuit or not; None without scores.

    Where a layer lacks a head or an MLP that others have, the name is "".
    """
    if circuit.scores is None:
        return None
    graph = circuit.graph
    totals = [six_digits(value) for value in circuit.scores.by_writer().tolist()]
    rows: list[list[tuple[str, float]]] = []
    for layer in range(graph.dims.n_layers):
        rows.append([("", 0.0) if row is None else (graph.writers[row], totals[row]) for row in graph.cells(layer)])
    columns = [str(head) for head in range(graph.dims.n_heads)] + ["MLP"] * graph.dims.has_mlp
    chosen = sorted({split_position(name)[0] for name in circuit.nodes})
    return {"rows": rows, "columns": columns, "chosen": chosen, "metric": circuit.scores.metric}
