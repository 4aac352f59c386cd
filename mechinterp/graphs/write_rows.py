"""A graph for the engines, in which every writer writes at one moment.

What is chosen is a writer; what engines compute with is a *row*: one for every writer and layer that it writes in. Only
features of a cross-layer transcoder have several. A reader's edge from such a feature is all of its rows that are there
before the reader: a mask holds for each of them, and scores and gradients of rows are added up to their writer.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.graphs.families.family import NodeFamily
from mechinterp.graphs.graph import Graph


@dataclass(frozen=True)
class WriteRows:
    """A graph of rows, and which writer of the graph that it was made of each of them is of."""

    graph: Graph
    """The writers are the rows; the readers are the same."""
    writer: Int[Tensor, " row"] | None
    """None: rows and writers are the same."""
    n_writers: int

    def masks(self, masks: Float[Tensor, "*candidate reader writer"]) -> Float[Tensor, "*candidate reader row"]:
        """Of every row the cuts of its writer, where there is an edge from it."""
        if self.writer is None:
            return masks
        return masks[..., self.writer.to(masks.device)] * self.graph.possible.to(masks.device)

    def tables(self, table: Float[Tensor, "*candidate reader row"]) -> Float[Tensor, "*candidate reader writer"]:
        """The numbers of all rows of a writer added up."""
        if self.writer is None:
            return table
        total = table.new_zeros(*table.shape[:-1], self.n_writers)
        return total.index_add(-1, self.writer.to(table.device), table)


def write_rows(graph: Graph) -> WriteRows:
    """The graph of rows; the graph itself where no writer has more than one, so that nothing changes.

    It is made anew in every call, and its families are equal to those of another one.
    """
    n_writers = len(graph.writers)
    if all(len(family.rows) == 1 for family in graph.families):
        return WriteRows(graph, None, n_writers)
    families: list[NodeFamily] = []
    owners: list[int] = []
    for family in graph.families:
        if family.part_of is not None:
            continue
        parts = [family, *graph.parts_of(family)]
        found = [(one.rows[0], graph.writers_of(one)) for one in parts]
        for one in graph.families:  # what earlier features write here, after the MLP itself
            found += [(row, graph.writers_of(one)) for row in one.rows[1:] if row.part_of in family.writers]
        for row, own in found:
            families.append(row)
            owners += range(own.start, own.stop)
    moments = [family.written for family in families for _ in family.writers]
    before: list[int] = []
    for family in families:
        if family.reads is not None:
            n_ports = sum(len(ports.names) for ports in family.ports)
            before += [bisect_right(moments, family.reads)] * (n_ports * graph.n_positions)
    before.append(len(moments))
    writer = torch.tensor(owners)
    made = replace(
        graph,
        writers=tuple(name for family in families for name in family.writers),
        possible=torch.arange(len(moments))[None] < torch.tensor(before)[:, None],
        feeds=graph.feeds[:, writer],
        families=tuple(families),
    )
    return WriteRows(made, writer, n_writers)
