"""The two directions of patching: which of a pair's prompts is run, and whose values are written into it.

How the two differ: Heimersheim & Nanda 2024 (arXiv 2404.15255).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.registry import unknown
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.pairs import Pairs

T = TypeVar("T")


@dataclass(frozen=True)
class PatchDirection:
    """`noise`: the clean run gets values of the corrupt run. `denoise`: the corrupt run gets values of the clean."""

    name: str

    @property
    def noise(self) -> bool:
        """Whether the run that is patched is the clean one."""
        return self.name == "noise"

    def swap(self, first: T, second: T) -> tuple[T, T]:
        """The two as they are for `noise`, exchanged for `denoise`: (clean, corrupt) to (base, other) and back."""
        return (first, second) if self.noise else (second, first)

    def tokens(self, pairs: Pairs) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """(the prompts that are run and patched, the prompts that the patches come from)."""
        return self.swap(pairs.clean, pairs.corrupt)

    def effect(
        self, base: Float[Tensor, " batch"], patched: Float[Tensor, "*run batch"], metric: Metric
    ) -> Float[Tensor, "*run batch"]:
        """What the patch changes in the metric; positive = what was patched helps the task.

        `noise`: metric(base) - metric(patched). `denoise`: metric(patched) - metric(base). The sign is turned where a
        lower metric is better.
        """
        return (base - patched if self.noise else patched - base) * metric.direction

    def sign(self, metric: Metric) -> int:
        """What (value in the base run - replacement) x gradient is multiplied by to estimate `effect`."""
        return metric.direction * (1 if self.noise else -1)


NOISE, DENOISE = PatchDirection("noise"), PatchDirection("denoise")
DIRECTIONS = {direction.name: direction for direction in (NOISE, DENOISE)}


def patch_direction(name: str) -> PatchDirection:
    """The direction of that name. Raises InputError for an unknown one."""
    if name not in DIRECTIONS:
        raise unknown("direction", name, DIRECTIONS)
    return DIRECTIONS[name]
