"""How a change of some nodes' writes changes the inputs of receivers, with all other heads frozen at the base run.

`walk` carries the change as a difference of the residual stream, layer by layer, for many candidates side by side: a
sender adds the difference of its write in its own layer, the heads between add nothing, and the MLPs between add
nothing (direct paths) or what recomputing them adds. No forward of the model is run. `mediate` turns changed inputs of
heads and MLPs into changed writes, so that a path may take several hops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.models.components import Part
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.modes import Gradients
from mechinterp.models.sites import Node, Site
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True)
class Values:
    """Values of one run (or of several candidates' runs) at the positions that matter: `[candidate, batch, pos, ...]`.

    Both runs have `resid_pre.0`, and z and mlp_out of every layer; the base run also `resid_pre`, `resid_mid` (not on
    parallel blocks) and `resid_final`. The first axis is 1 where all candidates share them.
    """

    of: Mapping[Site, Tensor]

    def __getitem__(self, site: Site) -> Tensor:
        return self.of[site]

    def rows(self, chosen: Tensor) -> Values:
        """The values of some of the candidates."""
        return Values({site: value if len(value) == 1 else value[chosen] for site, value in self.of.items()})


@dataclass(frozen=True)
class Senders:
    """Which nodes send in each candidate, and where."""

    nodes: tuple[Node, ...]
    where: Bool[Tensor, "candidate node batch pos"]
    """True where the node writes its new value."""

    def rows(self, chosen: Tensor) -> Senders:
        """Some of the candidates."""
        return Senders(self.nodes, self.where[chosen])

    def first_layer(self) -> Int[Tensor, " candidate"]:
        """The layer in which each candidate first differs."""
        layers = torch.tensor([max(0, node.layer) for node in self.nodes])
        sends = self.where.flatten(2).any(-1).cpu()
        return torch.where(sends, layers[None], 10**6).amin(1)

    def at(self, kind: str, layer: int) -> list[int]:
        """The rows of the nodes of a kind in a layer."""
        return [i for i, node in enumerate(self.nodes) if node.kind == kind and node.layer == layer]


def walk(
    model: HookManager,
    base: Values,
    new: Values,
    senders: Senders,
    receivers: Sequence[Part],
    *,
    recompute_mlps: bool,
) -> list[Tensor]:
    """The new input of each receiver, `[candidate, batch, pos, ...]`.

    A receiver is a part at a reader's site: q, k or v with its head, `mlp_in`, `resid_pre`, `resid_mid` or
    `resid_final` (before the final norm). `new` has the senders' new z and mlp_out.

    Cost: per layer one product of the heads' differences, and with `recompute_mlps` one MLP over all candidates that
    differ before it.
    """
    dims = model.dims
    # Candidates in the order of the layer where they begin, so that those that already differ are a leading block.
    order = senders.first_layer().argsort(stable=True)
    senders, new = senders.rows(order), new.rows(order)
    begins = senders.first_layer()
    n = len(order)
    last = max(dims.n_layers if part.site.layer is None else part.site.layer for part in receivers)
    like = base[Site("resid_pre", 0)]
    delta = like.new_zeros(n, *like.shape[1:])
    for i in senders.at("input", -1):
        lost = base[Site("resid_pre", 0)] - new[Site("resid_pre", 0)]
        delta += lost * senders.where[:, i, ..., None]
    found: dict[Part, Tensor] = {}
    for layer in range(min(last + 1, dims.n_layers)):
        live = slice(0, int((begins <= layer).sum()))
        before = delta.clone() if dims.parallel and dims.has_mlp else delta
        _read(model, base, layer, ("resid_pre", "q", "k", "v"), receivers, delta, found)
        _add_heads(model, base, new, senders, layer, delta, recompute_mlps)
        _read(model, base, layer, ("resid_mid",), receivers, delta, found)
        _read(model, base, layer, ("mlp_in",), receivers, before, found)
        if dims.has_mlp:
            _add_mlp(model, base, new, senders, layer, delta, before, live, recompute_mlps)
    for part in receivers:
        if part.site.layer is None:
            found[part] = base[part.site] - delta
    back = order.argsort()
    return [found[part][back] for part in receivers]


def _stream(model: HookManager, base: Values, layer: int) -> Tensor:
    """The residual stream that the MLP of a layer reads."""
    return base[Site("resid_pre" if model.dims.parallel else "resid_mid", layer)]


def _read(
    model: HookManager,
    base: Values,
    layer: int,
    kinds: tuple[str, ...],
    receivers: Sequence[Part],
    delta: Tensor,
    found: dict[Part, Tensor],
) -> None:
    for part in receivers:
        site = part.site
        if site.layer != layer or site.kind not in kinds:
            continue
        if site.kind in ("resid_pre", "resid_mid"):
            found[part] = base[site] - delta
        elif site.kind == "mlp_in":
            found[part] = model.layout.read_mlp(layer, _stream(model, base, layer) - delta)
        else:
            weight, constant = model.layout.folded(layer, site.kind, delta.dtype)
            seen = model.layout.attention[layer].norm.standardize(base[Site("resid_pre", layer)] - delta)
            found[part] = seen @ weight[part.unit or 0] + constant[part.unit or 0]


def _add_heads(
    model: HookManager,
    base: Values,
    new: Values,
    senders: Senders,
    layer: int,
    delta: Float[Tensor, "candidate batch pos d_model"],
    recompute: bool,
) -> None:
    rows = senders.at("head", layer)
    if not rows:
        return
    site, maps = Site("z", layer), model.layout.attention[layer]
    heads = [senders.nodes[i].head for i in rows]
    chosen = senders.where[:, rows].flatten(1).any(1).nonzero()[:, 0]
    where = senders.where[chosen][:, rows]
    z, other = base[site], new[site] if len(new[site]) == 1 else new[site][chosen]
    if maps.post.kind == "none":  # a head's write is linear in its z
        lost = (z - other)[..., heads, :].expand(len(chosen), -1, -1, -1, -1)
        lost = lost * where.movedim(1, -1)[..., None]
        # Only the heads that send anywhere in a candidate are multiplied: one product per head.
        for i, head in enumerate(heads):
            sends = where[:, i].flatten(1).any(1).nonzero()[:, 0]
            delta[chosen[sends]] += maps.post.project(lost[sends][..., i, :] @ maps.W_O[head].to(delta.dtype))
    elif recompute:  # the layer's output with these heads replaced, through its post-norm
        mixed = z.expand(len(chosen), -1, -1, -1, -1).clone()
        for i, head in enumerate(heads):
            swapped = other.expand_as(mixed)[..., head, :]
            mixed[..., head, :] = torch.where(where[:, i, ..., None], swapped, mixed[..., head, :])
        written = [maps.post(model.layout.attention_total(layer, part)) for part in (z, mixed)]
        delta[chosen] += written[0] - written[1]
    else:  # a head's write is its share of the normed sum in its own run
        shares = model.layout.head_writes(layer, z)[heads] - model.layout.head_writes(layer, other)[heads]
        weight = where.to(delta.dtype)
        if shares.shape[1] == 1:
            delta[chosen] += einsum(weight, shares[:, 0], "c h b p, h b p d -> c b p d")
        else:
            delta[chosen] += einsum(weight, shares, "c h b p, h c b p d -> c b p d")


def _add_mlp(
    model: HookManager,
    base: Values,
    new: Values,
    senders: Senders,
    layer: int,
    delta: Float[Tensor, "candidate batch pos d_model"],
    before: Float[Tensor, "candidate batch pos d_model"],
    live: slice,
    recompute: bool,
) -> None:
    site = Site("mlp_out", layer)
    change = torch.zeros_like(delta)
    if recompute and live.stop > 0:
        given = model.layout.read_mlp(layer, _stream(model, base, layer) - before[live])
        with Gradients(False) as off, off:
            change[live] = base[site] - model.mlp(layer, given).to(delta.dtype)
        # Where nothing differs, nothing changes, to the last bit.
        change[live] = torch.where((before[live] != 0).any(-1, keepdim=True), change[live], 0)
    for i in senders.at("mlp", layer):
        change = torch.where(senders.where[:, i, ..., None], base[site] - new[site], change)
    delta += change


def mediate(
    model: HookManager,
    pairs: Pairs,
    tokens: Int[Tensor, "batch pos"],
    base: Values,
    mediators: Sequence[Part],
    masks: Sequence[Bool[Tensor, "batch pos"]],
    inputs: Sequence[Tensor],
) -> tuple[Senders, Values, float]:
    """(the mediators as senders in every candidate, their new writes, the cost in forwards of the prompts).

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
                    f"'{mediators[i].site}' does not write by itself, so it cannot be a mediator; name heads' inputs "
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
