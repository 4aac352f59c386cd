"""The measured rows of the discovery methods (`python -m benchmarks.method_rows`) as pictures and tables.

Every number is of IOI in the bundled model: 100 train pairs, 100 held out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from mechinterp.graphs.colours import CHANNEL_COLOURS, CHOSEN_COLOUR, GUIDE_COLOUR, grid, look

ROWS = Path(__file__).parent / "methods" / "rows.jsonl"
BESIDE = ("eap-ig", "random")
"""The methods that every other one stands beside."""
COLOURS = {"eap-ig": CHANNEL_COLOURS["q"], "random": GUIDE_COLOUR}
SIZE = 95
"""A fifth of the edges: the size of which the tables state KL."""
Row = Mapping[str, Any]


@cache
def rows() -> dict[str, Row]:
    """The rows by method."""
    return {row["method"]: row for row in map(json.loads, ROWS.read_text(encoding="utf-8").splitlines())}


def figure(method: str) -> go.Figure:
    """Faithfulness by size with 95 % intervals: the method beside eap-ig and random."""
    drawn = go.Figure()
    for name in dict.fromkeys((*BESIDE, method)):
        row = rows()[name]
        colour = CHOSEN_COLOUR if name == method else COLOURS[name]
        sizes = [one["size"] for one in row["circuits"]]
        low, value, high = ([one[key] for one in row["circuits"]] for key in ("low", "faithfulness", "high"))
        drawn.add_scatter(
            x=[*sizes, *reversed(sizes)],
            y=[*high, *reversed(low)],
            fill="toself",
            fillcolor=colour,
            opacity=0.18,
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
        )
        dash = {"width": 3 if name == method else 1.5, "dash": "dot" if name == "random" else "solid", "color": colour}
        drawn.add_scatter(x=sizes, y=value, name=name, mode="lines+markers", line=dash, marker={"size": 5})
    own = rows()[method].get("own")
    if own:
        mark = {"symbol": "star", "size": 15, "color": CHOSEN_COLOUR, "line": {"color": "white", "width": 1}}
        drawn.add_scatter(
            x=[own["edges"]], y=[own["faithfulness"]], name="its own circuit", mode="markers", marker=mark
        )
    drawn.add_hline(y=1.0, line={"color": GUIDE_COLOUR, "dash": "dash", "width": 1})
    return drawn.update_layout(
        **look(height=360, showlegend=True),
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis={"title": "edges kept, of 479", "type": "log", "tickvals": [5, 10, 20, 50, 100, 200, 479], **grid()},
        yaxis={"title": "faithfulness", "range": [-0.35, 1.5], **grid()},
    )


def table(*methods: str) -> list[tuple[str, ...]]:
    """The rows of some methods as text, under the names of `HEAD`."""
    return [_cells(rows()[name]) for name in methods]


HEAD = ("method", "CPR", "CMD", "80&nbsp;%", "90&nbsp;%", f"KL at {SIZE}", "its own circuit", "runs", "CPU&nbsp;s")


def _cells(row: Row) -> tuple[str, ...]:
    at = next(one for one in row["circuits"] if one["size"] == SIZE)
    runs = f"{row['forwards']:.0f}" + (f"&nbsp;+&nbsp;{row['backwards']:.0f}" if row["backwards"] else "")
    return (
        f"`{row['method']}`",
        f"{row['CPR']:.3f}",
        f"{row['CMD']:.3f}",
        *(_reaches(row, level) for level in (0.8, 0.9)),
        f"{at['kl']:.2f}",
        _own(row.get("own")),
        runs,
        f"{row['seconds']:.1f}",
    )


def _reaches(row: Row, level: float) -> str:
    """The smallest measured size from which on every larger one is at least that faithful."""
    below = [i for i, one in enumerate(row["circuits"]) if one["faithfulness"] < level]
    return str(row["circuits"][below[-1] + 1 if below else 0]["size"])


def _own(own: Row | None) -> str:
    if own is None:
        return ""
    return f"{own['edges']} edges, {own['faithfulness']:.2f} [{own['low']:.2f}, {own['high']:.2f}], KL {own['kl']:.2f}"
