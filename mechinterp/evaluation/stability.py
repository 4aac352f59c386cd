"""Stability: how similar several circuits of one graph are, for example from different seeds, samples or settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import Graph
from mechinterp.models.sites import split_position


@dataclass(frozen=True, eq=False)
class Stability:
    """How often each edge and node occurs, and how much each two circuits overlap."""

    names: tuple[str, ...]
    graph: Graph
    edge_frequency: Float[Tensor, "reader writer"] = field(repr=False)
    """The share of the circuits that have the edge."""
    node_frequency: dict[str, float] = field(repr=False)
    """The share of the circuits that have the node, for every node in at least one of them."""
    edge_jaccard: Float[Tensor, "circuit circuit"] = field(repr=False)
    """|A and B| / |A or B| over edges."""
    node_jaccard: Float[Tensor, "circuit circuit"] = field(repr=False)
    expected_edge_jaccard: float
    """Roughly what random circuits of these sizes would have, with |A||B|/n edges in common; mean over all couples."""

    @property
    def mean_edge_jaccard(self) -> float:
        """The mean over all couples of different circuits."""
        return _mean_of_couples(self.edge_jaccard)

    @property
    def mean_node_jaccard(self) -> float:
        """The mean over all couples of different circuits."""
        return _mean_of_couples(self.node_jaccard)

    def core(self, share: float = 1.0) -> Bool[Tensor, "reader writer"]:
        """The edges that at least this share of the circuits have (1: all of them).

        Raises InputError unless 0 < share <= 1.
        """
        if not 0 < share <= 1:
            raise InputError(f"share must be above 0 and at most 1; got {share!r}.")
        # Frequencies are k / n; the tolerance is far below 1 / n and absorbs the rounding of the division.
        return self.edge_frequency >= share - 1e-9

    def to_frame(self) -> pd.DataFrame:
        """One row per edge in any of the circuits, the most frequent first: edge, writer, reader, frequency."""
        rows = [
            (self.graph.edge_name(r, w), self.graph.writers[w], self.graph.readers[r], float(self.edge_frequency[r, w]))
            for r, w in self.edge_frequency.nonzero().tolist()
        ]
        frame = pd.DataFrame(rows, columns=["edge", "writer", "reader", "frequency"])
        return frame.sort_values("frequency", ascending=False, kind="stable", ignore_index=True)

    def nodes_frame(self) -> pd.DataFrame:
        """One row per node in any of the circuits, the most frequent first: node, frequency."""
        frame = pd.DataFrame(list(self.node_frequency.items()), columns=["node", "frequency"])
        return frame.sort_values("frequency", ascending=False, kind="stable", ignore_index=True)

    def overlap(self) -> pd.DataFrame:
        """One row per couple of circuits: a, b, edge_jaccard, node_jaccard."""
        rows = [
            (self.names[i], self.names[j], float(self.edge_jaccard[i, j]), float(self.node_jaccard[i, j]))
            for i, j in combinations(range(len(self.names)), 2)
        ]
        return pd.DataFrame(rows, columns=["a", "b", "edge_jaccard", "node_jaccard"])


def stability(circuits: Sequence[Circuit], names: Sequence[str] | None = None) -> Stability:
    """How similar the circuits are: how often each edge and node occurs, and the Jaccard index of each two.

    No model is run.
    Overlap says nothing about what the edges do: circuits with few edges in common can be equally faithful, and
    circuits with most edges in common need not be (Hanna et al. 2024, arXiv 2403.17806).

    Args:
        circuits: At least two circuits of one graph, none of them empty.
        names: Their names in tables, all different; by default `0`, `1`, ...

    Raises:
        InputError: There are fewer than two circuits, they are of different graphs, one is empty, or the names do not
            tell them apart.
    """
    if len(circuits) < 2:
        raise InputError(f"Stability compares at least two circuits; got {len(circuits)}.")
    graph = circuits[0].graph
    labels = tuple(names) if names is not None else tuple(str(i) for i in range(len(circuits)))
    if len(labels) != len(circuits) or len(set(labels)) != len(labels):
        raise InputError(f"Give {len(circuits)} different names; got {list(labels)}.")
    for label, circuit in zip(labels, circuits, strict=True):
        if circuit.graph.digest() != graph.digest():
            raise InputError(f"Circuit {label!r} is of another graph than the first; compare circuits of one graph.")
        if not circuit.n_edges:
            raise InputError(f"Circuit {label!r} has no edges, so its overlap is not defined.")
    edges = torch.stack([circuit.kept[graph.possible] for circuit in circuits])
    used = [set(circuit.nodes) for circuit in circuits]
    rows = {name: row for row, name in enumerate((*graph.writers, "logits"))}
    names_used = sorted(set[str]().union(*used), key=lambda name: (rows[split_position(name)[0]], name))
    nodes = torch.tensor([[name in one for name in names_used] for one in used])
    sizes = edges.sum(1).tolist()
    expected = [(a, b, a * b / graph.n_edges) for a, b in combinations(sizes, 2)]
    return Stability(
        names=labels,
        graph=graph,
        edge_frequency=torch.stack([circuit.kept for circuit in circuits]).double().mean(0),
        node_frequency=dict(zip(names_used, nodes.double().mean(0).tolist(), strict=True)),
        edge_jaccard=_jaccard(edges),
        node_jaccard=_jaccard(nodes),
        expected_edge_jaccard=sum(both / (a + b - both) for a, b, both in expected) / len(expected),
    )


def _jaccard(members: Bool[Tensor, "circuit item"]) -> Float[Tensor, "circuit circuit"]:
    table = members.double()
    common, sizes = table @ table.T, table.sum(1)
    return common / (sizes[:, None] + sizes[None, :] - common)


def _mean_of_couples(matrix: Float[Tensor, "circuit circuit"]) -> float:
    n = len(matrix)
    return float((matrix.sum() - matrix.diagonal().sum()) / (n * (n - 1)))
