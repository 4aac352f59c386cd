"""`cytoscape`: the circuit as Cytoscape.js's JSON, which `cytoscape_graph` of networkx also reads."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mechinterp.base.canonical_json import render_json
from mechinterp.circuit_file.formats.format import Export
from mechinterp.circuit_file.formats.node_link_graph import links_of, nodes_of
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.graphs.circuit import Circuit


def to_cytoscape(circuit: Circuit, document: CircuitFile) -> bytes:
    """The circuit as Cytoscape.js elements; the ids of nodes are their names, scores are not rounded."""
    nodes = [{"data": {"id": n.name, "value": n.name, **asdict(n)}} for n in nodes_of(circuit, document)]
    edges: list[dict[str, Any]] = []
    for i, link in enumerate(links_of(circuit)):
        data: dict[str, Any] = {"id": f"e{i}", "key": i, "name": link.edge, "channel": link.channel}
        data |= {"source": link.source, "target": link.target}
        edges.append({"data": data if link.score is None else {**data, "score": link.score}})
    content = {
        "data": {"title": document.title, "model": document.model.name},
        "directed": True,
        "multigraph": True,
        "elements": {"nodes": nodes, "edges": edges},
    }
    return render_json(content).encode("utf-8")


EXPORT = Export(".cyjs", to_cytoscape, "Lost: task, results, provenance; edges out of the circuit.")
