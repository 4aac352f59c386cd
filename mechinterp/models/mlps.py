"""One MLP run by itself, and which activation function it has: measured, since a configuration may name another."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from mechinterp.errors import UnsupportedError

ACTIVATIONS = ("gelu", "gelu_new", "quick_gelu", "relu", "relu2", "silu", "tanh", "sigmoid", "gelu_10", "mish", "linear")
"""What is tried after the configured name."""


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name. Raises UnsupportedError for one that is not known."""
    if name not in ACT2FN:
        raise UnsupportedError(f"The activation function {name!r} is not known: it has no rule in a decomposition.")
    return ACT2FN[name]


def measure_activation(configured: str, given: Tensor, up: Tensor | None, out: Tensor, tolerance: float) -> str | None:
    """The name of the function f with f(given) * up = out (no `up`: f(given) = out), or None when none is near.

    The configured one stays where it is as near as any other but for rounding.
    """
    size = float(out.abs().max()) + 1e-6
    gaps: dict[str, float] = {}
    for name in dict.fromkeys((configured, *ACTIVATIONS)):
        if name in ACT2FN:
            own = ACT2FN[name](given)
            gaps[name] = float(((own if up is None else own * up) - out).abs().max()) / size
    best = min(gaps, key=lambda name: gaps[name])
    rounding = 8 * torch.finfo(out.dtype).eps
    if gaps.get(configured, float("inf")) <= max(2 * gaps[best], rounding):
        best = configured
    return best if gaps[best] < tolerance else None


def run_mlp(block: Any, mlp_in: Tensor) -> Tensor:
    """What the MLP of a block writes for any input, before any post-norm; only the MLP is run.

    Some add a residual stream that they are given (Bloom, MPT): here it is zero. Mixtures of experts give their
    routing back as well (GPT-OSS, Llama 4); it is left out.
    """
    mlp = block.mlp
    if getattr(mlp, "name", "mlp") is None:
        raise UnsupportedError("its two matrices lie in the layer, and running it would run the whole layer")
    component = getattr(mlp, "original_component", None) or mlp
    parameters = inspect.signature(component.forward).parameters.values()
    wants = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL}
    out = mlp(mlp_in, torch.zeros_like(mlp_in)) if "residual" in wants else mlp(mlp_in)
    return out[0] if isinstance(out, tuple) else out
