"""Tables for the terminal, to be printed by the command line. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mechinterp.circuit_file.schema import CircuitFile, EvaluationRecord
from mechinterp.circuit_file.summary import ranked_edges, ranked_nodes, stated_predictions
from mechinterp.circuit_file.verify.claims import Verification

if TYPE_CHECKING:
    from pandas import DataFrame

    from mechinterp.circuit_file.diff import CircuitDiff, Compared


def plain(text: str) -> str:
    """The text on one line, with `?` for control characters, which a terminal could interpret."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


class _Words(Table):
    """A table of literal text: no markup, no emoji codes, no control characters."""

    def add_row(self, *cells: object, **options: Any) -> None:
        """Add a row of plain cells."""
        super().add_row(*(Text(_shown(str(cell))) for cell in cells), **options)


def _shown(cell: str) -> str:
    indent = " " * (len(cell) - len(cell.lstrip(" ")))
    return indent + plain(cell)


def frame_table(frame: DataFrame) -> Table:
    """A table of a data frame; missing entries are `-`."""
    table = _table(*(str(column) for column in frame.columns))
    table.columns[0].no_wrap = True
    for row in frame.itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    return table


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10 or not value else f"{value:.3f}"
    return "-" if str(value) == "<NA>" else str(value)


def difference_tables(diff: CircuitDiff, most: int) -> Iterable[tuple[str, Table]]:
    """A heading and a table for each kind of difference, with at most `most` rows of edges and of nodes.

    The table of overlaps always comes first.
    """
    table = _table("", "in both", "only A", "only B", "Jaccard")
    for row in diff.overlaps():
        table.add_row(row.kind, f"{row.both:,}", f"{row.only_a:,}", f"{row.only_b:,}", f"{row.jaccard:.3f}")
    yield "", table
    if diff.scores:
        table = _table("scores over", "number", "Spearman", "Pearson", "of opposite signs")
        for entry in diff.scores:
            table.add_row(
                entry.over, f"{entry.n:,}", _known(entry.spearman), _known(entry.pearson), f"{entry.n_flipped:,}"
            )
        yield "", table
    for kind, entries in (("nodes", diff.nodes), ("edges", diff.edges)):
        some = [entry for entry in entries if entry.where != "both"]
        if some:
            yield _first(most, len(some), f"{kind} in one circuit only"), _compared_table(some[:most])
    changes = diff.changes()
    if changes:
        by = "score" if diff.scored_alike else "rank"
        yield _first(most, len(changes), f"edges in both, by change of {by}"), _compared_table(changes[:most])
    if diff.roles:
        table = _table("node", "role in A", "role in B", "", text=4)
        for role in diff.roles:
            table.add_row(role.node, role.a or "-", role.b or "-", role.change)
        yield "roles that differ", table
    if diff.fields:
        table = _table("field", "A", "B", text=3)
        for row in diff.fields:
            table.add_row(*("-" if cell is None else cell for cell in (row.field, row.a, row.b)))
        yield "other fields that differ", table


def _compared_table(entries: Iterable[Compared]) -> Table:
    entries = list(entries)
    often = any(entry.frequency_a is not None or entry.frequency_b is not None for entry in entries)
    shares = ("resamples A", "resamples B") if often else ()
    table = _table("", "in", "score A", "rank A", "score B", "rank B", *shares, "signs", text=2)
    for entry in entries:
        ranks = ["-" if rank is None else f"{rank:,}" for rank in (entry.rank_a, entry.rank_b)]
        signs = "opposite" if entry.flipped else ""
        scores = (_known(entry.score_a), _known(entry.score_b))
        found = [share_of(one) for one in (entry.frequency_a, entry.frequency_b)] if often else []
        table.add_row(entry.name, entry.where, scores[0], ranks[0], scores[1], ranks[1], *found, signs)
    return table


