"""Bootstrap intervals over examples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import InputError


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
