"""The page or picture of the differences between two circuit files: one file, without network or scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from mechinterp.base.errors import InputError
from mechinterp.circuit_file.diff import CircuitDiff, Compared
from mechinterp.circuit_file.store import write_file
from mechinterp.graphs.circuit import Circuit
from mechinterp.views.plots.difference import STYLE, difference_svg
from mechinterp.views.report.html_page import html_page
from mechinterp.views.report.shown_paths import shown_path, without_folders
from mechinterp.views.terminal_tables import share_of

ENDINGS = (".html", ".svg")
ROWS_SHOWN = 100
_STYLE = """
main .difference .ground { fill: var(--page); }
main .difference text { fill: var(--ink); }
main .difference .soft { fill: var(--soft); }
main .difference .node:not(.a):not(.b) rect { fill: var(--cell); }
main .difference .node.a text, main .difference .node.b text { fill: #fff; }
main .difference .edge:hover path { stroke: var(--ink); }
"""
_HIDE = (
    "".join(f"#{name}:not(:checked)~.scroll .{name}.edges{{display:none}}" for name in ("a", "b", "both"))
    + "#marks:not(:checked)~.scroll .marks{display:none}"
)


def write_difference(path: Path, diff: CircuitDiff, a: Circuit, b: Circuit) -> None:
    """Write the page (.html) or only the picture (.svg), or nothing at all. Raises InputError for other endings."""
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"Differences are written to NAME.html or NAME.svg; got {path.name!r}.")
    picture = difference_svg(diff, a, b)
    write_file(path, (picture if path.suffix.lower() == ".svg" else _page(diff, picture)).encode("utf-8"))


def _page(diff: CircuitDiff, picture: str) -> str:
    title = f"{diff.a.name} and {diff.b.name}"
    hashes = "".join(f"<p><code>{name}: circuit sha256 {sha}</code></p>" for name, sha in _hashes(diff))
    switches = "".join(
        f'<input type="checkbox" id="{name}" checked><label for="{name}"> {words}</label>'
        for name, words in (("a", "only in A"), ("b", "only in B"), ("both", "in both"), ("marks", "signs"))
    )
    a, b = (escape(shown_path(str(path))) for path in (diff.a, diff.b))
    body = (
        f'<h1>{escape(title)}</h1><p class="lead">{"The same circuit. " if diff.same_circuit else ""}A is '
        f"<code>{a}</code>, B is <code>{b}</code>.</p>"
        f"<ul>{''.join(f'<li>{escape(without_folders(note))}</li>' for note in diff.notes)}</ul>"
        f"{_overlap(diff)}{_scores(diff)}"
        f'<h2>The circuits</h2><div class="switches">{switches}<div class="scroll">{picture}</div></div>'
        f"{_parts('Edges', diff.edges)}{_parts('Nodes', diff.nodes)}{_roles(diff)}"
        f"<h2>Other fields that differ</h2>{_table(('field', 'A', 'B'), _fields(diff), 3)}"
        f"{hashes}"
    )
    return html_page(title, body, styles=(STYLE, _STYLE + _HIDE))


def _fields(diff: CircuitDiff) -> Iterable[tuple[str, str, str]]:
    for row in diff.fields:
        yield row.field, without_folders(row.a or "-"), without_folders(row.b or "-")


def _hashes(diff: CircuitDiff) -> Iterable[tuple[str, str]]:
    return zip(("A", "B"), diff.circuit_sha256, strict=True)


def _overlap(diff: CircuitDiff) -> str:
    rows = (
        (row.kind, f"{row.both:,}", f"{row.only_a:,}", f"{row.only_b:,}", f"{row.jaccard:.3f}")
        for row in diff.overlaps()
    )
    return _table(("", "in both", "only A", "only B", "Jaccard"), rows)


def _scores(diff: CircuitDiff) -> str:
    if not diff.scores:
        return ""
    rows = (
        (entry.over, f"{entry.n:,}", number(entry.spearman), number(entry.pearson), f"{entry.n_flipped:,}")
        for entry in diff.scores
    )
    return "<h2>Scores</h2>" + _table(("over", "number", "Spearman", "Pearson", "of opposite signs"), rows)


def _parts(title: str, entries: Sequence[Compared]) -> str:
    """The edges or nodes in one circuit only, the best ranks first."""
    differing = [entry for entry in entries if entry.where != "both"]
    if not differing:
        return f"<h2>{title}</h2><p>They are the same in both circuits.</p>"
    rows = (
        (
            entry.name,
            entry.where,
            number(entry.score_a),
            _rank(entry.rank_a),
            number(entry.score_b),
            _rank(entry.rank_b),
            share_of(entry.frequency_a if entry.frequency_b is None else entry.frequency_b),
        )
        for entry in differing[:ROWS_SHOWN]
    )
    head = ("name", "circuit", "score in A", "rank in A", "score in B", "rank in B", "resamples with it")
    more = f"<p>The first {ROWS_SHOWN} of {len(differing):,}.</p>" if len(differing) > ROWS_SHOWN else ""
    return f"<h2>{title} in one circuit only</h2>{_table(head, rows, 2)}{more}"


def _roles(diff: CircuitDiff) -> str:
    if not diff.roles:
        return ""
    rows = ((row.node, row.a or "-", row.b or "-", row.change) for row in diff.roles)
    return "<h2>Roles</h2>" + _table(("node", "role in A", "role in B", ""), rows, 4)


def number(value: float | None) -> str:
    """The number at 3 significant digits; `-` if there is none."""
    return "-" if value is None else f"{value:.3g}"


def _rank(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A table whose first `text` columns are text, the others numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}>{escape(cell)}</{tag}>" if i < text else f'<{tag} class="number">{escape(cell)}</{tag}>'
            for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{cells('th', head)}</tr></thead>"
    return f'<div class="scroll"><table class="data">{top}<tbody>{body}</tbody></table></div>'
