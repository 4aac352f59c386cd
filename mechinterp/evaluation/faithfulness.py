"""`evaluate`: how much of the model's performance a circuit alone gives back.

Bootstrap intervals over examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.engines.edge_patching import check_cut, check_model, clean_logits, edge_logits
from mechinterp.engines.replacement import Replacement, build_replacement
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import Graph
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import Metric, get_metric
from mechinterp.tasks.pairs import Pairs


def bootstrap_interval(
    statistic: Callable[[Float[Tensor, "resample example column"]], Float[Tensor, " resample"]],
    columns: Float[Tensor, "example column"],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of a statistic when the examples (rows) are drawn again with replacement.

    A resample whose statistic is no number is left out: a ratio has none where its denominator vanishes, as that of
    accuracies does when no example is drawn on which they differ. Raises InputError when no resample has a number.

    Source: Efron & Tibshirani 1993, ch. 13. Deterministic under `seed`, on the CPU in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    table = columns.detach().cpu().double()
    rows = torch.randint(len(table), (resamples, len(table)), generator=generator)
    tail = (1 - level) / 2
    values = statistic(table[rows])
    values = values[values.isfinite()]
    if not len(values):
        raise InputError("The statistic is not defined on any resample of these examples; give more examples.")
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


@dataclass(frozen=True)
class Ablation:
    """The six axes that define an ablation (Miller et al. 2024, arXiv 2407.08734)."""

    granularity: str = "edge"
    component: str = "edges outside the circuit"
    value: str = "corrupt"
    positions: str = "all"
    direction: str = "noising (the clean run is destroyed)"
    set: str = "complement"


def ablation_of(graph: Graph, replacement: str) -> Ablation:
    """The six axes of running a circuit of this graph alone."""
    where = ", ".join(graph.positions) if graph.positions else "all"
    return Ablation(graph.level, f"{graph.level}s outside the circuit", replacement, where)


@dataclass(frozen=True)
class Evaluation:
    """What a circuit alone does. All numbers are over examples; metric values are in the metric's unit.

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
    """Examples whose own denominator is not near zero; the others have no ratio."""
    kl: float
    accuracy: float | None
    accuracy_full: float | None
    random_faithfulness: tuple[float, ...]
    """Faithfulness of random circuits with as many edges."""
    seed: int
    per_example: Float[Tensor, "example 3"] = field(repr=False)
    """Metric of circuit, full model and empty circuit, per example."""
    circuit_digest: str
    """`Circuit.digest()` of the circuit that this is about."""
    pairs: Pairs = field(repr=False)
    """The examples."""
    reference: Pairs | None = field(default=None, repr=False)
    """The examples whose corrupt prompts gave the means, where they are others."""

    def per_example_frame(self) -> pd.DataFrame:
        """One row an example: example, circuit, full, empty (the metric of each), ratio, usable.

        The ratio is (circuit - empty) / (full - empty) of the example itself; NaN where that denominator is near zero
        and the example therefore not `usable`. The median of `ratio` is that of `example_quartiles`; its mean is not
        `faithfulness`, which is a ratio of means.
        """
        frame = pd.DataFrame(self.per_example.double().numpy(), columns=["circuit", "full", "empty"])
        frame.insert(0, "example", range(len(frame)))
        ratios, usable = _example_ratios(self.per_example)
        return frame.assign(ratio=ratios.masked_fill(~usable, torch.nan).numpy(), usable=usable.numpy())


MIN_DENOMINATOR = 1e-3
"""|m(full) - m(empty)| below this times the spread of the metric makes every ratio meaningless: refused."""


def evaluate(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    metric: Metric | str = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    n_random: int = 5,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> Evaluation:
    """The circuit's faithfulness on `pairs` (use held-out ones), every other edge replaced. Changes nothing.

    `reference` are the pairs whose corrupt prompts give the means, for the mean replacements (default: `pairs`).
    `n_random` random circuits of the same size are run for comparison. Cost: about (3 + n_random) forwards an example.

    Raises InputError when full and empty model perform alike, since then the ratio says nothing.
    """
    metric = get_metric(metric) if isinstance(metric, str) else metric
    graph = circuit.graph
    check_model(model, graph, pairs)
    values = build_replacement(replacement, model, graph, reference or pairs, batch_size)
    masks = [circuit.cut, graph.possible, *random_cuts(graph, circuit.n_units, n_random, seed)]
    has_answers = pairs.right is not None and pairs.wrong is not None
    metrics = [metric, get_metric("kl_to_clean"), *([get_metric("accuracy")] if has_answers else [])]
    tables = metric_tables(model, graph, pairs, torch.stack(masks), metrics, values, batch_size, progress)
    table = tables[metric.name]
    ours, full, empty = table[:, 1], table[:, 0], table[:, 2]
    per_example = torch.stack([ours, full, empty], 1)
    check_denominator(full, empty)
    faithfulness = ratio_of_means(per_example[None])
    ratios, usable = _example_ratios(per_example)
    ratios = ratios[usable]
    quartiles = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=ratios.dtype)).tolist()
    random_rows = [torch.stack([column, full, empty], 1)[None] for column in table[:, 3:].T]
    return Evaluation(
        metric=metric.name,
        ablation=ablation_of(graph, replacement),
        n_examples=len(pairs),
        n_edges=circuit.n_edges,
        n_edges_graph=graph.n_edges,
        circuit_value=float(ours.mean()),
        full_value=float(full.mean()),
        empty_value=float(empty.mean()),
        faithfulness=float(faithfulness),
        faithfulness_ci=bootstrap_interval(ratio_of_means, per_example, seed=seed),
        ci_level=0.95,
        example_quartiles=(quartiles[0], quartiles[1], quartiles[2]),
        n_ratio=len(ratios),
        kl=float(tables["kl_to_clean"][:, 1].mean()),
        accuracy=float(tables["accuracy"][:, 1].mean()) if has_answers else None,
        accuracy_full=float(tables["accuracy"][:, 0].mean()) if has_answers else None,
        random_faithfulness=tuple(float(ratio_of_means(rows)) for rows in random_rows),
        seed=seed,
        per_example=per_example,
        circuit_digest=circuit.digest(),
        pairs=pairs,
        reference=reference,
    )


