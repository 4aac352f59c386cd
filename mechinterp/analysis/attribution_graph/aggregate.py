"""`aggregate_graphs`: the attribution graphs of several prompts as one: mean influence and edges, and how often."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from mechinterp.analysis.attribution_graph.graph import AttributionGraph, GraphNode
from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.tasks.pairs import Pairs

POSITIONS = ("summed", "kept")
NODE_COLUMNS = ("node", "kind", "influence", "frequency", "value", "layer", "position", "feature", "basis", "text")
EDGE_COLUMNS = ("source", "target", "weight", "sd", "frequency")


@dataclass(frozen=True, eq=False)
class AggregatedGraph:
    """Means over the attribution graphs of several prompts; what a graph does not have counts as 0 there.

    Args:
        nodes: A row per node, the largest influence first: node, kind, influence (the mean over all graphs), frequency
            (the share of graphs that have it), value (of a feature its activation, summed over its positions if these
            are `summed`; of a target its probability; 0 of others: the mean over the graphs that have it), and layer,
            position, feature, basis, text as in `GraphNode` (a position of -1: summed; no text: it differs).
        edges: A row per edge, the largest first: source, target, weight (the mean over all graphs), sd (over the
            graphs), frequency.
        graphs: How many there are.
        positions: `summed`: a feature is one node at whatever positions; `kept`: one per position.
        of_errors: The share of the influence that is from errors, of every graph before it was pruned.
        words: The text of every token, of every graph.
        model: The name of the model.
        bases: By name, the sha256 of every transcoder.
        held: What the edges hold: `norms`, `patterns` or `nothing`.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    graphs: int
    positions: str
    of_errors: tuple[float, ...]
    words: tuple[tuple[str, ...], ...] = ()
    model: str = ""
    bases: Mapping[str, str] = field(default_factory=dict[str, str])
    held: str = "norms"

    def __str__(self) -> str:
        features = self.nodes[self.nodes["kind"] == "feature"]
        return (
            f"{self.graphs} graphs, positions {self.positions}: {len(features):,} features, "
            f"{int((features['frequency'] == 1).sum()):,} of them in every graph; {len(self.edges):,} edges; "
            f"on average {np.mean(self.of_errors):.0%} of the influence is from errors"
        )

    def __repr__(self) -> str:
        return f"AggregatedGraph({self})"

    def frequent(self, share: float = 0.5) -> AggregatedGraph:
        """What at least this share of the graphs has."""
        if not 0 < share <= 1:
            raise InputError(f"`share` is a share of the graphs, above 0 and at most 1; got {share}.")
        nodes = self.nodes.loc[self.nodes["frequency"] >= share - 1e-12].reset_index(drop=True)
        edges = self.edges.loc[self.edges["frequency"] >= share - 1e-12].reset_index(drop=True)
        return replace(self, nodes=nodes, edges=edges)


