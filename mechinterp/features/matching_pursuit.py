"""`MatchingPursuit`: a dictionary that is encoded greedily, one feature after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.features.basis import MEMORY, check_sites
from mechinterp.features.one_site import OneSite
from mechinterp.models.feature_basis import BasisSource, Features
from mechinterp.models.sites import Site

MAX_STEPS = 100_000


@dataclass(frozen=True, eq=False, repr=False)
class MatchingPursuit(OneSite):
    """A dictionary whose encoder takes the feature of largest product with the rest, subtracts it, and goes on.

    It ends when the rest is shorter than `residual_threshold`, when a step chooses no new feature, or after `steps`.
    Its encoding is not affine, so `reads` is None. Cost: per step one product of the inputs with all directions.

    Args:
        sites_in: The site, as a tuple of one.
        sites_out: The same.
        W_dec: The directions, `[feature, d]`; of length 1 for a true projection.
        b_dec: `[d]`, subtracted before encoding and added after decoding.
        residual_threshold: The length of the rest at which a token is done; 0: never.
        steps: The most steps; 0: as many as the input has numbers.
        stop_at_old: Whether a token is done when a step adds no new feature.
        label: Its name in addresses.
        source: Where it comes from.

    Source: SAELens's `matching_pursuit`; MP-SAE, Costa et al. 2025.
    """

    stored_as: ClassVar[str] = "matching_pursuit"
    sites_in: tuple[Site, ...]
    sites_out: tuple[Site, ...]
    W_dec: Tensor
    b_dec: Tensor
    residual_threshold: float = 1e-2
    steps: int = 0
    stop_at_old: bool = True
    label: str = ""
    source: BasisSource = MEMORY

    def __post_init__(self) -> None:
        check_sites(self.sites_in, self.sites_out)
        if len(self.sites_in) != 1 or self.sites_in != self.sites_out:
            raise InputError("Matching pursuit reconstructs the one site that it reads.")
        if (
            self.W_dec.ndim != 2
            or self.b_dec.shape != self.W_dec.shape[1:]
            or not 0 <= self.steps <= MAX_STEPS
            or not self.residual_threshold >= 0
        ):
            raise InputError("Matching pursuit needs b_dec as wide as W_dec, steps and a threshold of at least 0.")
        if not bool(self.W_dec.isfinite().all() and self.b_dec.isfinite().all()):
            raise InputError("W_dec and b_dec of a dictionary must hold finite floats.")

    @property
    def kind(self) -> str:
        """`sae`."""
        return "sae"

    @property
    def about(self) -> str:
        """One line about it."""
        return "matching pursuit"

    def settings(self) -> dict[str, Any]:
        """Everything else that it computes with, as JSON values."""
        return {"residual_threshold": self.residual_threshold, "steps": self.steps, "stop_at_old": self.stop_at_old}

    def encode(self, x: Tensor | Mapping[Any, Tensor], /) -> Features:
        """The features of the value at the site."""
        value, context = self.vectors(x)
        wide = self.wide(value)
        directions = self.W_dec.to(value.device, wide)
        rest = (value.to(wide) - self.b_dec.to(directions)).reshape(-1, value.shape[-1])
        values = rest.new_zeros(len(rest), len(directions))
        done = torch.zeros(len(rest), dtype=torch.bool, device=rest.device)
        for _ in range(self.steps or value.shape[-1]):
            products = (rest @ directions.T).relu()
            best = products.argmax(-1, keepdim=True)
            step = torch.where(done[:, None], 0, products.gather(1, best))
            active = values != 0
            values = values.scatter_add(1, best, step)
            rest = rest - step * directions[best[:, 0]]
            if self.stop_at_old:
                done = done | (active == (values != 0)).all(-1)
            if self.residual_threshold > 0:
                done = done | (rest.norm(dim=-1) < self.residual_threshold)
            if bool(done.all()):
                break
        return Features(values.reshape(*value.shape[:-1], -1), context)
