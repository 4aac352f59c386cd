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

from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Site


@dataclass(frozen=True)
class Step:
    """One forward and backward: values and gradients by site, `[batch, pos, ...]`."""

    values: Mapping[Site | FeatureBasis, Tensor]
    gradients: Mapping[Site | FeatureBasis, Tensor]


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
    chunk: slice,
    out: Float[Tensor, "port token d_model"],
    *,
    frozen: bool,
) -> None:
    """The gradient at the residual stream of ports that are projections."""
    dtype, norm = out.dtype, projections.norm
    resids = [step.values[stream][chunk].to(dtype).flatten(0, 1) for step in steps]
    scales = [norm.scale(resid) for resid in resids]
    first = 0
    along: list[list[Tensor]] = [[] for _ in steps]
    for site, (weight, constant) in zip(sites, projections.maps, strict=True):
        total: Tensor | None = None
        for i, (step, scale) in enumerate(zip(steps, scales, strict=True)):
            gradient = rearrange(step.gradients[site][chunk].to(dtype), "b p h d -> h (b p) d") / scale
            value = rearrange(step.values[site][chunk].to(dtype), "b p h d -> h (b p) d")
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
    chunk: slice,
    out: Float[Tensor, "1 token d_model"],
    *,
    frozen: bool,
) -> None:
    """The gradient at the residual stream of one port that is the norm's output."""
    dtype = out.dtype
    total: Tensor | None = None
    for step in steps:
        resid = step.values[stream][chunk].to(dtype).flatten(0, 1)
        gradient = step.gradients[site][chunk].to(dtype).flatten(0, 1)
        pulled = norm.project_transposed(gradient) / norm.scale(resid)
        if norm.kind != "none" and not frozen:
            standard = norm.standardize(resid)
            pulled = pulled - standard * (standard * pulled).mean(-1, keepdim=True)
        total = pulled if total is None else total + pulled
    assert total is not None
    out[0] = total


def pull_back_directions(
    norm: Norm,
    directions: Float[Tensor, "port d_model"],
    resids: Sequence[Float[Tensor, "batch pos d_model"]],
    gradients: Sequence[Float[Tensor, "batch pos port"]],
    out: Float[Tensor, "port token d_model"],
    *,
    frozen: bool,
) -> None:
    """The gradient at the residual stream of ports that are one number each: the norm's output along a direction.

    Args:
        norm: The norm.
        directions: What each port reads of the norm's output.
        resids: The residual stream of every step.
        gradients: The gradient at the ports of every step; the results are summed.
        out: Where to write it.
        frozen: Whether the scale of the norm is a constant.
    """
    dtype = out.dtype
    read = norm.project_transposed(directions.to(dtype))
    total: Tensor | None = None
    along: list[tuple[Tensor, Tensor]] = []
    for resid, gradient in zip(resids, gradients, strict=True):
        resid = resid.to(dtype).flatten(0, 1)
        scaled = (gradient.to(dtype).flatten(0, 1) / norm.scale(resid)).T  # [port, token]
        total = scaled if total is None else total + scaled
        if norm.kind != "none" and not frozen:
            standard = norm.standardize(resid)
            along.append((standard, scaled * (read @ standard.T) / resid.shape[-1]))
    assert total is not None
    torch.mul(total[..., None], read[:, None], out=out)
    for standard, weights in along:
        out.addcmul_(standard, weights[..., None], value=-1)
