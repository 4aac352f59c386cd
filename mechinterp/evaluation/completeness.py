"""Completeness: does knocking nodes out change the circuit as it changes the model?

Source: Wang et al. 2022 (arXiv 2211.00593), section 4. For a set K of the circuit's nodes, the incompleteness is
|F(C without K) - F(M without K)|, with F the mean of the metric over examples. A circuit that lacks the model's backup
nodes is faithful but incomplete: without K the model compensates for the loss and the circuit cannot. Deviations:
circuits are sets of edges, and a node is knocked out by cutting all its outgoing edges (in C those that C has, in M all
of them); the replacement is `replacement`, where the paper takes means over another distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.evaluation.ablation import Ablation, AblationSetup
from mechinterp.evaluation.faithfulness import check_denominator
from mechinterp.evaluation.masks import check_members, knock_out, mask_values, with_axes, writers_of
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True)
class Knockout:
    """One set K: the circuit and the model without it, as means over examples in the metric's unit."""

    name: str
    kind: str
    """`empty`, `given`, `random` or `greedy`."""
    nodes: tuple[str, ...]
    circuit_value: float
    model_value: float
    standard_error: float
    """The standard error of the difference of the two means, over the same examples; NaN for a single example."""

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
    """The incompleteness of each set. The first set is always the empty one: |F(C) - F(M)|, plain unfaithfulness."""

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
        """The set with the largest incompleteness, the first if several tie."""
        return max(self.sets, key=lambda knockout: knockout.incompleteness)

    def share(self, found: Knockout) -> float:
        """The incompleteness of one of the sets as a share of |F(M) - F(empty)|."""
        return found.incompleteness / abs(self.full_value - self.empty_value)

    def to_frame(self) -> pd.DataFrame:
        """One row per set, with the fields of the `Knockout`, its size and the share of its incompleteness."""
        rows = [
            {
                "name": knockout.name,
                "kind": knockout.kind,
                "size": len(knockout.nodes),
                "nodes": " ".join(knockout.nodes),
                "circuit": knockout.circuit_value,
                "model": knockout.model_value,
                "difference": knockout.difference,
                "incompleteness": knockout.incompleteness,
                "share": self.share(knockout),
                "standard_error": knockout.standard_error,
            }
            for knockout in self.sets
        ]
        return with_axes(pd.DataFrame(rows), self.metric, self.ablation)


