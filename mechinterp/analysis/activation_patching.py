"""Activation patching: how the metric changes when parts of a run are replaced.

Source: Vig et al. 2020 (arXiv 2004.12265), Geiger et al. 2021 (arXiv 2106.02997); the two directions and how they
differ: Heimersheim & Nanda 2024 (arXiv 2404.15255).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mechinterp.base.batches import Combine, over_batches
from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.registry import unknown
from mechinterp.engines.grid import Grid, numbered
from mechinterp.engines.means import MEANS, check_means, site_means
from mechinterp.engines.part_sets import Nodes, placed_parts, swept_parts
from mechinterp.engines.patch_direction import PatchDirection, patch_direction
from mechinterp.engines.patch_sweep import Base, Patch, run_base, start_layers, sweep
from mechinterp.engines.readout import checked_metric, metric_readout
from mechinterp.features.addresses import FeaturePart, parse_feature_sets
from mechinterp.features.basis import check_ids
from mechinterp.features.sweep import Coded, FeaturePatch, coded, feature_sweep
from mechinterp.models.components import Part, Positions
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs

Replacing: TypeAlias = "str | Tensor | Callable[[Tensor, Site], Tensor]"
REPLACEMENTS = ("pair", "mean", "mean-positional", "zero")


def activation_patching(
    model: HookManager,
    pairs: Pairs,
    what: str | Nodes | FeatureBasis = "z",
    *,
    features: Sequence[FeatureBasis] = (),
    positions: Positions = None,
    direction: Literal["noise", "denoise"] = "noise",
    replacement: Replacing = "pair",
    reference: Pairs | None = None,
    metric: MetricLike = "logit_diff",
    layers: Sequence[int] | None = None,
    units: Sequence[int] | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    progress: Progress = no_progress,
) -> Grid:
    """The effect of replacing each part of the run on its own: positive = the part helps the task.

    The grid has the axes (layer, head or neuron, if any; or node), pos, example, in units of the metric: for `noise`
    metric(clean) - metric(patched), for `denoise` metric(patched) - metric(corrupt), with the sign turned where a
    lower metric is better. An example that has no such position has NaN. `about` has the means of the metric in both
    runs; `fraction` divides by their difference.

    Args:
        model: The model.
        pairs: Clean and corrupt prompts.
        what: A kind of site, swept over its layers and heads (`z`, `q`, `k`, `v`, `pattern`), neurons (`mlp_post`) or
            layers (`resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`); or a list of parts (`a9.h9`,
            `a9.h9<q>`, `m3`, `m3.n17`, `resid_pre.5`, each with an optional `@S2` or `@4`) and of sets of parts that
            are replaced together. Or features: a feature basis, swept over its features; or, with `features`, a list
            of them (`m3.f17`, `m3.err`, each with an optional `@S2`) and of sets that are replaced together.
        features: The bases of the features that `what` names.
        positions: Where (see `Positions`); of `pattern`, query positions.
        direction: `noise`: the clean run is patched with values of the corrupt run (is the part necessary?).
            `denoise`: the corrupt run is patched with clean values (is it sufficient?).
        replacement: `pair` (the other run's value), `mean` (over all real tokens of the corrupt prompts of
            `reference`), `mean-positional` (the same per position), `zero`, token ids `[batch, pos]` of other prompts
            (interchange), or a function of (the base run's value, site) that returns the new value.
        reference: The pairs whose corrupt prompts give the means; by default `pairs`.
        metric: What is measured.
        layers: Of a kind of site, the layers to sweep; by default all.
        units: Of a kind of site, the heads or neurons to sweep; by default all. Of a basis, its features; by default
            those that are active in either run.
        batch_size: Examples at a time; by default all.
        memory: Bytes of activations at a time; by default 64 MiB on a CPU, 1 GiB elsewhere.
        progress: Called after every group of patched runs of a batch.

    Cost: two forwards, and per part the share of a forward that can differ: from its layer and first position on
    (see `cost`; earlier positions are skipped where the model has a key-value cache). Memory: also the replaced sites
    of `batch_size` examples.

    Raises InputError for parts, positions and prompts that do not exist, UnsupportedError for a site that the model
    does not have.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=8)
    >>> effects = mi.activation_patching(model, pairs, "z", positions=["S2", "end"])
    >>> effects.mean().axes, effects.at(pos="end").top(1)["layer"].tolist()
    (('layer', 'head', 'pos'), [2])
    """
    metric = checked_metric(model, pairs, metric)
    chosen = patch_direction(direction)
    pairs = pairs.to(model.device)
    if isinstance(what, FeatureBasis) or features:
        which = (what, features, layers, units)
        return _of_features(model, pairs, *which, positions, chosen, replacement, metric, batch_size, memory, progress)
    labels, parts = swept_parts(model, what, layers, units)
    sets, pos_labels = placed_parts(pairs, parts, positions)
    sites = tuple(dict.fromkeys(part.site for several in parts for part in several))
    _check_replacement(replacement, sites, pairs)
    means: dict[Site, Tensor] = {}
    if isinstance(replacement, str) and replacement in MEANS:
        means = site_means(model, reference or pairs, sites, replacement, batch_size)

    def patched(batch: Pairs, rows: slice) -> dict[str, Tensor | float]:
        readout = metric_readout(model, batch, metric)
        patches = [Patch(several, tuple(mask[rows] for mask in where)) for several, where in sets]
        base_tokens, other_tokens = chosen.tokens(batch)
        wanted = sites if callable(replacement) else ()
        base = run_base(model, readout, base_tokens, layers=start_layers(model, patches), record=wanted)
        wanted = sites if replacement == "pair" else ()
        other = run_base(model, readout, other_tokens, record=wanted)
        values = _values(model, batch, sites, replacement, rows, base, other, means)
        after, cost = sweep(model, readout, base, patches, values, memory=memory, progress=progress)
        present = torch.stack([patch.rows(batch.clean.shape[1]) for patch in patches])
        ends = chosen.swap(base.values, other.values)
        return {
            "effect": torch.where(present, chosen.effect(base.values, after, metric), torch.nan),
            "ends": torch.stack([end.double().sum().cpu() for end in ends]),
            "forwards": (2 + bool(metric.needs_reference) + cost) * len(batch) / len(pairs),
            "run_again": float(base.past is None),
        }

    joined: dict[str, Combine] = {"effect": -1, "ends": "sum", "forwards": "sum", "run_again": "sum"}
    found = over_batches(pairs, batch_size, patched, joined)
    shape = [len(names) for names in labels.values()]
    values = found["effect"].unflatten(0, [*shape, len(pos_labels)])
    clean_value, corrupt_value = (found["ends"] / len(pairs)).tolist()
    about = {
        "analysis": "activation patching",
        "direction": direction,
        "replacement": replacement if isinstance(replacement, str) else "function" if callable(replacement) else "ids",
        "metric": metric.name,
        "sign": "positive = the part helps the task",
        "metric_direction": metric.direction,
        "clean_value": clean_value,
        "corrupt_value": corrupt_value,
        "examples": len(pairs),
        "positions_before_the_patch": "run again" if float(found["run_again"]) else "skipped",
    }
    axes = {**labels, "pos": pos_labels, "example": numbered(len(pairs))}
    return Grid(values, axes, "effect", metric.unit, about, {"forwards": float(found["forwards"])})


def _of_features(
    model: HookManager,
    pairs: Pairs,
    what: str | Nodes | FeatureBasis,
    bases: Sequence[FeatureBasis],
    layers: Sequence[int] | None,
    units: Sequence[int] | None,
    positions: Positions,
    chosen: PatchDirection,
    replacement: Replacing,
    metric: Metric,
    batch_size: int | None,
    memory: int | None,
    progress: Progress,
) -> Grid:
    """`activation_patching` of features and errors."""
    if not isinstance(replacement, str) or replacement not in ("pair", "zero"):
        raise InputError("Features are replaced by those of the other prompt ('pair') or by 0 ('zero').")
    if layers is not None:
        raise InputError("`layers` restricts a sweep over a kind of site; a feature basis has its own sites.")
    if not isinstance(what, (str, Sequence)):
        bases = [what]
        ids = _active(model, pairs, what) if units is None else check_ids(what, units).tolist()
        labels = {"feature": tuple(map(str, ids))}
        parts: list[tuple[FeaturePart, ...]] = [(FeaturePart(what, i),) for i in ids]
    else:
        if units is not None:
            raise InputError("`units` restricts a sweep; a list of features is taken as it is, so leave it out.")
        names, parts = parse_feature_sets([what] if isinstance(what, str) else what, bases)
        labels = {"node": names}
    used = [basis for basis in bases if any(part.basis == basis for several in parts for part in several)]
    places = [tuple(Part(part.basis.sites_out[0], None, part.position) for part in several) for several in parts]
    placed, pos_labels = placed_parts(pairs, places, positions)
    sets = [(parts[i // len(pos_labels)], where) for i, (_, where) in enumerate(placed)]

    def patched(batch: Pairs, rows: slice) -> dict[str, Tensor | float]:
        readout = metric_readout(model, batch, metric)
        tokens, others = chosen.tokens(batch)
        base = coded(model, batch, tokens, used)
        new = coded(model, batch, others, used)
        base_run, other_run = (run_base(model, readout, ids) for ids in (tokens, others))
        if replacement == "zero":
            new = {basis: _zero(code) for basis, code in base.items()}
        patches = [FeaturePatch(several, tuple(mask[rows] for mask in where)) for several, where in sets]
        after, cost = feature_sweep(model, readout, tokens, patches, base, new, memory=memory, progress=progress)
        present = torch.stack([torch.stack([mask.any(1) for mask in patch.where]).any(0) for patch in patches])
        ends = chosen.swap(base_run.values, other_run.values)
        return {
            "effect": torch.where(present, chosen.effect(base_run.values, after, metric), torch.nan),
            "ends": torch.stack([end.double().sum().cpu() for end in ends]),
            "forwards": (4 + bool(metric.needs_reference) + cost) * len(batch) / len(pairs),
        }

    joined: dict[str, Combine] = {"effect": -1, "ends": "sum", "forwards": "sum"}
    found = over_batches(pairs, batch_size, patched, joined)
    clean_value, corrupt_value = (found["ends"] / len(pairs)).tolist()
    about = {
        "analysis": "activation patching",
        "direction": chosen.name,
        "replacement": replacement,
        "metric": metric.name,
        "sign": "positive = the part helps the task",
        "metric_direction": metric.direction,
        "clean_value": clean_value,
        "corrupt_value": corrupt_value,
        "examples": len(pairs),
        "bases": {basis.name: getattr(basis, "sha256", "") for basis in used},
    }
    shape = [len(names) for names in labels.values()]
    values = found["effect"].unflatten(0, [*shape, len(pos_labels)])
    axes = {**labels, "pos": pos_labels, "example": numbered(len(pairs))}
    return Grid(values, axes, "effect", metric.unit, about, {"forwards": float(found["forwards"])})


def _active(model: HookManager, pairs: Pairs, basis: FeatureBasis) -> list[int]:
    """The features that are active at a real token of either run."""
    on = torch.zeros(basis.n_features, dtype=torch.bool, device=model.device)
    for tokens in (pairs.clean, pairs.corrupt):
        values = coded(model, pairs, tokens, [basis])[basis].features.values
        on |= (values[pairs.mask] != 0).any(0)
    if not bool(on.any()):
        raise InputError(f"No feature of '{basis.name}' is active on these prompts.")
    return [int(i) for i in on.nonzero()[:, 0]]


def _zero(code: Coded) -> Coded:
    values = torch.zeros_like(code.features.values)
    return Coded(code.features.with_values(values), {site: 0 * error for site, error in code.errors.items()})


def fraction(effects: Grid) -> Grid:
    """The mean effect as a share of metric(clean) - metric(corrupt): a ratio of means over the examples.

    1 = noising destroys (denoising restores) all of the difference. `effects` is a Grid of `activation_patching`,
    `path_patching` or `causal_tracing`. Raises InputError when the metric is (nearly) the same in both runs.
    """
    if not {"clean_value", "corrupt_value"} <= set(effects.about):
        raise InputError(
            "Only effects of activation patching, path patching and causal tracing have a clean and a corrupt metric "
            "to divide by."
        )
    clean, corrupt = float(effects.about["clean_value"]), float(effects.about["corrupt_value"])
    whole = (clean - corrupt) * int(effects.about["metric_direction"])
    if not abs(whole) > 1e-4 * max(abs(clean), abs(corrupt)):
        raise InputError(
            f"The metric is {clean:.4g} in the clean and {corrupt:.4g} in the corrupt run, so a share of their "
            "difference is not defined. Use the effects themselves."
        )
    mean = effects.mean("example") if "example" in effects.labels else effects
    return Grid(mean.values / whole, mean.labels, "fraction", "", mean.about, mean.cost)


def _check_replacement(replacement: Replacing, sites: Sequence[Site], pairs: Pairs) -> None:
    if isinstance(replacement, str):
        if replacement not in REPLACEMENTS:
            raise unknown("replacement", replacement, REPLACEMENTS)
    elif isinstance(replacement, Tensor) and replacement.shape != pairs.clean.shape:
        raise InputError(
            f"Replacement prompts must be token ids {list(pairs.clean.shape)}, like the pairs'; got "
            f"{list(replacement.shape)}."
        )


def _values(
    model: HookManager,
    chunk: Pairs,
    sites: Sequence[Site],
    replacement: Replacing,
    rows: slice,
    base: Base,
    other: Base,
    means: dict[Site, Tensor],
) -> dict[Site, Tensor]:
    """What is written at every site."""
    if callable(replacement) and not isinstance(replacement, Tensor):
        made = {site: replacement(base.recorded[site].clone(), site) for site in sites}
        for site, value in made.items():
            if not isinstance(value, Tensor) or value.shape != base.recorded[site].shape:  # pyright: ignore[reportUnnecessaryIsInstance]
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InputError(
                    f"The replacement at '{site}' must be a tensor {list(base.recorded[site].shape)}; got {got}."
                )
        return made
    if isinstance(replacement, Tensor):
        run = model.run(replacement[rows].to(model.device), chunk.mask, record=sites, stop=Site("resid_final"))
        return {site: run.values[site] for site in sites}
    if replacement == "pair":
        return {site: other.recorded[site] for site in sites}
    if replacement == "zero":
        return {site: torch.zeros(1, *[1] * (_ndim(site) - 1), device=model.device) for site in sites}
    check_means(means, chunk)
    return means


def _ndim(site: Site) -> int:
    return 4 if site.kind in ("q", "k", "v", "z", "scores", "pattern") else 3