def _known(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def share_of(value: float | None) -> str:
    """A share in percent; `-` if there is none."""
    return "-" if value is None else f"{value:.0%}"


def _first(most: int, n: int, words: str) -> str:
    return f"{words}: {n:,}" if n <= most else f"{words}: the first {most:,} of {n:,}"


def result_table(document: CircuitFile) -> Table:
    """The numbers of the first evaluation of a circuit, with what to compare them with."""
    table = _table("", "circuit", "compare with")
    if not document.evaluation:
        table.add_row("edges", f"{len(document.edges):,}", f"{document.graph.n_edges:,} in the model")
        return table
    for row in _numbers(document.evaluation[0]):
        table.add_row(*row)
    return table


def _numbers(entry: EvaluationRecord) -> Iterable[tuple[str, str, str]]:
    low, high = entry.faithfulness_ci
    share = entry.n_edges / entry.n_edges_graph
    yield "edges", f"{entry.n_edges:,}", f"{entry.n_edges_graph:,} in the model ({share:.1%} kept)"
    yield "faithfulness", f"{entry.faithfulness:.3f}", f"{entry.ci_level:.0%} interval {low:.3f} to {high:.3f}"
    if entry.random_faithfulness:
        n = len(entry.random_faithfulness)
        mean, best = sum(entry.random_faithfulness) / n, max(entry.random_faithfulness)
        mean, best = (round(value, 3) + 0.0 for value in (mean, best))  # zero has no sign
        yield "  random circuits", f"{mean:.3f}", f"mean of {n} of the same size; best {best:.3f}"
    unit = f"{entry.metric.name}, {entry.metric.unit}"
    ends = f"full model {entry.full_value:.3f}, every edge replaced {entry.empty_value:.3f}"
    yield unit, f"{entry.circuit_value:.3f}", ends
    yield "KL to full model", f"{entry.kl:.3f}", "nats; 0 is the full model"
    if entry.accuracy is not None and entry.accuracy_full is not None:
        yield "accuracy", f"{entry.accuracy:.1%}", f"full model {entry.accuracy_full:.1%}"
    yield (
        "examples",
        f"{entry.n_examples:,}",
        f"pairs {entry.pairs!r}; replaced by {entry.ablation.value}",
    )


def nodes_table(document: CircuitFile, most: int) -> Table:
    """The nodes of a circuit with their roles, the largest absolute scores first."""
    nodes = ranked_nodes(document)
    roles = any(node.role for node in nodes)
    score = "score" if document.graph.granularity == "node" else "score of edges out"
    table = _table("node", *(("role",) if roles else ()), "edges in", "edges out", score, text=1 + roles)
    for node in nodes[:most]:
        role = (node.role,) if roles else ()
        table.add_row(node.name, *role, str(node.n_in), str(node.n_out), _score(node.score))
    return table


def edges_table(document: CircuitFile, most: int) -> Table:
    """The edges of a circuit, the strongest first."""
    edges = ranked_edges(document)
    table = _table("edge", "score")
    for edge in edges[:most]:
        table.add_row(edge.name, _score(edge.score))
    return table


def predictions_table(document: CircuitFile, most: int) -> Table:
    """The first predictions in a circuit file, with the measured values and negative controls."""
    table = _table("prediction", "measured", "negative controls")
    table.columns[2].justify = "left"
    for row in stated_predictions(document)[:most]:
        table.add_row(*row)
    return table


def failed_table(verification: Verification) -> Table:
    """The claims that do not hold, with the stated and the found value."""
    table = _table("claim", "stated", "found", "why", text=4)
    for claim in verification.failed:
        table.add_row(claim.name, claim.expected, claim.got, claim.detail)
    return table


def warnings_table(verification: Verification) -> Table:
    """The warnings of `verify`."""
    table = _table("warning", "", text=2)
    for warning in verification.warnings:
        table.add_row(Text(plain(warning.name)), Text(plain(warning.text)))
    return table


def extent_table(verification: Verification) -> Table:
    """Which parts were recomputed, only hash-checked, or not checked."""
    table = _table("how checked", "what", text=2)
    for heading, words in verification.extent.lines():
        table.add_row(Text(heading), Text(plain(words)))
    return table


def names_table(kind: str, about: Mapping[str, str]) -> Table:
    """Names of one kind with a line about each."""
    table = _table(kind, "", text=2)
    for name, words in about.items():
        table.add_row(name, words)
    return table


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.4g}"


def _table(*columns: str, text: int = 1) -> Table:
    """An empty table; the first `text` columns are text, the others numbers. Long cells are wrapped, never cut off."""
    table = _Words(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, name in enumerate(columns):
        table.add_column(
            Text(plain(name)), justify="left" if i < text or name == "compare with" else "right", overflow="fold"
        )
    return table
