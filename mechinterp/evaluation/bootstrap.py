"""Bootstrap intervals over examples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def bootstrap_interval(
    statistic: Callable[[Float[Tensor, "resample example column"]], Float[Tensor, " resample"]],
    columns: Float[Tensor, "example column"],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of a statistic when the examples (rows) are drawn again with replacement.

    Source: Efron & Tibshirani 1993, ch. 13. Deterministic under `seed`, on the CPU in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    table = columns.detach().cpu().double()
    rows = torch.randint(len(table), (resamples, len(table)), generator=generator)
    tail = (1 - level) / 2
    low, high = statistic(table[rows]).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
