"""The sizes on the slider of the page: the points of the file's curve, each with the circuit that was measured.

The circuit of a point is selected again from the scores by the rule in the file. If this gives another number of edges
than the file states, the file is wrong, and the page has no slider.
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
"""Circuits with more edges are not on the slider."""
MAX_STOPS = 100
MAX_SELECTED = 100_000
MAX_ILP_EDGES = 2000
"""On a larger graph, an integer program for every size would take minutes."""


@dataclass(frozen=True, eq=False)
class MeasuredSize:
    """One size: the number selected, the edges on paths, and the stated faithfulness.

    `faithfulness` is None for the circuit itself if it is not a point of the curve.
    """

    n_selected: int
    kept: Bool[Tensor, "reader writer"]
    faithfulness: float | None


def measured_sizes(circuit: Circuit, document: CircuitFile) -> tuple[tuple[MeasuredSize, ...], str]:
    """The sizes from the smallest to the largest, including that of the circuit, and a sentence about them.

    Empty without scores or a curve, or if the rule does not give the circuits of the curve.
    """
    curve, scores = document.curve, circuit.scores
    if scores is None or curve is None or not curve.points:
        missing = "scores" if scores is None else "faithfulness at other sizes"
        return (), f"The file has no {missing}, so there is no slider for the size."
    graph, parameters = circuit.graph, circuit.selection
    rule, ratio = str(parameters.get("rule", "top")), parameters.get("ratio")
    if rule == "ilp" and graph.n_edges > MAX_ILP_EDGES:
        return (), "There is no slider: every size would need its own integer program."
    points = sorted({(p.n_selected, p.n_edges, p.faithfulness) for p in curve.points})
    drawn = [point for point in points if point[1] <= MAX_EDGES and point[0] <= MAX_SELECTED][:MAX_STOPS]
    if not drawn:
        return (), f"There is no slider: all sizes of the curve have more edges than are drawn ({MAX_EDGES:,})."
    found: list[MeasuredSize] = []
    for n_selected, n_edges, faithfulness in drawn:
        how: dict[str, Any] = {"rule": rule, "by": str(parameters.get("by", "magnitude"))}
        try:
            kept = select(
                graph, scores, **sized(graph, n_selected), **how, ratio=None if ratio is None else float(ratio)
            ).kept
        except EmptyCircuit:
            kept = torch.zeros_like(graph.possible)
        except (InputError, ValueError) as error:  # ValueError: a ratio that is not a number
            return (), f"There is no slider: the rule of the file gives no circuit of size {n_selected} ({error})"
        if int(kept.sum()) != n_edges:
            return (), (
                f"There is no slider: the file states {n_edges:,} edges where {n_selected:,} are selected, but its "
                f"rule gives {int(kept.sum()):,} from its scores."
            )
        found.append(MeasuredSize(n_selected, kept, faithfulness))
    left = len(points) - len(drawn)
    more = f" {left} larger sizes are only in the curve, as they have too many edges to be drawn." if left else ""
    if not any(torch.equal(stop.kept, circuit.kept) for stop in found):
        found.append(MeasuredSize(circuit.n_selected, circuit.kept, None))
    found.sort(key=lambda stop: (int(stop.kept.sum()), stop.n_selected))
    about = "Every stop of the slider is a measured size, with the edges that the rule selects for it."
    if "refined" in parameters:
        about += " The circuit itself was refined by exact runs afterwards."
    return tuple(found), about + more
