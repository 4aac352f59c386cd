"""Figures for a comparison of methods."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.colors import qualitative

from mechinterp.evaluation.comparison import Comparison
from mechinterp.graphs.colours import GUIDE_COLOUR, grid, look

DASHES = ("solid", "dash", "dot")


def comparison_curves(found: Comparison) -> go.Figure:
    """Faithfulness against the number of edges (log axis), one line per method, circuits by magnitude."""
    units = str(found.about["units"])
    figure = go.Figure()
    colours = qualitative.Safe
    for i, (name, result) in enumerate(found.results.items()):
        figure.add_scatter(
            x=[max(1, size) for size in found.sizes],
            y=list(result.by_magnitude),
            name=name,
            mode="lines+markers",
            line={"color": colours[i % len(colours)], "dash": DASHES[i // len(colours) % len(DASHES)]},
            hovertemplate=f"<b>{name}</b><br>%{{x}} {found.about['units']}: %{{y:.3f}}<extra></extra>",
        )
    for level in (0.0, 1.0):
        figure.add_hline(y=level, line={"color": GUIDE_COLOUR, "dash": "dash", "width": 1})
    return figure.update_layout(
        **look(height=460, showlegend=True),
        xaxis={"title": f"{units} kept (of {found.about[units]})", "type": "log", **grid()},
        yaxis={"title": "faithfulness", **grid()},
    )


def overlap_matrix(found: Comparison, edges: int) -> go.Figure:
    """The Jaccard index of the edges that any two methods select first."""
    table = found.overlap(edges)
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=list(table.columns),
            y=list(table.index),
            zmin=0,
            zmax=1,
            colorscale="Blues",
            texttemplate="%{z:.2f}",
            hovertemplate="%{x} and %{y}: %{z:.3f}<extra></extra>",
            colorbar={"title": {"text": "Jaccard", "side": "right"}, "thickness": 12},
        )
    )
    figure.update_layout(**look(height=110 + 34 * len(table), showlegend=False))
    return figure.update_layout(
        title={"text": f"the first {edges} {found.about['units']}", "x": 0.02, "font": {"size": 14}},
        xaxis={"automargin": True},
        yaxis={"autorange": "reversed", "automargin": True},
    )
