"""Attribution patching at nodes: estimates of activation patching from gradients, for all nodes at once.

Sources: Nanda 2023 and Syed et al. 2023 (arXiv 2310.10348) for the first order; Hanna et al. 2024 (EAP-IG, arXiv
2403.17806) for the two integrated variants; Kramar et al. 2024 (AtP*, arXiv 2403.00745); Rezaei Jafari et al. 2025
(RelP, arXiv 2508.21258). Activation and gradient are always taken at the same site.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mechinterp.analysis.attribution_methods import METHODS, Batch, Plan
from mechinterp.analysis.grid import Grid, numbered
from mechinterp.analysis.means import site_means
from mechinterp.analysis.parts import layer_range, n_units, unit_axis
from mechinterp.analysis.positions import Positions, PositionSets, position_sets
from mechinterp.edges import clean_logits
from mechinterp.hooks import HookManager
from mechinterp.metrics import Metric, get_metric
from mechinterp.sites import Node, Site
from mechinterp.tasks.pairs import Pairs


def attribution_patching(
    model: HookManager,
    pairs: Pairs,
    what: str = "z",
    *,
    method: str = "atp",
    steps: int = 5,
    quadrature: str = "midpoint",
    positions: Positions = None,
    direction: Literal["noise", "denoise"] = "noise",
    replacement: Literal["pair", "mean", "zero"] = "pair",
    reference: Pairs | None = None,
    metric: Metric | str = "logit_diff",
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> Grid:
    """An estimate of `activation_patching` of every layer, head or neuron of a kind of site, from gradients.

    Positive = the node helps the task: for `noise` it estimates metric(clean) - metric(clean run with the node's
    corrupt value), for `denoise` metric(corrupt run with the node's clean value) - metric(corrupt), in units of the
    metric, the sign turned where a lower metric is better. The axes are those of `activation_patching`: (layer, head
    or neuron if any, pos, example), NaN where an example lacks the position.

    `what` is `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, `q`, `k`, `v`, `z`, `pattern` (positions
    are queries), `mlp_post` (neurons), or another site. `replacement` is `pair` (the
    other run's value), `mean` (over all real tokens of the corrupt prompts of `reference`, by default of `pairs`) or
    `zero`.

    `method`, with D the node's value in the base run less its replacement, and L layers:
    - `atp`: D x gradient at the base run. 2 forwards, 1 backward.
    - `atp-qk-fix`: the same but for q and k, whose patched attention patterns are computed exactly (AtP* without
      GradDrop). For q one forward more, for k one per set of positions.
    - `atp-star`: with GradDrop too: the mean of |estimate| over L backwards, each without one layer's contribution.
      Never negative. L more forwards and backwards.
    - `eap-ig-inputs`: D x the mean gradient over runs whose input is between the two prompts'. `steps` forwards and
      backwards.
    - `eap-ig-activations`: D x the mean gradient over runs whose own site is between the base value and the
      replacement (all nodes of the layer and all positions together), else as in the base run. A layer's sum over
      nodes and positions tends to the exact effect of patching them all. `steps` backwards for each layer.
    - `relp`: D x the LRP coefficient of RelP. 2 forwards, 1 backward; not for q, k and pattern, which get nothing.

    `quadrature` says where the `steps` lie on the way to the base run (1): `midpoint`, `gauss-legendre`, or `right`
    (k / steps, as published). Memory: one run's graph and the sites' values and gradients, `batch_size` examples at
    a time; `atp-star` keeps the gradients of L runs.

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
    chosen = layer_range(model, what, layers)
    sites = [Site(what, layer) for layer in chosen]
    labels = {"layer": tuple(map(str, chosen))}
    axis = unit_axis(model, what)
    if axis is not None:
        labels[axis] = numbered(n_units(model, sites[0]))
    plan = Plan(method, steps, quadrature, direction, replacement, _metric(metric))
    found, sets, cost = _score(model, pairs, reference, sites, plan, positions, batch_size)
    values = torch.stack([found[site] for site in sites])
    values = values if axis is not None else values.squeeze(1)
    axes = {**labels, "pos": sets.labels, "example": numbered(len(pairs))}
    return Grid(values, axes, "score", plan.metric.unit, {**_about(plan), "examples": len(pairs)}, cost)


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
    metric: Metric | str = "logit_diff",
    batch_size: int | None = None,
) -> Grid:
    """The scores of `attribution_patching` for every writer: `input`, the heads (at z) and the MLPs (at mlp_out).

    Axes (node, pos, example), the nodes named and ordered as the writers of `build_graph`. All nodes come from the
    same runs, so that `atp` takes 2 forwards and 1 backward. Arguments, sign and errors as in `attribution_patching`.

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
        sites.append(Site("z", layer))
        names += [str(Node("head", layer, head)) for head in range(dims.n_heads)]
        if dims.has_mlp:
            sites.append(Site("mlp_out", layer))
            names.append(str(Node("mlp", layer)))
    plan = Plan(method, steps, quadrature, direction, replacement, _metric(metric))
    found, sets, cost = _score(model, pairs, reference, sites, plan, positions, batch_size)
    values = torch.cat([found[site] for site in sites])
    axes = {"node": tuple(names), "pos": sets.labels, "example": numbered(len(pairs))}
    return Grid(values, axes, "score", plan.metric.unit, {**_about(plan), "examples": len(pairs)}, cost)


def _score(
    model: HookManager,
    pairs: Pairs,
    others: Pairs | None,
    sites: Sequence[Site],
    plan: Plan,
    positions: Positions,
    batch_size: int | None,
) -> tuple[dict[Site, Tensor], PositionSets, dict[str, float]]:
    """(scores [unit, set, example] of every site, the sets of positions, the cost)."""
    plan.metric.check_answers(pairs)
    pairs.check_vocabulary(model.dims.d_vocab, model.dims.d_vocab_out)
    for site in sites:
        model.resolve(site)
    pairs = pairs.to(model.device)
    sets = position_sets(pairs, positions)
    means: dict[Site, Tensor] = {}
    if plan.replacement == "mean":
        of = (others or pairs).to(model.device)
        means = {s: m[0, 0] for s, m in site_means(model, of, sites, "mean", batch_size or len(of)).items()}
    results: dict[Site, list[Tensor]] = {site: [] for site in sites}
    forwards, backwards = float(plan.replacement == "mean"), 0.0
    row = 0
    for chunk in pairs.chunks(batch_size or len(pairs)):
        masks = sets.masks[:, row : row + len(chunk)]
        row += len(chunk)
        base, other = (chunk.clean, chunk.corrupt) if plan.direction == "noise" else (chunk.corrupt, chunk.clean)
        reference = clean_logits(model, chunk) if plan.metric.needs_reference else None
        batch = Batch(model, chunk, base, other, sites, masks, plan, reference, means)
        found, n_forwards, n_backwards = METHODS[plan.method](batch)
        share = len(chunk) / len(pairs)
        forwards += (n_forwards + plan.metric.needs_reference) * share
        backwards += n_backwards * share
        # D is base less replacement; what denoising gains is the other way round.
        sign = plan.metric.direction * (1 if plan.direction == "noise" else -1)
        sign = 1 if plan.method == "atp-star" else sign
        for site, scores in found.items():
            results[site].append(torch.where(masks.any(-1), sign * scores, torch.nan))
    joined = {site: torch.cat(parts, -1) for site, parts in results.items()}
    return joined, sets, {"forwards": forwards, "backwards": backwards}


def _metric(metric: Metric | str) -> Metric:
    return get_metric(metric) if isinstance(metric, str) else metric


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
