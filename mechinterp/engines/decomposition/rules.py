"""The rules of contextual decomposition: how a relevant part passes through one operation, by preset.

Every activation t is r + i, relevant and irrelevant. A rule gives the relevant part r' of an operation's output; the
irrelevant part is always the rest, t' - r'. Only r is carried, next to the totals t of the unedited run.

Sources: Hsu et al. 2024 (arXiv 2407.00886), whose published code is the presets `authors-gpt` and `authors-bert`;
the rules for norms and gates by a fixed coefficient are those of layer-wise relevance propagation (Ali et al. 2022).
Deviations from that code: the norm's own epsilon, and shares of a bias that sum to 1 (so r + i = t exactly).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp.base.registry import unknown
from mechinterp.models.modes import Gradients


@dataclass(frozen=True)
class Preset:
    """Which rule each kind of operation gets."""

    bias: str = "irrelevant"
    """irrelevant: no part of a bias is relevant. shared: |r W| / (|r W| + |i W|) of it, elementwise."""
    norm: str = "frozen"
    """frozen: the scale is the total's. remove: norm(t) - norm(i)."""
    attention: str = "frozen"
    """frozen: the total's pattern times the relevant values. own: softmax(q_r k_r) v_r. remove: z - softmax(q_i k_i)
    v_i."""
    activation: str = "ratio"
    """ratio: r f(t) / t. remove: f(t) - f(i)."""
    product: str = "half"
    """For a gate g times u: half is (g_r u_t + g_t u_r) / 2; remove is g_t u_t - g_i u_i. A soft cap
    on the logits has the same rule: r cap(t) / t, or cap(t) - cap(i)."""
    settle: frozenset[str] = frozenset()
    """The kinds of operations after which r and i of opposite sign are settled (the larger in magnitude becomes the
    total, the other 0): `linear`, `attention_out`, `mlp_in`, `mlp_out`, `attention_sum`, `mlp_sum`."""

    def __post_init__(self) -> None:
        for name, known in _RULES.items():
            if getattr(self, name) not in known:
                raise unknown(f"rule for {name}", str(getattr(self, name)), known)
        for kind in self.settle:
            if kind not in _SETTLED:
                raise unknown("kind of operation", str(kind), _SETTLED)


_RULES = {
    "bias": ("irrelevant", "shared"),
    "norm": ("frozen", "remove"),
    "attention": ("frozen", "own", "remove"),
    "activation": ("ratio", "remove"),
    "product": ("half", "remove"),
}
_SETTLED = ("linear", "attention_out", "mlp_in", "mlp_out", "attention_sum", "mlp_sum")
PRESETS = {
    "linear": Preset(),
    "frozen-remove": Preset(activation="remove"),
    "authors-gpt": Preset(
        bias="shared", attention="own", activation="remove", settle=frozenset({"mlp_in", "mlp_out", "mlp_sum"})
    ),
    "authors-bert": Preset(
        bias="shared",
        activation="remove",
        settle=frozenset({"linear", "attention_out", "mlp_in", "mlp_out", "attention_sum", "mlp_sum"}),
    ),
    "patch": Preset(norm="remove", attention="remove", activation="remove", product="remove"),
}
"""linear: every operation is a fixed coefficient, so r is linear in the source. frozen-remove: the same, activations
by removing the irrelevant part. authors-gpt, authors-bert: the published rules for causal models and for encoders.
patch: every rule by removal, which is ablation itself: t - r is the run with the source ablated."""


def get_preset(preset: str | Preset) -> Preset:
    """The named preset. Raises InputError for an unknown name."""
    if isinstance(preset, Preset):
        return preset
    if not isinstance(preset, str) or preset not in PRESETS:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise unknown("preset", str(preset), PRESETS)
    return PRESETS[preset]


def with_bias(preset: Preset, relevant: Tensor, total: Tensor, bias: Tensor | None) -> Tensor:
    """The relevant part of a product (the total less its bias) and its share of the bias."""
    if bias is None or preset.bias == "irrelevant":
        return relevant
    size = relevant.abs()
    rest = (total - bias - relevant).abs()
    # Rounding errors get no share: near r W = 0 they would get half of the bias.
    rounding = 64 * torch.finfo(rest.dtype).eps * size.amax(-1, keepdim=True)
    both = size + torch.where(rest > rounding, rest, 0)
    return relevant + bias * torch.where(both > 0, size / torch.where(both > 0, both, 1), 0)


def through_function(preset: Preset, f: Callable[[Tensor], Tensor], relevant: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """The relevant part of an activation function's output `out` = f(x)."""
    if preset.activation == "remove":
        return f(x) - f(x - relevant)  # not `out - ...`, so that r = 0 gives exactly 0
    return relevant * coefficient(f, x, out)


def coefficient(f: Callable[[Tensor], Tensor], x: Tensor, out: Tensor) -> Tensor:
    """f(x) / x, and the derivative of f where x is 0."""
    at_zero = x.abs() < torch.finfo(x.dtype).tiny
    ratio = out / torch.where(at_zero, 1, x)
    if not bool(at_zero.any()):
        return ratio
    with Gradients(True) as on, on:
        zero = torch.zeros_like(x, requires_grad=True)
        (slope,) = torch.autograd.grad(f(zero).sum(), zero)
    return torch.where(at_zero, slope, ratio)


def settled(relevant: Tensor, total: Tensor) -> Tensor:
    """Where r and i have opposite signs, the larger in magnitude becomes the total and the other 0."""
    irrelevant = total - relevant
    opposite = relevant * irrelevant < 0
    return torch.where(opposite, torch.where(relevant.abs() >= irrelevant.abs(), total, 0), relevant)
