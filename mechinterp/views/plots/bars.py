"""A bar per entry of a grid with one axis."""

from __future__ import annotations

import html

import plotly.graph_objects as go

from mechinterp.base.errors import InputError
from mechinterp.engines.grid import Grid
from mechinterp.graphs.colours import GUIDE_COLOUR, grid, look
from mechinterp.views.plots.grids import GAIN_COLOUR, LOSS_COLOUR

MOST = 60
"""Bars that are drawn."""


def bars(values: Grid, *, top: int | None = None, title: str = "") -> go.Figure:
    """A bar per entry, the mean over examples with its standard error; blue is positive, red negative.

    Args:
        values: A grid with one axis, and perhaps `example`.
        top: Draw only the entries of the largest magnitude, so many, in order of magnitude; by default all, in their
            order, if they are at most 60, otherwise the first 60 by magnitude.
        title: A title above the figure.

    Raises:
        InputError: For a grid with other axes.
    """
    mean = values.mean() if "example" in values.labels else values
    if len(mean.axes) != 1 or (top is not None and top < 1):
        raise InputError(
            f"Bars are of one axis, at least one of them; got {', '.join(mean.axes)}. Choose with .at(...)."
        )
    axis = mean.axes[0]
    spread = values.sem().values.tolist() if len(values.labels.get("example", ())) > 1 else None
    names = mean.labels[axis]
    order = [i for i, value in enumerate(mean.values.tolist()) if value == value]
    if top is not None or len(order) > MOST:
        order = sorted(order, key=lambda i: -abs(float(mean.values[i])))[: top or MOST]
    heights = [float(mean.values[i]) for i in order]
    figure = go.Figure(
        go.Bar(
            x=[html.escape(names[i]) for i in order],
            y=heights,
            error_y=None if spread is None else {"array": [spread[i] for i in order], "thickness": 1},
            marker={"color": [GAIN_COLOUR if height >= 0 else LOSS_COLOUR for height in heights]},
            hovertemplate="<b>%{x}</b><br>%{y:.4g}<extra></extra>",
        )
    )
    unit = f" ({mean.unit})" if mean.unit else ""
    figure.update_layout(
        **look(height=360, showlegend=False, below=70),
        xaxis={"title": axis, "type": "category", "automargin": True},
        yaxis={"title": html.escape(mean.name + unit), **grid(), "zeroline": True, "zerolinecolor": GUIDE_COLOUR},
    )
    if title:
        figure.update_layout(title={"text": html.escape(title), "x": 0.02, "font": {"size": 14}})
    return figure
