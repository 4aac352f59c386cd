"""Readable summaries of a circuit file: the finding in one sentence, ranked edges and nodes. Imports no torch."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mechinterp.circuit_file.schema import CircuitFile, EdgeRecord, Role
from mechinterp.evaluation.role_names import plain_role
from mechinterp.models.sites import Node, node_of, split_position

METRIC_WORDS = {
    "logit_diff": "the logit difference",
    "prob_diff": "the probability difference",
    "prob": "the probability",
    "log_prob": "the log-probability",
    "kl_to_clean": "the KL divergence's gap",
    "l2_to_clean": "the logit distance's gap",
    "accuracy": "the accuracy",
    "direction": "the reading of the direction",
}


ROLE_COLOURS = (
    *("#2f5f8f", "#a6611a", "#1b7a5a", "#a13d63", "#6b5b95", "#7a6a00"),
    *("#3f7f93", "#c23b22", "#5a8f29", "#b07aa1", "#7f4f24", "#4b6cb7"),
)
NO_ROLE = "#8b949e"
"""The colour of nodes without a role, where other nodes have one."""


def coloured(roles: Mapping[str, Role]) -> list[tuple[Role, str]]:
    """Every role with its colour: the one it states, or the next in a fixed list."""
    return [(role, role.color or ROLE_COLOURS[i % len(ROLE_COLOURS)]) for i, role in enumerate(roles.values())]


@dataclass(frozen=True)
class NodeSummary:
    """A node, its role ("" if it has none), the numbers of its edges, and the sum of their scores.

    `score` is over the edges that leave the node; None if there are none or they have no scores.
    """

    name: str
    role: str
    n_in: int
    n_out: int
    score: float | None


def finding(document: CircuitFile) -> str:
    """The finding in one sentence: how many edges recover how much of the metric.

    Without an evaluation, the circuit's title (free text by the author) and "(no evaluation)".
    """
    if not document.evaluation:
        return f"{document.title} (no evaluation)"
    entry = document.evaluation[0]
    low, high = (f"{100 * bound:.0f}" for bound in entry.faithfulness_ci)
    words = METRIC_WORDS.get(entry.metric.name, entry.metric.name)
    if document.graph.granularity == "node":
        return (
            f"{n_chosen(document):,} nodes ({entry.n_edges:,} of {entry.n_edges_graph:,} edges) recover "
            f"{100 * entry.faithfulness:.0f} % [{low}, {high}] of {words}"
        )
    return (
        f"{entry.n_edges:,} of {entry.n_edges_graph:,} edges recover {100 * entry.faithfulness:.0f} % [{low}, {high}] "
        f"of {words}"
    )


def n_chosen(document: CircuitFile) -> int:
    """How many edges the circuit has or, where nodes are chosen, how many nodes."""
    if document.graph.granularity == "node":
        return len(document.nodes) - ("logits" in document.nodes)
    return len(document.edges)


def steadiness(document: CircuitFile) -> list[str]:
    """How the size was chosen and how stable the circuit is, one sentence each; empty if nothing was measured."""
    lines: list[str] = []
    size, found = document.selection.size, document.stability
    if size is not None and size.low is not None:
        spread = f"; other examples would choose {size.spread[0]:,} to {size.spread[1]:,}" if size.spread else ""
        lines.append(
            f"size: the smallest whose interval lies in [{size.low:g}, {size.high:g}] on {size.agreement:.0%} of "
            f"resamples of the {size.pairs} pairs{spread}"
        )
    parameters = document.selection.parameters
    what = f"{document.graph.granularity}s"
    lines += _given_size(document, what)
    if "refined" in parameters:
        n, dropped, added = (parameters.get(name) for name in ("refined_on", "dropped", "added"))
        each = f"each for less than {parameters.get('tau')} of {parameters['refined']}"
        lines.append(f"refined by exact runs on {n} pairs: {dropped} {what} dropped, {each}, and {added} added")
    if found is not None:
        n = n_chosen(document)
        before = ", before it was refined" if "refined" in parameters else ""
        lines.append(
            f"stability{before}: {found.n_core:,} of {n:,} {what} ({found.n_core / n:.0%}) are in at least "
            f"{found.core_share:.0%} of {found.resamples} circuits of resampled examples; two of these share "
            f"{found.jaccard:.0%} of their {what} (by chance {found.jaccard_by_chance:.0%})"
        )
    return lines


def _given_size(document: CircuitFile, what: str) -> list[str]:
    """Of a size that was given: whether the rule of a run would have let it pass, where the curve says so."""
    n, curve = document.selection.parameters.get(what), document.curve
    if document.selection.size is not None or curve is None or curve.kl_empty is None:
        return []
    at = next((point for point in curve.points if point.n_selected == n and point.passing is not None), None)
    if at is None or at.passing is None or at.kl is None or at.faithfulness_ci is None:
        return []
    low, high = at.faithfulness_ci
    there = f"faithfulness {at.faithfulness:.2f} [{low:.2f}, {high:.2f}]"
    return [
        f"size: given ({at.n_selected:,} {what}); the rule that chooses sizes lets it pass on {at.passing:.0%} of "
        f"resamples of the {curve.pairs} pairs ({there}, KL divergence {at.kl / (curve.kl_empty or 1):.0%} of the "
        "empty circuit's)"
    ]


def ranked_edges(document: CircuitFile) -> tuple[EdgeRecord, ...]:
    """The edges by decreasing absolute score, then by name."""
    return tuple(sorted(document.edges, key=lambda edge: (-abs(edge.score or 0.0), edge.name)))


def ranked_nodes(document: CircuitFile) -> tuple[NodeSummary, ...]:
    """The nodes by decreasing absolute score, then in the order of the model.

    An edge into a shared key or value head counts as one edge into every head of its group. At named positions an edge
    into a key or value counts for the head at the position of that key.
    """
    roles = {name: plain_role(role.label) for role in document.roles.values() for name in role.nodes}
    group = document.model.dims.n_heads // max(1, document.model.dims.n_kv_heads)
    whole = {node.layer for node in map(node_of, document.nodes) if node.kind == "attention"}
    logits_at = f"@{document.graph.answers}" if document.graph.answers else ""
    n_in: dict[str, int] = defaultdict(int)
    leaving: dict[str, list[float | None]] = defaultdict(list)
    names: dict[str, tuple[str, ...]] = {}  # of the nodes that each reader feeds; there are fewer readers than edges
    for record in document.edges:
        writer, _, rest = record.name.partition("->")
        reader, position = split_position(rest)
        if reader not in names:
            names[reader] = tuple(str(node) for node in _heads_of(Node.parse(reader.partition("<")[0]), group, whole))
        at = f"@{position}" if position else logits_at
        leaving[f"{writer}{at}"].append(record.score)
        for node in names[reader]:
            n_in[node if node == "logits" else f"{node}{at}"] += 1
    found: list[NodeSummary] = []
    for name in sorted(document.nodes, key=_order):
        scores = [score for score in leaving[name] if score is not None]
        if document.graph.granularity == "node":
            scores = scores[:1]  # each of its edges carries the score of the node
        found.append(
            NodeSummary(name, roles.get(name, ""), n_in[name], len(leaving[name]), sum(scores) if scores else None)
        )
    return tuple(sorted(found, key=lambda node: -abs(node.score or 0.0)))


def verify_command(circuit_path: str) -> str:
    """The shell command that verifies a circuit file, with the path quoted."""
    return f"discover-circuit verify {shlex.quote(circuit_path)}"


def _heads_of(reader: Node, group: int, whole: Collection[int]) -> tuple[Node, ...]:
    """The nodes that a reader is counted for; in the layers of `whole` all heads are one node."""
    if reader.kind in ("head", "kv_head") and reader.layer in whole:
        return (Node("attention", reader.layer),)
    if reader.kind != "kv_head":
        return (reader,)
    return tuple(Node("head", reader.layer, reader.head * group + i) for i in range(group))


def _order(name: str) -> tuple[bool, int, bool, int]:
    node = node_of(name)
    return (node.kind == "logits", node.layer, node.kind == "mlp", node.head)


def stated_predictions(document: CircuitFile) -> list[tuple[str, str, str]]:
    """For each prediction: the statement, the measured value, and its negative controls with theirs."""
    rows: list[tuple[str, str, str]] = []
    for stated in document.predictions or ():
        side = "<" if stated.relation == ">=" else ">"
        controls = [
            f"{control.measure} {side} {stated.value:.4g}" + _measured(control.measured, ": ")
            for control in stated.controls
        ]
        said = f"{stated.statement} ({stated!r})" if stated.statement else f"{stated!r}"
        rows.append((said, _measured(stated.measured), "; ".join(controls) or "none"))
    return rows


def _measured(value: float | None, before: str = "") -> str:
    return "" if value is None else f"{before}{value:.4g}"
