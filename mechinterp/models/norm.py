"""A norm of a model as a closed form, checked against the model's own module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import UnsupportedError
from mechinterp.models.placement import on_device

UNNAMED_EPS = (1e-5, 1e-6, 1e-8, 1e-12)
"""Values of eps to try if a module has no such attribute (OLMo's LayerNorm has 1e-5 in its code)."""


@dataclass(frozen=True)
class Norm:
    """`weight * standardize(x) + bias`; kind is `layer` (mean removed, divided by the standard deviation),
    `rms` (divided by the root mean square) or `none` (x as it is: with a weight, a constant multiplier)."""

    kind: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0

    @property
    def identity(self) -> bool:
        """Whether its output is its input."""
        return self.kind == "none" and self.weight is None and self.bias is None

    def on(self, device: torch.device) -> Norm:
        """The norm with its weight and bias on a device; itself where they are there."""
        weight, bias = (None if part is None else on_device(part, device) for part in (self.weight, self.bias))
        return self if weight is self.weight and bias is self.bias else replace(self, weight=weight, bias=bias)

    def scale(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes 1"]:
        """The scale by which `x` is divided."""
        if self.kind == "none":
            return torch.ones_like(x[..., :1])
        centred = x - x.mean(-1, keepdim=True) if self.kind == "layer" else x
        return (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def standardize(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """`x` centred (layer) and divided by its scale, before weight and bias."""
        if self.kind == "none":
            return x
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def factored(
        self, x: Float[Tensor, "*axes d_model"]
    ) -> tuple[Float[Tensor, "*axes d_model"], Float[Tensor, "*axes 1"] | None, Float[Tensor, "*axes 1"]]:
        """(y, f, scale) with `standardize(x) = y * f` (None: 1): after a linear map of y, fewer numbers are scaled."""
        if self.kind == "none":
            return x, None, torch.ones_like(x[..., :1])
        if self.kind == "layer":
            y, _, inverse = torch.native_layer_norm(x, x.shape[-1:], None, None, self.eps)
            return y, None, 1 / inverse
        scale = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + self.eps).sqrt()
        return x, 1 / scale, scale

    def __call__(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """The norm's output at `x`."""
        out = self.standardize(x)
        if self.weight is not None:
            out = out * self.weight
        return out if self.bias is None else out + self.bias

    def project(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """The linear part of the norm without its scale: centre (layer only), then weight.

        With the scale of the run frozen, `project(x) / scale` is the contribution of a summand x of the norm's
        input to its output.
        """
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        return x if self.weight is None else x * self.weight

    def project_transposed(self, g: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """The transpose of `project`: weight, then centre."""
        if self.weight is not None:
            g = g * self.weight
        return g - g.mean(-1, keepdim=True) if self.kind == "layer" else g


def measure_norm(name: str, module: Callable[[Tensor], Tensor], like: Tensor, d_model: int) -> Norm:
    """The closed form that reproduces `module`, found by trying each kind on random inputs of two sizes.

    It is measured, not inferred from the class name, so that a norm with an offset weight (Gemma's 1 + w) or none
    is exact, too. Raises UnsupportedError, naming the norm, when no closed form agrees.
    """
    component = getattr(module, "original_component", None) or module
    weight, bias = getattr(component, "weight", None), getattr(component, "bias", None)
    named = [getattr(component, n, None) for n in ("eps", "variance_epsilon", "epsilon")]
    found = [float(eps) for eps in named if eps is not None][:1] or [0.0, *UNNAMED_EPS]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, d_model, generator=generator, dtype=torch.float64) + 0.5
    # The second pair is so small that eps matters.
    probe = torch.cat([noise, noise[:, :2] * 1e-2], dim=1).to(like if weight is None else like.to(weight.device))
    with torch.no_grad():
        target = module(probe)
        tolerance = 1e-5 if like.dtype in (torch.float32, torch.float64) else 2e-2
        weights = [None] if weight is None else [weight.detach(), 1 + weight.detach()]
        for kind in ("none", "layer", "rms"):
            for candidate, eps in product(weights, found) if kind != "none" else [(None, 0.0)]:
                norm = Norm(kind, candidate, None if bias is None else bias.detach(), eps)
                got = norm(probe)
                if got.shape == target.shape and torch.allclose(got, target, rtol=tolerance, atol=tolerance):
                    return norm
    raise UnsupportedError(
        f"The norm {name!r} ({type(component).__name__}) is neither LayerNorm, RMSNorm nor the identity; "
        "edges cannot be read through it exactly."
    )
