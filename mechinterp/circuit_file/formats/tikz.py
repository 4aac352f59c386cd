"""`tikz`: the circuit as a figure for a paper, input at the bottom and logits at the top (`\\usepackage{tikz}`).

The layout is that of the figures of this package. Nodes are called `n0`, `n1`, ... so that a name is never parsed as
syntax.
"""

from __future__ import annotations

from collections.abc import Mapping

from mechinterp.circuit_file.formats.format import Export
from mechinterp.circuit_file.formats.latex import latex_text
from mechinterp.circuit_file.formats.node_link_graph import Link, link_colour, links_of, nodes_of
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.circuit_file.summary import NO_ROLE, coloured
from mechinterp.graphs.circuit import Circuit, NodeGraph
from mechinterp.graphs.colours import NODE_LOOKS

MOST_EDGES = 400
"""If there are more edges, only the strongest are drawn, as in the figures of this package."""
WIDTHS = (0.3, 2.4)
"""Width of a line in points, from score 0 to the largest absolute score, linear."""
FILLS = {kind: look.colour[1:] for kind, look in NODE_LOOKS.items() if look.named}
OTHER_FILL = "5c6773"
X, Y = 1.9, 1.3
"""Centimetres between neighbours of a row, and between rows."""


def to_tikz(circuit: Circuit, document: CircuitFile) -> bytes:
    """The circuit as a `tikzpicture`; wide lines have large scores, dashed lines negative ones."""
    from mechinterp.graphs.layered_layout import POINTS_PER_ROW, draw_layered  # imports plotly

    net, links = _strongest(circuit)
    drawing = draw_layered(net)
    largest = max((abs(link.score or 0.0) for link in links.values()), default=0.0)
    low, _ = drawing.x_range
    nodes = [node for node in nodes_of(circuit, document) if node.name in drawing.places]
    ids = {node.name: f"n{i}" for i, node in enumerate(nodes)}
    fills = dict.fromkeys(FILLS, NO_ROLE[1:]) if document.roles else FILLS  # then every colour stands for a role
    of_role = {name: colour[1:] for role, colour in coloured(document.roles) for name in role.nodes}
    colours = {node.name: of_role.get(node.name, fills.get(node.kind, OTHER_FILL)) for node in nodes}
    lines = [
        "% Needs \\usepackage{tikz}.",
        f"\\begin{{tikzpicture}}[x={X}cm, y={Y}cm, every node/.style={{font=\\sffamily\\scriptsize}}]",
    ]
    for height, label in enumerate(drawing.rows):
        lines.append(f"\\node[anchor=east, text=gray] at ({low - 0.6:.2f},{height}) {{{latex_text(label)}}};")
    for strand in sorted(drawing.strands, key=lambda s: (abs(s.score or 0.0), s.name, s.reader)):
        link = links[strand.name, strand.reader]
        points = [*strand.curve[::POINTS_PER_ROW], strand.curve[-1]]
        path = " ".join(f"({x:.2f},{y:.2f})" for x, y in dict.fromkeys(points))
        lines.append(f"\\draw[{_style(link, largest)}] plot[smooth] coordinates {{{path}}};")
    for node in nodes:
        x, y = drawing.places[node.name]
        fill = _rgb("fill", colours[node.name])
        options = f"draw=white, text=white, rounded corners=1pt, inner sep=2pt, {fill}"
        lines.append(f"\\node[{options}] ({ids[node.name]}) at ({x:.2f},{y:.2f}) {{{latex_text(node.name)}}};")
    lines += _legend(document, {node.name for node in nodes}, low)
    return "\n".join([*lines, "\\end{tikzpicture}", ""]).encode("utf-8")


def _strongest(circuit: Circuit) -> tuple[NodeGraph, Mapping[tuple[str, str], Link]]:
    """(The graph to draw, its links by edge and target); nodes and links are in a fixed order."""
    chosen = sorted(links_of(circuit), key=lambda link: (-abs(link.score or 0.0), link.edge, link.target))
    net: NodeGraph = type(circuit.to_networkx())()
    for link in sorted(chosen[:MOST_EDGES], key=lambda link: (link.edge, link.target)):
        more = {} if link.score is None else {"score": link.score}
        net.add_edge(link.source, link.target, name=link.edge, channel=link.channel, **more)
    return net, {(link.edge, link.target): link for link in chosen}


def _style(link: Link, largest: float) -> str:
    thin, wide = WIDTHS
    width = 0.6 if link.score is None else thin + (wide - thin) * abs(link.score) / (largest or 1.0)
    dashed = ", dashed" if (link.score or 0.0) < 0 else ""
    return f"->, line width={width:.2f}pt, opacity=0.75, {_rgb('draw', link_colour(link)[1:])}{dashed}"


def _rgb(option: str, colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (0, 2, 4))
    return f"{option}={{rgb,255:red,{red};green,{green};blue,{blue}}}"


def _legend(document: CircuitFile, drawn: set[str], low: float) -> list[str]:
    roles = [(role, colour) for role, colour in coloured(document.roles) if not drawn.isdisjoint(role.nodes)]
    lines: list[str] = []
    for i, (role, colour) in enumerate(roles):
        text = _rgb("text", colour[1:])
        lines.append(
            f"\\node[anchor=west, {text}] at ({low - 0.6:.2f},{-0.8 - 0.35 * i:.2f}) {{{latex_text(role.label)}}};"
        )
    return lines


EXPORT = Export(".tex", to_tikz, "Lost: all but the 400 strongest edges; scores are widths of lines.")
