"""Activation functions by name, and which one an MLP uses: measured, since the configuration may be wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mechinterp.base.errors import UnsupportedError

ACTIVATIONS = (
    "gelu",
    "gelu_new",
    "quick_gelu",
    "relu",
    "relu2",
    "silu",
    "tanh",
    "sigmoid",
    "gelu_10",
    "mish",
    "linear",
)
"""The functions to try after the configured one."""


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name. Raises UnsupportedError for one that is not known."""
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise UnsupportedError(f"The activation function {name!r} is not known: it has no rule in a decomposition.")
    return ACT2FN[name]


def measure_activation(configured: str, given: Tensor, up: Tensor | None, out: Tensor, tolerance: float) -> str | None:
    """The name of the function f with f(given) * up = out (no `up`: f(given) = out), or None when none is close.

    The configured one is preferred if no other is closer, up to rounding.
    """
    from transformers.activations import ACT2FN

    size = float(out.abs().max()) + 1e-6
    gaps: dict[str, float] = {}
    for name in dict.fromkeys((configured, *ACTIVATIONS)):
        if name in ACT2FN:
            with torch.no_grad():
                own = ACT2FN[name](given)
                gaps[name] = float(((own if up is None else own * up) - out).abs().max()) / size
    best = min(gaps, key=lambda name: gaps[name])
    rounding = 8 * torch.finfo(out.dtype).eps
    if gaps.get(configured, float("inf")) <= max(2 * gaps[best], rounding):
        best = configured
    return best if gaps[best] < tolerance else None
