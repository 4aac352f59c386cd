"""`neuronpedia`: the circuit as an attribution graph of Neuronpedia (schema "Anthropic Attribution Graph", 1.0.0).

Their graph has features on one prompt, ours has heads and MLPs over many prompts, so the export is for viewing only:

- `feature_type` is `embedding` for the input and `logit` for the logits; `attention head`, `mlp` and `neuron` are not
  types of theirs, and `feature` is null, since there is no feature to look up.
- `ctx_idx` counts the named positions, which take the place of the tokens of the prompt; 0 without named positions.
- One link joins two nodes: its weight is the sum of the scores of the edges into q, k and v, positive if the edges
  help the task; without scores it is 1.

Source: github.com/hijohnnylin/neuronpedia, `apps/webapp/app/api/graph/graph-schema.json`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from datetime import datetime, timezone
from typing import Any

from mechinterp.base.canonical_json import render_json
from mechinterp.circuit_file.formats.format import Export
from mechinterp.circuit_file.formats.node_link_graph import CircuitNode, links_of, nodes_of
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.colours import NODE_LOOKS
from mechinterp.models.sites import Node

ALL_POSITIONS = "(all positions)"
_TYPES = {
    **{kind: look.label.lower() for kind, look in NODE_LOOKS.items()},
    **{"input": "embedding", "embed": "embedding", "pos_embed": "embedding", "logits": "logit"},
}


def to_neuronpedia(circuit: Circuit, document: CircuitFile) -> bytes:
    """The circuit as Neuronpedia's JSON."""
    positions = list(circuit.graph.positions) or [ALL_POSITIONS]
    answers = circuit.graph.answers or positions[0]
    nodes = [_node(node, positions, answers) for node in nodes_of(circuit, document)]
    weights: dict[tuple[str, str], float] = defaultdict(float)
    for link in links_of(circuit):
        if link.score is None:
            weights[link.source, link.target] = 1.0
        else:
            weights[link.source, link.target] += link.score
    kinds = "heads, MLPs and features" if circuit.graph.features else "heads and MLPs, not features"
    info: dict[str, Any] = {
        "description": f"{document.title}. Nodes are {kinds}; positions stand for tokens.",
        "generator": {"name": "mechinterp", "version": document.provenance.versions.get("mechinterp", "unknown")},
    }
    if document.created_utc is not None:
        created = datetime.strptime(document.created_utc, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        info["create_time_ms"] = int(created.timestamp()) * 1000
    content = {
        "metadata": {
            "slug": re.sub(r"[^a-z0-9]+", "-", document.id.lower()).strip("-") or "circuit",
            "scan": document.model.name,
            "prompt_tokens": positions,
            "prompt": document.title,
            "info": info,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": [{"source": s, "target": t, "weight": weight} for (s, t), weight in sorted(weights.items())],
    }
    return render_json(content).encode("utf-8")


def _node(node: CircuitNode, positions: list[str], answers: str) -> dict[str, Any]:
    place = positions.index(node.position or (answers if node.kind == "logits" else positions[0]))
    return {
        "node_id": node.name,
        "feature": Node.parse(node.name.partition("@")[0]).head if node.kind == "feature" else None,
        "layer": "E" if node.layer < 0 else str(node.layer),
        "ctx_idx": place,
        "feature_type": _TYPES[node.kind],
        "jsNodeId": f"{node.name}-{place}",
        "clerp": f"{node.name} ({node.role})" if node.role else node.name,
        "influence": None,
        "activation": None,
    }


EXPORT = Export(
    ".json",
    to_neuronpedia,
    "Lost: q, k and v (one link); heads and MLPs stand for features, positions for tokens; dictionaries; results.",
)
