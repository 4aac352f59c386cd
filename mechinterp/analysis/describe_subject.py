"""What can be described: a feature of any basis, a neuron or a head, as a number per token that can be amplified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.features.basis import check_ids
from mechinterp.models.components import parse_part
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site

STREAM = ("embed", "resid_pre", "resid_mid", "resid_post", "resid_final", "attn_out", "mlp_out")


@dataclass(frozen=True, eq=False)
class Subject:
    """A feature, neuron or head.

    Args:
        name: Its name.
        site: What is recorded for it.
        activation: From the recorded value to a number per token, `[batch, pos]`.
        direction: What one unit of it adds to the residual stream; None where that depends on the prompt (heads).
        amplified: The intervention that adds so much to its activation everywhere (heads: that share of its output).
        read_site: Where its pre-activation is read; None if it has none.
        pre: From the value there to the pre-activation.
        write: Of a head, from the recorded value to what it writes.
        ablated: The intervention that sets it to 0 everywhere.
    """

    name: str
    site: Site | FeatureBasis
    activation: Callable[[Tensor], Tensor]
    direction: Float[Tensor, " d_model"] | None
    amplified: Callable[[float], Intervention]
    read_site: Site | None
    pre: Callable[[Tensor], Tensor]
    ablated: Callable[[], Intervention]
    write: Callable[[Tensor], Tensor] | None = None


def subject_of(model: HookManager, what: FeatureBasis | str, feature: int | None) -> Subject:
    """The feature of a basis, or the neuron (`m3.n17`) or head (`a9.h9`) of that name. Raises InputError otherwise."""
    if isinstance(what, str):
        if feature is not None:
            raise InputError(f"{what!r} is one part of the model; a number goes with a feature basis.")
        return _of_part(model, what)
    if feature is None:
        raise InputError(f"Which feature of '{what.name}'? Give its number.")
    model.resolve(what)
    i = int(check_ids(what, [feature])[0])

    def amplified(by: float) -> Intervention:
        def edit(value: Tensor) -> Tensor:
            new = value.clone()
            new[..., i] += by
            return new

        return Intervention(what, edit)

    reads = what.reads([i])
    single = reads is not None and len(what.sites_in) == 1

    def pre(value: Tensor) -> Tensor:
        assert reads is not None
        flat = value.flatten(-2) if what.sites_in[0].kind in ("q", "k", "v", "z") else value
        return flat @ reads[0].to(flat)

    def ablated() -> Intervention:
        def edit(value: Tensor) -> Tensor:
            new = value.clone()
            new[..., i] = 0
            return new

        return Intervention(what, edit)

    read_site, name = what.sites_in[0] if single else None, f"{what.name}.f{i}"
    return Subject(name, what, lambda v: v[..., i], _direction(model, what, i), amplified, read_site, pre, ablated)


def _direction(model: HookManager, basis: FeatureBasis, i: int) -> Tensor | None:
    """What one unit of a feature adds to the residual stream, over all its output sites; None where it does not."""
    wide = torch.promote_types(model.dtype, torch.float32)
    rows = basis.writes([i])[0].to(model.device, wide)
    rows = rows[None] if rows.ndim == 1 else rows
    total = torch.zeros(model.dims.d_model, dtype=wide, device=model.device)
    for site, row in zip(basis.sites_out, rows, strict=True):
        if site.kind == "mlp_post":
            maps = model.layout.neurons(site.layer or 0)
            total = total + maps.post.project(row @ maps.W_out.to(row))
        elif site.kind == "mlp_raw":
            total = total + model.layout.mlp_post[site.layer or 0].project(row)
        elif site.kind == "z":
            maps = model.layout.attention[site.layer or 0]
            total = total + maps.post.project(row @ maps.W_O.to(row).flatten(0, 1))
        elif site.kind in STREAM:
            total = total + row
        else:
            return None
    return total


def _of_part(model: HookManager, name: str) -> Subject:
    part = parse_part(model, name)
    site, unit = part.site, part.unit
    if unit is None or part.position is not None or site.kind not in ("mlp_post", "z"):
        raise InputError(f"{name!r} is not a neuron or head; describe 'm3.n17', 'a9.h9', or a feature of a basis.")
    layer = site.layer or 0
    if site.kind == "mlp_post":
        maps = model.layout.neurons(layer)
        row = maps.W_out[unit].to(torch.promote_types(model.dtype, torch.float32))

        def neuron(value: Tensor) -> Tensor:
            return value[..., unit]

        def added(by: float) -> Intervention:
            def edit(value: Tensor) -> Tensor:
                new = value.clone()
                new[..., unit] += by
                return new

            return Intervention(site, edit)

        def silent() -> Intervention:
            def edit(value: Tensor) -> Tensor:
                new = value.clone()
                new[..., unit] = 0
                return new

            return Intervention(site, edit)

        return Subject(name, site, neuron, maps.post.project(row), added, site, neuron, silent)
    maps = model.layout.attention[layer]
    W_O = maps.W_O[unit].to(torch.promote_types(model.dtype, torch.float32))

    def write(value: Tensor) -> Tensor:
        return maps.post.project(value[..., unit, :].to(W_O) @ W_O)

    def size(value: Tensor) -> Tensor:
        return write(value).norm(dim=-1)

    def scaled(by: float) -> Intervention:
        def edit(value: Tensor) -> Tensor:
            new = value.clone()
            new[..., unit, :] *= 1 + by
            return new

        return Intervention(site, edit)

    return Subject(name, site, size, None, scaled, site, size, lambda: scaled(-1.0), write)
