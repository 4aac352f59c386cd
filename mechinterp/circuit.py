"""`Circuit`: the edges that were chosen from a graph. The one object that is saved, evaluated, drawn and verified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import networkx as nx
from jaxtyping import Bool
from torch import Tensor

from mechinterp.errors import InputError
from mechinterp.graph import Graph
from mechinterp.scores import Parameter, Scores

if TYPE_CHECKING:
    NodeGraph = nx.MultiDiGraph[str]
else:  # networkx's types take arguments in its stubs only
    NodeGraph = nx.MultiDiGraph


@dataclass(frozen=True, eq=False)
class Circuit:
    """Edges of `graph` that make up the circuit: `kept`, every one on a path from an input to the logits.

    `n_selected` counts the edges of the selection before those on no path were dropped.
    """

    graph: Graph
    kept: Bool[Tensor, "reader writer"] = field(repr=False)
    n_selected: int
    selection: Mapping[str, Parameter] = field(default_factory=dict[str, Parameter])
    """The rule that chose the edges, with its parameters."""
    scores: Scores | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.kept.shape != self.graph.possible.shape or bool((self.kept & ~self.graph.possible).any()):
            raise InputError("The circuit's mask is not a part of its graph.")
        object.__setattr__(self, "kept", self.kept.cpu().clone())

    def __repr__(self) -> str:
        how = ", ".join(f"{name}={value}" for name, value in self.selection.items())
        return f"Circuit({self.n_edges} of {self.graph.n_edges} edges, {self.n_selected} selected ({how}))"

    @property
    def edges(self) -> tuple[str, ...]:
        """The names of the edges, sorted."""
        return tuple(sorted(self.graph.edge_name(int(r), int(w)) for r, w in self.kept.nonzero()))

    @property
    def nodes(self) -> tuple[str, ...]:
        """The writers (and `logits`) that an edge touches, in the model's order."""
        used = self.kept.any(0) | (self.graph.feeds & self.kept.any(1, keepdim=True)).any(0)
        names = [name for name, is_used in zip(self.graph.writers, used.tolist(), strict=True) if is_used]
        return (*names, "logits") if bool(self.kept[-1].any()) else tuple(names)

    @property
    def n_edges(self) -> int:
        """How many edges the circuit has."""
        return int(self.kept.sum())

    @property
    def cut(self) -> Bool[Tensor, "reader writer"]:
        """The edges that are replaced when the circuit is run alone: all but its own."""
        return self.graph.possible & ~self.kept

    def digest(self) -> str:
        """sha256 over the graph and the edges: tells which circuit a result belongs to."""
        return hashlib.sha256(json.dumps([self.graph.digest(), self.edges]).encode()).hexdigest()

    def to_networkx(self) -> NodeGraph:
        """Nodes and edges as a networkx graph; an edge has `name`, `channel` and, when scored, `score`."""
        out = to_networkx(self.graph, self.kept)
        if self.scores is not None:
            values = self.scores.values
            for _, _, data in out.edges(data=True):
                data["score"] = float(values[self.graph.edge_index(data["name"])])
        return out


def to_networkx(graph: Graph, mask: Bool[Tensor, "reader writer"]) -> NodeGraph:
    """The masked edges between nodes; an edge into a shared K or V head leads to every head of its group."""
    out: NodeGraph = nx.MultiDiGraph()
    for r, w in mask.nonzero().tolist():
        reader = graph.readers[r]
        channel = reader[-2] if reader.endswith(">") else ""
        fed = [graph.writers[i] for i in graph.feeds[r].nonzero().flatten().tolist()] or ["logits"]
        for node in fed:
            out.add_edge(graph.writers[w], node, name=graph.edge_name(r, w), channel=channel)
    return out


def on_paths(graph: Graph, mask: Bool[Tensor, "reader writer"]) -> Bool[Tensor, "reader writer"]:
    """The part of the mask that lies on a path from an input to the logits."""
    net = to_networkx(graph, mask)
    reached: set[str] = set()
    for source in graph.inputs:
        if source in net:
            reached |= {source} | nx.descendants(net, source)
    useful = {"logits"} | nx.ancestors(net, "logits") if "logits" in net else set[str]()
    kept = mask.clone()
    for r, w in mask.nonzero().tolist():
        fed = {graph.writers[i] for i in graph.feeds[r].nonzero().flatten().tolist()} or {"logits"}
        kept[r, w] = graph.writers[w] in reached and not useful.isdisjoint(fed)
    return kept
