"""`Entry`: one published circuit, on the graph of its model, before it is written as a circuit file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.circuit_file.schema import Citation, ModelRecord, Origin, Position, Role, RoleEdge
from mechinterp.graphs.circuit import Circuit, on_paths
from mechinterp.graphs.graph import Graph

Groups = Mapping[str, tuple[str, ...]]
"""Nodes by the key of their role."""


@dataclass(frozen=True)
class Entry:
    """What a publication states about one circuit, with where each part of it was read."""

    name: str
    title: str
    description: str
    """What it is, how it was made from what is stated, and what is known to be wrong or open about it."""
    citation: Citation
    derived_from: tuple[Origin, ...]
    model: ModelRecord
    graph: Graph
    chosen: Bool[Tensor, "reader writer"] = field(repr=False)
    """The edges; of a graph whose level is nodes, all edges out of the nodes that were chosen."""
    expansion: str
    """The rule by which the edges were made from what is stated."""
    roles: Mapping[str, Role]
    role_edges: tuple[RoleEdge, ...] | None = None
    positions: Mapping[str, Position] = field(default_factory=dict[str, Position])

    def circuit(self) -> Circuit:
        """The circuit. Raises InputError when a chosen edge (not: an edge out of a chosen node) is on no path."""
        kept = on_paths(self.graph, self.chosen)
        lost = int((self.chosen & ~kept).sum())
        if lost and self.graph.level == "edge":
            raise InputError(f"{self.name}: {lost} of the edges lie on no path from the input to the logits.")
        selection = {"rule": "published", "expansion": self.expansion}
        return Circuit(self.graph, kept, int(self.chosen.sum()), selection)


def inputs_of(node: str, channels: Iterable[str] = ("q", "k", "v")) -> tuple[str, ...]:
    """The readers of a node: these inputs of a head; an MLP and the logits have one, of the same name."""
    return tuple(f"{node}<{channel}>" for channel in channels) if node.startswith("a") else (node,)


def between(graph: Graph, writers: Iterable[str], readers: Iterable[str]) -> set[str]:
    """The names of all edges that the graph has from these writers to these readers."""
    readers = tuple(readers)
    pairs = [(graph.writer_index[w], graph.reader_index[r]) for w in writers for r in readers]
    return {graph.edge_name(r, w) for w, r in pairs if bool(graph.possible[r, w])}


def spelled_out(graph: Graph, groups: Groups, role_edges: Iterable[RoleEdge]) -> set[str]:
    """The edges that role edges name literally: from each node of the source to those inputs of each of the target."""
    ends = {**groups, "input": ("input",), "logits": ("logits",)}
    found: set[str] = set()
    for edge in role_edges:
        readers = [reader for node in ends[edge.target] for reader in inputs_of(node, edge.inputs)]
        found |= between(graph, ends[edge.source], readers)
    return found


def out_of(graph: Graph, nodes: Iterable[str]) -> Bool[Tensor, "reader writer"]:
    """All edges out of these nodes, named as the graph names them: `a9.h9`, or `a9.h9@end` at named positions.

    The graph's level is `node`. Raises InputError for a node that the graph does not have.
    """
    units = {name: i for i, name in enumerate(graph.unit_names())}
    wanted = sorted(set(nodes))
    if absent := [name for name in wanted if name not in units]:
        raise InputError(f"The graph has no node {absent[0]!r}.")
    return torch.isin(graph.unit, torch.tensor([units[name] for name in wanted]))
