"""Minimality: what each node and each edge of the circuit adds to it.

Source: Wang et al. 2022 (arXiv 2211.00593), section 4. A node v is worth its place when for some set K of the circuit's
nodes |F(C without K and v) - F(C without K)| is large, F the mean of the metric over examples. With K empty that is
the plain effect of v, which backups hide; a set K per node, chosen by who knows the circuit, takes them away first.
Deviations: circuits are edges here, and a node is knocked out by cutting its outgoing edges; the replacement is
`replacement`; single edges too.
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
from mechinterp.evaluation.faithfulness import Ablation, ablation_of, check_denominator
from mechinterp.evaluation.masks import check_members, knock_out, mask_values, with_axes, writers_of
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import Metric, get_metric
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True)
class Removal:
    """One node or edge v taken away: means over examples, in the metric's unit."""

    name: str
    given: tuple[str, ...]
    """The nodes K that were knocked out before."""
    n_edges: int
    """How many edges of the circuit that cuts, beyond those of K."""
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
    """What `node_minimality` and `edge_minimality` found, the largest change first."""

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
        """One row a node or edge, the largest change first.

        `change` is the absolute change of the mean, `effect` the signed one (positive = v helps the task), `share` the
        change as a share of |F(M) - F(empty)|; `faithfulness_before` and `faithfulness_after` are of the circuit
        without K, and without K and v.
        """
        gap = self.full_value - self.empty_value
        rows = [
            {
                "name": found.name,
                "given": " ".join(found.given),
                "edges": found.n_edges,
                "before": found.before,
                "after": found.after,
                "change": found.change,
                "effect": self.direction * (found.before - found.after),
                "share": found.change / abs(gap),
                "faithfulness_before": (found.before - self.empty_value) / gap,
                "faithfulness_after": (found.after - self.empty_value) / gap,
            }
            for found in self.removals
        ]
        return with_axes(pd.DataFrame(rows), self.metric, self.ablation)


def node_minimality(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    given: Mapping[str, Sequence[str]] | None = None,
    metric: Metric | str = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> Minimality:
    """What knocking out each node adds to what its set K (`given`: node -> nodes; empty where none is) does.

    Every node of the circuit that writes has a row, the graph's inputs too. `reference` as in `evaluate`. Cost: one
    forward a node and example, one for every different K, and three more.

    Raises InputError for nodes that the circuit has not, for a K with its own node in it, and when full and empty
    model perform alike.
    """
    nodes, sets = writers_of(circuit, inputs=True), {key: tuple(value) for key, value in (given or {}).items()}
    check_members(circuit, sets)
    for name, others in sets.items():
        check_members(circuit, others)
        if name in others:
            raise InputError(f"The set K of {name!r} holds {name!r} itself.")
    graph = circuit.graph
    items = [(name, knock_out(graph, [name]), sets.get(name, ())) for name in nodes]
    kind = f"{circuit.graph.level}; knocked out nodes by all their outgoing edges"
    return _removals(model, circuit, pairs, items, kind, metric, replacement, reference, batch_size, progress)


def edge_minimality(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    metric: Metric | str = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> Minimality:
    """What cutting each single edge of the circuit changes. `reference` as in `evaluate`.

    Cost: one forward an edge and example, and three more. Raises InputError when full and empty model perform alike.
    """
    graph = circuit.graph
    items: list[tuple[str, Tensor, tuple[str, ...]]] = []
    if circuit.graph.level != "edge":
        raise UnsupportedError("The circuit was chosen node by node; take node_minimality.")
    for r, w in circuit.kept.nonzero().tolist():
        mask = torch.zeros_like(graph.possible)
        mask[r, w] = True
        items.append((graph.edge_name(r, w), mask, ()))
    return _removals(model, circuit, pairs, items, "edge", metric, replacement, reference, batch_size, progress)


def _removals(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    items: Sequence[tuple[str, Bool[Tensor, "reader writer"], tuple[str, ...]]],
    granularity: str,
    metric: Metric | str,
    replacement: str,
    reference: Pairs | None,
    batch_size: int,
    progress: Progress,
) -> Minimality:
    """Full, empty, the circuit without every K, then without every K and v: all side by side."""
    metric = get_metric(metric) if isinstance(metric, str) else metric
    graph = circuit.graph
    sets = list(dict.fromkeys([(), *[tuple(sorted(given)) for _, _, given in items]]))
    before = [circuit.cut | knock_out(graph, given) for given in sets]
    place = {given: i for i, given in enumerate(sets)}
    places = [place[tuple(sorted(given))] for _, _, given in items]
    after = [before[i] | cut for i, (_, cut, _) in zip(places, items, strict=True)]
    table = mask_values(
        model,
        graph,
        pairs,
        [torch.zeros_like(graph.possible), graph.possible, *before, *after],
        metric=metric,
        replacement=replacement,
        reference=reference,
        batch_size=batch_size,
        progress=progress,
    )
    check_denominator(table[:, 0], table[:, 1])
    full, empty, *means = table.mean(0).tolist()
    found = [
        Removal(name, given, int((mask & ~before[i]).sum()), means[i], value)
        for (name, _, given), i, mask, value in zip(items, places, after, means[len(before) :], strict=True)
    ]
    return Minimality(
        metric=metric.name,
        direction=metric.direction,
        ablation=replace(
            ablation_of(circuit.graph, replacement),
            granularity=granularity,
            component="edges outside the circuit, and the node or edge (and K)",
            set="complement and the node or edge (and K)",
        ),
        n_examples=len(pairs),
        full_value=full,
        empty_value=empty,
        removals=tuple(sorted(found, key=lambda row: -row.change)),
        circuit_digest=circuit.digest(),
        pairs=pairs,
        reference=reference,
    )
