"""Minimality: what each node and each edge contributes to the circuit.

Source: Wang et al. 2022 (arXiv 2211.00593), section 4. A node v belongs in the circuit if for some set K of the other
nodes |F(C without K and v) - F(C without K)| is large, with F the mean of the metric over examples. With K empty this
is the plain effect of v, which backup nodes can hide; choose K for a node so that it contains its backups. Deviations:
circuits are sets of edges, and a node is knocked out by cutting its outgoing edges; the replacement is `replacement`;
single edges can be removed, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.evaluation.ablation import Ablation, AblationSetup
from mechinterp.evaluation.faithfulness import check_denominator
from mechinterp.evaluation.masks import check_members, knock_out, mask_values, with_axes, writers_of
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True)
class Removal:
    """The circuit with and without one node or edge v, as means over examples in the metric's unit."""

    name: str
    given: tuple[str, ...]
    """The set K of nodes that is knocked out in both."""
    n_edges: int
    """How many edges removing v cuts, beyond those that knocking out K cuts."""
    before: float
    """F(C without K)."""
    after: float
    """F(C without K and v)."""

    @property
    def change(self) -> float:
        """|F(C without K and v) - F(C without K)|: the paper's minimality score."""
        return abs(self.before - self.after)


@dataclass(frozen=True)
class Minimality:
    """What each node or edge contributes, the largest change first."""

    metric: str
    direction: int
    """+1 when a higher value of the metric is better, else -1."""
    ablation: Ablation
    n_examples: int
    full_value: float
    empty_value: float
    removals: tuple[Removal, ...]
    circuit_digest: str
    pairs: Pairs = field(repr=False)
    reference: Pairs | None = field(default=None, repr=False)

    def to_frame(self) -> pd.DataFrame:
        """One row per node or edge, the largest change first.

        `change` is the absolute change of the mean, `effect` the signed one (positive = v helps the task), and `share`
        the change as a share of |F(M) - F(empty)|. `faithfulness_before` is that of the circuit without K,
        `faithfulness_after` that of the circuit without K and v.
        """
        gap = self.full_value - self.empty_value
        rows = [
            {
                "name": removal.name,
                "given": " ".join(removal.given),
                "edges": removal.n_edges,
                "before": removal.before,
                "after": removal.after,
                "change": removal.change,
                "effect": self.direction * (removal.before - removal.after),
                "share": removal.change / abs(gap),
                "faithfulness_before": (removal.before - self.empty_value) / gap,
                "faithfulness_after": (removal.after - self.empty_value) / gap,
            }
            for removal in self.removals
        ]
        return with_axes(pd.DataFrame(rows), self.metric, self.ablation)


def node_minimality(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    given: Mapping[str, Sequence[str]] | None = None,
    metric: MetricLike = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> Minimality:
    """The change when each node is knocked out of the circuit, on top of a set K of other nodes.

    Every node with an outgoing edge in the circuit has a row, the graph's inputs included. Cost: one forward per node
    and example, one for every different K, and three more.

    Args:
        model: The model that the circuit was found in.
        circuit: The circuit.
        pairs: The examples; use held-out ones.
        given: The set K of each node, by node; by default it is empty.
        metric: A metric, or the name of one.
        replacement: What a cut edge carries: `corrupt`, `mean`, `mean-positional` or `zero`.
        reference: The pairs whose corrupt prompts give the means; by default `pairs`.
        batch_size: How many examples to run at a time.
        progress: Called with the number of runs done and their total; one run is one mask on one example.

    Raises:
        InputError: A node is not in the circuit, a set K contains its own node, or the full model and the empty
            circuit perform alike.
    """
    setup = AblationSetup.of(model, circuit.graph, pairs, metric, replacement, reference, batch_size, progress)
    nodes, sets = writers_of(circuit, inputs=True), {key: tuple(value) for key, value in (given or {}).items()}
    check_members(circuit, sets)
    for name, others in sets.items():
        check_members(circuit, others)
        if name in others:
            raise InputError(f"The set K of {name!r} contains {name!r} itself; leave it out.")
    graph = circuit.graph
    items = [(name, knock_out(graph, [name]), sets.get(name, ())) for name in nodes]
    return _removals(setup, circuit, items, f"{graph.level}; knocked out nodes by all their outgoing edges")


def edge_minimality(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    metric: MetricLike = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> Minimality:
    """The change when each edge of the circuit is cut alone. Cost: one forward per edge and example, and three more.

    Args:
        model: The model that the circuit was found in.
        circuit: The circuit; its graph is of level `edge`.
        pairs: The examples; use held-out ones.
        metric: A metric, or the name of one.
        replacement: What a cut edge carries: `corrupt`, `mean`, `mean-positional` or `zero`.
        reference: The pairs whose corrupt prompts give the means; by default `pairs`.
        batch_size: How many examples to run at a time.
        progress: Called with the number of runs done and their total; one run is one mask on one example.

    Raises:
        InputError: The full model and the empty circuit perform alike.
        UnsupportedError: The circuit consists of nodes, not edges.
    """
    setup = AblationSetup.of(model, circuit.graph, pairs, metric, replacement, reference, batch_size, progress)
    graph = circuit.graph
    items: list[tuple[str, Tensor, tuple[str, ...]]] = []
    if graph.level != "edge":
        raise UnsupportedError("The circuit consists of nodes, not of single edges; use node_minimality.")
    for r, w in circuit.kept.nonzero().tolist():
        mask = torch.zeros_like(graph.possible)
        mask[r, w] = True
        items.append((graph.edge_name(r, w), mask, ()))
    return _removals(setup, circuit, items, "edge")


def _removals(
    setup: AblationSetup,
    circuit: Circuit,
    items: Sequence[tuple[str, Bool[Tensor, "reader writer"], tuple[str, ...]]],
    granularity: str,
) -> Minimality:
    """The result, from runs of the full model, the empty circuit, and the circuit without each K and each K and v.

    Args:
        setup: How the circuit is run.
        circuit: The circuit.
        items: Name, mask of cut edges and set K of each v.
        granularity: What the ablation's axis of that name says.
    """
    graph = circuit.graph
    sets = list(dict.fromkeys([(), *[tuple(sorted(given)) for _, _, given in items]]))
    before = [circuit.cut | knock_out(graph, given) for given in sets]
    place = {given: i for i, given in enumerate(sets)}
    places = [place[tuple(sorted(given))] for _, _, given in items]
    after = [before[i] | cut for i, (_, cut, _) in zip(places, items, strict=True)]
    table = mask_values(setup, [torch.zeros_like(graph.possible), graph.possible, *before, *after])
    check_denominator(table[:, 0], table[:, 1])
    full, empty, *means = table.mean(0).tolist()
    removals = [
        Removal(name, given, int((mask & ~before[i]).sum()), means[i], value)
        for (name, _, given), i, mask, value in zip(items, places, after, means[len(before) :], strict=True)
    ]
    return Minimality(
        **setup.stated(circuit),
        direction=setup.metric.direction,
        ablation=replace(
            setup.axes,
            granularity=granularity,
            component="edges outside the circuit, and the node or edge (and K)",
            set="complement and the node or edge (and K)",
        ),
        full_value=full,
        empty_value=empty,
        removals=tuple(sorted(removals, key=lambda removal: -removal.change)),
    )
