"""Random circuits whose every edge lies on a path from the input to the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from mechinterp.circuit import on_paths
from mechinterp.errors import InputError, UnsupportedError
from mechinterp.graph import Graph

T = TypeVar("T")
PathEdges = list[tuple[int, int]]
"""(reader row, writer row) of every edge of a path, from the logits back or in any order."""


class RandomPaths:
    """Draws paths through a graph, or through a part of its edges, under a seed."""

    def __init__(self, graph: Graph, seed: int, within: Bool[Tensor, "reader writer"] | None = None) -> None:
        if graph.positions or graph.level != "edge":
            raise UnsupportedError("Random circuits of paths are made of single edges at all positions, not of nodes.")
        allowed = graph.possible if within is None else on_paths(graph, within)
        self.graph, self.allowed = graph, allowed
        self.generator = torch.Generator().manual_seed(seed)
        self.edges: PathEdges = [(r, w) for r, w in allowed.nonzero().tolist()]
        self._into = [row.nonzero().flatten().tolist() for row in allowed]
        self._out = [column.nonzero().flatten().tolist() for column in allowed.T]
        # Nodes and inputs from which no allowed edge leads on are no way to go (some heads of a shared K or V, say).
        self._fed_by = [[w for w in row.nonzero().flatten().tolist() if self._out[w]] for row in graph.feeds]
        self._inputs_of = [
            [r for r in column.nonzero().flatten().tolist() if self._into[r]] for column in graph.feeds.T
        ]

    def below(self, n: int) -> int:
        """A random whole number from 0 to n - 1."""
        return int(torch.randint(n, (1,), generator=self.generator))

    def through(self, edge: tuple[int, int]) -> PathEdges:
        """A random path through the edge: at every node one of its inputs, or of its readers, each as likely."""
        path, (reader, writer) = [edge], edge
        while self._fed_by[reader]:  # on to the logits, which feed nothing
            node = self._one_of(self._fed_by[reader])
            reader = self._one_of(self._out[node])
            path.append((reader, node))
        while self._inputs_of[writer]:  # back to an input of the graph, which reads nothing
            reader = self._one_of(self._inputs_of[writer])
            writer = self._one_of(self._into[reader])
            path.append((reader, writer))
        return path

    def circuit(self, n_edges: int) -> Bool[Tensor, "reader writer"]:
        """The edges of random paths, each through a random edge that is not yet in, until there are `n_edges`.

        The last path is kept whole, so that every edge is on a path: there may be a few more than `n_edges`.
        """
        if not 1 <= n_edges <= len(self.edges):
            raise InputError(f"Random paths have from 1 to {len(self.edges)} edges here; got {n_edges!r}.")
        chosen: set[tuple[int, int]] = set()
        for i in torch.randperm(len(self.edges), generator=self.generator).tolist():
            if len(chosen) >= n_edges:
                break
            if self.edges[i] not in chosen:
                chosen.update(self.through(self.edges[i]))
        return self.mask(chosen)

    def added_path(self, kept: Bool[Tensor, "reader writer"]) -> tuple[Bool[Tensor, "reader writer"], tuple[int, int]]:
        """`kept` with a random path through an edge that it has not, and one of the edges that are new."""
        missing = (self.allowed & ~kept).nonzero().tolist()
        if not missing:
            raise InputError("The circuit is the whole graph: no edge can be added to it.")
        r, w = missing[self.below(len(missing))]
        path = self.through((r, w))
        new = [edge for edge in path if not kept[edge]]
        return kept | self.mask(path), self._one_of(new)

    def mask(self, edges: PathEdges | set[tuple[int, int]]) -> Bool[Tensor, "reader writer"]:
        """True at the edges."""
        out = torch.zeros_like(self.graph.possible)
        for edge in edges:
            out[edge] = True
        return out

    def _one_of(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]
