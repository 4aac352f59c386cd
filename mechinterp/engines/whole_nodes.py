"""Masks that cut whole nodes, taken apart: what is cut of single edges, and which nodes are replaced where they write.

A node all of whose edges are cut need not be subtracted from what each later reader sees: its write is replaced once,
in the residual stream. What such a node itself reads does not matter, unless others depend on it: under a norm over
all heads of a layer they share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.graphs.graph import Graph


@dataclass(frozen=True)
class Cuts:
    """Cut edges of several candidates, of which some are all edges out of a node (at one position)."""

    edges: Float[Tensor, "candidate reader writer"]
    nodes: Bool[Tensor, "candidate writer position"]

    @cached_property
    def needed(self) -> Bool[Tensor, "candidate writer"]:
        """The writers with a single edge that is cut."""
        return (self.edges != 0).any(1)

    def rows(self, chosen: slice) -> Cuts:
        """Some of the candidates."""
        return Cuts(self.edges[chosen], self.nodes[chosen])


def edges_only(graph: Graph, masks: Float[Tensor, "candidate reader writer"]) -> Cuts:
    """The masks as they are."""
    possible = graph.possible.to(masks.device)
    return Cuts(masks * possible, possible.new_zeros(len(masks), len(graph.writers), graph.n_positions))


def whole_nodes(
    graph: Graph,
    masks: Float[Tensor, "candidate reader writer"],
    acts_on: Bool[Tensor, "reader writer"] | None = None,
    first: int = 0,
) -> Cuts:
    """The same cuts, with nodes whose edges are all cut as such, and without edges into what acts on nothing.

    Args:
        graph: The graph.
        masks: 1 where an edge is cut.
        acts_on: The writers on whose writes a reader acts: by default those that it feeds.
        first: Writers before this one are not replaced: a run that starts behind them cannot.

    >>> from mechinterp.graphs.graph import graph_of
    >>> from mechinterp.models.layout import Dims
    >>> graph = graph_of(Dims(1, 1, 1, 8, 8, 9, 9, 9, True, False, True))
    >>> cuts = whole_nodes(graph, graph.mask_of(["a0.h0->m0", "a0.h0->logits", "input->a0.h0<q>"])[None].float())
    >>> cuts.nodes[0, :, 0].tolist(), bool(cuts.edges.any())
    ([False, True, False], False)
    """
    possible, position = graph.possible.to(masks.device), graph.position.to(masks.device)
    open_edges = possible & (masks != 1)
    at_each: list[Tensor] = []
    for place in range(graph.n_positions):
        here = position == place
        at_each.append(~open_edges[:, here].any(1) & possible[here].any(0))
    nodes = torch.stack(at_each, -1)
    nodes[:, :first] = False
    edges = (masks * possible).masked_fill(nodes[:, :, position].transpose(1, 2), 0)
    acts_on = (graph.feeds if acts_on is None else acts_on).to(edges)
    acting = open_edges.any(1).to(edges)  # [candidate, writer]
    idle = acts_on.any(1) & ((acting @ acts_on.T) == 0)
    return Cuts(edges.masked_fill(idle[..., None], 0), nodes)
