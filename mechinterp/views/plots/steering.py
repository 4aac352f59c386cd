"""The figure of a steering sweep: effect against damage."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.colors import qualitative

from mechinterp.engines.grid import Grid
from mechinterp.graphs.colours import GUIDE_COLOUR, grid, look


def steering_curve(found: Grid) -> go.Figure:
    """The change of the target against the KL divergence on neutral text, one line per edit, a point per strength.

    A direction that steers has a line above those of the random ones: more effect for the same damage.

    Args:
        found: The Grid of `steering_sweep`.
    """
    figure = go.Figure()
    for i, edit in enumerate(found.labels["edit"]):
        own = found.at(edit=edit)
        control = edit != "direction"
        figure.add_scatter(
            x=own.at(measure="kl").values.tolist(),
            y=own.at(measure="change").values.tolist(),
            text=list(found.labels["strength"]),
            name=edit,
            mode="lines+markers",
            line={"color": qualitative.Safe[i % len(qualitative.Safe)], "dash": "dot" if control else "solid"},
            opacity=0.6 if control else 1.0,
            hovertemplate=f"<b>{edit}</b>, strength %{{text}}<br>KL %{{x:.4g}}<br>change %{{y:.4g}}<extra></extra>",
        )
    figure.add_hline(y=0.0, line={"color": GUIDE_COLOUR, "dash": "dash", "width": 1})
    return figure.update_layout(
        **look(height=420, showlegend=True),
        xaxis={"title": "KL divergence on neutral text [nats per token]", **grid()},
        yaxis={"title": f"change of {found.about['metric']}", **grid()},
    )
