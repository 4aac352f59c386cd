"""AtP*: the repairs of attribution patching where its first order fails (Kramar et al. 2024, arXiv 2403.00745).

The QK fix (section 3.1.1) computes what a patched query or key does to the attention pattern exactly, softmax and
all, and only then takes the first order. GradDrop (section 3.1.2) makes direct and indirect effects cancel less: one
backward per layer, with the gradient through what that layer adds to the residual stream set to zero.

Deviation: the patched patterns come from the model itself (queries or keys written, z written back, so that nothing
else changes), in place of the paper's algebra on scores. So they hold on every shape: rotary, grouped, windowed,
capped. Keys of a set of positions are replaced together; with `positions="each"` they are the paper's, one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.errors import UnsupportedError
from mechinterp.hooks import HookManager, Intervention
from mechinterp.sites import Site
from mechinterp.tasks.pairs import Pairs


def patched_patterns(
    model: HookManager,
    pairs: Pairs,
    tokens: Tensor,
    replaced: Mapping[Site, Tensor],
    where: Bool[Tensor, "batch pos"],
    z: Mapping[Site, Tensor],
) -> dict[int, Tensor]:
    """Each layer's pattern `[batch, head, query, key]` with its queries or keys replaced, all else as in the base run.

    `replaced` are the new values by site (all queries, or all keys), written at `where`; `z` are the base run's head
    outputs, so that no layer sees another one's patch. One forward for all layers and heads: a head's pattern is its
    own affair.
    """
    at = where[:, :, None, None]
    edits = [Intervention(site, lambda old, new=new: torch.where(at, new, old)) for site, new in replaced.items()]
    edits += [Intervention(site, value) for site, value in z.items()]
    layers = [int(site.layer or 0) for site in replaced]
    patterns = {layer: Site("pattern", layer) for layer in layers}
    last = Site("z", max(layers))
    run = model.run(tokens, pairs.mask, record=list(patterns.values()), interventions=edits, stop=last)
    return {layer: run.values[site] for layer, site in patterns.items()}


def pattern_effects(
    base: Float[Tensor, "batch head query key"],
    patched: Float[Tensor, "batch head query key"],
    gradient: Float[Tensor, "batch head query key"],
    real: Bool[Tensor, "batch pos"],
    n_units: int,
) -> Float[Tensor, "batch query unit"]:
    """`(base - patched) * gradient` summed over the keys; heads that share keys are summed into one unit."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    product = (base.to(dtype) - patched.to(dtype)) * gradient.to(dtype)
    # Rows of padding may be NaN.
    by_head = torch.where(real[:, :, None], product.sum(-1).transpose(1, 2), 0)
    return by_head.unflatten(-1, (n_units, -1)).sum(-1)


def dropped_layers(model: HookManager) -> list[list[Intervention]]:
    """Per layer the edits that set the gradient through its contribution to the residual stream to zero.

    Raises UnsupportedError for a model of one layer: nothing would be left.
    """
    if model.dims.n_layers < 2:
        raise UnsupportedError("GradDrop drops one layer of several, and this model has one; use 'atp-qk-fix'.")
    kinds = ("attn_out", "mlp_out") if model.dims.has_mlp else ("attn_out",)
    return [
        [Intervention(Site(kind, layer), grad=torch.zeros_like) for kind in kinds]
        for layer in range(model.dims.n_layers)
    ]


def drop_mean(
    model: HookManager, site: Site, effects: Sequence[Float[Tensor, "unit set batch"]]
) -> Float[Tensor, "unit set batch"]:
    """The mean of |effect| over the dropped layers other than the site's own, which leaves nothing of it.

    The residual stream belongs to no layer, so there the mean is over all of them.
    """
    total = torch.stack([effect.abs() for effect in effects]).sum(0)
    return total / (model.dims.n_layers - (not site.kind.startswith("resid")))