def ratio_of_means(rows: Float[Tensor, "resample example 3"]) -> Float[Tensor, " resample"]:
    """(circuit - empty) / (full - empty), each the mean over examples."""
    ours, full, empty = rows.double().mean(1).unbind(-1)
    return (ours - empty) / (full - empty)


def check_denominator(full: Float[Tensor, " example"], empty: Float[Tensor, " example"]) -> None:
    """Return None when the full and the empty model differ enough for a ratio. Raises InputError otherwise."""
    gap = abs(float((full - empty).double().mean()))
    spread = float(torch.cat([full, empty]).double().abs().mean()) + 1e-12
    if not gap > MIN_DENOMINATOR * spread:
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
    metric: Metric | str = "logit_diff",
    replacement: str = "corrupt",
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> tuple[float, ...]:
    """The faithfulness of each mask of kept edges, as a ratio of means."""
    metric = get_metric(metric) if isinstance(metric, str) else metric
    check_model(model, graph, pairs)
    values = build_replacement(replacement, model, graph, pairs, batch_size)
    cuts = torch.stack([graph.possible, *[graph.possible & ~mask for mask in masks]])
    table = metric_tables(model, graph, pairs, cuts, [metric], values, batch_size, progress)[metric.name]
    full, empty = table[:, 0], table[:, 1]
    check_denominator(full, empty)
    return tuple(float(ratio_of_means(torch.stack([c, full, empty], 1)[None])) for c in table[:, 2:].T)


def random_cuts(graph: Graph, n_units: int, n: int, seed: int) -> list[Bool[Tensor, "reader writer"]]:
    """`n` masks that cut all but `n_units` random edges (or nodes, where those are what is chosen)."""
    generator = torch.Generator().manual_seed(seed)
    cuts: list[Tensor] = []
    for _ in range(n):
        kept = torch.zeros(graph.n_units, dtype=torch.bool)
        kept[torch.randperm(graph.n_units, generator=generator)[:n_units]] = True
        cuts.append(graph.possible & ~kept[graph.unit.clamp(min=0)])
    return cuts


def metric_tables(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    cuts: Bool[Tensor, "mask reader writer"],
    metrics: Sequence[Metric],
    values: Replacement,
    batch_size: int,
    progress: Progress = no_progress,
) -> dict[str, Float[Tensor, "example column"]]:
    """Per metric and example: the full model, then each mask. One run of a mask serves all metrics."""
    masks = check_cut(graph, cuts)
    done, total = 0, len(masks) * len(pairs)
    progress(done, total)
    metrics = list({metric.name: metric for metric in metrics}.values())
    tables: dict[str, list[Tensor]] = {metric.name: [] for metric in metrics}
    for chunk in pairs.to(model.device).chunks(batch_size):
        full = clean_logits(model, chunk)
        columns: dict[str, list[Tensor]] = {metric.name: [metric(full, chunk, full)] for metric in metrics}
        for logits in edge_logits(model, graph, chunk, masks, values.on(chunk)):
            for metric in metrics:
                columns[metric.name].append(metric(logits, chunk, full))
            done += len(chunk)
            progress(done, total)
        for name, parts in columns.items():
            tables[name].append(torch.stack(parts, 1).cpu())
    return {name: torch.cat(parts) for name, parts in tables.items()}


def _example_ratios(
    per_example: Float[Tensor, "example 3"],
) -> tuple[Float[Tensor, " example"], Bool[Tensor, " example"]]:
    """The ratio of every example, and whether its own denominator is far enough from zero."""
    ours, full, empty = per_example.double().unbind(1)
    gap = full - empty
    usable = gap.abs() > MIN_DENOMINATOR * (per_example.abs().mean() + 1e-12)
    usable = usable if bool(usable.any()) else gap != 0  # the circuit's own values may be what is large
    return (ours - empty) / gap, usable
