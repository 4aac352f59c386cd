"""The effects of features and errors at their sites, and what the edges between them need: one batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.engines.readout import FINAL, Readout
from mechinterp.engines.site_gradients import over_sets, site_gradients, site_integral, site_values
from mechinterp.features.sweep import Coded, coded
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.modes import Gradients
from mechinterp.models.sites import Site

METHODS = ("eap-ig-activations", "atp")
REPLACEMENTS = ("pair", "zero")


@dataclass(frozen=True, eq=False)
class AtSite:
    """One basis in one batch: its features, how they change, and what the metric's gradient says about them.

    Args:
        basis: The basis.
        base: Features and error of the clean run.
        change: Of each feature, its activation less the replacement, 0 at padding.
        error_change: The same of the error: what of the site's change the features do not make.
        gradient: The gradient of the metric at the site.
        along: The gradient along each feature's direction: that of the metric with respect to its activation.
        exact: Per example, metric(clean) less the metric with the whole site replaced.
    """

    basis: FeatureBasis
    base: Coded
    change: Float[Tensor, "batch pos feature"]
    error_change: Float[Tensor, "batch pos ..."]
    gradient: Float[Tensor, "batch pos ..."]
    along: Float[Tensor, "batch pos feature"]
    exact: Float[Tensor, " batch"]

    @property
    def site(self) -> Site:
        """Where it writes."""
        return self.basis.sites_out[0]

    def products(self, gradient: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos node"]:
        """Change times gradient for a gradient at the site: of every feature, and last of the error."""
        features = self.change * along(self.basis, self.base, self.site, gradient)
        error = (self.error_change * gradient.to(self.error_change)).flatten(2).sum(-1, keepdim=True)
        return torch.cat([features, error.to(features)], -1)

    def effects(self, masks: Bool[Tensor, "set batch pos"]) -> Float[Tensor, "node set batch"]:
        """The effect of every feature and of the error at every set of positions."""
        error = (self.error_change * self.gradient.to(self.error_change)).flatten(2).sum(-1, keepdim=True)
        products = torch.cat([self.change * self.along, error.to(self.change)], -1)
        return over_sets(products, masks)


def along(
    basis: FeatureBasis, code: Coded, site: Site, gradient: Float[Tensor, "batch pos ..."]
) -> Float[Tensor, "batch pos feature"]:
    """A gradient at the site as one with respect to the activations: along the direction that each feature writes."""
    with Gradients(True) as on, on:
        values = code.features.values.detach().requires_grad_()
        decoded = basis.decode(code.features.with_values(values))[site]
        return torch.autograd.grad(decoded, values, gradient.to(decoded))[0]


def at_sites(
    model: HookManager,
    readout: Readout,
    bases: Sequence[FeatureBasis],
    *,
    method: str,
    points: Sequence[tuple[float, float]],
    replacement: str,
) -> list[AtSite]:
    """Every basis in one batch. Per basis a forward, and `len(points)` forwards and backwards (`atp`: one for all)."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if replacement not in REPLACEMENTS:
        raise unknown("replacement", replacement, REPLACEMENTS)
    pairs, loss = readout.pairs, readout.of_resid
    if readout.metric.needs_reference and method == "atp":
        raise InputError(
            f"The gradient of {readout.metric.name} at the clean run is 0; take method 'eap-ig-activations'."
        )
    codes = coded(model, pairs, pairs.clean, bases)
    others = coded(model, pairs, pairs.corrupt, bases) if replacement == "pair" else {}
    sites = [basis.sites_out[0] for basis in bases]
    entries = [Site("resid_pre", site.layer) for site in sites if site.layer is not None]
    values = site_values(model, pairs, pairs.clean, list(dict.fromkeys([*sites, *entries])))
    plain = _metric(model, readout, pairs.clean, [])
    first = site_gradients(model, pairs, pairs.clean, sites, loss).gradients if method == "atp" else {}
    found: list[AtSite] = []
    for basis, site in zip(bases, sites, strict=True):
        code = codes[basis]
        base_value, mask = values[site], pairs.mask
        if replacement == "pair":
            new, other = others[basis].features.values, others[basis].errors[site]
            decoded, there = (basis.decode(one)[site] for one in (code.features, others[basis].features))
            site_change = decoded + code.errors[site] - there - other
        else:
            new = torch.zeros_like(code.features.values)
            site_change = base_value.to(code.errors[site]) - basis.decode(code.features.with_values(new))[site]
        change = torch.where(mask[..., None], code.features.values - new, 0)
        site_change = torch.where(mask.reshape(*mask.shape, *[1] * (site_change.ndim - 2)), site_change, 0)
        made = (
            basis.decode(code.features)[site]
            - basis.decode(code.features.with_values(code.features.values - change))[site]
        )
        start = None if site.layer is None else (site.layer, values[Site("resid_pre", site.layer)])
        if method == "atp":
            gradient = first[site]
        else:
            gradient = site_integral(
                model, pairs, pairs.clean, site, site_change, loss, points, base=base_value, start=start
            )
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        patched = Intervention(site, base_value - site_change.to(base_value.dtype))
        exact = plain - _metric(model, readout, pairs.clean, [patched])
        found.append(
            AtSite(basis, code, change, site_change - made, gradient, along(basis, code, site, gradient), exact)
        )
    return found


def _metric(
    model: HookManager, readout: Readout, tokens: Int[Tensor, "batch pos"], edits: Sequence[Intervention]
) -> Float[Tensor, " batch"]:
    run = model.run(tokens, readout.pairs.mask, interventions=edits, record=[FINAL], stop=FINAL)
    return readout.of_resid(run.values[FINAL])
