"""Direct effects between the features of a circuit: what does not pass through another dictionary's site.

An edge is a product of three: how much the downstream node matters to the metric, the derivative of the downstream node
with respect to the upstream one, and the change of the upstream one. For the derivative every dictionary's site before
the downstream node is cut off from what is before it, so that what is left is direct. That is what the paper's stops of
gradients do (from the attention or the previous residual stream to the residual stream: not through the MLP, ...), and
holds for any choice of sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.analysis.feature_circuit.effects import AtSite
from mechinterp.analysis.feature_circuit.places import reaches
from mechinterp.engines.patch_sweep import memory_budget
from mechinterp.engines.readout import FINAL, Readout
from mechinterp.engines.site_gradients import over_sets
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.hook_manager import HookManager, Intervention


@dataclass(frozen=True)
class Target:
    """A downstream node: feature number `index` (the last one is the error) at set number `at`."""

    index: int
    at: int


def edges_into(
    model: HookManager,
    readout: Readout,
    parts: Sequence[AtSite],
    own: AtSite,
    targets: Sequence[Target],
    masks: Bool[Tensor, "set batch pos"],
    *,
    memory: int | None = None,
) -> dict[FeatureBasis, Float[Tensor, "target node set batch"]]:
    """The edges into nodes of one basis from every node of the bases that reach it directly, by basis.

    Cost: a forward up to the site and a backward per target.
    """
    pairs = readout.pairs
    sites = [part.site for part in parts]
    above = [p for p in parts if p is not own and reaches(model, p.site, own.basis.sites_in[0], sites)]
    if not above:
        return {}
    size = _at_once(model, parts, pairs.clean.shape, memory)
    found: dict[FeatureBasis, list[Tensor]] = {part.basis: [] for part in above}
    for first in range(0, len(targets), size):
        chunk = targets[first : first + size]
        captured: dict[str, Tensor] = {}

        def keep(value: Tensor, seen: dict[str, Tensor] = captured) -> Tensor:
            seen["in"] = value
            return value

        cut = [Intervention(part.site, torch.Tensor.detach) for part in above]
        reads = [] if own.basis.sites_in == own.basis.sites_out else [Intervention(own.basis.sites_in[0], keep)]
        run = model.run(
            pairs.clean.repeat(len(chunk), 1),
            pairs.mask.repeat(len(chunk), 1),
            interventions=[*cut, *reads],
            grads=[part.site for part in above],
            loss=_weighted(own, chunk, masks, captured),
            stop=own.site,
        )
        for part in above:
            rows = run.grads[part.site].unflatten(0, (len(chunk), -1))
            found[part.basis] += [over_sets(part.products(row), masks) for row in rows]
    return {basis: torch.stack(rows) for basis, rows in found.items()}


def _weighted(
    own: AtSite, chunk: Sequence[Target], masks: Bool[Tensor, "set batch pos"], captured: Mapping[str, Tensor]
) -> Callable[[Tensor], Tensor]:
    """The sum of the targets, each times the metric's gradient there, run by run.

    The error is the site less what the features make of it, so all nodes of a site add up to the site times its
    gradient.
    """
    error = own.along.shape[-1]

    def loss(value: Tensor) -> Tensor:
        value = value.unflatten(0, (len(chunk), -1))
        given = captured.get("in")
        read = value if given is None else given.unflatten(0, (len(chunk), -1))
        total = value.new_zeros(())
        for target, row, seen in zip(chunk, value, read, strict=True):
            mask = masks[target.at].to(own.along)
            features = own.basis.encode(seen).values
            if target.index < error:
                total = total + (features[..., target.index] * own.along[..., target.index] * mask).sum()
            else:
                whole = (row.to(own.gradient) * own.gradient).flatten(2).sum(-1)
                total = total + ((whole - (features * own.along).sum(-1)) * mask).sum()
        return total

    return loss


def edges_into_logits(
    model: HookManager, readout: Readout, parts: Sequence[AtSite], masks: Bool[Tensor, "set batch pos"]
) -> dict[FeatureBasis, Float[Tensor, "node set batch"]]:
    """The direct effects on the metric of every node that reaches the logits directly. A forward and a backward."""
    pairs = readout.pairs
    sites = [part.site for part in parts]
    above = [part for part in parts if reaches(model, part.site, FINAL, sites)]
    above = [part for part in above if part.site == FINAL or FINAL not in sites]
    run = model.run(
        pairs.clean,
        pairs.mask,
        interventions=[Intervention(part.site, torch.Tensor.detach) for part in above],
        grads=[part.site for part in above],
        loss=readout.of_resid,
        stop=FINAL,
    )
    return {part.basis: over_sets(part.products(run.grads[part.site]), masks) for part in above}


def _at_once(model: HookManager, parts: Sequence[AtSite], shape: torch.Size, memory: int | None) -> int:
    widest = max(part.along.shape[-1] for part in parts)
    each = 4 * shape[0] * shape[1] * (4 * widest + 48 * model.dims.d_model * max(1, model.dims.n_layers))
    return 1 if model.edited else max(1, memory_budget(model.device, memory) // each)
