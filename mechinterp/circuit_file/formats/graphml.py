"""`graphml`: the circuit for networkx, Gephi, yEd: nodes and links with all their properties.

Characters that XML does not allow (control characters) are written as `?`.
"""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from mechinterp.circuit_file.formats.format import Export
from mechinterp.circuit_file.formats.node_link_graph import links_of, nodes_of, printable
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.graphs.circuit import Circuit

GRAPH_KEYS = {"title": "string", "model": "string"}
NODE_KEYS = {"kind": "string", "layer": "int", "position": "string", "role": "string"}
EDGE_KEYS = {"name": "string", "channel": "string", "score": "double"}


def to_graphml(circuit: Circuit, document: CircuitFile) -> bytes:
    """The circuit as GraphML; the ids of nodes are their names, scores are not rounded."""
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">']
    for owner, keys in (("graph", GRAPH_KEYS), ("node", NODE_KEYS), ("edge", EDGE_KEYS)):
        for name, kind in keys.items():
            lines.append(f'  <key id="{owner}_{name}" for="{owner}" attr.name="{name}" attr.type="{kind}"/>')
    lines.append('  <graph id="circuit" edgedefault="directed">')
    lines += _data("graph", {"title": document.title, "model": document.model.name}, "    ")
    for node in nodes_of(circuit, document):
        lines.append(f"    <node id={_attribute(node.name)}>")
        lines += _data("node", {key: getattr(node, key) for key in NODE_KEYS}, "      ")
        lines.append("    </node>")
    for i, link in enumerate(links_of(circuit)):
        ends = f"source={_attribute(link.source)} target={_attribute(link.target)}"
        lines.append(f'    <edge id="e{i}" {ends}>')
        lines += _data("edge", {"name": link.edge, "channel": link.channel, "score": link.score}, "      ")
        lines.append("    </edge>")
    return "\n".join([*lines, "  </graph>", "</graphml>", ""]).encode("utf-8")


def xml_text(text: str) -> str:
    """The text on one line, with `?` for characters that XML does not allow."""
    return "".join(
        "?" if letter in "\ufffe\uffff" or "\ud800" <= letter <= "\udfff" else letter for letter in printable(text)
    )


def _attribute(text: str) -> str:
    return quoteattr(xml_text(text))


def _data(owner: str, values: dict[str, str | int | float | None], pad: str) -> list[str]:
    return [
        f'{pad}<data key="{owner}_{key}">{escape(xml_text(value) if isinstance(value, str) else repr(value))}</data>'
        for key, value in values.items()
        if value is not None and value != ""
    ]


EXPORT = Export(".graphml", to_graphml, "Lost: task, results, provenance; edges out of the circuit.")
