"""The sizes that the page's slider stops at: the points of the file's curve, each with the circuit it was measured on.

A point's circuit is made again from the scores by the file's own rule; a point where that is another circuit than the
file states is an error of the file, and then there is no slider.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.select import EmptyCircuit, select, sized

MAX_EDGES = 2000
"""A circuit of more edges is not drawn for the slider."""
MAX_STOPS = 100
MAX_SELECTED = 100_000
MAX_ILP_EDGES = 2000
"""On a larger graph an integer program for every size would take minutes."""


@dataclass(frozen=True, eq=False)
class MeasuredSize:
    """One size: what the rule selected, the edges on paths, and the faithfulness that the file states for it.

    `faithfulness` is None for the circuit itself when no point of the curve is it.
    """

    n_selected: int
    kept: Bool[Tensor, "reader writer"]
    faithfulness: float | None


def measured_sizes(circuit: Circuit, document: CircuitFile) -> tuple[tuple[MeasuredSize, ...], str]:
    """The stops from the smallest to the largest, the circuit among them, and what the page says about them.

    Without scores or a curve, or where the curve is not of the circuits that the rule gives, there are none.
    """
    curve, scores = document.curve, circuit.scores
    if scores is None or curve is None or not curve.points:
        missing = "scores" if scores is None else "faithfulness at other sizes"
        return (), f"The file has no {missing}, so there is no slider for the size."
    graph, parameters = circuit.graph, circuit.selection
    rule, ratio = str(parameters.get("rule", "top")), parameters.get("ratio")
    if rule == "ilp" and graph.n_edges > MAX_ILP_EDGES:
        return (), "There is no slider: each size would be an integer program of its own."
    points = sorted({(p.n_selected, p.n_edges, p.faithfulness) for p in curve.points})
    drawn = [point for point in points if point[1] <= MAX_EDGES and point[0] <= MAX_SELECTED][:MAX_STOPS]
    if not drawn:
        return (), f"There is no slider: all sizes of the curve have more edges than can be drawn ({MAX_EDGES:,})."
    found: list[MeasuredSize] = []
    for n_selected, n_edges, faithfulness in drawn:
        how: dict[str, Any] = {"rule": rule, "by": str(parameters.get("by", "magnitude"))}
        try:
            kept = select(
                graph, scores, **sized(graph, n_selected), **how, ratio=None if ratio is None else float(ratio)
            ).kept
        except EmptyCircuit:
            kept = torch.zeros_like(graph.possible)
        except (InputError, ValueError) as error:  # ValueError: a ratio that is no number
            return (), f"There is no slider: the rule of the file gives no circuit of size {n_selected} ({error})"
        if int(kept.sum()) != n_edges:
            return (), (
                f"There is no slider: the file states {n_edges:,} edges where {n_selected:,} are selected, but its "
                f"rule gives {int(kept.sum()):,} from its scores."
            )
        found.append(MeasuredSize(n_selected, kept, faithfulness))
    left = len(points) - len(drawn)
    more = f" {left} larger sizes are in the curve only: too many edges to be drawn." if left else ""
    if not any(torch.equal(stop.kept, circuit.kept) for stop in found):
        found.append(MeasuredSize(circuit.n_selected, circuit.kept, None))
    found.sort(key=lambda stop: (int(stop.kept.sum()), stop.n_selected))
    about = "Every stop of the slider is a size that was measured, with the edges that the rule selects there."
    return tuple(found), about + more
