"""What a circuit file says of its edges and nodes, ranked: for tables. Needs neither the model nor torch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from mechinterp.schema import CircuitFile, EdgeRecord
from mechinterp.sites import Edge, Node


@dataclass(frozen=True)
class NodeSummary:
    """A node, its role ("" where none is known), its edges in the circuit, and the score of those that leave it.

    `score` is None when nothing leaves it or the edges have no scores.
    """

    name: str
    role: str
    n_in: int
    n_out: int
    score: float | None


def ranked_edges(document: CircuitFile) -> tuple[EdgeRecord, ...]:
    """The edges, those with the largest scores (either sign) first, then by name."""
    return tuple(sorted(document.edges, key=lambda edge: (-abs(edge.score or 0.0), edge.name)))


def ranked_nodes(document: CircuitFile) -> tuple[NodeSummary, ...]:
    """The nodes, those with the largest scores (either sign) first, then in the order of the model.

    An edge into a shared key or value head counts as one edge into every head of its group.
    """
    roles = {name: role.label for role in document.roles.values() for name in role.nodes}
    group = document.model.dims.n_heads // document.model.dims.n_kv_heads
    n_in: dict[str, int] = defaultdict(int)
    leaving: dict[str, list[float | None]] = defaultdict(list)
    for record in document.edges:
        edge = Edge.parse(record.name)
        leaving[str(edge.writer)].append(record.score)
        for node in _heads_of(edge.reader, group):
            n_in[str(node)] += 1
    found: list[NodeSummary] = []
    for name in sorted(document.nodes, key=_order):
        scores = [score for score in leaving[name] if score is not None]
        found.append(
            NodeSummary(name, roles.get(name, ""), n_in[name], len(leaving[name]), sum(scores) if scores else None)
        )
    return tuple(sorted(found, key=lambda node: -abs(node.score or 0.0)))


def _heads_of(reader: Node, group: int) -> tuple[Node, ...]:
    if reader.kind != "kv_head":
        return (reader,)
    return tuple(Node("head", reader.layer, reader.head * group + i) for i in range(group))


def _order(name: str) -> tuple[bool, int, bool, int]:
    node = Node.parse(name)
    return (node.kind == "logits", node.layer, node.kind == "mlp", node.head)
