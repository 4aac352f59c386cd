"""Steering: adding a direction to a site, mapping its values, or ablating a direction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.features.edits import edit_at
from mechinterp.models.components import BY_QUERY, Position, Positions, as_pairs, position_index
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.interventions import Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs


def add_direction(
    site: str | Site,
    vector: Float[Tensor, " d"],
    coefficient: float = 1.0,
    *,
    pairs: Pairs | None = None,
    positions: Positions = None,
) -> Intervention:
    """The intervention that adds `coefficient * vector` at a site: everywhere, or at `positions` of `pairs`.

    Args:
        site: Where.
        vector: Of the site's last axis (d_model, d_head, neurons; at `z`, the same for every head).
        coefficient: Multiplies the vector.
        pairs: The pairs whose prompts (clean or corrupt) will be run, if `positions` are given.
        positions: One set of positions; by default all.

    Source: activation addition, Turner et al. 2023 (arXiv 2308.10248).

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=4)
    >>> toward = mi.mean_difference(model, pairs.clean, pairs.corrupt, "resid_pre.2", mask=pairs.mask)
    >>> steered = model.run(pairs.clean, interventions=[mi.add_direction("resid_pre.2", toward, -2.0)])
    """
    _check_vector(vector)
    return _affine(site, lambda value: value + coefficient * vector.to(value), vector.shape[0], pairs, positions)


def affine(
    site: str | Site,
    matrix: Float[Tensor, "d d"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    pairs: Pairs | None = None,
    positions: Positions = None,
) -> Intervention:
    """The intervention that maps the value v at a site to `v @ matrix + bias`, everywhere or at positions.

    Args:
        site: Where.
        matrix: Of the site's last axis.
        bias: Added after it; by default none.
        pairs: The pairs whose prompts will be run, if `positions` are given.
        positions: One set of positions; by default all.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or (bias is not None and bias.shape != matrix.shape[:1]):
        got = None if bias is None else list(bias.shape)
        raise InputError(f"An affine map must be [d, d] with a bias [d]; got {list(matrix.shape)} and {got}.")

    def mapped(value: Tensor) -> Tensor:
        new = value @ matrix.to(value)
        return new if bias is None else new + bias.to(value)

    return _affine(site, mapped, matrix.shape[0], pairs, positions)


def ablate_direction(
    site: str | Site,
    vector: Float[Tensor, " d"],
    *,
    pairs: Pairs | None = None,
    positions: Positions = None,
) -> Intervention:
    """The intervention that removes the component along `vector` from the value: `v - (v . u) u` with u of length 1.

    Args:
        site: Where.
        vector: The direction; its length does not matter.
        pairs: The pairs whose prompts will be run, if `positions` are given.
        positions: One set of positions; by default all.

    Source: Arditi et al. 2024 (arXiv 2406.11717).
    """
    _check_vector(vector)
    unit = vector.double() / vector.double().norm()

    def ablate(value: Tensor) -> Tensor:
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        along = unit.to(wide)
        return (wide - (wide @ along)[..., None] * along).to(value.dtype)

    return _affine(site, ablate, len(vector), pairs, positions)


def mean_difference(
    model: HookManager,
    toward: Int[Tensor, "batch pos"],
    away: Int[Tensor, "batch2 pos2"],
    site: str | Site,
    position: Position = -1,
    *,
    mask: Bool[Tensor, "batch pos"] | None = None,
    away_mask: Bool[Tensor, "batch2 pos2"] | None = None,
) -> Float[Tensor, "*unit d"]:
    """The mean value at a site over some prompts minus that over others, at one position of each.

    Args:
        model: The model.
        toward: The first prompts.
        away: The prompts whose mean is subtracted.
        site: Where the values are read.
        position: Where in each prompt; -1: the last real token.
        mask: True at the real tokens of `toward`; by default everywhere.
        away_mask: The same for `away`; by default `mask`, if the prompts have the same shape.

    Cost: two forwards up to the site. Raises InputError for a position outside a prompt, and for attention patterns,
    which are not vectors.
    """
    site = Site.parse(site) if isinstance(site, str) else site
    if site.kind in BY_QUERY:
        raise InputError(f"'{site}' is an attention pattern; a direction needs a residual stream, head or neurons.")
    if away_mask is None and mask is not None and away.shape == toward.shape:
        away_mask = mask
    means: list[Tensor] = []
    for tokens, real in ((toward, mask), (away, away_mask)):
        value = model.run(tokens, real, record=[site], stop=site).values[site]
        at = position_index(as_pairs(tokens, real), position).to(value.device)
        chosen = value[torch.arange(len(value), device=value.device), at]
        means.append(chosen.to(torch.promote_types(value.dtype, torch.float32)).mean(0))
    return means[0] - means[1]


def _check_vector(vector: Tensor) -> None:
    if vector.ndim != 1 or not bool(vector.isfinite().all()) or not bool(vector.any()):
        raise InputError(f"A direction must be a vector [d] that is finite and not 0; got shape {list(vector.shape)}.")


def _affine(
    site: str | Site, change: Callable[[Tensor], Tensor], width: int, pairs: Pairs | None, positions: Positions
) -> Intervention:
    site = Site.parse(site) if isinstance(site, str) else site
    if site.kind in BY_QUERY:
        raise InputError(f"'{site}' is an attention pattern; see `edit_pattern`.")

    def checked(value: Tensor) -> Tensor:
        if value.shape[-1] != width:
            raise InputError(f"The direction or map at '{site}' is of {width} numbers, the value of {value.shape[-1]}.")
        return change(value)

    return edit_at(site, checked, pairs, positions)
