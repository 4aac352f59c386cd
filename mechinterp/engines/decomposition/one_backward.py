"""Preset `linear` for every source at once: one backward with the coefficients of the rules.

With norms' scales, patterns and f(t) / t constant, a source's contribution to a direction is linear in it: its
relevance is <activation - replacement, gradient>. These are RelP's coefficients, so the backward is that of `lrp`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.engines.decomposition.decoder import recorded_sites
from mechinterp.engines.decomposition.rules import PRESETS, Preset
from mechinterp.engines.decomposition.subject import Subject
from mechinterp.engines.decomposition.tape import Source
from mechinterp.engines.decomposition.targets import Target
from mechinterp.engines.lrp import RULES, lrp_logits, rule_edits
from mechinterp.engines.site_gradients import site_gradients, unit_products
from mechinterp.graphs.token_positions import take_positions
from mechinterp.models.components import Part
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import NO_ENTRY
from mechinterp.tasks.pairs import Pairs


def suits(model: object, rules: Preset, targets: Sequence[Target], parts: Sequence[tuple[Part, ...]]) -> bool:
    """Whether one backward suffices: preset `linear`, one direction, and sources whose parts do not overlap."""
    one = len(targets) == 1 and targets[0].direction is not None
    apart = all(_apart(several) for several in parts)
    if not (isinstance(model, HookManager) and rules == PRESETS["linear"] and one and apart):
        return False
    # The backward must skip the patterns; if they cannot be edited (OPT), the walk gives the same result.
    return all(model.has(Site("pattern", layer)) for layer in range(model.dims.n_layers))


def _apart(several: tuple[Part, ...]) -> bool:
    """Whether the parts of a set are different units of one site: then their relevance adds up."""
    units = [part.unit for part in several]
    return (
        len({part.site for part in several}) == 1
        and len(set(units)) == len(units)
        and (len(units) == 1 or None not in units)
    )


def linear_scores(
    model: HookManager,
    subject: Subject,
    pairs: Pairs,
    sites: Sequence[Site],
    sources: Sequence[Source],
    target: Target,
    at: Int[Tensor, "batch n_at"],
) -> tuple[Float[Tensor, "source batch"], dict[str, Tensor], float]:
    """(the relevance of every source, the total of the target, the completeness). One forward and one backward."""
    direction = target.direction
    assert direction is not None
    wide = torch.promote_types(model.dtype, torch.float32)
    valid = at != NO_ENTRY
    share = valid.to(wide) / valid.sum(1, keepdim=True)
    weights = direction.weights.to(wide)

    def loss(resid: Tensor) -> Tensor:
        _, _, logits = lrp_logits(model, direction.columns, RULES["relp"], take_positions(resid, at).to(wide))
        return einsum(logits, weights, share, "batch n column, batch column, batch n -> batch")

    edits = rule_edits(model, RULES["relp"])
    run = site_gradients(model, pairs, pairs.clean, sites, loss, record=recorded_sites(model), edits=edits)
    pass_ = subject.run_pass(pairs, at, direction.columns, scores=False, values=dict(run.values))
    site_of = {subject.name(site): site for site in sites}
    products: dict[str, Tensor] = {}
    scores: list[Tensor] = []
    for source in sources:  # all sources at a site have the same replacement
        ((name, _, _, replacement), *_) = source.entries
        if name not in products:
            value = pass_.totals[name]
            difference = value if replacement is None else value - replacement.to(wide)
            products[name] = unit_products(site_of[name], difference, run.gradients[site_of[name]].to(wide))
        own = [products[name] if unit is None else products[name][..., unit, None] for _, unit, _, _ in source.entries]
        kept = [torch.where(m[..., None], p, 0) for p, (_, _, m, _) in zip(own, source.entries, strict=True)]
        scores.append(torch.stack([part.sum((1, 2)) for part in kept]).sum(0))
    return torch.stack(scores), {target.name: run.metric}, pass_.completeness
