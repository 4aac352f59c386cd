"""The methods of attribution patching: from one batch of examples to the scores of every unit at every site.

Sources and the meaning of each are in `attribution.attribution_patching`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.analysis.atp_star import drop_mean, dropped_layers, patched_patterns, pattern_effects
from mechinterp.analysis.integrated_gradients import integration_points
from mechinterp.analysis.lrp_rules import RULES, check_receives, lrp_loss, rule_edits
from mechinterp.analysis.parts import BY_QUERY, n_units
from mechinterp.analysis.site_gradients import (
    Loss,
    check_differentiable,
    metric_loss,
    over_sets,
    site_gradients,
    site_values,
    unit_products,
)
from mechinterp.errors import InputError
from mechinterp.hooks import HookManager, Intervention
from mechinterp.metrics import Metric
from mechinterp.registry import unknown
from mechinterp.sites import Site
from mechinterp.tasks.pairs import Pairs

REPLACEMENTS = ("pair", "mean", "zero")
DIRECTIONS = ("noise", "denoise")
AT_THE_BASE = ("atp", "atp-qk-fix", "atp-star", "relp")
"""Methods whose gradient is that of the base run itself."""


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked."""

    method: str
    steps: int
    quadrature: str
    direction: str
    replacement: str
    metric: Metric

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("attribution method", self.method, METHODS)
        if self.direction not in DIRECTIONS:
            raise unknown("direction", self.direction, DIRECTIONS)
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
    """What a method works on: some examples, their base and other prompts, and where it is to score."""

    model: HookManager
    pairs: Pairs
    base: Tensor
    other: Tensor
    sites: Sequence[Site]
    masks: Bool[Tensor, "set batch pos"]
    plan: Plan
    reference: Tensor | None
    means: Mapping[Site, Tensor]
    """What replaces every token at a site, where the replacement is a mean."""

    def loss(self) -> Loss:
        return metric_loss(self.model, self.pairs, self.plan.metric, self.reference)

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
        difference = base - new
        if site.kind in BY_QUERY:
            difference = torch.where(base == new, 0, difference)  # where nothing is attended to: -inf less -inf
        return over_sets(unit_products(site, difference, gradient), self.masks)


Scores = tuple[dict[Site, Tensor], float, float]
"""(scores [unit, set, batch], forwards, backwards)"""


def _atp(batch: Batch) -> Scores:
    run = site_gradients(batch.model, batch.pairs, batch.base, batch.sites, batch.loss())
    new = batch.replaced(batch.sites)
    return {s: batch.scores(s, run.values[s], new[s], run.gradients[s]) for s in batch.sites}, 2.0, 1.0


def _relp(batch: Batch) -> Scores:
    rules = RULES["relp"]
    for site in batch.sites:
        check_receives(rules, site.kind)
    loss = lrp_loss(batch.model, batch.pairs, batch.plan.metric, batch.reference, rules)
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
        site_gradients(model, pairs, batch.base, wanted, batch.loss(), record=z, edits=edits)
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
        run = site_gradients(batch.model, batch.pairs, batch.base, batch.sites, batch.loss(), edits=[edit])
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
        layer, total = site.layer or 0, torch.zeros_like(_wide(base[site]))
        difference = torch.where(base[site] == new[site], 0, base[site] - new[site])
        for point, weight in points:
            edit = Intervention(site, base[site] - (1 - point) * difference)
            start = (layer, base[entries[layer]])
            run = site_gradients(model, pairs, batch.base, [site], batch.loss(), edits=[edit], start=start)
            total += weight * _wide(run.gradients[site])
            forwards += 1 - layer / model.dims.n_layers
            backwards += 1 - layer / model.dims.n_layers
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
