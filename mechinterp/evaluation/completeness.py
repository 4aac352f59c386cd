"""Completeness: does knocking nodes out change the circuit as it changes the model?

Source: Wang et al. 2022 (arXiv 2211.00593), section 4. For a set K of the circuit's nodes, the incompleteness is
|F(C without K) - F(M without K)|, F the mean of the metric over examples. A circuit that lacks the model's backups is
faithful and yet incomplete: the model without K makes up for the loss, the circuit cannot. Deviations: circuits are
edges here, and a node is knocked out by cutting all its outgoing edges (in C those that C has; in M all); the
replacement is `replacement`, where the paper takes means over another distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.evaluation.faithfulness import Ablation, ablation_of, check_denominator
from mechinterp.evaluation.masks import check_members, knock_out, mask_values, with_axes, writers_of
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import Metric, get_metric
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True)
class Knockout:
    """One set K: the circuit and the model without it, means over examples in the metric's unit."""

    name: str
    kind: str
    """`empty`, `given`, `random` or `greedy`."""
    nodes: tuple[str, ...]
    circuit_value: float
    model_value: float
    standard_error: float
    """Of the difference of the two means, over the same examples; NaN for one example."""

    @property
    def difference(self) -> float:
        """F(C without K) - F(M without K)."""
        return self.circuit_value - self.model_value

    @property
    def incompleteness(self) -> float:
        """|F(C without K) - F(M without K)|, a difference of means."""
        return abs(self.difference)


@dataclass(frozen=True)
class Completeness:
    """What `completeness` found. The first set is always the empty one: |F(C) - F(M)|, plain unfaithfulness."""

    metric: str
    ablation: Ablation
    n_examples: int
    full_value: float
    empty_value: float
    sets: tuple[Knockout, ...]
    seed: int | None
    circuit_digest: str
    pairs: Pairs = field(repr=False)
    reference: Pairs | None = field(default=None, repr=False)

    @property
    def worst(self) -> Knockout:
        """The set of the largest incompleteness; of several the first."""
        return max(self.sets, key=lambda found: found.incompleteness)

    def share(self, found: Knockout) -> float:
        """The incompleteness as a share of |F(M) - F(empty)|."""
        return found.incompleteness / abs(self.full_value - self.empty_value)

    def to_frame(self) -> pd.DataFrame:
        """One row a set: name, kind, size, nodes, both values, their difference, incompleteness, its share, error."""
        rows = [
            {
                "name": found.name,
                "kind": found.kind,
                "size": len(found.nodes),
                "nodes": " ".join(found.nodes),
                "circuit": found.circuit_value,
                "model": found.model_value,
                "difference": found.difference,
                "incompleteness": found.incompleteness,
                "share": self.share(found),
                "standard_error": found.standard_error,
            }
            for found in self.sets
        ]
        return with_axes(pd.DataFrame(rows), self.metric, self.ablation)


