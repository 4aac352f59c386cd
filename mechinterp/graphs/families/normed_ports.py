"""Reading through a norm and a projection, and the way back of a gradient: the ports of heads and of MLPs.

With u the standardized residual, s its scale and W the weights of the norm and the projection, the gradient of the
residual is `W' g / s - u <u, W' g> / (d_model s)`. For a projection `<u, W' g> = <q - constant, g>` is available as a
scalar per port and token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechinterp.graphs.token_windows import Window
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Site


@dataclass(frozen=True)
class Step:
    """One forward and backward: values and gradients by site, `[batch, pos, ...]`."""

    values: Mapping[Site | FeatureBasis, Tensor]
    gradients: Mapping[Site | FeatureBasis, Tensor]

    @property
    def nbytes(self) -> int:
        """What they take."""
        return sum(value.nbytes for value in (*self.values.values(), *self.gradients.values()))


@dataclass(frozen=True)
class Projections:
    """`standardize(resid) @ weight + constant`, a site at a time; the norm's weight and bias are folded in."""

    norm: Norm
    maps: tuple[tuple[Tensor, Tensor], ...]
    """(weight `[port, d_model, n]`, constant `[port, n]`) of every site."""


def pull_back_projections(
    projections: Projections,
    sites: Sequence[Site | FeatureBasis],
    stream: Site,
    steps: Sequence[Step],
    window: Window,
    out: Float[Tensor, "port token d_model"],
    *,
    frozen: bool,
) -> None:
    """The gradient at the residual stream of ports that are projections."""
    dtype, norm = out.dtype, projections.norm
    resids = [step.values[stream][window].to(dtype).flatten(0, 1) for step in steps]
    scales = [norm.scale(resid) for resid in resids]
    first = 0
    along: list[list[Tensor]] = [[] for _ in steps]
    for site, (weight, constant) in zip(sites, projections.maps, strict=True):
        total: Tensor | None = None
        for i, (step, scale) in enumerate(zip(steps, scales, strict=True)):
            gradient = rearrange(step.gradients[site][window].to(dtype), "b p h d -> h (b p) d") / scale
            value = rearrange(step.values[site][window].to(dtype), "b p h d -> h (b p) d")
            total = gradient if total is None else total + gradient
            if norm.kind != "none" and not frozen:
                along[i].append(((value - constant[:, None]) * gradient).sum(-1) / resids[i].shape[-1])
        assert total is not None
        if norm.kind == "layer":
            weight = weight - weight.mean(1, keepdim=True)
        torch.bmm(total, weight.transpose(1, 2), out=out[first : first + len(weight)])
        first += len(weight)
    if norm.kind != "none" and not frozen:
        for resid, parts in zip(resids, along, strict=True):
            out.addcmul_(norm.standardize(resid), torch.cat(parts)[..., None], value=-1)


def pull_back_norm(
    norm: Norm,
    site: Site | FeatureBasis,
    stream: Site,
    steps: Sequence[Step],
    window: Window,
    out: Float[Tensor, "1 token d_model"],
    *,
    frozen: bool,
) -> None:
    """The gradient at the residual stream of one port that is the norm's output."""
    dtype = out.dtype
    total: Tensor | None = None
    for step in steps:
        resid = step.values[stream][window].to(dtype).flatten(0, 1)
        gradient = step.gradients[site][window].to(dtype).flatten(0, 1)
        pulled = norm.project_transposed(gradient) / norm.scale(resid)
        if norm.kind != "none" and not frozen:
            standard = norm.standardize(resid)
            pulled = pulled - standard * (standard * pulled).mean(-1, keepdim=True)
        total = pulled if total is None else total + pulled
    assert total is not None
    out[0] = total


@dataclass(frozen=True)
class DirectionGradients:
    """The gradients at the residual stream of ports that are one number each: no `[port, token, d_model]` is made.

    That of port p at token t is `weights[p, t] * directions[p]`, less `along[p, t] * standard[t]` of every step: what
    the scale of the norm takes away.
    """

    weights: Float[Tensor, "port token"]
    directions: Float[Tensor, "port d_model"]
    steps: tuple[tuple[Float[Tensor, "port token"], Float[Tensor, "token d_model"]], ...]
    """(along, standard) of every step; none where the scale is a constant."""

    def dense(self) -> Float[Tensor, "port token d_model"]:
        """Every gradient in full; for tests and small graphs."""
        found = self.weights[..., None] * self.directions[:, None]
        for along, standard in self.steps:
            found = found.addcmul(standard, along[..., None], value=-1)
        return found

    def total(self) -> Float[Tensor, "token d_model"]:
        """The sum over the ports."""
        found = self.weights.T @ self.directions
        for along, standard in self.steps:
            found = found - along.sum(0)[:, None] * standard
        return found

    def at(self, tokens: Tensor) -> DirectionGradients:
        """Those at some tokens."""
        steps = tuple((along[:, tokens], standard[tokens]) for along, standard in self.steps)
        return DirectionGradients(self.weights[:, tokens], self.directions, steps)

    def inner(self, writes: Float[Tensor, "writer token d_model"]) -> Float[Tensor, "port writer"]:
        """The product of every gradient with every write, summed over tokens."""
        found = ((writes @ self.directions.T) * self.weights.T).sum(1).T
        for along, standard in self.steps:
            found = found - along @ _dots(writes, standard)
        return found

    def inner_low_rank(
        self, values: Float[Tensor, "writer token"], directions: Float[Tensor, "writer d_model"]
    ) -> Float[Tensor, "port writer"]:
        """The same for writes that are values times directions: only products of directions have d_model."""
        found = (self.directions @ directions.T) * (self.weights @ values.T)
        for along, standard in self.steps:
            found = found - along @ (values * (directions @ standard.T)).T
        return found


def _dots(writes: Float[Tensor, "writer token d_model"], of: Float[Tensor, "token d_model"]) -> Tensor:
    """The product of every write with the vector of its token, `[token, writer]`."""
    return torch.einsum("wtd,td->tw", writes, of)


def direction_gradients(
    norm: Norm,
    directions: Float[Tensor, "port d_model"],
    resids: Sequence[Float[Tensor, "batch pos d_model"]],
    gradients: Sequence[Float[Tensor, "batch pos port"]],
    dtype: torch.dtype,
    *,
    frozen: bool,
) -> DirectionGradients:
    """The gradients at the residual stream of ports that are one number each: the norm's output along a direction.

    Args:
        norm: The norm.
        directions: What each port reads of the norm's output.
        resids: The residual stream of every step.
        gradients: The gradient at the ports of every step; the results are summed.
        dtype: Of the results.
        frozen: Whether the scale of the norm is a constant.
    """
    read = norm.project_transposed(directions.to(dtype))
    total = torch.zeros((), dtype=dtype, device=read.device)
    steps: list[tuple[Tensor, Tensor]] = []
    for resid, gradient in zip(resids, gradients, strict=True):
        resid = resid.to(dtype).flatten(0, 1)
        scaled = (gradient.to(dtype).flatten(0, 1) / norm.scale(resid)).T  # [port, token]
        total = total + scaled
        if norm.kind != "none" and not frozen:
            standard = norm.standardize(resid)
            steps.append((scaled * (read @ standard.T) / resid.shape[-1], standard))
    return DirectionGradients(total, read, tuple(steps))
