"""Figures for the results of analyses: heatmaps of grids, the logit lens, attention patterns, parts of a logit."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechinterp.analysis.logit_lens import LogitLens
from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.engines.grid import Grid
from mechinterp.graphs.colours import GUIDE_COLOUR, look
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.pairs import Pairs

MAX_CELLS_WITH_NUMBERS = 200
MAX_LETTERS = 14
CELL_LETTERS = 120
"""How many letters fit side by side into a figure."""
GAIN_COLOUR, LOSS_COLOUR = "#2166ac", "#b2182b"
"""The ends of RdBu: blue = positive = helps, red = negative."""


def token_labels(model: HookManager, pairs: Pairs, row: int = 0, prompt: str = "clean") -> tuple[str, ...]:
    """The tokens of one prompt with their positions (`3 Mary`), one label per position, as plain text.

    Positions beyond the end of this prompt are labelled by their number.

    Args:
        model: the model with its tokenizer.
        pairs: the examples.
        row: which example.
        prompt: "clean" or "corrupt".

    Raises:
        InputError: if the model has no tokenizer, or for another row or prompt.
    """
    if model.tokenizer is None:
        raise InputError("The model has no tokenizer to write tokens with; give labels of your own as `tokens`.")
    if not 0 <= row < len(pairs) or prompt not in ("clean", "corrupt"):
        raise InputError(
            f"`row` is from 0 to {len(pairs) - 1} and `prompt` 'clean' or 'corrupt'; got {row}, {prompt!r}."
        )
    ids = (pairs.clean if prompt == "clean" else pairs.corrupt)[row].tolist()
    length = int(pairs.lengths[row])
    texts = [_short(model.tokenizer.decode([token]).strip() or repr(model.tokenizer.decode([token]))) for token in ids]
    return tuple(f"{i} {text}" if i < length else str(i) for i, text in enumerate(texts))


def heatmap(
    grid: Grid,
    x: str | None = None,
    y: str | None = None,
    *,
    tokens: Sequence[str] | None = None,
    title: str = "",
) -> go.Figure:
    """A heatmap of two axes of a grid, the mean over examples; blue is positive, red negative, white 0, empty missing.

    Args:
        grid: the result of an analysis; select from further axes with `.at(...)` unless they have one entry.
        x: the horizontal axis. None: the last axis.
        y: the vertical axis. None: the remaining axis.
        tokens: labels for the axis `pos`, from `token_labels`.
        title: a title above the figure.

    Raises:
        InputError: for an unknown axis, a grid with more than two axes, or labels that do not fit.
    """
    mean = grid.mean("example") if "example" in grid.labels else grid
    for axis, labels in list(mean.labels.items()):
        if len(labels) == 1 and len(mean.labels) > 2 and axis not in (x, y):
            mean = mean.at(**{axis: labels[0]})
    for axis in (x, y):
        if axis is not None and axis not in mean.labels:
            raise unknown("axis", axis, mean.labels)
    if len(mean.labels) != 2:
        rest = ", ".join(f"{axis} ({len(labels)})" for axis, labels in mean.labels.items())
        raise InputError(
            f"A heatmap has two axes; this grid has {rest}. Choose with .at(...), as in grid.at(pos='end')."
        )
    names = list(mean.labels)
    x = x or next(axis for axis in reversed(names) if axis != y)
    y = next(axis for axis in names if axis != x)
    values = mean.values if names[0] == y else mean.values.T
    across, down = (_labels(mean, axis, tokens) for axis in (x, y))
    numbers = values.detach().float().cpu().tolist()
    largest = max((abs(v) for row in numbers for v in row if v == v), default=0.0) or 1.0
    cells = len(across) * len(down)
    unit = f" ({mean.unit})" if mean.unit else ""
    figure = go.Figure(
        go.Heatmap(
            z=[[None if v != v else v for v in row] for row in numbers],
            x=list(range(len(across))),
            y=list(range(len(down))),
            customdata=[[f"{y} {down[j]}, {x} {across[i]}" for i in range(len(across))] for j in range(len(down))],
            colorscale="RdBu",
            zmin=-largest,
            zmax=largest,
            zmid=0,
            xgap=1,
            ygap=1,
            texttemplate="%{z:.2f}" if cells <= MAX_CELLS_WITH_NUMBERS and len(across) <= 16 else None,
            hovertemplate=f"<b>%{{customdata}}</b><br>{html.escape(mean.name)} %{{z:.4g}}<extra></extra>",
            hoverongaps=False,
            colorbar={"title": {"text": html.escape(mean.name + unit), "side": "right"}, "thickness": 12},
        )
    )
    longest = max(map(len, across))
    slanted = longest > 4
    height = 110 + min(46, max(20, 620 // len(down))) * len(down) + (5 * longest if slanted else 0)
    figure.update_layout(
        **look(height=height, showlegend=False, below=50 + (5 * longest if slanted else 0)),
        xaxis={"title": {"text": x, "standoff": 10}, **_ticks(across, -90 if slanted else 0)},
        yaxis={"title": y, "automargin": True, **_ticks(down)},
    )
    figure.update_layout(plot_bgcolor="rgba(128,128,128,0.18)")  # what stands where there is nothing
    # Layers grow upwards, as in the papers; anything else reads from the top.
    figure.update_yaxes(range=[-0.5, len(down) - 0.5] if y in ("layer", "site") else [len(down) - 0.5, -0.5])
    if title:
        figure.update_layout(title={"text": html.escape(title), "x": 0.02, "font": {"size": 14}})
    return figure


def lens_figure(
    lens: LogitLens,
    model: HookManager,
    *,
    example: int = 0,
    tokens: Sequence[str] | None = None,
    colour: str = "probability",
) -> go.Figure:
    """The most probable token at every site and position of one example, coloured by `probability`, `kl` or `entropy`.

    Args:
        lens: the result of `logit_lens`.
        model: the model, whose tokenizer writes the tokens.
        example: which example.
        tokens: labels for the positions, from `token_labels`.
        colour: "probability" (of the token; dark is probable), "kl" (to the output of the model) or "entropy".

    Raises:
        InputError: for another colour.
    """
    choices = {"probability": lens.probabilities, "kl": lens.kl, "entropy": lens.entropy}
    if colour not in choices:
        raise unknown("colour", colour, choices)
    grid = choices[colour].at(example=example)
    grid = grid.at(rank=0) if "rank" in grid.labels else grid
    there = grid.values.isfinite().any(0)  # the positions that this example has
    sites = grid.labels["site"]
    across = [label for label, own in zip(_labels(grid, "pos", tokens), there.tolist(), strict=True) if own]
    ids = lens.top_tokens[:, there, list(lens.kl.labels["example"]).index(str(example)), 0].tolist()
    decode = str if model.tokenizer is None else lambda token: model.tokenizer.decode([token])
    words = [["" if token < 0 else decode(token).strip() or "␣" for token in row] for row in ids]
    # As much as fits into a cell; hovering shows more of the token.
    letters = max(4, min(MAX_LETTERS, CELL_LETTERS // max(1, len(across))))
    texts = [[html.escape(_short(word, letters)) for word in row] for row in words]
    values = grid.values[:, there].detach().float().cpu().tolist()
    figure = go.Figure(
        go.Heatmap(
            z=[[None if v != v else v for v in row] for row in values],
            x=list(range(len(across))),
            y=list(range(len(sites))),
            text=texts,
            texttemplate="%{text}",
            textfont={"size": 11 if len(across) <= 12 else 10},
            customdata=[
                [f"<b>{site}, {pos}</b><br>{html.escape(_short(word))}" for pos, word in zip(across, row, strict=True)]
                for site, row in zip(sites, words, strict=True)
            ],
            colorscale=[[0, "#f7fbff"], [1, "#3182bd"]],
            zmin=0,
            zmax=1 if colour == "probability" else None,
            xgap=1,
            ygap=1,
            hovertemplate=f"%{{customdata}}<br>{colour} %{{z:.4g}}<extra></extra>",
            hoverongaps=False,
            colorbar={
                "title": {"text": colour + (" (nats)" if colour != "probability" else ""), "side": "right"},
                "thickness": 12,
            },
        )
    )
    longest = max(map(len, across))
    return figure.update_layout(
        **look(height=120 + 26 * len(sites) + 5 * longest, showlegend=False, below=60 + 5 * longest),
        xaxis={"title": {"text": "position", "standoff": 10}, **_ticks(across, -90 if longest > 4 else 0)},
        yaxis={"automargin": True, **_ticks(sites), "range": [-0.5, len(sites) - 0.5]},
    )


def attention_figure(
    patterns: Sequence[Any], names: Sequence[str], tokens: Sequence[str], *, columns: int = 4
) -> go.Figure:
    """Attention patterns of several heads on one prompt, side by side; dark is 1, hovering shows the tokens.

    Args:
        patterns: one pattern `[query, key]` per head.
        names: one name per pattern.
        tokens: one label per position, from `token_labels`.
        columns: how many patterns are in one row.

    Raises:
        InputError: if patterns, names and tokens do not fit each other.
    """
    if not len(names) or len(patterns) != len(names):
        raise InputError(f"There are {len(patterns)} patterns and {len(names)} names; give one name per pattern.")
    values = [
        pattern.tolist() if hasattr(pattern, "tolist") else [list(row) for row in pattern] for pattern in patterns
    ]
    n = len(tokens)
    if any(len(value) != n or any(len(row) != n for row in value) for value in values):
        raise InputError(f"Every pattern must be [{n}, {n}], as there are {n} tokens.")
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    safe = [html.escape(token) for token in tokens]
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[html.escape(name) for name in names],
        horizontal_spacing=0.03,
        vertical_spacing=0.11 / rows,
        shared_yaxes="all",  # pyright: ignore[reportArgumentType]
        shared_xaxes="all",  # pyright: ignore[reportArgumentType]
    )
    for i, value in enumerate(values):
        hover = [[f"{safe[q]} attends to {safe[k]}" for k in range(n)] for q in range(n)]
        trace = go.Heatmap(
            z=value,
            customdata=hover,
            zmin=0,
            zmax=1,
            colorscale=[[0, "#ffffff"], [1, "#08519c"]],
            hovertemplate="%{customdata}<br>%{z:.3f}<extra></extra>",
            showscale=i == 0,
            colorbar={"title": {"text": "attention", "side": "right"}, "thickness": 12},
        )
        figure.add_trace(trace, row=i // columns + 1, col=i % columns + 1)
    longest = max(map(len, tokens))
    side = 240 if columns > 2 else 340
    figure.update_layout(**look(height=90 + (side + 30) * rows + 7 * longest, showlegend=False, below=40 + 7 * longest))
    figure.update_xaxes(**_ticks(safe, -90), tickfont={"size": 10})
    figure.update_yaxes(**_ticks(safe), tickfont={"size": 10}, automargin=True)
    figure.update_yaxes(range=[n - 0.5, -0.5])
    for column in range(len(names) - (rows - 1) * columns, columns):  # the last row is empty below these
        figure.update_xaxes(showticklabels=True, row=rows - 1, col=column + 1)
    figure.update_annotations(font={"size": 12})
    return figure


def waterfall(parts: Grid, *, top: int = 20) -> go.Figure:
    """The largest parts of a logit by magnitude, the others as one bar, and their sum; blue raises it, red lowers it.

    Args:
        parts: the result of `direct_logit_attribution`; the mean over examples is drawn.
        top: how many parts have their own bar.

    Raises:
        InputError: for a grid with other axes.
    """
    mean = parts.mean("example") if "example" in parts.labels else parts
    if list(mean.labels) != ["node"] or top < 1:
        raise InputError(
            f"A waterfall is of parts along the one axis 'node', at least one; got {', '.join(mean.axes)}."
        )
    pairs = [(name, v) for name, v in zip(mean.labels["node"], mean.values.tolist(), strict=True) if v == v]
    pairs.sort(key=lambda pair: -abs(pair[1]))
    shown, rest = pairs[:top], pairs[top:]
    names = [name for name, _ in shown] + ([f"{len(rest)} others"] if rest else []) + ["sum"]
    values = [value for _, value in shown] + ([sum(value for _, value in rest)] if rest else [])
    total = sum(values)
    figure = go.Figure(
        go.Waterfall(
            x=names,
            y=[*values, total],
            measure=["relative"] * len(values) + ["total"],
            text=[f"{value:+.2f}" for value in values] + [f"{total:.2f}"],
            textposition="outside",
            cliponaxis=False,
            connector={"line": {"color": GUIDE_COLOUR, "width": 1}},
            increasing={"marker": {"color": GAIN_COLOUR}},
            decreasing={"marker": {"color": LOSS_COLOUR}},
            totals={"marker": {"color": "#666666"}},
            hovertemplate="<b>%{x}</b><br>%{delta:.4g}<extra></extra>",
        )
    )
    unit = f" ({mean.unit})" if mean.unit else ""
    return figure.update_layout(
        **look(height=440, showlegend=False, below=90),
        xaxis={"tickangle": -60, "type": "category", "automargin": True},
        yaxis={
            "title": html.escape(mean.name + unit),
            "gridcolor": "rgba(128,128,128,0.25)",
            "zerolinecolor": GUIDE_COLOUR,
        },
    )


def _labels(grid: Grid, axis: str, tokens: Sequence[str] | None) -> list[str]:
    own = grid.labels[axis]
    if axis != "pos" or tokens is None:
        return [html.escape(label) for label in own]
    if all(label.isdecimal() for label in own) and max(map(int, own)) < len(tokens):
        return [html.escape(tokens[int(label)]) for label in own]
    if len(tokens) == len(own):
        return [html.escape(token) for token in tokens]
    raise InputError(f"There are {len(own)} positions and {len(tokens)} token labels; give as many of both.")


def _short(text: str, letters: int = MAX_LETTERS) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _ticks(labels: Sequence[str], angle: int = 0) -> dict[str, Any]:
    # Of many numbers only some are shown; of words all are, since the missing ones could not be guessed.
    step = max(1, len(labels) // 24) if all(label.isdecimal() for label in labels) else 1
    places = list(range(0, len(labels), step))
    return {
        "tickvals": places,
        "ticktext": [labels[i] for i in places],
        "tickangle": angle,
        "range": [-0.5, len(labels) - 0.5],
        "showgrid": False,
        "zeroline": False,
    }