def graph_prompts(pairs: Pairs) -> list[tuple[Int[Tensor, " pos"], dict[str, dict[int, float]]]]:
    """(prompt, targets) of every pair, for `attribution_graph`: the clean prompt up to where its answer is read.

    The target is `right - wrong`, the mean logit of the right answers less that of the wrong ones; without wrong
    answers it is `right`. It has one name in all prompts, so that an aggregate has it once.

    Args:
        pairs: Pairs with right answers.

    Raises InputError for pairs without answers, or whose answers are read at several positions.

    >>> import mechinterp as mi
    >>> pairs = mi.Pairs(clean=[[5, 6], [5, 9]], corrupt=[[5, 9], [5, 6]], right=[7, 8], wrong=[8, 7])
    >>> prompt, targets = mi.graph_prompts(pairs)[0]
    >>> prompt.tolist(), targets
    ([5, 6], {'right - wrong': {7: 1.0, 8: -1.0}})
    """
    if pairs.right is None or pairs.answer_pos.shape[1] != 1:
        raise InputError("These pairs have no right answer at one position; give attribution_graph prompt and targets.")
    made: list[tuple[Tensor, dict[str, dict[int, float]]]] = []
    for row, at in enumerate(pairs.answer_pos[:, 0].tolist()):
        weights: dict[int, float] = {}
        for sign, ids in ((1.0, pairs.right), (-1.0, pairs.wrong)):
            own = [] if ids is None else [token for token in ids[row].tolist() if token >= 0]
            for token in own:
                weights[token] = weights.get(token, 0.0) + sign / len(own)
        made.append((pairs.clean[row, : at + 1], {"right" if pairs.wrong is None else "right - wrong": weights}))
    return made


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
    made: tuple[str, dict[str, str], str] | None = None
    nodes, edges, errors = list[pd.DataFrame](), list[pd.DataFrame](), list[float]()
    words = list[tuple[str, ...]]()
    for graph in graphs:
        of = (graph.model, dict(graph.bases), str(graph.about.get("held", "norms")))
        if made is not None and of != made:
            raise InputError(
                "The graphs differ in their model, transcoders or what their edges hold; aggregate alike ones."
            )
        made = of
        named = [_name(graph, node, positions == "kept") for node in graph.nodes]
        nodes.append(_nodes(graph, named, positions == "kept"))
        edges.append(_edges(graph, named))
        whole = graph.about.get("errors_before_pruning")
        errors.append(whole if isinstance(whole, float) else graph.scores.of_errors)
        words.append(graph.words)
    if made is None:
        raise InputError("There are no graphs to aggregate.")
    n = len(nodes)
    return AggregatedGraph(
        _mean_nodes(pd.concat(nodes), n), _mean_edges(pd.concat(edges), n), n, positions, tuple(errors), tuple(words),
        *made,
    )  # fmt: skip


def _name(graph: AttributionGraph, node: GraphNode, kept: bool) -> str:
    if kept or node.position < 0 or node.kind == "target":
        return node.name
    return f"token {node.text!r}" if node.kind == "token" else node.name.partition("@")[0]


def _nodes(graph: AttributionGraph, named: list[str], kept: bool) -> pd.DataFrame:
    influence = [*graph.influence().tolist(), *(node.weight for node in graph.targets)]
    table = pd.DataFrame(
        {
            "node": named,
            "kind": [node.kind for node in graph.nodes],
            "influence": influence,
            "value": [node.value for node in graph.nodes],
            "layer": [node.layer for node in graph.nodes],
            "position": [node.position if kept else -1 for node in graph.nodes],
            "feature": [node.feature for node in graph.nodes],
            "basis": [node.basis for node in graph.nodes],
            "text": [node.text for node in graph.nodes],
        }
    )
    found = table.groupby(["node", "kind"], sort=False, as_index=False)
    once = dict.fromkeys(("layer", "position", "feature", "basis", "text"), "first")
    return pd.DataFrame(found.agg({"influence": "sum", "value": "sum", **once}))


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
    table = found.agg(
        influence=("influence", "sum"),
        frequency=("influence", "size"),
        value=("value", "mean"),
        layer=("layer", "first"),
        position=("position", "max"),  # a target is at the end of every prompt
        feature=("feature", "first"),
        basis=("basis", "first"),
        text=("text", "first"),
    )
    for name, none in (("feature", -1), ("text", "")):
        table[name] = table[name].where(found[name].nunique() == 1, none)
    table[["influence", "frequency"]] /= n
    table = pd.DataFrame(table.reset_index()[list(NODE_COLUMNS)])
    return table.sort_values("influence", ascending=False, kind="stable", ignore_index=True)


def _mean_edges(every: pd.DataFrame, n: int) -> pd.DataFrame:
    every = every.assign(square=every["weight"] ** 2)
    found = every.groupby(["source", "target"], sort=False)
    table = found.agg(weight=("weight", "sum"), square=("square", "sum"), frequency=("weight", "size")) / n
    table["sd"] = np.sqrt((table.pop("square") - table["weight"] ** 2).clip(lower=0))
    table = pd.DataFrame(table.reset_index()[list(EDGE_COLUMNS)])
    return table.sort_values("weight", key=np.abs, ascending=False, kind="stable", ignore_index=True)
