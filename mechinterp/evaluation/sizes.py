"""Faithfulness against the size of the circuit, and the default size: the smallest that is faithful beyond doubt.

A size passes on a set of examples if the whole interval of its faithfulness lies in [0.92, 1.1] and its KL divergence
from the full model is at most a fifth of the empty circuit's: the output as a whole has come back, not only the metric.
The lower end is above what is promised, 0.9, since held-out pairs have other templates.
The chosen size is the smallest that passes on at least 90 % of bootstrap resamples of the examples (so that other
examples are likely to agree), as does the next larger measured size (so that one lucky crossing of a curve that goes
up and down is not taken). Circuits with more than half of the edges are not taken either.

Sizes lie on one grid, 4 * 2**(i/8), whatever the graph: first every doubled one is measured, then all of the grid
between the first that passes and its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.bootstrap import bootstrap_interval, ratio_of_means
from mechinterp.base.canonical_json import six_digits
from mechinterp.base.errors import InputError
from mechinterp.base.keep import Keep, compute_always
from mechinterp.base.progress import Progress, no_progress
from mechinterp.evaluation.ablation import AblationSetup
from mechinterp.evaluation.faithfulness import check_denominator, metric_tables
from mechinterp.graphs.scores import Scores
from mechinterp.graphs.select import EmptyCircuit, select, sized
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs

TARGET = 0.9
"""The faithfulness that a circuit of the default size must reach in files of version 0.1."""
FOLDS = 3
"""Parts of the train pairs with cross-fitting."""
RESAMPLES = 200
"""Resamples of the examples on which a size must pass."""
SPREAD_AT = RESAMPLES // 20
"""The spread begins after so many of the sorted sizes of resamples, and ends before as many."""
FINE = 8
"""Sizes of the grid between a size and its double."""


@dataclass(frozen=True)
class Levels:
    """What a size must reach."""

    low: float = 0.92
    high: float = 1.1
    kl_share: float = 0.2
    """Of the KL divergence of the empty circuit."""
    most: float = 0.5
    """The largest share of the edges (or nodes)."""
    agreement: float = 0.9
    """The share of resamples of the examples on which the size must pass."""


@dataclass(frozen=True)
class CurvePoint:
    """The faithfulness of a circuit for which `n_selected` edges (or nodes) were selected, of which `n_edges` lie on
    paths, with its bootstrap interval over examples, its KL divergence from the full model in nats, and the share of
    resamples of the examples on which it passes."""

    n_selected: int
    n_edges: int
    faithfulness: float
    interval: tuple[float, float] | None = None
    kl: float | None = None
    passing: float | None = None

    def rounded(self) -> CurvePoint:
        """The point at 6 significant digits, as it is in a file."""
        interval = None if self.interval is None else (six_digits(self.interval[0]), six_digits(self.interval[1]))
        kl = None if self.kl is None else six_digits(self.kl)
        return replace(self, faithfulness=six_digits(self.faithfulness), interval=interval, kl=kl)


@dataclass(frozen=True)
class Curve:
    """Points with what they were measured on.

    If the curve chose the size of the circuit, `levels` is what the size had to reach (None otherwise). `spread` is the
    5 % and the 95 % quantile of the size that would have been chosen on other examples (None where most give no size).
    """

    points: tuple[CurvePoint, ...]
    pairs: Pairs
    metric: str
    replacement: str
    levels: Levels | None = None
    kl_empty: float | None = None
    """The KL divergence of the empty circuit."""
    spread: tuple[int, int] | None = None
    seed: int = 0
    folds: int = 1
    """With cross-fitting, the number of parts of the train pairs, each measured with the scores of the others."""


def size_grid(n_units: int, fine: int = FINE, first: int = 4) -> tuple[int, ...]:
    """The sizes `first * 2**(i / fine)`, rounded down, each once, and all edges.

    >>> size_grid(50, fine=1)
    (4, 8, 16, 32, 50)
    """
    sizes, i = list[int](), 0
    while (size := int(min(first, n_units) * 2 ** (i / fine))) < n_units:
        if size not in sizes[-1:]:
            sizes.append(size)
        i += 1
    return (*sizes, n_units)


def size_curve(
    model: HookManager,
    scores: Scores,
    pairs: Pairs,
    sizes: Sequence[int],
    *,
    rule: str = "top",
    by: str = "magnitude",
    ratio: float | None = None,
    metric: str = "logit_diff",
    replacement: str = "corrupt",
    levels: Levels = Levels(),
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> tuple[CurvePoint, ...]:
    """The faithfulness of the circuit of each size, in the order of `sizes`, with intervals, and the KL divergence.

    Cost: per example, one patched forward per size, and three more.

    Args:
        model: The model that the scores are of.
        scores: The scores to select by.
        pairs: The examples.
        sizes: How many edges (or nodes, if the graph's level is `node`) to select.
        rule: How to select, as in `select`.
        by: What to rank by, as in `select`.
        ratio: As in `select`.
        metric: The name of a metric.
        replacement: What a cut edge carries: `corrupt`, `mean`, `mean-positional` or `zero`.
        levels: What a size must reach to pass.
        seed: The seed of the bootstrap.
        batch_size: How many examples to run at a time.
        progress: Called with the number of runs done and their total; one run is one mask on one example.
    """
    how = {"rule": rule, "by": by, "ratio": ratio}
    search = SizeSearch(
        model, scores, [(scores, pairs)], how, metric, replacement, batch_size, levels=levels, seed=seed
    )
    search.measure(sizes, progress)
    return tuple(search.point(size) for size in sizes)


class SizeSearch:
    """The circuits of one ranking at several sizes, measured on held-out examples; each size is run once.

    Args:
        model: The model that the scores are of.
        scores: The scores to select by.
        parts: The examples. With cross-fitting several parts, each with the scores of the examples outside it, by which
            the circuits that it measures are selected.
        how: The arguments `rule`, `by` and `ratio` of `select`.
        metric: The name of a metric.
        replacement: What a cut edge carries.
        batch_size: How many examples to run at a time.
        levels: What a size must reach to pass.
        seed: The seed of the bootstrap.
        keep: Called as `keep(name, compute)` around every run, to load what an earlier run has saved.
    """

    def __init__(
        self,
        model: HookManager,
        scores: Scores,
        parts: Sequence[tuple[Scores, Pairs]],
        how: Mapping[str, object],
        metric: str,
        replacement: str,
        batch_size: int,
        *,
        levels: Levels = Levels(),
        seed: int = 0,
        keep: Keep = compute_always,
    ) -> None:
        self.model, self.scores, self.parts, self.how = model, scores, parts, how
        self.metric, self.replacement, self.batch_size = metric, replacement, batch_size
        self.levels, self.seed, self.keep = levels, seed, keep
        self.n_edges: dict[int, int] = {}
        self.points: dict[int, CurvePoint] = {}
        self.tables: dict[int, Float[Tensor, "example 2"]] = {}
        """Per size: the metric and the KL divergence of every example."""
        self.ends: Float[Tensor, "example 3"] | None = None
        """The metric of the full model and the empty circuit, and the KL divergence of the empty circuit."""

    def measure(self, sizes: Sequence[int], progress: Progress = no_progress) -> None:
        """Return None after running the sizes that were not run before, all at once."""
        new = [size for size in dict.fromkeys(sizes) if size not in self.tables]
        if not new:
            return
        found = [self._run(number, new, progress) for number in range(len(self.parts))]
        values, kl = (torch.cat([tables[i] for tables in found]) for i in range(2))
        check_denominator(values[:, 0], values[:, 1])
        self.ends = torch.stack([values[:, 0], values[:, 1], kl[:, 1]], 1)
        for i, size in enumerate(new):
            self.n_edges[size] = int(self.kept(self.scores, size).sum())
            self.tables[size] = torch.stack([values[:, 2 + i], kl[:, 2 + i]], 1)

    def _run(self, number: int, sizes: Sequence[int], progress: Progress) -> tuple[Tensor, Tensor]:
        """The metric and the KL divergence on one part: of the full model, the empty circuit, and each size."""
        scores, pairs = self.parts[number]
        graph, before = scores.graph, sum(len(part) for _, part in self.parts[:number])
        n, total = 1 + len(sizes), sum(len(part) for _, part in self.parts)
        setup = AblationSetup.of(
            self.model,
            graph,
            pairs,
            self.metric,
            self.replacement,
            None,
            self.batch_size,
            lambda done, _: progress(before * n + done, total * n),
        )
        cuts = torch.stack([graph.possible, *[graph.possible & ~self.kept(scores, size) for size in sizes]])
        metrics = [setup.metric, get_metric("kl_to_clean")]
        tables = self.keep(f"part {number} {list(sizes)}", lambda: metric_tables(setup, cuts, metrics))
        return tables[setup.metric.name].double(), tables["kl_to_clean"].double()

    def kept(self, scores: Scores, size: int) -> Bool[Tensor, "reader writer"]:
        """The edges of the circuit of this size; none if no selected edge lies on a path."""
        graph = scores.graph
        try:
            return select(graph, scores, **sized(graph, size), **self.how).kept  # pyright: ignore[reportArgumentType]
        except EmptyCircuit:
            return torch.zeros_like(graph.possible)

    def rows(self, size: int) -> Float[Tensor, "example 3"]:
        """The metric of the circuit, the full model and the empty circuit, per example."""
        assert self.ends is not None
        return torch.stack([self.tables[size][:, 0], self.ends[:, 0], self.ends[:, 1]], 1)

    def point(self, size: int) -> CurvePoint:
        """The point of the curve at a measured size."""
        if size in self.points:
            return self.points[size]
        rows = self.rows(size)
        interval = bootstrap_interval(ratio_of_means, rows, seed=self.seed)
        kl = float(self.tables[size][:, 1].mean())
        passing = float(self._passes(size, interval).double().mean())
        value = float(ratio_of_means(rows[None]))
        self.points[size] = CurvePoint(size, self.n_edges[size], value, interval, kl, passing)
        return self.points[size]

    def _passes(self, size: int, interval: tuple[float, float]) -> Bool[Tensor, " resample"]:
        """On which of the resamples the size passes; there the interval has moved and kept its width."""
        assert self.ends is not None
        drawn, levels = self._resamples(), self.levels
        rows = self.rows(size)
        moved = ratio_of_means(rows[drawn]) - ratio_of_means(rows[None])
        low, high = interval[0] + moved, interval[1] + moved
        kl, empty = self.tables[size][:, 1][drawn].mean(1), self.ends[:, 2][drawn].mean(1)
        return (low >= levels.low) & (high <= levels.high) & (kl <= levels.kl_share * empty)

    def _resamples(self) -> Int[Tensor, "resample example"]:
        assert self.ends is not None
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(len(self.ends), (RESAMPLES, len(self.ends)), generator=generator)

    @property
    def kl_empty(self) -> float:
        """The KL divergence of the empty circuit, mean over the examples."""
        assert self.ends is not None
        return float(self.ends[:, 2].mean())

    def chosen(self) -> int | None:
        """The size that the rule chooses among the measured ones."""
        return chosen_size([self.point(size) for size in self.tables], self.scores.graph.n_units, self.levels)

    def curve(self, pairs: Pairs, levels: Levels | None) -> Curve:
        """All measured sizes in order; `pairs` are all examples. `levels` is given if they chose the size."""
        points = tuple(self.point(size) for size in sorted(self.tables))
        spread = None if levels is None else self._spread()
        about = (self.metric, self.replacement, levels, self.kl_empty, spread, self.seed, len(self.parts))
        return Curve(points, pairs, *about)

    def _spread(self) -> tuple[int, int] | None:
        """The central 90 % of the sizes that single resamples choose among the measured; None if some choose none."""
        found = self.resampled_sizes()
        low, high = found[SPREAD_AT], found[-1 - SPREAD_AT]
        return None if math.isinf(high) else (int(low), int(high))

    def resampled_sizes(self) -> list[float]:
        """The sizes that single resamples choose among the measured, sorted; infinite where one chooses none."""
        points = [self.point(size) for size in sorted(self.tables)]
        passed = {p.n_selected: self._passes(p.n_selected, p.interval) for p in points if p.interval is not None}
        n_units, once = self.scores.graph.n_units, replace(self.levels, agreement=1.0)
        found: list[float] = []
        for i in range(RESAMPLES):
            here = [replace(p, passing=float(passed[p.n_selected][i])) for p in points]
            size = chosen_size(here, n_units, once)
            found.append(math.inf if size is None else size)
        return sorted(found)


def chosen_size(points: Sequence[CurvePoint], n_units: int, levels: Levels) -> int | None:
    """The smallest `n_selected` that passes on enough resamples, as does the next larger measured size.

    None if no size up to the largest share does.

    >>> some = [CurvePoint(n, n, 1.0, passing=share) for n, share in ((4, 1.0), (8, 0.2), (16, 0.95), (32, 1.0))]
    >>> chosen_size(some, 100, Levels())
    16
    """
    ordered = sorted(points, key=lambda point: point.n_selected)
    good = [point.passing is not None and point.passing >= levels.agreement for point in ordered]
    for i, point in enumerate(ordered):
        if point.n_selected > levels.most * n_units:
            return None
        if good[i] and (i + 1 == len(ordered) or good[i + 1]):
            return point.n_selected
    return None


def search_size(
    search: SizeSearch,
    scored: int,
    *,
    curve: bool = True,
    given: int | None = None,
    progress: Progress = no_progress,
    progress_near: Progress = no_progress,
) -> int | None:
    """The default size, with every doubled size of the grid measured, and all on both sides of the first that passes.

    None if no size up to the largest share passes.

    Args:
        search: What measures the sizes.
        scored: The number of edges (or nodes) with a score other than 0.
        curve: Whether to measure the small sizes, too; without, sizes are measured from the largest down until two in
            a row fail.
        given: A size that was chosen otherwise: then only it and, with `curve`, the coarse grid are measured.
        progress: Called with the number of runs done and of all of this pass; one run is one size on one example.
            Without `curve` these are the most that there can be.
        progress_near: The same for the sizes on both sides of the one that passes, which are known only then.
    """
    n_units = search.scores.graph.n_units
    most = int(search.levels.most * n_units)
    grid = [size for size in size_grid(min(scored, most)) if size <= most]
    doubled = [size for size in size_grid(min(scored, most), fine=1) if size <= most]
    coarse = list(dict.fromkeys([*doubled, min(scored, n_units)]))

    def measure(sizes: Sequence[int], tell: Progress, before: int, planned: int) -> None:
        search.measure(
            sizes, lambda done, total: tell(before * total // len(sizes) + done, planned * total // len(sizes))
        )

    if given is not None or curve:
        first: list[int] = sorted({*(coarse if curve else []), *([] if given is None else [given])})
        measure(first, progress, 0, len(first))
        progress(1, 1)  # also where all was kept from an earlier run
        if given is not None:
            return None
    else:  # from the top down until two sizes in a row fail
        missed = 0
        for i, size in enumerate(reversed(coarse)):
            measure([size], progress, i, len(coarse))
            missed = 0 if (search.point(size).passing or 0) >= search.levels.agreement else missed + 1
            if missed == 2:
                break
        progress(1, 1)
    size, near = search.chosen(), 0
    while size is not None and (gaps := _beside(size, grid, search.tables)):
        measure(gaps, progress_near, near, near + len(gaps))
        near += len(gaps)
        progress_near(1, 1)
        size = search.chosen()
    return size


def _beside(size: int, grid: Sequence[int], measured: Container[int]) -> list[int]:
    """The sizes of the grid between this one and the next measured ones below and above."""
    below = [s for s in grid if s < size]
    above = [s for s in grid if s > size]
    near = [*takewhile(lambda s: s not in measured, reversed(below)), *takewhile(lambda s: s not in measured, above)]
    return sorted(near)


def smallest_faithful(points: Sequence[CurvePoint], target: float = TARGET) -> int:
    """The smallest `n_selected` whose faithfulness, at 6 digits, reaches the target. Raises InputError if none does.

    The rule of files of version 0.1.
    """
    for point in sorted(points, key=lambda point: point.n_selected):
        if six_digits(point.faithfulness) >= target:
            return point.n_selected
    best = max(point.faithfulness for point in points)
    raise InputError(f"No size reaches faithfulness {target:g} (the best is {best:.3g}); give the number of edges.")
