"""Attribution patching at nodes: estimates of activation patching from gradients, for all nodes at once.

Sources: Nanda 2023 and Syed et al. 2023 (arXiv 2310.10348) for the first order; Hanna et al. 2024 (EAP-IG, arXiv
2403.17806) for the two integrated variants; Kramar et al. 2024 (AtP*, arXiv 2403.00745); Rezaei Jafari et al. 2025
(RelP, arXiv 2508.21258). Activation and gradient are always taken at the same site.

AtP* corrects attribution patching where the first order fails. The QK fix (section 3.1.1) computes exactly, softmax
included, how a patched query or key changes the attention pattern, and takes the first order from there on. GradDrop
(section 3.1.2) makes direct and indirect effects cancel less: one backward per layer, with the gradient through that
layer's contribution to the residual stream set to zero.

Deviation: the patched patterns come from the model itself (queries or keys are written, and z is written back so that
nothing else changes) instead of the paper's algebra on scores, so they hold on every architecture: rotary, grouped,
windowed, capped. Keys of a set of positions are replaced together; with `positions="each"` one by one, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.analysis.integrated_gradients import integration_points
from mechinterp.base.batches import Combine, over_batches
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.registry import unknown
from mechinterp.engines.grid import Grid, numbered
from mechinterp.engines.lrp import RULES, check_receives, lrp_loss, rule_edits
from mechinterp.engines.means import site_means
from mechinterp.engines.patch_direction import patch_direction
from mechinterp.engines.readout import Readout, checked_metric, metric_readout
from mechinterp.engines.site_gradients import (
    check_differentiable,
    over_sets,
    site_gradients,
    site_integral,
    site_values,
    unit_products,
)
from mechinterp.features.sweep import Coded, coded
from mechinterp.models.components import (
    BY_QUERY,
    Positions,
    PositionSets,
    layer_range,
    n_units,
    position_sets,
    unit_axis,
)
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.modes import Gradients
from mechinterp.models.sites import Node, Site
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.own_metric import MetricLike
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
    outputs, so that no layer sees another one's patch. One forward for all layers and heads, since a head's pattern
    depends on its own queries and keys only.
    """
    at = where[:, :, None, None]

    def write(new: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda old: torch.where(at, new, old)

    edits = [Intervention(site, write(new)) for site, new in replaced.items()]
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

    Raises UnsupportedError for a model of one layer, where nothing would be left.
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

    The residual stream does not belong to a layer, so there the mean is over all of them.
    """
    total = torch.stack([effect.abs() for effect in effects]).sum(0)
    return total / (model.dims.n_layers - (not site.kind.startswith("resid")))


REPLACEMENTS = ("pair", "mean", "zero")
AT_THE_BASE = ("atp", "atp-qk-fix", "atp-star", "relp")
"""Methods whose gradient is that of the base run itself."""


@dataclass(frozen=True)
class Plan:
    """The settings of a call, checked."""

    method: str
    steps: int
    quadrature: str
    direction: str
    replacement: str
    metric: Metric

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("attribution method", self.method, METHODS)
        patch_direction(self.direction)
        if self.replacement not in REPLACEMENTS:
            raise unknown("replacement", self.replacement, REPLACEMENTS)
        check_differentiable(self.metric)
        if self.metric.needs_reference and self.direction == "noise" and self.method in AT_THE_BASE:
            raise InputError(
                f"The gradient of {self.metric.name} at the clean run is 0, so {self.method!r} would score every node "
                "0; use method 'eap-ig-inputs', or metric 'logit_diff'."
            )
        integration_points(self.steps, self.quadrature)


@dataclass(frozen=True)
class Batch:
    """What a method works on: one batch, its base and other prompts, and the sites and positions to score."""

    model: HookManager
    readout: Readout
    base: Tensor
    other: Tensor
    sites: Sequence[Site]
    masks: Bool[Tensor, "set batch pos"]
    plan: Plan
    means: Mapping[Site, Tensor]
    """What is written at every token of a site, if the replacement is a mean."""
    basis: FeatureBasis | None = None
    """The features to score, instead of the units of its output sites."""

    @property
    def pairs(self) -> Pairs:
        return self.readout.pairs

    def replaced(self, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """The replacement at every site."""
        if self.plan.replacement == "pair":
            return site_values(self.model, self.pairs, self.other, sites)
        like = site_values(self.model, self.pairs, self.base, sites)
        if self.plan.replacement == "zero":
            return {site: torch.zeros_like(value) for site, value in like.items()}
        return {site: self.means[site].to(value.dtype).expand_as(value) for site, value in like.items()}

    def scores(self, site: Site, base: Tensor, new: Tensor, gradient: Tensor) -> Float[Tensor, "unit set batch"]:
        """(base - new) x gradient by unit and set of positions."""
        if self.basis is not None:
            return self._feature_scores(self.basis, site, gradient)
        difference = base - new
        if site.kind in BY_QUERY:
            difference = torch.where(base == new, 0, difference)  # where nothing is attended to: -inf less -inf
        return over_sets(unit_products(site, difference, gradient), self.masks)

    @cached_property
    def codes(self) -> tuple[Coded, Coded]:
        """The features and errors of the base run and of the other one."""
        assert self.basis is not None
        runs = (coded(self.model, self.pairs, tokens, [self.basis]) for tokens in (self.base, self.other))
        base, other = (run[self.basis] for run in runs)
        return base, other

    def _feature_scores(self, basis: FeatureBasis, site: Site, gradient: Tensor) -> Float[Tensor, "unit set batch"]:
        """(base - new) x gradient along each feature's direction at a site, and last of the error.

        The error is what of the site's change the features' change does not make, so that the sum over features and
        error is the score of the site. (It holds the change of a skip connection and of a normalisation, too.)
        """
        (base, errors), (new, other_errors) = ((code.features, code.errors) for code in self.codes)
        with Gradients(True) as on, on:
            values = base.values.detach().requires_grad_()
            decoded = basis.decode(base.with_values(values))[site]
            (along,) = torch.autograd.grad(decoded, values, gradient.to(decoded))
        products = (base.values - new.values) * along
        moved, there = (basis.decode(code)[site] for code in (base.with_values(new.values), new))
        left = errors[site] - other_errors[site] + (moved - there)
        rest = (left * gradient.to(left)).flatten(2).sum(-1, keepdim=True)
        return over_sets(torch.cat([products, rest.to(products)], -1), self.masks)


Scores = tuple[dict[Site, Tensor], float, float]
"""(scores [unit, set, batch], forwards, backwards)"""


def _atp(batch: Batch) -> Scores:
    run = site_gradients(batch.model, batch.pairs, batch.base, batch.sites, batch.readout.of_resid)
    new = batch.replaced(batch.sites)
    return {s: batch.scores(s, run.values[s], new[s], run.gradients[s]) for s in batch.sites}, 2.0, 1.0


def _relp(batch: Batch) -> Scores:
    rules = RULES["relp"]
    for site in batch.sites:
        check_receives(rules, site.kind)
    loss = lrp_loss(batch.model, batch.readout, rules)
    edits = rule_edits(batch.model, rules)
    run = site_gradients(batch.model, batch.pairs, batch.base, batch.sites, loss, edits=edits)
    new = batch.replaced(batch.sites)
    return {s: batch.scores(s, run.values[s], new[s], run.gradients[s]) for s in batch.sites}, 2.0, 1.0


def _qk_fix(batch: Batch) -> Scores:
    scores, forwards, backwards = _with_fix(batch, [[]])
    return {site: effects[0] for site, effects in scores.items()}, forwards, backwards


def _star(batch: Batch) -> Scores:
    scores, forwards, backwards = _with_fix(batch, dropped_layers(batch.model))
    return {site: drop_mean(batch.model, site, effects) for site, effects in scores.items()}, forwards, backwards


def _with_fix(
    batch: Batch, backward_edits: Sequence[Sequence[Intervention]]
) -> tuple[dict[Site, list[Tensor]], float, float]:
    """Per site the scores from the gradients of every run, queries and keys by their exact patterns."""
    model, pairs = batch.model, batch.pairs
    fixed = [site for site in batch.sites if site.kind in ("q", "k")]
    plain = [site for site in batch.sites if site.kind not in ("q", "k")]
    patterns = {site: Site("pattern", site.layer) for site in fixed}
    wanted = [*plain, *patterns.values()]
    z = [Site("z", layer) for layer in range(1 + max((site.layer or 0 for site in fixed), default=-1))]
    runs = [
        site_gradients(model, pairs, batch.base, wanted, batch.readout.of_resid, record=z, edits=edits)
        for edits in backward_edits
    ]
    base, new = runs[0].values, batch.replaced(batch.sites)
    out = {s: [batch.scores(s, base[s], new[s], run.gradients[s]) for run in runs] for s in plain}
    forwards = float(len(runs) + 1)
    kept = {site: base[site] for site in z}
    for kind in dict.fromkeys(site.kind for site in fixed):
        # A query changes its own row of the pattern only, so all can be replaced at once; keys share their rows.
        wheres = [pairs.mask] if kind == "q" else list(batch.masks)
        forwards += len(wheres)
        replaced = {site: new[site] for site in fixed if site.kind == kind}
        pieces: dict[Site, list[list[Tensor]]] = {site: [[] for _ in runs] for site in replaced}
        for where in wheres:
            patched = patched_patterns(model, pairs, batch.base, replaced, where, kept)
            for site in replaced:
                at, layer = patterns[site], site.layer or 0
                for run, piece in zip(runs, pieces[site], strict=True):
                    effect = pattern_effects(
                        base[at], patched[layer], run.gradients[at], pairs.mask, n_units(model, site)
                    )
                    piece.append(over_sets(effect, batch.masks if kind == "q" else pairs.mask[None]))
        out |= {site: [torch.cat(piece, 1) for piece in several] for site, several in pieces.items()}
    return {site: out[site] for site in batch.sites}, forwards, float(len(runs))


def _ig_inputs(batch: Batch) -> Scores:
    entry = Site("resid_pre", 0)
    base = site_values(batch.model, batch.pairs, batch.base, [entry, *batch.sites])
    ends = site_values(batch.model, batch.pairs, batch.other, [entry])
    new = batch.replaced(batch.sites)
    total: dict[Site, Tensor] = {}
    points = integration_points(batch.plan.steps, batch.plan.quadrature)
    for point, weight in points:
        edit = Intervention(entry, ends[entry] + point * (base[entry] - ends[entry]))
        run = site_gradients(batch.model, batch.pairs, batch.base, batch.sites, batch.readout.of_resid, edits=[edit])
        for site in batch.sites:
            total[site] = total.get(site, 0.0) + weight * _wide(run.gradients[site])
    forwards = 3.0 + len(points)
    return {s: batch.scores(s, base[s], new[s], total[s]) for s in batch.sites}, forwards, float(len(points))


def _ig_activations(batch: Batch) -> Scores:
    model, pairs = batch.model, batch.pairs
    entries = {site.layer or 0: Site("resid_pre", site.layer or 0) for site in batch.sites}
    base = site_values(model, pairs, batch.base, [*batch.sites, *entries.values()])
    new = batch.replaced(batch.sites)
    out: dict[Site, Tensor] = {}
    points = integration_points(batch.plan.steps, batch.plan.quadrature)
    forwards = backwards = 0.0
    for site in batch.sites:
        layer = site.layer or 0
        change = torch.where(base[site] == new[site], 0, base[site] - new[site])
        start = (layer, base[entries[layer]])
        loss = batch.readout.of_resid
        total = site_integral(model, pairs, batch.base, site, change, loss, points, base=base[site], start=start)
        forwards += (1 - layer / model.dims.n_layers) * len(points)
        backwards += (1 - layer / model.dims.n_layers) * len(points)
        out[site] = batch.scores(site, base[site], new[site], total)
    return out, forwards + 2, backwards


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


METHODS: dict[str, Callable[[Batch], Scores]] = {
    "atp": _atp,
    "atp-qk-fix": _qk_fix,
    "atp-star": _star,
    "eap-ig-inputs": _ig_inputs,
    "eap-ig-activations": _ig_activations,
    "relp": _relp,
}


def attribution_patching(
    model: HookManager,
    pairs: Pairs,
    what: str | FeatureBasis = "z",
    *,
    method: str = "atp",
    steps: int = 5,
    quadrature: str = "midpoint",
    positions: Positions = None,
    direction: Literal["noise", "denoise"] = "noise",
    replacement: Literal["pair", "mean", "zero"] = "pair",
    reference: Pairs | None = None,
    metric: MetricLike = "logit_diff",
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> Grid:
    """An estimate of `activation_patching` for every layer, head or neuron of a kind of site, from gradients.

    Positive = the node helps the task: for `noise` it estimates metric(clean) - metric(clean run with the node's
    corrupt value), for `denoise` metric(corrupt run with the node's clean value) - metric(corrupt), in units of the
    metric, the sign turned where a lower metric is better. The axes are those of `activation_patching`: (layer, head
    or neuron if any, pos, example), NaN where an example does not have the position.

    The methods, where D is the node's value in the base run minus its replacement, and L the number of layers:

    - `atp`: D x gradient at the base run. 2 forwards, 1 backward.
    - `atp-qk-fix`: the same except for q and k, whose patched attention patterns are computed exactly (AtP* without
      GradDrop). One more forward for q, and for k one per set of positions.
    - `atp-star`: also with GradDrop: the mean of |estimate| over L backwards, each without one layer's contribution.
      Never negative. L more forwards and backwards.
    - `eap-ig-inputs`: D x the mean gradient over runs whose input is interpolated between the two prompts'. `steps`
      forwards and backwards.
    - `eap-ig-activations`: D x the mean gradient over runs in which the site itself is interpolated between its base
      value and the replacement (all nodes of the layer and all positions together), else as in the base run. A
      layer's sum over nodes and positions tends to the exact effect of patching them all. `steps` backwards per layer.
    - `relp`: D x the LRP coefficient of RelP. 2 forwards, 1 backward; not for q, k and pattern, which get no relevance.

    Args:
        model: The model.
        pairs: Clean and corrupt prompts.
        what: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, `q`, `k`, `v`, `z`, `pattern` (positions
            are queries), `mlp_post` (neurons), or another site. Or a feature basis: the axes are then feature, pos,
            example; the features are numbered and `err` is the error of the reconstruction, and their sum is the
            score of the site (which the basis writes to; several are summed), whatever the method.
        method: See above.
        steps: The number of interpolated runs of the `eap-ig` methods.
        quadrature: Where these lie between the replacement (0) and the base run (1): `midpoint`, `gauss-legendre`, or
            `right` (k / steps, as published).
        positions: Where (see `Positions`).
        direction: `noise` or `denoise`.
        replacement: `pair` (the other run's value), `mean` (over all real tokens of the corrupt prompts of
            `reference`) or `zero`.
        reference: The pairs whose corrupt prompts give the means; by default `pairs`.
        metric: What is measured; it must have a gradient.
        layers: The layers to score; by default all.
        batch_size: Examples at a time; by default all.

    Memory: one run's graph and the sites' values and gradients; `atp-star` keeps the gradients of L runs.

    Raises InputError for unknown names, positions and metrics without a gradient, UnsupportedError for a site that
    the model does not have, or that the method cannot score.

    >>> import mechinterp as mi
    >>> from mechinterp.analysis.attribution import attribution_patching
    >>> model = mi.load_model("bundled")
    >>> scores = attribution_patching(model, mi.load_task("ioi").pairs(model, n=8), positions=["S2", "end"],
    ...     method="relp")
    >>> scores.mean().axes, scores.at(pos="end").top(1)["layer"].tolist()
    (('layer', 'head', 'pos'), [2])
    """
    if not isinstance(what, str):
        plan = Plan(method, steps, quadrature, direction, replacement, checked_metric(model, pairs, metric))
        return _of_features(model, pairs, what, plan, positions, layers, batch_size)
    chosen = layer_range(model, what, layers)
    sites = [Site(what, layer) for layer in chosen]
    labels = {"layer": tuple(map(str, chosen))}
    axis = unit_axis(model, what)
    if axis is not None:
        labels[axis] = numbered(n_units(model, sites[0]))
    plan = Plan(method, steps, quadrature, direction, replacement, checked_metric(model, pairs, metric))
    found, sets, cost = _score(model, pairs, reference, sites, plan, positions, batch_size)
    values = torch.stack([found[site] for site in sites])
    values = values if axis is not None else values.squeeze(1)
    axes = {**labels, "pos": sets.labels, "example": numbered(len(pairs))}
    return Grid(values, axes, "score", plan.metric.unit, {**_about(plan), "examples": len(pairs)}, cost)


def _of_features(
    model: HookManager,
    pairs: Pairs,
    basis: FeatureBasis,
    plan: Plan,
    positions: Positions,
    layers: Sequence[int] | None,
    batch_size: int | None,
) -> Grid:
    """`attribution_patching` of the features of a basis and its error."""
    if layers is not None:
        raise InputError("`layers` restricts a kind of site; a feature basis has its own sites.")
    if plan.replacement != "pair":
        raise InputError("Features are scored by the other prompt's activations (replacement='pair') only.")
    model.resolve(basis)
    if plan.method == "atp-star" and len(basis.sites_out) > 1:
        raise InputError("atp-star gives magnitudes, which do not add up over the sites that a feature writes to.")
    found, sets, cost = _score(model, pairs, None, basis.sites_out, plan, positions, batch_size, basis)
    values = torch.stack([found[site] for site in basis.sites_out]).sum(0)
    names = (*map(str, range(basis.n_features)), "err")
    axes = {"feature": names, "pos": sets.labels, "example": numbered(len(pairs))}
    about = {**_about(plan), "examples": len(pairs), "basis": basis.name, "sha256": getattr(basis, "sha256", "")}
    cost["forwards"] += 2
    return Grid(values, axes, "score", plan.metric.unit, about, cost)


def node_attribution(
    model: HookManager,
    pairs: Pairs,
    *,
    method: str = "atp",
    steps: int = 5,
    quadrature: str = "midpoint",
    positions: Positions = None,
    direction: Literal["noise", "denoise"] = "noise",
    replacement: Literal["pair", "mean", "zero"] = "pair",
    reference: Pairs | None = None,
    metric: MetricLike = "logit_diff",
    features: Sequence[FeatureBasis] = (),
    batch_size: int | None = None,
) -> Grid:
    """The scores of `attribution_patching` for every writer: `input`, the heads (at z) and the MLPs (at mlp_out).

    Axes (node, pos, example), the nodes named and ordered as the writers of `build_graph`. All nodes come from the
    same runs, so `atp` takes 2 forwards and 1 backward; every basis takes as many again.

    Args:
        model: The model.
        pairs: Clean and corrupt prompts.
        method: As in `attribution_patching`, like all arguments, signs and errors.
        steps: The number of interpolated runs of the `eap-ig` methods.
        quadrature: Where these lie.
        positions: Where (see `Positions`).
        direction: `noise` or `denoise`.
        replacement: `pair`, `mean` or `zero`.
        reference: The pairs whose corrupt prompts give the means; by default `pairs`.
        metric: What is measured; it must have a gradient.
        features: Bases of an MLP's output: `m3` is then `m3.f0`, `m3.f1`, ..., `m3.err`, which add up to it.
        batch_size: Examples at a time; by default all.

    >>> import mechinterp as mi
    >>> from mechinterp.analysis.attribution import node_attribution
    >>> model = mi.load_model("bundled")
    >>> node_attribution(model, mi.load_task("ioi").pairs(model, n=8)).mean().axes
    ('node', 'pos')
    """
    dims = model.dims
    sites = [Site("resid_pre", 0)]
    names = [str(Node("input"))]
    for layer in range(dims.n_layers):
        own = dims.layer(layer)
        if own.n_heads:
            sites.append(Site("z", layer))
            names += [str(Node("head", layer, head)) for head in range(own.n_heads)]
        elif own.mixer:
            sites.append(Site("attn_raw", layer))
            names.append(str(Node("attention", layer)))
        if own.mlp:
            sites.append(Site("mlp_out", layer))
            names.append(str(Node("mlp", layer)))
    plan = Plan(method, steps, quadrature, direction, replacement, checked_metric(model, pairs, metric))
    grids = {
        basis.sites_out[0]: _of_features(model, pairs, basis, plan, positions, None, batch_size)
        for basis in _of_mlps(features)
    }
    bases = {basis.sites_out[0]: basis.name for basis in features}
    found, sets, cost = _score(model, pairs, reference, sites, plan, positions, batch_size)
    parts: list[Tensor] = []
    labels: list[str] = []
    for site in sites:
        first = sum(len(found[earlier]) for earlier in sites[: sites.index(site)])
        own = names[first : first + len(found[site])]
        if (grid := grids.get(site)) is not None:
            own = [f"{bases[site]}.{name if name == 'err' else f'f{name}'}" for name in grid.labels["feature"]]
            cost = {name: cost[name] + grid.cost[name] for name in cost}
        parts.append(found[site] if grid is None else grid.values)
        labels += own
    values = torch.cat(parts)
    axes = {"node": tuple(labels), "pos": sets.labels, "example": numbered(len(pairs))}
    return Grid(values, axes, "score", plan.metric.unit, {**_about(plan), "examples": len(pairs)}, cost)


def _of_mlps(features: Sequence[FeatureBasis]) -> Sequence[FeatureBasis]:
    """The bases, if each splits the output of another MLP. Raises InputError otherwise."""
    sites: set[Site] = set()
    for basis in features:
        (site, *more) = basis.sites_out
        if more or site.kind != "mlp_out" or site in sites:
            raise InputError(
                f"Each basis must write to the output of another MLP ('mlp_out.3'); '{basis.name}' writes to "
                f"{', '.join(map(str, basis.sites_out))}. Score others by themselves: attribution_patching(..., basis)."
            )
        sites.add(site)
    return features


def _score(
    model: HookManager,
    pairs: Pairs,
    others: Pairs | None,
    sites: Sequence[Site],
    plan: Plan,
    positions: Positions,
    batch_size: int | None,
    basis: FeatureBasis | None = None,
) -> tuple[dict[Site, Tensor], PositionSets, dict[str, float]]:
    """(scores [unit, set, example] of every site, the sets of positions, the cost)."""
    for site in sites:
        model.resolve(site)
    pairs = pairs.to(model.device)
    sets = position_sets(pairs, positions)
    means: dict[Site, Tensor] = {}
    if plan.replacement == "mean":
        of = (others or pairs).to(model.device)
        means = {s: m[0, 0] for s, m in site_means(model, of, sites, "mean", batch_size or len(of)).items()}
    direction = patch_direction(plan.direction)
    sign = 1 if plan.method == "atp-star" else direction.sign(plan.metric)

    def scored(batch: Pairs, rows: slice) -> dict[str, Tensor | float]:
        base, other = direction.tokens(batch)
        masks, readout = sets.masks[:, rows], metric_readout(model, batch, plan.metric)
        found, forwards, backwards = METHODS[plan.method](
            Batch(model, readout, base, other, sites, masks, plan, means, basis)
        )
        share = len(batch) / len(pairs)
        scores = {str(site): torch.where(masks.any(-1), sign * score, torch.nan) for site, score in found.items()}
        cost = {"forwards": (forwards + plan.metric.needs_reference) * share, "backwards": backwards * share}
        return {**scores, **cost}

    joined: dict[str, Combine] = {str(site): -1 for site in sites}
    found = over_batches(pairs, batch_size, scored, {**joined, "forwards": "sum", "backwards": "sum"})
    cost = {"forwards": float(plan.replacement == "mean") + float(found["forwards"])}
    cost["backwards"] = float(found["backwards"])
    return {site: found[str(site)] for site in sites}, sets, cost


def _about(plan: Plan) -> dict[str, object]:
    about: dict[str, object] = {
        "analysis": "attribution patching",
        "method": plan.method,
        "direction": plan.direction,
        "replacement": plan.replacement,
        "metric": plan.metric.name,
        "sign": "magnitude, never negative" if plan.method == "atp-star" else "positive = the node helps the task",
    }
    if plan.method.startswith("eap-ig"):
        about |= {"steps": plan.steps, "quadrature": plan.quadrature}
    return about
