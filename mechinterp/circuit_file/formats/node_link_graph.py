"""A circuit as nodes and links, with the roles and scores from its file: the basis of the formats for drawing."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.graphs.circuit import Circuit, NodeGraph
from mechinterp.graphs.colours import NODE_LOOKS
from mechinterp.models.sites import Node, node_of, split_position


@dataclass(frozen=True)
class CircuitNode:
    """A node: its name (`a9.h9`, `a9.h9@end`), kind, layer, position ("": all) and role ("": none).

    The layer of the inputs is -1, that of `logits` is the number of layers.
    """

    name: str
    kind: str
    layer: int
    position: str
    role: str


@dataclass(frozen=True)
class Link:
    """A line between two nodes: the edge that it stands for, the channel that it enters (q, k, v or ""), and its score.

    An edge into a shared key or value head is one link to every head of its group, with the same name.
    """

    edge: str
    source: str
    target: str
    channel: str
    score: float | None


def nodes_of(circuit: Circuit, document: CircuitFile) -> tuple[CircuitNode, ...]:
    """The nodes with at least one link, in the order of the model; `logits` comes last."""
    net = circuit.to_networkx()
    roles: dict[str, list[str]] = defaultdict(list)
    for role in document.roles.values():
        for name in role.nodes:
            roles[name].append(role.label)
    places = {name: i for i, name in enumerate(circuit.graph.positions)}
    found: list[tuple[Node, int, CircuitNode]] = []
    for name in net.nodes:
        node, position = node_of(name), split_position(name)[1]
        layer = circuit.graph.dims.n_layers if node.kind == "logits" else node.layer
        entry = CircuitNode(name, node.kind, layer, position, ", ".join(roles[name]))
        found.append((node, places.get(position, -1), entry))
    found.sort(key=lambda item: (*_order(item[0]), item[1]))
    return tuple(entry for *_, entry in found)


def links_of(circuit: Circuit) -> tuple[Link, ...]:
    """The links, sorted by the name of the edge, then by the target."""
    net: NodeGraph = circuit.to_networkx()
    found = [
        Link(data["name"], source, target, data["channel"], data.get("score"))
        for source, target, data in net.edges(data=True)
    ]
    return tuple(sorted(found, key=lambda link: (link.edge, link.target)))


def link_colour(link: Link) -> str:
    """The colour of a link (#rrggbb), the same as in the figures of this package."""
    from mechinterp.graphs.colours import CHANNEL_COLOURS  # imports plotly, which only drawings need

    return CHANNEL_COLOURS[link.channel or ("logits" if link.target == "logits" else "mlp")]


def edge_scores(circuit: Circuit) -> dict[str, float | None]:
    """The name of every edge of the circuit, sorted, with its unrounded score (None: no score)."""
    if circuit.scores is None:
        return dict.fromkeys(circuit.edges)
    values, graph = circuit.scores.values, circuit.graph
    return {name: float(values[graph.edge_index(name)]) for name in circuit.edges}


def score_text(score: float | None) -> str:
    """The score at 4 significant digits; "" if there is none."""
    return "" if score is None else f"{score:.4g}"


def printable(text: str) -> str:
    """The text on one line, with `?` for characters that cannot be printed."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def _order(node: Node) -> tuple[bool, int, int, int]:
    return (node.kind == "logits", node.layer, list(NODE_LOOKS).index(node.kind), node.head)
