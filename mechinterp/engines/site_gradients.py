"""Values and gradients at sites of one run, and their products summed to units and positions.

What every first-order method shares: attribution patching, its variants, and integrated gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.engines.readout import FINAL
from mechinterp.models.components import BY_QUERY, UNIT_AXES
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.pairs import Pairs

Loss: TypeAlias = Callable[[Tensor], Tensor]
"""The final residual stream -> one number per example."""


@dataclass(frozen=True)
class SiteGradients:
    """One run: the value of the metric, and per site the activation and its gradient (as the model has them)."""

    values: Mapping[Site, Tensor]
    gradients: Mapping[Site, Tensor]
    metric: Float[Tensor, " batch"]


def site_gradients(
    model: HookManager,
    pairs: Pairs,
    tokens: Int[Tensor, "batch pos"],
    sites: Iterable[Site],
    loss: Loss,
    *,
    record: Iterable[Site] = (),
    edits: Sequence[Intervention] = (),
    start: tuple[int, Tensor] | None = None,
) -> SiteGradients:
    """The gradients of `loss` at `sites`, and the values there and at `record`. One forward and one backward."""
    wanted = tuple(dict.fromkeys(sites))
    run = model.run(
        tokens,
        pairs.mask,
        record=list(dict.fromkeys([*wanted, *record])),
        interventions=edits,
        grads=wanted,
        loss=loss,
        start=start,
        stop=FINAL,
    )
    if run.loss is None:
        raise InputError("The run did not return a value of the metric.")
    return SiteGradients(_by_site(run.values), _by_site(run.grads), run.loss)


def site_integral(
    model: HookManager,
    pairs: Pairs,
    tokens: Int[Tensor, "batch pos"],
    site: Site,
    change: Float[Tensor, "batch ..."],
    loss: Loss,
    points: Sequence[tuple[float, float]],
    *,
    base: Float[Tensor, "batch ..."],
    start: tuple[int, Tensor] | None = None,
) -> Float[Tensor, "batch ..."]:
    """The mean gradient of `loss` at a site on the line from `base - change` to its value `base` in the plain run.

    All positions of the site move together, and everything before it stays as it is. So the sum of `change` times this
    tends to loss(base) - loss(base - change), example by example. In float32 or better.

    Args:
        model: The model.
        pairs: The batch.
        tokens: The prompts that are run.
        site: Where.
        change: The value at the site less its replacement.
        loss: What is differentiated.
        points: (point, weight) of the integral; point 1 is the plain run.
        base: The value at the site.
        start: As in `HookManager.run`.

    Cost: a forward and a backward per point.
    """
    total = torch.zeros(base.shape, dtype=torch.promote_types(base.dtype, torch.float32), device=base.device)
    for point, weight in points:
        edit = Intervention(site, base - ((1 - point) * change).to(base.dtype))
        run = site_gradients(model, pairs, tokens, [site], loss, edits=[edit], start=start)
        total += weight * run.gradients[site].to(total)
    return total


def site_values(
    model: HookManager, pairs: Pairs, tokens: Int[Tensor, "batch pos"], sites: Sequence[Site]
) -> dict[Site, Tensor]:
    """The activations at `sites`. One forward."""
    return _by_site(model.run(tokens, pairs.mask, record=sites, stop=FINAL).values)


def check_differentiable(metric: Metric) -> None:
    """Return None when the metric has a gradient. Raises InputError otherwise."""
    if not metric.differentiable:
        raise InputError(
            f"Metric {metric.name!r} has no gradient; use logit_diff, prob_diff, log_prob or another one that has."
        )


def unit_products(
    site: Site, difference: Float[Tensor, "batch ..."], gradient: Float[Tensor, "batch ..."]
) -> Float[Tensor, "batch pos unit"]:
    """`difference * gradient` summed over all axes but token and unit, in float32 or better.

    A unit is a head or a neuron; a site without them has one unit. The token of a pattern is its query.
    """
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    product = difference.to(dtype) * gradient.to(dtype)
    if site.kind in BY_QUERY:
        return product.sum(-1).transpose(1, 2)
    axis = UNIT_AXES.get(site.kind)
    if axis == "neuron":
        return product
    return product.sum(-1) if axis is not None else product.sum(-1, keepdim=True)


def over_sets(
    products: Float[Tensor, "batch pos unit"], masks: Bool[Tensor, "set batch pos"]
) -> Float[Tensor, "unit set batch"]:
    """Summed over the positions of every set."""
    # Not a product with 0: at padding a pattern's products may be NaN.
    real = torch.where(masks.any(0)[..., None], products, 0)
    return einsum(real, masks.to(real.dtype), "batch pos unit, set batch pos -> unit set batch")


def _by_site(found: Mapping[Site | str, Tensor]) -> dict[Site, Tensor]:
    return {Site.parse(site) if isinstance(site, str) else site: value for site, value in found.items()}
