"""`evaluate`: how much of the model's performance the circuit recovers when everything else is ablated.

Intervals are bootstrapped over examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.base.batches import over_batches
from mechinterp.base.bootstrap import (
    CI_LEVEL,
    MIN_DENOMINATOR,
    bootstrap_interval,
    denominator_vanishes,
    ratio_of_means,
)
from mechinterp.base.errors import InputError
from mechinterp.base.keep import Keep, compute_always
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.shown import Shown
from mechinterp.engines.edge_patching import check_cut, check_model, edge_logits
from mechinterp.engines.readout import clean_logits
from mechinterp.evaluation.ablation import Ablation, AblationSetup
from mechinterp.evaluation.ablation import ablation_of as ablation_of
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import Graph
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import Metric, get_metric
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """How the circuit alone performs. All numbers are over examples; metric values are in the metric's unit.

    `faithfulness` is (m(C) - m(empty)) / (m(full) - m(empty)) with m the mean over examples: a ratio of means. The
    quartiles are of the same ratio per example. `kl` is KL(full model || circuit) in nats, summed over the vocabulary.
    """

    metric: str
    ablation: Ablation
    n_examples: int
    n_edges: int
    n_edges_graph: int
    circuit_value: float
    full_value: float
    empty_value: float
    faithfulness: float
    faithfulness_ci: tuple[float, float]
    ci_level: float
    example_quartiles: tuple[float, float, float]
    """First quartile, median and third quartile of the per-example ratio, over `n_ratio` examples."""
    n_ratio: int
    """How many examples have a ratio: those whose own denominator is not near zero."""
    kl: float
    accuracy: float | None
    accuracy_full: float | None
    random_faithfulness: tuple[float, ...]
    """Faithfulness of random circuits of the same size."""
    seed: int
    per_example: Float[Tensor, "example 3"] = field(repr=False)
    """The metric of the circuit, the full model and the empty circuit, per example."""
    circuit_digest: str
    """`Circuit.digest()` of the circuit that was evaluated."""
    pairs: Pairs = field(repr=False)
    """The examples."""
    reference: Pairs | None = field(default=None, repr=False)
    """The pairs whose corrupt prompts gave the means; None: `pairs`."""

    def _facts(self) -> list[tuple[str, object]]:
        low, high = self.faithfulness_ci
        ends = f"full model {self.full_value:.4g}, every edge replaced {self.empty_value:.4g}"
        random = sum(self.random_faithfulness) / max(1, len(self.random_faithfulness))
        facts: list[tuple[str, object]] = [
            ("faithfulness", f"{self.faithfulness:.3f} [{low:.3f}, {high:.3f}]"),
            ("edges", f"{self.n_edges:,} of {self.n_edges_graph:,}"),
            (self.metric, f"{self.circuit_value:.4g} ({ends})"),
            ("KL to the full model", f"{self.kl:.3g} nats"),
            ("examples", f"{self.n_examples:,}"),
            ("replaced by", self.ablation.value),
        ]
        if self.random_faithfulness:
            facts.insert(1, ("of random circuits", f"{random:.3f}"))
        if self.accuracy is not None:
            facts.insert(-2, ("accuracy", f"{self.accuracy:.1%}"))
        return facts

    def per_example_frame(self) -> pd.DataFrame:
        """One row per example: example, circuit, full, empty (the metric of each), ratio, usable.

        The ratio is (circuit - empty) / (full - empty) of that example; it is NaN, and the example not `usable`, where
        the denominator is near zero. The median of `ratio` is that of `example_quartiles`; its mean is not
        `faithfulness`, which is a ratio of means.
        """
        frame = pd.DataFrame(self.per_example.double().numpy(), columns=["circuit", "full", "empty"])
        frame.insert(0, "example", range(len(frame)))
        ratios, usable = _example_ratios(self.per_example)
        return frame.assign(ratio=ratios.masked_fill(~usable, torch.nan).numpy(), usable=usable.numpy())


def evaluate(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    metric: MetricLike = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    n_random: int = 5,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> Evaluation:
    """The circuit's faithfulness on `pairs`, with every other edge ablated, and random circuits for comparison.

    Neither the model nor the circuit is changed. Cost: about (3 + n_random) forwards per example.

    Args:
        model: The model that the circuit was found in.
        circuit: The circuit.
        pairs: The examples; use held-out ones.
        metric: A metric, or the name of one.
        replacement: What a cut edge carries: `corrupt`, `mean`, `mean-positional` or `zero`.
        reference: The pairs whose corrupt prompts give the means; by default `pairs`.
        n_random: How many random circuits of the same size to run.
        seed: The seed of the random circuits and of the bootstrap.
        batch_size: How many examples to run at a time.
        progress: Called with the number of runs done and their total; one run is one mask on one example.

    Raises:
        InputError: The full model and the empty circuit perform alike, so that faithfulness is not defined; or the
            model, the circuit and the pairs do not match.
    """
    setup = AblationSetup.of(model, circuit.graph, pairs, metric, replacement, reference, batch_size, progress)
    return evaluate_in(setup, circuit, n_random=n_random, seed=seed)


def evaluate_in(
    setup: AblationSetup, circuit: Circuit, *, n_random: int = 5, seed: int = 0, keep: Keep = compute_always
) -> Evaluation:
    """`evaluate` in a setup; `keep` may load what an earlier run has saved."""
    graph, pairs = setup.graph, setup.pairs
    masks = [circuit.cut, graph.possible, *random_cuts(graph, circuit.n_units, n_random, seed)]
    has_answers = pairs.right is not None and pairs.wrong is not None
    metrics = [setup.metric, get_metric("kl_to_clean"), *([get_metric("accuracy")] if has_answers else [])]
    tables = keep(f"evaluation of {circuit.digest()}", lambda: metric_tables(setup, torch.stack(masks), metrics))
    table = tables[setup.metric.name]
    ours, full, empty = table[:, 1], table[:, 0], table[:, 2]
    per_example = torch.stack([ours, full, empty], 1)
    check_denominator(full, empty)
    faithfulness = ratio_of_means(per_example[None])
    ratios, usable = _example_ratios(per_example)
    ratios = ratios[usable]
    quartiles = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=ratios.dtype)).tolist()
    random_rows = [torch.stack([column, full, empty], 1)[None] for column in table[:, 3:].T]
    return Evaluation(
        **setup.stated(circuit),
        ablation=setup.axes,
        n_edges=circuit.n_edges,
        n_edges_graph=graph.n_edges,
        circuit_value=float(ours.mean()),
        full_value=float(full.mean()),
        empty_value=float(empty.mean()),
        faithfulness=float(faithfulness),
        faithfulness_ci=bootstrap_interval(ratio_of_means, per_example, seed=seed),
        ci_level=CI_LEVEL,
        example_quartiles=(quartiles[0], quartiles[1], quartiles[2]),
        n_ratio=len(ratios),
        kl=float(tables["kl_to_clean"][:, 1].mean()),
        accuracy=float(tables["accuracy"][:, 1].mean()) if has_answers else None,
        accuracy_full=float(tables["accuracy"][:, 0].mean()) if has_answers else None,
        random_faithfulness=tuple(float(ratio_of_means(rows)) for rows in random_rows),
        seed=seed,
        per_example=per_example,
    )


def check_denominator(full: Float[Tensor, " example"], empty: Float[Tensor, " example"]) -> None:
    """Return None when the full model and the empty circuit differ enough for a ratio. Raises InputError otherwise."""
    if denominator_vanishes(full, empty):
        raise InputError(
            f"The full model ({float(full.mean()):.4g}) and the empty circuit ({float(empty.mean()):.4g}) perform "
            "alike on these pairs, so faithfulness is not defined; check the task, the metric and the corruption."
        )


def faithfulness_curve(
    model: HookManager,
    masks: Sequence[Bool[Tensor, "reader writer"]],
    graph: Graph,
    pairs: Pairs,
    *,
    metric: MetricLike = "logit_diff",
    replacement: str = "corrupt",
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> tuple[float, ...]:
    """The faithfulness of each mask of kept edges, as a ratio of means. Cost: one forward per mask, and three more."""
    setup = AblationSetup.of(model, graph, pairs, metric, replacement, None, batch_size, progress)
    cuts = torch.stack([graph.possible, *[graph.possible & ~mask for mask in masks]])
    table = metric_tables(setup, cuts, [setup.metric])[setup.metric.name]
    full, empty = table[:, 0], table[:, 1]
    check_denominator(full, empty)
    return tuple(float(ratio_of_means(torch.stack([c, full, empty], 1)[None])) for c in table[:, 2:].T)


def random_cuts(graph: Graph, n_units: int, n: int, seed: int) -> list[Bool[Tensor, "reader writer"]]:
    """`n` masks that cut all but `n_units` random edges (random nodes, if the graph's level is `node`)."""
    generator = torch.Generator().manual_seed(seed)
    cuts: list[Tensor] = []
    for _ in range(n):
        kept = torch.zeros(graph.n_units, dtype=torch.bool)
        kept[torch.randperm(graph.n_units, generator=generator)[:n_units]] = True
        cuts.append(graph.possible & ~kept[graph.unit.clamp(min=0)])
    return cuts


def metric_tables(
    setup: AblationSetup, cuts: Bool[Tensor, "mask reader writer"], metrics: Sequence[Metric]
) -> dict[str, Float[Tensor, "example column"]]:
    """For each metric, a table whose columns are the full model and then each mask; all metrics share the runs."""
    check_model(setup.model, setup.graph, setup.pairs)
    values = setup.build_replacement()
    masks = check_cut(setup.graph, cuts)
    metrics = list({metric.name: metric for metric in metrics}.values())
    done, total = 0, len(masks) * len(setup.pairs)
    setup.progress(done, total)

    def run(batch: Pairs, rows: slice) -> Mapping[str, Tensor]:
        nonlocal done
        full = clean_logits(setup.model, batch)
        columns: dict[str, list[Tensor]] = {metric.name: [metric(full, batch, full)] for metric in metrics}
        for logits in edge_logits(setup.model, setup.graph, batch, masks, values.on(batch)):
            for metric in metrics:
                columns[metric.name].append(metric(logits, batch, full))
            done += len(batch)
            setup.progress(done, total)
        return {name: torch.stack(values_of, 1).cpu() for name, values_of in columns.items()}

    pairs = setup.pairs.to(setup.model.device)
    return over_batches(pairs, setup.batch_size, run, {metric.name: 0 for metric in metrics})


def _example_ratios(
    per_example: Float[Tensor, "example 3"],
) -> tuple[Float[Tensor, " example"], Bool[Tensor, " example"]]:
    """The ratio of each example, and whether its own denominator is far enough from zero."""
    ours, full, empty = per_example.double().unbind(1)
    gap = full - empty
    usable = gap.abs() > MIN_DENOMINATOR * (per_example.abs().mean() + 1e-12)
    usable = usable if bool(usable.any()) else gap != 0  # the circuit's own values may be what is large
    return (ours - empty) / gap, usable
