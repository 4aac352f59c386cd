"""Faithfulness against the size of the circuit, and the default size: the smallest that is faithful enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp.base.canonical_json import six_digits
from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.evaluation.faithfulness import faithfulness_curve
from mechinterp.graphs.scores import Scores
from mechinterp.graphs.select import EmptyCircuit, select, sized
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.pairs import Pairs

TARGET = 0.9
"""The faithfulness that a circuit of the default size must reach."""


@dataclass(frozen=True)
class CurvePoint:
    """The faithfulness of a circuit for which `n_selected` edges (or nodes) were selected, of which `n_edges` lie on
    paths."""

    n_selected: int
    n_edges: int
    faithfulness: float


@dataclass(frozen=True)
class Curve:
    """Points with what they were measured on. If the curve chose the size of the circuit, `target` is the faithfulness
    that it had to reach; otherwise it is None."""

    points: tuple[CurvePoint, ...]
    pairs: Pairs
    metric: str
    replacement: str
    target: float | None = None


def size_grid(n_edges: int, step: float = 1.3, first: int = 4) -> tuple[int, ...]:
    """Sizes evenly spaced on a log axis, from `first` to all edges.

    >>> size_grid(100, step=3.0)
    (4, 12, 36, 100)
    """
    sizes: list[int] = []
    size = float(min(first, n_edges))
    while size < n_edges:
        sizes.append(int(size))
        size = max(size * step, size + 1)
    return (*sizes, n_edges)


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
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> tuple[CurvePoint, ...]:
    """The faithfulness of the circuit of each size, in the order of `sizes`.

    Cost: per example, one forward per size, and three more.

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
        batch_size: How many examples to run at a time.
        progress: Called with the number of runs done and their total; one run is one mask on one example.
    """
    graph = scores.graph
    masks: list[Tensor] = []
    for size in sizes:
        try:
            masks.append(select(graph, scores, **sized(graph, size), rule=rule, by=by, ratio=ratio).kept)
        except EmptyCircuit:  # too few edges: none lies on a path
            masks.append(torch.zeros_like(graph.possible))
    values = faithfulness_curve(
        model, masks, graph, pairs, metric=metric, replacement=replacement, batch_size=batch_size, progress=progress
    )
    rows = zip(sizes, masks, values, strict=True)
    return tuple(CurvePoint(size, int(mask.sum()), value) for size, mask, value in rows)


def smallest_faithful(points: Sequence[CurvePoint], target: float = TARGET) -> int:
    """The smallest `n_selected` whose faithfulness, at 6 digits, reaches the target. Raises InputError if none does."""
    for point in sorted(points, key=lambda point: point.n_selected):
        if six_digits(point.faithfulness) >= target:
            return point.n_selected
    best = max(point.faithfulness for point in points)
    raise InputError(f"No size reaches faithfulness {target:g} (the best is {best:.3g}); give the number of edges.")
