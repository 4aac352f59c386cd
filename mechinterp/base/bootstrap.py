"""Intervals of numbers over examples by the bootstrap, and shares of an effect that may vanish."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError

CI_LEVEL = 0.95
MIN_DENOMINATOR = 1e-3
"""When |m(full) - m(empty)| is below this share of the metric's mean size, no ratio is meaningful."""


def bootstrap_interval(
    statistic: Callable[[Float[Tensor, "resample example column"]], Float[Tensor, " resample"]],
    columns: Float[Tensor, "example column"],
    *,
    resamples: int = 2000,
    level: float = CI_LEVEL,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of a statistic when the examples (rows) are resampled with replacement.

    A resample whose statistic is not defined is left out, as a ratio is not where its denominator vanishes, as that of
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


def ratio_of_means(rows: Float[Tensor, "resample example 3"]) -> Float[Tensor, " resample"]:
    """(circuit - empty) / (full - empty), each the mean over examples."""
    ours, full, empty = rows.double().mean(1).unbind(-1)
    return (ours - empty) / (full - empty)


def denominator_vanishes(full: Float[Tensor, " example"], empty: Float[Tensor, " example"]) -> bool:
    """Whether the mean difference of two ends is too small, beside their sizes, for a share of it to mean anything."""
    gap = abs(float((full - empty).double().mean()))
    spread = float(torch.cat([full, empty]).double().abs().mean()) + 1e-12
    return not gap > MIN_DENOMINATOR * spread


def share_with_interval(
    value: Float[Tensor, " example"], full: Float[Tensor, " example"], empty: Float[Tensor, " example"], seed: int = 0
) -> tuple[float, float, float]:
    """(value - empty) / (full - empty) as a ratio of means, and its interval; all NaN where the denominator vanishes.

    Args:
        value: What is a share, per example.
        full: Where the share is 1.
        empty: Where it is 0.
        seed: Of the resamples.
    """
    if denominator_vanishes(full, empty):
        return torch.nan, torch.nan, torch.nan
    rows = torch.stack([value, full, empty], 1).double().cpu()
    low, high = bootstrap_interval(ratio_of_means, rows, seed=seed)
    return float(ratio_of_means(rows[None])[0]), low, high
