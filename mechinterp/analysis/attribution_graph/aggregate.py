"""`aggregate_graphs`: the attribution graphs of several prompts as one: mean influence and edges, and how often."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mechinterp.analysis.attribution_graph.graph import AttributionGraph, GraphNode
from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown

POSITIONS = ("summed", "kept")


@dataclass(frozen=True, eq=False)
class AggregatedGraph:
    """Means over the attribution graphs of several prompts; what a graph does not have counts as 0 there.

    Args:
        nodes: A row per node, the largest influence first: node, kind, influence (the mean), frequency (the share of
            graphs that have it), value (the mean activation, or probability of a target, in the graphs that have it).
        edges: A row per edge, the largest first: source, target, weight (the mean), sd (over the graphs), frequency.
        graphs: How many there are.
        positions: `summed`: a feature is one node at whatever positions; `kept`: one per position.
        of_errors: The share of the influence that is from errors, of every graph.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    graphs: int
    positions: str
    of_errors: tuple[float, ...]

    def __repr__(self) -> str:
        features = self.nodes[self.nodes["kind"] == "feature"]
        return (
            f"AggregatedGraph({self.graphs} graphs, positions {self.positions}: {len(features):,} features, "
            f"{int((features['frequency'] == 1).sum()):,} of them in every graph; {len(self.edges):,} edges; "
            f"on average {np.mean(self.of_errors):.0%} of the influence is from errors)"
        )

    def frequent(self, share: float = 0.5) -> AggregatedGraph:
        """What at least this share of the graphs has."""
        if not 0 < share <= 1:
            raise InputError(f"`share` is a share of the graphs, above 0 and at most 1; got {share}.")
        nodes = self.nodes.loc[self.nodes["frequency"] >= share - 1e-12].reset_index(drop=True)
        edges = self.edges.loc[self.edges["frequency"] >= share - 1e-12].reset_index(drop=True)
        return AggregatedGraph(nodes, edges, self.graphs, self.positions, self.of_errors)


def aggregate_graphs(graphs: Iterable[AttributionGraph], *, positions: str = "summed") -> AggregatedGraph:
    """The graphs of several prompts as one, with the share of prompts that have each node and edge.

    How often something is there is the doubt about it: what a single prompt has need not be of the task. Prune the
    graphs first (`graph.pruned()`), since in whole graphs most features are there by a little.

    Args:
        graphs: The graphs, of one model with the same transcoders; an iterator is read one by one.
        positions: `summed`: influences and edges of a feature are summed over its positions, and tokens are told apart
            by their text. `kept`: nodes at the same position are the same, for prompts of one template.

    The aggregate of one graph with positions kept is that graph. Sums of means are means of sums, so an aggregate of
    parts is their mean, weighted by their numbers of graphs. Targets of the same name are the same.

    Raises InputError for graphs of different models, transcoders or edges, and for none.

    >>> import torch, mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> bases = mi.load_bases("bundled:transcoders", model=model, check=False)
    >>> prompts = [torch.tensor([2, 5, 6]), torch.tensor([2, 5, 7])]
    >>> graphs = (mi.attribution_graph(model, prompt, bases, targets=[3]).pruned() for prompt in prompts)
    >>> mi.aggregate_graphs(graphs).graphs
    2
    """
    if positions not in POSITIONS:
        raise unknown("treatment of positions", positions, POSITIONS)
    made: tuple[object, ...] | None = None
    nodes, edges, errors = list[pd.DataFrame](), list[pd.DataFrame](), list[float]()
    for graph in graphs:
        of = (graph.model, dict(graph.bases), graph.about.get("held", "norms"))
        if made is not None and of != made:
            raise InputError(
                "The graphs differ in their model, transcoders or what their edges hold; aggregate alike ones."
            )
        made = of
        named = [_name(graph, node, positions == "kept") for node in graph.nodes]
        nodes.append(_nodes(graph, named))
        edges.append(_edges(graph, named))
        errors.append(graph.scores.of_errors)
    if not nodes:
        raise InputError("There are no graphs to aggregate.")
    return AggregatedGraph(
        _mean_nodes(pd.concat(nodes), len(nodes)), _mean_edges(pd.concat(edges), len(nodes)), len(nodes), positions,
        tuple(errors),
    )  # fmt: skip


def _name(graph: AttributionGraph, node: GraphNode, kept: bool) -> str:
    if kept or node.position < 0 or node.kind == "target":
        return node.name
    return f"token {node.text!r}" if node.kind == "token" else node.name.partition("@")[0]


def _nodes(graph: AttributionGraph, named: list[str]) -> pd.DataFrame:
    influence = [*graph.influence().tolist(), *(node.weight for node in graph.targets)]
    kinds, values = [node.kind for node in graph.nodes], [node.value for node in graph.nodes]
    table = pd.DataFrame({"node": named, "kind": kinds, "influence": influence, "value": values})
    return pd.DataFrame(table.groupby(["node", "kind"], sort=False, as_index=False).sum())


def _edges(graph: AttributionGraph, named: list[str]) -> pd.DataFrame:
    rows, columns = graph.weights.nonzero(as_tuple=True)
    table = pd.DataFrame(
        {
            "source": [named[i] for i in columns.tolist()],
            "target": [named[graph.n_leaves + i] for i in rows.tolist()],
            "weight": graph.weights[rows, columns].double().cpu().numpy(),
        }
    )
    return pd.DataFrame(table.groupby(["source", "target"], sort=False, as_index=False).sum())


def _mean_nodes(every: pd.DataFrame, n: int) -> pd.DataFrame:
    found = every.groupby(["node", "kind"], sort=False)
    table = found.agg(influence=("influence", "sum"), frequency=("influence", "size"), value=("value", "mean"))
    table[["influence", "frequency"]] /= n
    table = table.reset_index()
    return table.sort_values("influence", ascending=False, kind="stable", ignore_index=True)


def _mean_edges(every: pd.DataFrame, n: int) -> pd.DataFrame:
    every = every.assign(square=every["weight"] ** 2)
    found = every.groupby(["source", "target"], sort=False)
    table = found.agg(weight=("weight", "sum"), square=("square", "sum"), frequency=("weight", "size")) / n
    table["sd"] = np.sqrt((table.pop("square") - table["weight"] ** 2).clip(lower=0))
    table = table[["weight", "sd", "frequency"]].reset_index()
    return table.sort_values("weight", key=np.abs, ascending=False, kind="stable", ignore_index=True)
