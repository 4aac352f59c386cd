"""`eap-ig-json`: EAP-IG's graph as JSON (`Graph.to_json`, `Graph.from_json`). Names and signs: see `eap_ig.py`.

Every edge of the model is listed, in or out of the circuit. Without scores, `score` is left out, as MIB
expects; `from_json` of EAP-IG then refuses the file, since it needs a score for every edge.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from mechinterp.base.canonical_json import parse_json
from mechinterp.base.errors import FormatError, clipped
from mechinterp.circuit_file.formats.eap_ig import (
    LOST,
    EapIgFile,
    cfg_of,
    circuit_of_file,
    graph_of_cfg,
    mapping_with,
    nodes_in_graph,
)
from mechinterp.circuit_file.formats.foreign import MAX_VALUES, edge_place, read_file
from mechinterp.circuit_file.formats.format import Export, Import
from mechinterp.circuit_file.formats.score_origin import Made
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import Graph
from mechinterp.models.layout import Dims

NAME = "eap-ig-json"


def to_eap_ig_json(circuit: Circuit, document: CircuitFile) -> bytes:
    """The circuit as EAP-IG's JSON, scores not rounded.

    Raises UnsupportedError if EAP-IG does not support the graph.
    """
    graph = circuit.graph
    cfg = cfg_of(graph)
    nodes = {name: {"in_graph": inside} for name, inside in nodes_in_graph(circuit).items()}
    content = bytearray(json.dumps({"cfg": cfg, "nodes": nodes, "edges": {}}, allow_nan=False).encode("ascii")[:-2])
    scores = None if circuit.scores is None else circuit.scores.values.cpu()
    for r, row in enumerate(graph.possible):  # one reader at a time: an 8B model has 1.6 million edges
        edges: dict[str, dict[str, float | bool]] = {}
        for w in row.nonzero().flatten().tolist():
            edges[graph.edge_name(r, w)] = {"in_graph": False}
        if scores is not None:
            edges = {
                name: {"score": score, **entry}
                for (name, entry), score in zip(edges.items(), scores[r][row].tolist(), strict=True)
            }
        for name, inside in zip(edges, circuit.kept[r][row].tolist(), strict=True):
            edges[name]["in_graph"] = inside
        if edges:
            content += (b"" if content.endswith(b"{") else b", ") + json.dumps(edges, allow_nan=False)[1:-1].encode()
    return bytes(content + b"}}\n")


def from_eap_ig_json(
    content: bytes, dims: Dims | None = None, made: Made | None = None, where: str = "The file"
) -> Circuit:
    """The circuit in EAP-IG's JSON, for a model with `dims`, by default those that the file states.

    Scores are read if `made` is given; either every edge has one or none has. Raises FormatError, in one line, for
    any other file, UnsupportedError if the format does not support `dims`.
    """
    return circuit_of_file(read_eap_ig_json(content, where), dims, made, NAME, where)


def read_eap_ig_json(content: bytes, where: str = "The file") -> EapIgFile:
    """The content of EAP-IG's JSON. Raises FormatError for any other file."""
    top = mapping_with(parse_json(content, where, MAX_VALUES), {"cfg", "nodes", "edges"}, set(), where)
    graph = graph_of_cfg(top["cfg"], where)
    _check_nodes(top["nodes"], graph, where)
    edges = top["edges"]
    if not isinstance(edges, dict):
        raise FormatError(f"{where}: edges must be a mapping of names; got {type(edges).__name__}.")
    in_graph, scores = _tables(edges, graph, where)
    return EapIgFile(graph, in_graph, scores)


def _check_nodes(nodes: object, graph: Graph, where: str) -> None:
    if not isinstance(nodes, dict):
        raise FormatError(f"{where}: nodes must be a mapping of names; got {type(nodes).__name__}.")
    for name, entry in nodes.items():
        if name != "logits" and name not in graph.writer_index:
            raise FormatError(f"{where}: the model has no node {clipped(name)}.")
        place = f"{where}: node {name!r}"
        if isinstance(entry, dict) and "score" in entry:
            raise FormatError(f"{place} has a score: only scores of edges are read, not of nodes.")
        if type(mapping_with(entry, {"in_graph"}, set(), place)["in_graph"]) is not bool:
            raise FormatError(f"{place}: in_graph must be true or false.")


def _tables(edges: dict[str, object], graph: Graph, where: str) -> tuple[Tensor, Tensor | None]:
    places: list[tuple[int, int]] = []
    kept: list[bool] = []
    scores: list[float] = []
    for name, entry in edges.items():
        writer, _, reader = name.partition("->")
        places.append(edge_place(graph, writer, reader, name, where))
        place = f"{where}: edge {clipped(name)}"
        found = mapping_with(entry, {"in_graph"}, {"score"}, place)
        if type(found["in_graph"]) is not bool:
            raise FormatError(f"{place}: in_graph must be true or false; got {clipped(found['in_graph'])}.")
        kept.append(found["in_graph"])
        score = found.get("score")
        if isinstance(score, (int, float)) and not isinstance(score, bool):
            scores.append(float(score))
        elif "score" in found:
            raise FormatError(f"{place}: score must be a number; got {clipped(score)}.")
    if scores and len(scores) < graph.n_edges:
        raise FormatError(
            f"{where} has scores for {len(scores)} of the model's {graph.n_edges} edges; it must have all or none."
        )
    at = torch.tensor(places, dtype=torch.long).reshape(-1, 2)
    in_graph = torch.zeros_like(graph.possible)
    in_graph[at[:, 0], at[:, 1]] = torch.tensor(kept, dtype=torch.bool)
    if not scores:
        return in_graph, None
    table = torch.zeros(graph.possible.shape, dtype=torch.float64)
    table[at[:, 0], at[:, 1]] = torch.tensor(scores, dtype=torch.float64)
    return in_graph, table


EXPORT = Export(".json", to_eap_ig_json, LOST)
IMPORT = Import(
    has_scores=True,
    has_sizes=True,
    read=lambda path, dims, made: from_eap_ig_json(read_file(path), dims, made, str(path)),
)