def completeness(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    sets: Mapping[str, Sequence[str]] | None = None,
    n_random: int = 20,
    metric: MetricLike = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Completeness:
    """The incompleteness of the empty set, of each of `sets`, and of random sets of the circuit's nodes.

    A random set contains each head and MLP of the circuit with probability 1/2, so that every nonempty set is equally
    likely; the graph's inputs are never drawn but may be named in `sets`. Cost: two forwards per set and example, and
    four more.

    Args:
        model: The model that the circuit was found in.
        circuit: The circuit.
        pairs: The examples; use held-out ones.
        sets: Sets of the circuit's nodes to knock out, by name (a role, for example).
        n_random: How many random sets to draw.
        metric: A metric, or the name of one.
        replacement: What a cut edge carries: `corrupt`, `mean`, `mean-positional` or `zero`.
        reference: The pairs whose corrupt prompts give the means; by default `pairs`.
        batch_size: How many examples to run at a time.
        seed: The seed of the random sets.
        progress: Called with the number of runs done and their total; one run is one mask on one example.

    Raises:
        InputError: A node is not in the circuit, a set is empty, or the full model and the empty circuit perform alike.
    """
    setup = AblationSetup.of(model, circuit.graph, pairs, metric, replacement, reference, batch_size, progress)
    members = writers_of(circuit, inputs=False)
    chosen: list[tuple[str, str, tuple[str, ...]]] = [("empty", "empty", ())]
    for name, nodes in (sets or {}).items():
        check_members(circuit, nodes)
        if not nodes:
            raise InputError(f"The set {name!r} names no node; leave it out, the empty set is always included.")
        chosen.append((name, "given", tuple(nodes)))
    if n_random and not members:
        raise InputError("The circuit has no components to draw random sets from; take n_random=0.")
    generator = torch.Generator().manual_seed(seed)
    while len(chosen) < 1 + len(sets or {}) + n_random:
        drawn = (torch.rand(len(members), generator=generator) < 0.5).tolist()
        if any(drawn):
            nodes = tuple(name for name, is_in in zip(members, drawn, strict=True) if is_in)
            chosen.append((f"random {len(chosen) - len(sets or {})}", "random", nodes))
    knocked = [knock_out(circuit.graph, nodes) for _, _, nodes in chosen]
    possible = circuit.graph.possible
    cuts = [torch.zeros_like(possible), possible, *[circuit.cut | k for k in knocked], *knocked]
    return _result(setup, circuit, mask_values(setup, cuts), chosen, seed)


def greedy_completeness(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    steps: int = 5,
    metric: MetricLike = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> Completeness:
    """The incompleteness along a greedy search for a bad set, which each step extends by the worst node.

    Each step tries every head and MLP of the circuit that is not in the set yet (the paper tries a random few) and adds
    the one with which the incompleteness is largest, the first in the model if several tie. The search sees the
    examples that it is judged on, so `worst` is too pessimistic. Cost: per step, two forwards per example for each node
    that is tried.

    Args:
        model: The model that the circuit was found in.
        circuit: The circuit.
        pairs: The examples.
        steps: How many nodes to add.
        metric: A metric, or the name of one.
        replacement: What a cut edge carries: `corrupt`, `mean`, `mean-positional` or `zero`.
        reference: The pairs whose corrupt prompts give the means; by default `pairs`.
        batch_size: How many examples to run at a time.
        progress: Called with the number of steps done and their total.

    Raises:
        InputError: The circuit has fewer nodes than `steps`, or the full model and the empty circuit perform alike.
    """
    setup = AblationSetup.of(model, circuit.graph, pairs, metric, replacement, reference, batch_size, no_progress)
    members = writers_of(circuit, inputs=False)
    if not 1 <= steps <= len(members):
        raise InputError(f"steps must be from 1 to {len(members)}, the heads and MLPs of the circuit; got {steps!r}.")
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
        table = mask_values(setup, [*first, *[circuit.cut | k for k in knocked], *knocked])
        if not ends:
            ends, table = list(table[:, :4].unbind(1)), table[:, 4:]
        ours, models = table.split(len(left), 1)
        worst = int((ours - models).mean(0).abs().argmax())
        chosen.append((f"greedy {step + 1}", "greedy", (*taken, left[worst])))
        best += [ours[:, worst], models[:, worst]]
    progress(steps, steps)
    columns = [*ends[:3], *best[::2], ends[3], *best[1::2]]
    return _result(setup, circuit, torch.stack(columns, 1), chosen, None)


def _result(
    setup: AblationSetup,
    circuit: Circuit,
    table: Float[Tensor, "example mask"],
    chosen: Sequence[tuple[str, str, tuple[str, ...]]],
    seed: int | None,
) -> Completeness:
    """The result, from the columns full, empty, then the circuit without each set, then the model without each set.

    Args:
        setup: What the table was measured with.
        circuit: The circuit.
        table: The metric of each example under each mask.
        chosen: Name, kind and nodes of each set.
        seed: The seed of the random sets; None if none were drawn.
    """
    full, empty = table[:, 0], table[:, 1]
    check_denominator(full, empty)
    ours, models = table[:, 2:].split(len(chosen), 1)
    n = len(setup.pairs)
    errors = (ours - models).std(0) / n**0.5 if n > 1 else torch.full((len(chosen),), torch.nan)
    knockouts = [
        Knockout(name, kind, nodes, *numbers)
        for (name, kind, nodes), numbers in zip(
            chosen, torch.stack([ours.mean(0), models.mean(0), errors], 1).tolist(), strict=True
        )
    ]
    return Completeness(
        **setup.stated(circuit),
        ablation=replace(
            setup.axes,
            granularity=f"{circuit.graph.level}; knocked out nodes by all their outgoing edges",
            component="edges outside the circuit (C) or none (M), and the outgoing edges of the nodes in K",
            set="complement and K (C), K (M)",
        ),
        full_value=float(full.mean()),
        empty_value=float(empty.mean()),
        sets=tuple(knockouts),
        seed=seed,
    )
