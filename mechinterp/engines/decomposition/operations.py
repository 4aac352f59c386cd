"""The operations of a forward pass: what each computes, and how it carries a relevant part.

An operation reads named values `[batch, pos, ...]` and computes one. `apply` is the forward itself; `relevant` carries
the relevant parts `[source, batch, pos, ...]` of its inputs (None: no part is relevant) to its output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.engines.decomposition.rules import Preset, through_function, with_bias
from mechinterp.models.attention import AttentionScores, softmax_where
from mechinterp.models.norm import Norm

Parts = Sequence[Tensor | None]


@runtime_checkable
class Operation(Protocol):
    """One step of the forward; `kind` decides whether opposite signs are settled (see `Preset.settle`)."""

    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def output(self) -> str: ...
    @property
    def kind(self) -> str: ...

    def apply(self, totals: Sequence[Tensor]) -> Tensor:
        """The output of the forward."""
        ...

    def relevant(self, preset: Preset, parts: Parts, totals: Sequence[Tensor], out: Tensor) -> Tensor:
        """The relevant part of the output `out`; at least one of `parts` is not None."""
        ...


@dataclass(frozen=True)
class Linear:
    """`x W + b` over the last axes of x, which are flattened; the output's are `shape`."""

    inputs: tuple[str]
    output: str
    weight: Float[Tensor, "n_in n_out"]
    bias: Float[Tensor, " n_out"] | None
    shape: tuple[int, ...]
    kind: str = "linear"
    in_axes: int = 1

    def apply(self, totals: Sequence[Tensor]) -> Tensor:
        """x W + b."""
        x = totals[0].flatten(-self.in_axes)
        out = x @ self.weight.to(x.dtype)
        return (out if self.bias is None else out + self.bias.to(x.dtype)).unflatten(-1, self.shape)

    def relevant(self, preset: Preset, parts: Parts, totals: Sequence[Tensor], out: Tensor) -> Tensor:
        """r W and its share of the bias."""
        (r,) = parts
        assert r is not None
        product = r.flatten(-self.in_axes) @ self.weight.to(r.dtype)
        bias = None if self.bias is None else self.bias.to(r.dtype)
        return with_bias(preset, product, out.flatten(-len(self.shape)), bias).unflatten(-1, self.shape)


@dataclass(frozen=True)
class Normalize:
    """LayerNorm or RMSNorm."""

    inputs: tuple[str]
    output: str
    norm: Norm
    kind: str = "norm"

    def apply(self, totals: Sequence[Tensor]) -> Tensor:
        """The norm of x."""
        return self.norm(totals[0])

    def relevant(self, preset: Preset, parts: Parts, totals: Sequence[Tensor], out: Tensor) -> Tensor:
        """r with the total's scale, or the change of the output when r is removed from the input."""
        (r,), (x,) = parts, totals
        assert r is not None
        if preset.norm == "remove":
            return self.norm(x) - self.norm(x - r)
        return with_bias(preset, self.norm.project(r) / self.norm.scale(x), out, self.norm.bias)


@dataclass(frozen=True)
class Function:
    """An activation function, entry by entry."""

    inputs: tuple[str]
    output: str
    f: Callable[[Tensor], Tensor]
    kind: str = "activation"

    def apply(self, totals: Sequence[Tensor]) -> Tensor:
        """f(x)."""
        return self.f(totals[0])

    def relevant(self, preset: Preset, parts: Parts, totals: Sequence[Tensor], out: Tensor) -> Tensor:
        """By the preset's rule for activations; a soft cap follows the rule for products."""
        (r,), (x,) = parts, totals
        assert r is not None
        if self.kind == "cap":
            rule = "remove" if preset.product == "remove" else "ratio"
            preset = Preset(activation=rule)
        return through_function(preset, self.f, r, x, out)


@dataclass(frozen=True)
class Gate:
    """f(gate) * up, entry by entry (gated MLPs)."""

    inputs: tuple[str, str]
    output: str
    f: Callable[[Tensor], Tensor]
    kind: str = "gate"

    def apply(self, totals: Sequence[Tensor]) -> Tensor:
        """f(gate) * up."""
        return self.f(totals[0]) * totals[1]

    def relevant(self, preset: Preset, parts: Parts, totals: Sequence[Tensor], out: Tensor) -> Tensor:
        """Half of each factor's part, or the change of the product when both parts are removed."""
        x, up = totals
        gate, r_up = self.f(x), parts[1]
        r_gate = None if parts[0] is None else through_function(preset, self.f, parts[0], x, gate)
        if preset.product == "remove":
            return gate * up - (gate if r_gate is None else gate - r_gate) * (up if r_up is None else up - r_up)
        terms = [term for term in (None if r_gate is None else r_gate * up, None if r_up is None else gate * r_up)]
        return 0.5 * torch.stack([term for term in terms if term is not None]).sum(0)


@dataclass(frozen=True)
class Add:
    """The sum of its inputs."""

    inputs: tuple[str, ...]
    output: str
    kind: str = "sum"

    def apply(self, totals: Sequence[Tensor]) -> Tensor:
        """The sum."""
        return torch.stack(list(totals)).sum(0)

    def relevant(self, preset: Preset, parts: Parts, totals: Sequence[Tensor], out: Tensor) -> Tensor:
        """The sum of the relevant parts."""
        given = [r for r in parts if r is not None]
        return sum(given[1:], given[0])


@dataclass(frozen=True)
class Attention:
    """Every head's `pattern @ v`; inputs are q, k, v. Its methods also need the pattern, or the queries' positions."""

    inputs: tuple[str, str, str]
    output: str
    scores: AttentionScores | None
    """None: only the frozen pattern has a rule."""
    kind: str = "attention"

    def apply(self, totals: Sequence[Tensor]) -> Tensor:
        """`totals` are the pattern and v."""
        return _attended(*totals)

    def relevant(self, preset: Preset, parts: Parts, totals: Sequence[Tensor], out: Tensor) -> Tensor:
        """With the pattern of the total: `parts` are v's from position `first` on, `totals` the pattern's block."""
        r = parts[-1]
        assert r is not None
        return _attended(totals[0], r)

    def with_scores(
        self,
        preset: Preset,
        parts: Parts,
        totals: Sequence[Tensor],
        visible: Bool[Tensor, "batch 1 query key"],
        at: Int[Tensor, "batch query"],
    ) -> Tensor:
        """With the pattern of parts of q and k, by rule `own` or `remove`; keys and values are of all positions."""
        assert self.scores is not None
        if preset.attention == "own":
            like = next(r for r in parts if r is not None)
            q, k, v = (
                like.new_zeros(len(like), *t.shape) if r is None else r for r, t in zip(parts, totals, strict=True)
            )
            return _attended(softmax_where(self.scores(q, k, at), visible), v)
        q, k, v = (t if r is None else t - r for r, t in zip(parts, totals, strict=True))
        whole = _attended(softmax_where(self.scores(totals[0], totals[1], at), visible), totals[2])
        return whole - _attended(softmax_where(self.scores(q, k, at), visible), v)


def _attended(
    pattern: Float[Tensor, "*_axes head query key"], v: Float[Tensor, "*_axes key kv_head d_head"]
) -> Float[Tensor, "*_axes query head d_head"]:
    group = pattern.shape[-3] // v.shape[-2]
    grouped = pattern.unflatten(-3, (-1, group))
    if pattern.ndim == 4:
        z = einsum(grouped, v, "batch kv group query key, ... batch key kv d -> ... batch query kv group d")
    else:
        z = einsum(grouped, v, "... kv group query key, ... key kv d -> ... query kv group d")
    return z.flatten(-3, -2)
