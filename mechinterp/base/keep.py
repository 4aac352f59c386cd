"""`Keep`: around each part of a long computation, so that what an earlier run has saved is loaded instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

Compute = Callable[[], Mapping[str, Tensor]]
Keep = Callable[[str, Compute], Mapping[str, Tensor]]
"""Called with the name of a part and what computes it; gives what that gave."""


def compute_always(name: str, compute: Compute) -> Mapping[str, Tensor]:
    """Keeps nothing."""
    return compute()