def completeness(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    sets: Mapping[str, Sequence[str]] | None = None,
    n_random: int = 20,
    metric: Metric | str = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Completeness:
    """The incompleteness for the empty set, each of `sets` (role -> nodes of the circuit) and `n_random` random sets.

    A random set holds each component of the circuit with chance 1/2, so that every set but the empty one is equally
    likely; the graph's inputs are never drawn, but may be named. `reference` are the pairs of the means, as in
    `evaluate`. Cost: two forwards a set and example, and four more.

    Raises InputError for nodes that the circuit has not, and when full and empty model perform alike.
    """
    members = writers_of(circuit, inputs=False)
    chosen: list[tuple[str, str, tuple[str, ...]]] = [("empty", "empty", ())]
    for name, nodes in (sets or {}).items():
        check_members(circuit, nodes)
        if not nodes:
            raise InputError(f"The set {name!r} names no node; the empty set is always there.")
        chosen.append((name, "given", tuple(nodes)))
    if n_random and not members:
        raise InputError("The circuit has no components to draw random sets from; take n_random=0.")
    generator = torch.Generator().manual_seed(seed)
    while len(chosen) < 1 + len(sets or {}) + n_random:
        drawn = (torch.rand(len(members), generator=generator) < 0.5).tolist()
        if any(drawn):
            some = tuple(name for name, is_in in zip(members, drawn, strict=True) if is_in)
            chosen.append((f"random {len(chosen) - len(sets or {})}", "random", some))
    knocked = [knock_out(circuit.graph, nodes) for _, _, nodes in chosen]
    possible = circuit.graph.possible
    cuts = [torch.zeros_like(possible), possible, *[circuit.cut | k for k in knocked], *knocked]
    table = mask_values(
        model,
        circuit.graph,
        pairs,
        cuts,
        metric=metric,
        replacement=replacement,
        reference=reference,
        batch_size=batch_size,
        progress=progress,
    )
    return _result(circuit, pairs, reference, metric, replacement, seed, table, chosen)


def greedy_completeness(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    steps: int = 5,
    metric: Metric | str = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> Completeness:
    """The incompleteness along a greedy search for a bad set: each step adds the component that raises it most.

    Every component is tried in every step (the paper tries a random few); ties go to the first in the model. It ends
    after `steps`, or when all are in. The search sees the examples it is judged on, so `worst` is too pessimistic.
    Cost: two forwards an example for every component left, in each step. Raises as `completeness`.
    """
    members = writers_of(circuit, inputs=False)
    if not 1 <= steps <= len(members):
        raise InputError(f"steps must be from 1 to the {len(members)} components of the circuit; got {steps!r}.")
    graph, zero = circuit.graph, torch.zeros_like(circuit.graph.possible)
    chosen: list[tuple[str, str, tuple[str, ...]]] = [("empty", "empty", ())]
    best: list[Tensor] = []
    ends: list[Tensor] = []
    for step in range(steps):
        progress(step, steps)
        taken = chosen[-1][2]
        left = [name for name in members if name not in taken]
        knocked = [knock_out(graph, (*taken, name)) for name in left]
        first = [zero, graph.possible, circuit.cut, zero] if not ends else []
        table = mask_values(
            model,
            graph,
            pairs,
            [*first, *[circuit.cut | k for k in knocked], *knocked],
            metric=metric,
            replacement=replacement,
            reference=reference,
            batch_size=batch_size,
        )
        if not ends:
            ends, table = list(table[:, :4].unbind(1)), table[:, 4:]
        ours, models = table.split(len(left), 1)
        found = int((ours - models).mean(0).abs().argmax())
        chosen.append((f"greedy {step + 1}", "greedy", (*taken, left[found])))
        best += [ours[:, found], models[:, found]]
    progress(steps, steps)
    columns = [*ends[:3], *best[::2], ends[3], *best[1::2]]
    return _result(circuit, pairs, reference, metric, replacement, None, torch.stack(columns, 1), chosen)


def _result(
    circuit: Circuit,
    pairs: Pairs,
    reference: Pairs | None,
    metric: Metric | str,
    replacement: str,
    seed: int | None,
    table: Tensor,
    chosen: Sequence[tuple[str, str, tuple[str, ...]]],
) -> Completeness:
    """From columns full, empty, then the circuit without each set, then the model without each set."""
    full, empty = table[:, 0], table[:, 1]
    check_denominator(full, empty)
    ours, models = table[:, 2:].split(len(chosen), 1)
    errors = (ours - models).std(0) / len(pairs) ** 0.5 if len(pairs) > 1 else torch.full((len(chosen),), torch.nan)
    found = [
        Knockout(name, kind, nodes, *numbers)
        for (name, kind, nodes), numbers in zip(
            chosen, torch.stack([ours.mean(0), models.mean(0), errors], 1).tolist(), strict=True
        )
    ]
    return Completeness(
        metric=get_metric(metric).name if isinstance(metric, str) else metric.name,
        ablation=replace(
            ablation_of(circuit.graph, replacement),
            granularity=f"{circuit.graph.level}; knocked out nodes by all their outgoing edges",
            component="edges outside the circuit (C) or none (M), and the outgoing edges of the nodes in K",
            set="complement and K (C), K (M)",
        ),
        n_examples=len(pairs),
        full_value=float(full.mean()),
        empty_value=float(empty.mean()),
        sets=tuple(found),
        seed=seed,
        circuit_digest=circuit.digest(),
        pairs=pairs,
        reference=reference,
    )
