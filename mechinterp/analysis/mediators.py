"""One hop of a longer path: what mediators write when only their chosen inputs change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.analysis.parts import Part
from mechinterp.analysis.residual_paths import Senders, Values
from mechinterp.errors import InputError
from mechinterp.hooks import HookManager, Intervention
from mechinterp.models.modes import Gradients
from mechinterp.sites import Node, Site
from mechinterp.tasks.pairs import Pairs


def mediate(
    model: HookManager,
    pairs: Pairs,
    tokens: Int[Tensor, "batch pos"],
    base: Values,
    mediators: Sequence[Part],
    masks: Sequence[Bool[Tensor, "batch pos"]],
    inputs: Sequence[Tensor],
) -> tuple[Senders, Values, float]:
    """(the mediators as senders in every candidate, their new writes, what it took in forwards of the prompts).

    `inputs` has for every mediator its new input, `[candidate, batch, pos, ...]`, written where its mask is True; all
    other inputs are the base run's. A key/value head's change reaches every query head that reads it.
    """
    dims, n = model.dims, len(inputs[0])
    new, nodes, cost = dict(base.of), list[Node](), 0.0
    for layer in sorted({part.site.layer or 0 for part in mediators}):
        mine = [i for i, part in enumerate(mediators) if part.site.layer == layer]
        heads = [i for i in mine if mediators[i].site.kind in ("q", "k", "v")]
        if heads:
            start = base[Site("resid_pre", layer)][0].to(model.dtype)
            edits = {i: (mediators[i], masks[i], inputs[i]) for i in heads}
            sites = {mediators[i].site for i in heads}
            run = model.run(
                tokens.repeat(n, 1),
                None if dims.causal else pairs.mask.repeat(n, 1),
                interventions=[
                    Intervention(site, _write([e for e in edits.values() if e[0].site == site], n)) for site in sites
                ],
                record=[Site("z", layer)],
                start=(layer, start.repeat(n, 1, 1)),
                stop=Site("z", layer),
            )
            z = run.values[Site("z", layer)].unflatten(0, (n, -1))
            new[Site("z", layer)] = z.to(base[Site("z", layer)].dtype)
            cost += n / dims.n_layers
            nodes += [Node("head", layer, head) for head in _touched(model, [mediators[i] for i in heads])]
        for i in mine:
            if i in heads:
                continue
            if mediators[i].site.kind != "mlp_in":
                raise InputError(
                    f"'{mediators[i].site}' writes nothing by itself, so it cannot be a mediator; name heads' inputs "
                    "('a5.h5<k>') and MLPs ('m3')."
                )
            with Gradients(False) as off, off:
                written = model.mlp(layer, inputs[i])
            old = base[Site("mlp_out", layer)]
            new[Site("mlp_out", layer)] = torch.where(masks[i][..., None], written.to(old.dtype), old)
            nodes.append(Node("mlp", layer))
    where = pairs.mask.expand(n, len(nodes), *pairs.mask.shape)
    return Senders(tuple(nodes), where), Values(new), cost


def _touched(model: HookManager, parts: Sequence[Part]) -> list[int]:
    """The query heads whose output the changed inputs reach."""
    group = model.dims.n_heads // model.dims.n_kv_heads
    found: set[int] = set()
    for part in parts:
        unit = part.unit or 0
        found |= {unit} if part.site.kind == "q" else set(range(unit * group, (unit + 1) * group))
    return sorted(found)


def _write(several: Sequence[tuple[Part, Tensor, Tensor]], n: int) -> Callable[[Tensor], Tensor]:
    """Writes each head's new input into every candidate's rows."""

    def edit(value: Tensor) -> Tensor:
        new = value.clone()
        rows = new.unflatten(0, (n, -1))
        for part, mask, given in several:
            own = rows[:, :, :, part.unit]
            rows[:, :, :, part.unit] = torch.where(mask[..., None], given.to(value.dtype), own)
        return new

    return edit
