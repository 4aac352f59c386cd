"""`dot`: the circuit for Graphviz, input at the bottom and logits at the top, a row per layer and kind.

Nodes are `n0`, `n1`, ... with their names as labels, so that a name is never parsed as syntax. In labels `\\` and
`"` are escaped by a backslash, and `&` as `&amp;`, which Graphviz would otherwise read as the start of an HTML entity.
"""

from __future__ import annotations

from itertools import groupby

from mechinterp.circuit_file.formats.format import Export
from mechinterp.circuit_file.formats.node_link_graph import Link, link_colour, links_of, nodes_of, printable, score_text
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.graphs.circuit import Circuit

WIDEST = 5.0


def to_dot(circuit: Circuit, document: CircuitFile) -> bytes:
    """The circuit as a Graphviz digraph; wide lines have large scores, dashed lines negative ones."""
    nodes, links = nodes_of(circuit, document), links_of(circuit)
    ids = {node.name: f"n{i}" for i, node in enumerate(nodes)}
    largest = max((abs(link.score or 0.0) for link in links), default=0.0)
    lines = [
        "digraph circuit {",
        f"  graph [rankdir=BT, label={quoted(document.title)}, labelloc=t, fontname=Helvetica];",
        '  node [shape=box, style="rounded,filled", fillcolor="#f4f4f4", fontname=Helvetica];',
        "  edge [arrowsize=0.6, fontname=Helvetica];",
    ]
    for (_, kind), row in groupby(nodes, key=lambda node: (node.layer, node.kind)):
        members = list(row)
        lines.append(f"  {{ rank={'max' if kind == 'logits' else 'same'};")
        for node in members:
            label = f"{node.name} ({node.role})" if node.role else node.name
            lines.append(f"    {ids[node.name]} [label={quoted(label)}];")
        lines.append("  }")
    for link in links:
        attributes = ", ".join(f"{key}={value}" for key, value in _attributes(link, largest).items())
        lines.append(f"  {ids[link.source]} -> {ids[link.target]} [{attributes}];")
    return "\n".join([*lines, "}", ""]).encode("utf-8")


def quoted(text: str) -> str:
    """The text as a quoted DOT label on one line."""
    shown = printable(text).replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;")
    return f'"{shown}"'


def _attributes(link: Link, largest: float) -> dict[str, str]:
    score = score_text(link.score)
    found = {"tooltip": quoted(f"{link.edge} {score}".strip()), "color": f'"{link_colour(link)}"'}
    if link.channel:
        found["label"] = quoted(link.channel)
    if link.score is not None:
        found["penwidth"] = f"{0.5 + (WIDEST - 0.5) * abs(link.score) / (largest or 1.0):.2f}"
        if link.score < 0:
            found["style"] = "dashed"
    return found


EXPORT = Export(".dot", to_dot, "Lost: results, provenance; scores have 4 digits and are tooltips and widths.")
