"""`eap-ig-pt`: EAP-IG's graph as a `.pt` file (`Graph.to_pt`, `Graph.from_pt`). Names and signs: see `eap_ig.py`.

A dictionary of plain values and tensors, which `torch.load(weights_only=True)` reads. Without scores, `edges_scores`
is left out: the evaluation of MIB accepts that, `from_pt` of EAP-IG does not.
"""

from __future__ import annotations

import io
from typing import Any

import torch

from mechinterp.base.errors import FormatError, clipped
from mechinterp.base.safe_torch import check_tensor, load_plain
from mechinterp.circuit_file.formats.eap_ig import (
    LOST,
    EapIgFile,
    cfg_of,
    circuit_of_file,
    graph_of_cfg,
    mapping_with,
    nodes_in_graph,
)
from mechinterp.circuit_file.formats.foreign import read_file
from mechinterp.circuit_file.formats.format import Export, Import
from mechinterp.circuit_file.formats.score_origin import Made
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import Graph
from mechinterp.models.layout import Dims

NAME = "eap-ig-pt"
KEYS = {"cfg", "src_nodes", "dst_nodes", "edges_in_graph", "nodes_in_graph"}
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def to_eap_ig_pt(circuit: Circuit, document: CircuitFile) -> bytes:
    """The circuit as EAP-IG's `.pt` file, scores not rounded.

    Raises UnsupportedError if EAP-IG does not support the graph.
    """
    graph = circuit.graph
    content: dict[str, Any] = {
        "cfg": cfg_of(graph),
        "src_nodes": list(graph.writers),
        "dst_nodes": list(graph.readers),
    }
    if circuit.scores is not None:
        scores = torch.where(graph.possible, circuit.scores.values.cpu(), 0)
        content["edges_scores"] = scores.T.contiguous()
    content["edges_in_graph"] = circuit.kept.T.contiguous()
    inside = nodes_in_graph(circuit)
    content["nodes_in_graph"] = torch.tensor([inside[name] for name in graph.writers])
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def from_eap_ig_pt(
    content: bytes, dims: Dims | None = None, made: Made | None = None, where: str = "The file"
) -> Circuit:
    """The circuit in EAP-IG's `.pt` file, for a model with `dims`, by default those that the file states.

    Scores are read if `made` is given. Nothing in the file is executed. Raises FormatError, in one line, for any other
    file, UnsupportedError if the format does not support `dims`.
    """
    return circuit_of_file(read_eap_ig_pt(content, where), dims, made, NAME, where)


def read_eap_ig_pt(content: bytes, where: str = "The file") -> EapIgFile:
    """The content of EAP-IG's `.pt` file. Raises FormatError for any other file."""
    top = mapping_with(load_plain(content, where), KEYS, {"edges_scores"}, where)
    graph = graph_of_cfg(top["cfg"], where)
    for key, names in (("src_nodes", graph.writers), ("dst_nodes", graph.readers)):
        _check_names(top[key], names, f"{where}: {key}")
    shape = (len(graph.writers), len(graph.readers))
    check_tensor(top["nodes_in_graph"], shape[:1], {torch.bool}, f"{where}: nodes_in_graph")
    in_graph = check_tensor(top["edges_in_graph"], shape, {torch.bool}, f"{where}: edges_in_graph").T.contiguous()
    _check_possible(in_graph, graph, f"{where}: edges_in_graph")
    scores = None
    if "edges_scores" in top:
        scores = check_tensor(top["edges_scores"], shape, FLOATS, f"{where}: edges_scores").T.contiguous()
        _check_possible(scores != 0, graph, f"{where}: edges_scores")
    return EapIgFile(graph, in_graph, scores)


def _check_names(given: object, names: tuple[str, ...], where: str) -> None:
    if not isinstance(given, (list, tuple)) or len(given) != len(names):
        raise FormatError(f"{where} must be a list of the {len(names)} names of the model that cfg describes.")
    for got, wanted in zip(given, names, strict=True):
        if got != wanted:
            raise FormatError(f"{where}: got {clipped(got)} where EAP-IG has {wanted!r}.")


def _check_possible(named: torch.Tensor, graph: Graph, where: str) -> None:
    impossible = named & ~graph.possible
    if bool(impossible.any()):
        r, w = impossible.nonzero()[0].tolist()
        raise FormatError(f"{where} names {graph.edge_name(r, w)}, which is not an edge: it would run backwards.")


EXPORT = Export(".pt", to_eap_ig_pt, LOST)
IMPORT = Import(
    has_scores=True,
    has_sizes=True,
    read=lambda path, dims, made: from_eap_ig_pt(read_file(path), dims, made, str(path)),
)
