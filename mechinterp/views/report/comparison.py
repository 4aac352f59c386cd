"""The page of a comparison of methods: table, curves, overlap. One file that needs no network and no script."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from html import escape

import pandas as pd

from mechinterp.base.atomic_write import write_whole
from mechinterp.circuit_file.summary import ROLE_COLOURS
from mechinterp.evaluation.comparison import Comparison
from mechinterp.views.report.html_page import html_page
from mechinterp.views.report.shown_paths import shown_command, without_folders

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 46, 150, 14, 42
CELL, LABELS = 44, 130
DASHES = ("", "7 4", "2 4")
Place = Callable[[float], float]


def write_comparison(path: str | os.PathLike[str], found: Comparison, title: str, command: str) -> None:
    """Return None after writing the page, completely or not at all; it names no folder of this machine.

    Args:
        path: where to write it.
        found: the comparison.
        title: the heading, as plain text.
        command: the command that makes it again.
    """
    about, title = found.about, without_folders(title)
    middle = found.sizes[len(found.sizes) * 7 // 10]
    units = escape(str(about["units"]))
    body = (
        f"<h1>{escape(title)}</h1>"
        f'<p class="lead">Scored on {about["train"]} pairs, evaluated on {about["test"]} others; metric '
        f"{escape(str(about['metric']))}, cut edges carry {escape(str(about['replacement']))}. Forwards and backwards "
        f"are per example.</p>{_table(found.to_frame())}"
        '<p class="note">CPR: area under the faithfulness curve, circuits by signed score. CMD: area between this '
        f"curve and 1, circuits by magnitude (0 is best). Both are over the share of {units}, as in MIB; a circuit "
        "that does nothing until it has every edge has CPR 0.25 and CMD 0.75.</p>"
        f'<h2>Faithfulness against size, by magnitude</h2><div class="scroll">{_curves(found)}</div>'
        f"<h2>Overlap of the first {middle:,} {units}</h2>"
        '<p class="note">Jaccard index of what any two methods select first.</p>'
        f'<div class="scroll">{_matrix(found.overlap(middle))}</div>'
        f"<h2>Make it again</h2><pre><code>{escape(shown_command(command))}</code></pre>"
    )
    write_whole(path, html_page(title, body).encode("utf-8"))


def _table(frame: pd.DataFrame) -> str:
    head = "".join(f'<th class="{"name" if i == 0 else "number"}">{escape(str(c))}</th>' for i, c in enumerate(frame))
    rows = "".join(_row(*row) for row in frame.itertuples(index=False, name=None))
    table = f'<table class="data"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _row(name: object, *values: object) -> str:
    cells = "".join(f'<td class="number">{_cell(value)}</td>' for value in values)
    return f"<tr><td>{escape(str(name))}</td>{cells}</tr>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 or value.is_integer() else f"{value:.3f}"
    return "not reached" if value is pd.NA else escape(f"{value:,}" if isinstance(value, int) else str(value))


def _curves(found: Comparison) -> str:
    """Faithfulness against the number of edges (log axis), one line per method, with their names at the ends."""
    sizes = [max(1, size) for size in found.sizes]
    low, high = math.log(min(sizes)), math.log(max(max(sizes), min(sizes) + 1))
    values = [value for result in found.results.values() for value in result.by_magnitude]
    least, most = min(0.0, *values) - 0.05, max(1.0, *values) + 0.05

    def x(size: float) -> float:
        return LEFT + (math.log(size) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - least) / (most - least) * (HEIGHT - TOP - BOTTOM)

    parts = list(_axes(x, y, sizes, least, most))
    ends: list[tuple[float, str, str]] = []
    for i, (name, result) in enumerate(found.results.items()):
        colour, dash = ROLE_COLOURS[i % len(ROLE_COLOURS)], DASHES[i // len(ROLE_COLOURS) % len(DASHES)]
        points = list(zip(sizes, result.by_magnitude, strict=True))
        line = " ".join(f"{x(size):.1f},{y(value):.1f}" for size, value in points)
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}" points="{line}"/>'
        )
        for size, value in points:
            about = f"{escape(name)}, {size:,}: {value:.3f}"
            circle = f'<circle cx="{x(size):.1f}" cy="{y(value):.1f}" r="3.5" fill="{colour}"/>'
            parts.append(f"<g>{circle}<title>{about}</title></g>")
        ends.append((y(points[-1][1]), escape(name), colour))
    parts += _names(ends)
    label = f"{found.about['units']} kept (of {found.about[str(found.about['units'])]:,})"
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, escape(label), "middle"))
    return _svg(WIDTH, HEIGHT, "Faithfulness against size", parts)


def _axes(x: Place, y: Place, sizes: Sequence[int], least: float, most: float) -> Iterable[str]:
    step = next((s for s in (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0) if (most - least) / s <= 8), most - least)
    for k in range(math.ceil(least / step), math.floor(most / step) + 1):
        kind = "grid guide" if abs(k * step) < 1e-9 or abs(k * step - 1) < 1e-9 else "grid"
        yield f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(k * step):.1f}" y2="{y(k * step):.1f}"/>'
        yield _text(LEFT - 6, y(k * step) + 4, f"{k * step:g}", "end")
    for tick in (first * 10**power for power in range(9) for first in (1, 3)):
        if min(sizes) <= tick <= max(sizes):
            yield _text(x(tick), HEIGHT - BOTTOM + 17, f"{tick:,}", "middle")


def _names(ends: Sequence[tuple[float, str, str]]) -> Iterable[str]:
    """The names of the lines on the right, in the order of their ends, none over another."""
    last = -math.inf
    for at, name, colour in sorted(ends):
        last = max(at, last + 15)
        yield f'<rect x="{WIDTH - RIGHT + 12}" y="{last - 5:.1f}" width="14" height="4" fill="{colour}"/>'
        yield _text(WIDTH - RIGHT + 32, last + 2, name, "start")


def _matrix(table: pd.DataFrame) -> str:
    """The overlap of any two methods, darker the larger."""
    names = [escape(str(name)) for name in table.columns]
    parts: list[str] = []
    for row, (name, values) in enumerate(zip(names, table.to_numpy().tolist(), strict=True)):
        middle = row * CELL + CELL / 2 + 4
        parts.append(_text(LABELS - 8, middle, name, "end"))
        for column, value in enumerate(values):
            x, y = LABELS + column * CELL, row * CELL
            place = f'x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}"'
            ink = ' class="strong"' if value > 0.6 else ""
            parts.append(
                f'<g><rect class="ground" {place}/><rect class="gain" {place} fill-opacity="{value:.3f}"/>'
                f'<text{ink} x="{x + CELL / 2}" y="{middle}" text-anchor="middle">{value:.2f}</text>'
                f"<title>{name} and {names[column]}: {value:.3f}</title></g>"
            )
    below = len(names) * CELL + 8
    for column, name in enumerate(names):
        x = LABELS + column * CELL + CELL / 2 + 4
        parts.append(f'<text transform="translate({x} {below}) rotate(-90)" text-anchor="end">{name}</text>')
    longest = max(len(str(name)) for name in table.columns)
    return _svg(LABELS + len(names) * CELL + 8, below + 7 * longest, "Overlap of methods", parts, "heat")


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def _svg(width: float, height: float, label: str, parts: Iterable[str], kind: str = "") -> str:
    return (
        f'<svg class="chart still {kind}" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} '
        f'{height:.0f}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )
