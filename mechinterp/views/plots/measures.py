"""Figures of measurements: scores by layer and head, faithfulness against size."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from mechinterp.base.errors import InputError
from mechinterp.circuit_file.schema import EvaluationRecord
from mechinterp.evaluation.faithfulness import Evaluation
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.colours import CHANNEL_COLOURS, CHOSEN_COLOUR, GUIDE_COLOUR, grid, look
from mechinterp.graphs.scores import Scores
from mechinterp.models.sites import split_position

MAX_CELLS_WITH_NUMBERS = 80


def head_heatmap(scores: Scores, circuit: Circuit | None = None) -> go.Figure:
    """A heatmap, layer x head with a column for the MLPs, of the scores of nodes: sums over the edges that leave them.

    Blue helps the task, red works against it, white is 0. All edges of the graph count, so that the figure also shows
    what the circuit leaves out.

    Args:
        scores: the scores of all edges.
        circuit: its nodes are marked with a dot.
    """
    graph = scores.graph
    dims = graph.dims
    totals = scores.by_writer().tolist()
    columns = [str(head) for head in range(dims.n_heads)] + (["MLP"] if dims.has_mlp else [])
    values: list[list[float]] = []
    names: list[list[str]] = []
    for layer in range(dims.n_layers):
        cells = graph.cells(layer)
        values.append([math.nan if row is None else totals[row] for row in cells])
        names.append(["" if row is None else graph.writers[row] for row in cells])
    largest = max((abs(value) for row in values for value in row if not math.isnan(value)), default=0.0) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values,
            customdata=names,
            colorscale="RdBu",
            zmin=-largest,
            zmax=largest,
            zmid=0,
            xgap=1,
            ygap=1,
            texttemplate="%{z:.2f}" if len(columns) * dims.n_layers <= MAX_CELLS_WITH_NUMBERS else None,
            hovertemplate="<b>%{customdata}</b><br>sum of its outgoing edges' scores %{z:.4g}<extra></extra>",
            colorbar={"title": {"text": f"score ({html.escape(scores.metric)})", "side": "right"}, "thickness": 12},
        )
    )
    if circuit is not None:
        figure.add_trace(_corner_dots(names, {split_position(name)[0] for name in circuit.nodes}))
    pixels = min(46, max(18, 560 // max(1, dims.n_layers)))
    return figure.update_layout(
        **look(height=100 + pixels * dims.n_layers, showlegend=False),
        xaxis={"title": {"text": "head", "standoff": 8}, **_named_ticks(columns)},
        yaxis={"title": "layer", **_named_ticks([str(layer) for layer in range(dims.n_layers)])},
    )


def faithfulness_figure(
    sizes: Sequence[int],
    values: Sequence[float],
    evaluation: Evaluation | EvaluationRecord,
    *,
    curve_label: str = "",
    label: str = "",
) -> go.Figure:
    """Faithfulness against the number of edges (log axis), with the chosen circuit and random ones of its size.

    1 is the full model, 0 the model with every edge replaced. The circuit is drawn with its bootstrap interval.

    Args:
        sizes: the numbers of edges of the curve.
        values: the faithfulness at each size.
        evaluation: the evaluation of the chosen circuit.
        curve_label: the examples that the curve was measured on.
        label: the examples that the circuit was evaluated on.

    Raises:
        InputError: if `sizes` and `values` differ in length.
    """
    if len(sizes) != len(values):
        raise InputError(f"The curve has {len(sizes)} sizes and {len(values)} values; give as many of both.")
    figure = go.Figure()
    # Each label is far from the curve, which rises from 0 on the left to 1 on the right.
    for height, text, side in ((1.0, "full model", 0), (0.0, "every edge replaced", 1)):
        figure.add_hline(y=height, line={"dash": "dot", "width": 1, "color": GUIDE_COLOUR})
        figure.add_annotation(
            x=side,
            xref="paper",
            y=height,
            text=text,
            showarrow=False,
            xanchor="right" if side else "left",
            yanchor="bottom",
            font={"size": 11},
        )
    curve = sorted(
        (size, value) for size, value in zip(sizes, values, strict=True) if size > 0
    )  # the axis is logarithmic
    if curve:
        figure.add_trace(
            go.Scatter(
                x=[size for size, _ in curve],
                y=[value for _, value in curve],
                mode="lines+markers",
                name="best edges by score" + _on(curve_label),
                line={"color": CHANNEL_COLOURS["q"], "width": 2},
                marker={"size": 5},
                hovertemplate="%{x} edges<br>faithfulness %{y:.3f}<extra></extra>",
            )
        )
    if evaluation.random_faithfulness:
        figure.add_trace(
            go.Scatter(
                x=[evaluation.n_edges] * len(evaluation.random_faithfulness),
                y=list(evaluation.random_faithfulness),
                mode="markers",
                name=f"{len(evaluation.random_faithfulness)} random circuits of this size" + _on(label),
                marker={"symbol": "x-thin", "size": 9, "line": {"width": 1.5, "color": GUIDE_COLOUR}},
                hovertemplate="random, %{x} edges<br>faithfulness %{y:.3f}<extra></extra>",
            )
        )
    low, high = evaluation.faithfulness_ci
    figure.add_trace(
        go.Scatter(
            x=[evaluation.n_edges],
            y=[evaluation.faithfulness],
            error_y={
                "array": [max(0.0, high - evaluation.faithfulness)],
                "arrayminus": [max(0.0, evaluation.faithfulness - low)],
                "symmetric": False,
                "thickness": 1.5,
                "width": 5,
            },
            mode="markers",
            name=f"this circuit, {evaluation.ci_level:.0%} interval" + _on(label),
            marker={"symbol": "diamond", "size": 11, "color": CHOSEN_COLOUR},
            hovertemplate="this circuit, %{x} edges<br>faithfulness %{y:.3f}<extra></extra>",
        )
    )
    ticks = [first * 10**power for power in range(12) for first in (1, 3)]
    return figure.update_layout(
        **look(height=460, showlegend=True, below=130),
        legend={"orientation": "v", "yref": "container", "yanchor": "bottom", "y": 0, "xanchor": "left", "x": 0},
        xaxis={
            "title": f"edges kept (of {evaluation.n_edges_graph:,})",
            "type": "log",
            "tickangle": 0,
            "tickvals": ticks,
            "ticktext": [f"{tick:,}" for tick in ticks],
            **grid(),
        },
        yaxis={"title": "faithfulness", **grid()},
    )


def _on(label: str) -> str:
    return f" ({html.escape(label)} examples)" if label else ""


def _corner_dots(names: Sequence[Sequence[str]], kept: set[str]) -> go.Scatter:
    """A dot in the upper right corner of the cells whose node is kept."""
    cells = [(x, y) for y, row in enumerate(names) for x, name in enumerate(row) if name in kept]
    return go.Scatter(
        x=[x + 0.36 for x, _ in cells],
        y=[y + 0.32 for _, y in cells],
        mode="markers",
        marker={"size": 6, "color": "#111111", "line": {"width": 1, "color": "#ffffff"}},
        hoverinfo="skip",
    )


def _named_ticks(names: Sequence[str]) -> dict[str, Any]:
    ticks = {"tickvals": list(range(len(names))), "ticktext": list(names)}
    return {**ticks, "range": [-0.5, len(names) - 0.5], "showgrid": False, "zeroline": False}
