"""Attribution graphs as Neuronpedia's JSON ("Anthropic Attribution Graph"), written and read.

What their schema has no word for is in keys of our own: `metadata.mechinterp` (ids of the tokens, sha256 of the
transcoders, the targets' combinations), and for every node `basis`, `pre_activation` and `target_weight`. The bias and
the features that were not expanded are nodes of the types `bias` and `rest`. An error has the id `LAYER_err_POSITION`,
since circuit-tracer's `0_LAYER_POSITION` is also the id of a feature of layer 0.

Sources: github.com/hijohnnylin/neuronpedia, `apps/webapp/app/api/graph/graph-schema.json`; circuit-tracer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mechinterp.analysis.attribution_graph.graph import KINDS, LEAVES, AttributionGraph, GraphNode, Supernode
from mechinterp.base.atomic_write import write_whole
from mechinterp.base.canonical_json import parse_json
from mechinterp.base.errors import FormatError, InputError, clip, clipped
from mechinterp.circuit_file.formats.foreign import MAX_VALUES, read_file

TYPES = {
    "token": "embedding",
    "bias": "bias",
    "error": "mlp reconstruction error",
    "rest": "rest",
    "feature": "cross layer transcoder",
    "target": "logit",
}
MAX_CELLS = 2**27
"""Readers x writers of the largest graph that is read."""
MAX_NODES = 2**16


def save_attribution_graph(path: str | Path, graph: AttributionGraph) -> None:
    """Return None after writing the graph as Neuronpedia's JSON, completely or not at all.

    Args:
        path: Where; by convention `NAME.graph.json`.
        graph: The graph, pruned or not. One link per edge that is not 0.

    Weights and activations are kept to the last digit that float32 has.
    """
    write_whole(path, json.dumps(as_neuronpedia(graph, _slug(Path(path))), allow_nan=False).encode("utf-8"))


def load_attribution_graph(path: str | Path) -> AttributionGraph:
    """The graph in a file of Neuronpedia's JSON: ours, or that of circuit-tracer or Neuronpedia.

    Args:
        path: The file. Descriptions (`clerp`) and supernodes are kept, and pinned nodes in `about["pinned"]`.

    Files of other tools do not say pre-activations (they are NaN then), constants, and token ids of targets'
    combinations.

    Raises FormatError, in one line, for a file that is too large or no such graph, for ids that name two nodes, and for
    edges that do not go from earlier to later layers.
    """
    where = clip(str(path), 200)
    content = parse_json(read_file(Path(path)), where, MAX_VALUES)
    try:
        return from_neuronpedia(content, where)
    except FormatError:
        raise
    except InputError as error:
        raise FormatError(f"{where} is not an attribution graph. {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise FormatError(f"{where} is not an attribution graph: {type(error).__name__} at {clipped(error)}.") from None


def as_neuronpedia(graph: AttributionGraph, slug: str = "graph") -> dict[str, Any]:
    """The graph as the values of Neuronpedia's JSON."""
    ids = {node.name: _node_id(node, i) for i, node in enumerate(graph.nodes)}
    influence = [*graph.influence().tolist(), *(node.weight for node in graph.targets)]
    rows, columns = graph.weights.nonzero(as_tuple=True)
    weights = graph.weights[rows, columns].tolist()
    readers, writers = [ids[node.name] for node in graph.readers], [ids[node.name] for node in graph.writers]
    links = zip(columns.tolist(), rows.tolist(), weights, strict=True)
    about = {key: value for key, value in graph.about.items() if key != "pinned"}
    return {
        "metadata": {
            "slug": slug,
            "scan": graph.model,
            "prompt_tokens": list(graph.words),
            "prompt": graph.prompt,
            "schema_version": 1,
            "info": {"generator": {"name": "mechinterp", "version": metadata.version("mechinterp-circuits")}},
            "mechinterp": {"tokens": list(graph.tokens), "bases": dict(graph.bases), "about": about},
        },
        "qParams": {
            "pinnedIds": [ids[name] for name in graph.about.get("pinned", ()) if name in ids],
            "supernodes": [[group.label, *(ids[name] for name in group.members)] for group in graph.supernodes],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [_node(node, ids[node.name], by) for node, by in zip(graph.nodes, influence, strict=True)],
        "links": [{"source": writers[w], "target": readers[r], "weight": weight} for w, r, weight in links],
    }


def _node_id(node: GraphNode, index: int) -> str:
    return {
        "token": f"E_{node.feature}_{node.position}",
        "error": f"{node.layer}_err_{node.position}",
        "feature": f"{node.layer}_{node.feature}_{node.position}",
        "target": f"L_{node.feature if node.feature >= 0 else f'n{index}'}_{node.position}",
    }.get(node.kind, node.kind)


def _node(node: GraphNode, node_id: str, influence: float) -> dict[str, Any]:
    feature = {"feature": _cantor(node.layer, node.feature), "error": -1}.get(node.kind, max(node.feature, -1))
    made: dict[str, Any] = {
        "node_id": node_id,
        "feature": feature,
        "layer": "E" if node.kind in ("token", "bias", "rest") else "L" if node.kind == "target" else str(node.layer),
        "ctx_idx": max(node.position, 0),
        "feature_type": TYPES[node.kind],
        "jsNodeId": f"{node_id}-0",
        "clerp": node.text,
        "influence": influence,
        "activation": node.value if node.kind == "feature" else None,
        "basis": node.basis,
    }
    if node.kind == "target":
        made |= {"token_prob": node.value, "is_target_logit": True, "target_weight": node.weight}
    if not math.isnan(node.pre):
        made["pre_activation"] = node.pre
    return made


def from_neuronpedia(content: Mapping[str, Any], where: str) -> AttributionGraph:
    """The graph of the values of Neuronpedia's JSON. Raises FormatError for what is no such graph."""
    for key in ("metadata", "nodes", "links"):
        if not isinstance(content, dict) or key not in content:
            raise FormatError(f"{where} is not an attribution graph: it has no {key!r}.")
    if len(content["nodes"]) > MAX_NODES:
        raise FormatError(f"{where} has {len(content['nodes']):,} nodes; {MAX_NODES:,} are read at most.")
    words = tuple(str(word) for word in content["metadata"]["prompt_tokens"])
    by_id: dict[str, GraphNode] = {}
    for entry in content["nodes"]:
        node = _read_node(entry, len(words), where)
        if by_id.setdefault(str(entry["node_id"]), node) is not node:
            raise FormatError(
                f"{where}: two nodes have the id {clipped(entry['node_id'])}, so its links are ambiguous "
                "(circuit-tracer "
                "gives errors the ids of features of layer 0)."
            )
    nodes = sorted(by_id.values(), key=_order)
    index = {id(node): i for i, node in enumerate(nodes)}
    n_leaves = sum(node.kind in LEAVES for node in nodes)
    n_writers = sum(node.kind != "target" for node in nodes)
    if (len(nodes) - n_leaves) * n_writers > MAX_CELLS:
        raise FormatError(f"{where} is too large: {len(nodes) - n_leaves:,} nodes are read by {n_writers:,}.")
    weights = torch.zeros(len(nodes) - n_leaves, n_writers, dtype=torch.float64)
    seen: set[tuple[int, int]] = set()
    for link in content["links"]:
        source, target = (by_id.get(str(link[end])) for end in ("source", "target"))
        if source is None or target is None:
            raise FormatError(
                f"{where}: a link joins {clipped(link['source'])} and {clipped(link['target'])}; a node is missing."
            )
        place = index[id(target)] - n_leaves, index[id(source)]
        late = source.kind == "target" or (source.kind == target.kind == "feature" and source.layer >= target.layer)
        if target.kind in LEAVES or late or place in seen:
            raise FormatError(f"{where}: {source.name} -> {target.name} is not an edge, or is given twice.")
        seen.add(place)
        weights[place] = float(link["weight"])
    names = {key: node.name for key, node in by_id.items()}
    asked = content.get("qParams") or {}
    groups = [Supernode(str(label), tuple(names[one] for one in ids)) for label, *ids in asked.get("supernodes") or ()]
    own = content["metadata"].get("mechinterp") or {}
    ids = [node.feature for node in nodes if node.kind == "token"]
    tokens = tuple(int(token) for token in own.get("tokens") or (ids if len(ids) == len(words) else [-1] * len(words)))
    about = {"format": "neuronpedia", **(own.get("about") or {})}
    if pinned := [names[one] for one in asked.get("pinnedIds") or () if one in names]:
        about["pinned"] = pinned
    bases = {str(name): str(digest) for name, digest in (own.get("bases") or {}).items()}
    scan = content["metadata"].get("scan")
    return AttributionGraph(tokens, words, tuple(nodes), weights.float(), str(scan or ""), bases, tuple(groups), about)


def _read_node(entry: Mapping[str, Any], n_pos: int, where: str) -> GraphNode:
    kind = _kind(str(entry["feature_type"]), where)
    position, layer, text = int(entry["ctx_idx"]), str(entry["layer"]), str(entry.get("clerp") or "")
    if not 0 <= position < n_pos:
        raise FormatError(f"{where}: a node is at position {position} of {n_pos}.")
    pre = float(entry.get("pre_activation", math.nan))
    if kind in ("bias", "rest"):
        return GraphNode(kind)
    if kind == "token":
        found = re.fullmatch(r"E_([0-9]{1,9})_[0-9]+", str(entry["node_id"]))
        return GraphNode(kind, -1, position, int(found[1]) if found else -1, text=text)
    if kind == "error":
        return GraphNode(kind, _number(layer), position, text=text)
    if kind == "target":
        share = float(entry.get("token_prob") or 0.0)
        weight = float(entry.get("target_weight", share))
        return GraphNode(kind, -1, position, int(entry["feature"]), "", text, share, pre, weight)
    found = re.fullmatch(r"([0-9]{1,4})_([0-9]{1,9})_([0-9]+)", str(entry["node_id"]))
    feature = int(found[2]) if found else _second(int(entry["feature"]))
    basis = str(entry.get("basis") or f"m{_number(layer)}")
    return GraphNode(kind, _number(layer), position, feature, basis, text, float(entry.get("activation") or 0.0), pre)


def _order(node: GraphNode) -> tuple[int, ...]:
    """By kind, layer, position, number; targets stay in the order of the file."""
    own = () if node.kind == "target" else (node.layer, node.position, node.feature)
    return KINDS.index(node.kind), *own


def _kind(name: str, where: str) -> str:
    for kind, own in TYPES.items():
        if name == own or (kind == "feature" and "transcoder" in name):
            return kind
    raise FormatError(f"{where}: nodes of the type {clipped(name)} are not known; known: {', '.join(TYPES.values())}.")


def _number(layer: str) -> int:
    if not re.fullmatch("[0-9]{1,4}", layer):
        raise ValueError(f"layer {layer[:20]!r}")
    return int(layer)


def _cantor(a: int, b: int) -> int:
    """One number for two, as in circuit-tracer."""
    return (a + b) * (a + b + 1) // 2 + b


def _second(pair: int) -> int:
    """The second of the two numbers that `_cantor` has joined."""
    if pair < 0:
        raise ValueError(f"feature {pair}")
    total = (math.isqrt(8 * pair + 1) - 1) // 2
    return pair - total * (total + 1) // 2


def _slug(path: Path) -> str:
    return (
        re.sub(r"[^a-z0-9]+", "-", path.name.lower().removesuffix(".json").removesuffix(".graph")).strip("-") or "graph"
    )
