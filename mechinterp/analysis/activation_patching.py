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
from mechinterp.engines.patch_direction import patch_direction
from mechinterp.engines.patch_sweep import Base, Patch, run_base, start_layers, sweep
from mechinterp.engines.readout import checked_metric, metric_readout
from mechinterp.models.components import Positions
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.pairs import Pairs

Replacing: TypeAlias = "str | Tensor | Callable[[Tensor, Site], Tensor]"
REPLACEMENTS = ("pair", "mean", "mean-positional", "zero")


def activation_patching(
    model: HookManager,
    pairs: Pairs,
    what: str | Nodes = "z",
    *,
    positions: Positions = None,
    direction: Literal["noise", "denoise"] = "noise",
    replacement: Replacing = "pair",
    reference: Pairs | None = None,
    metric: Metric | str = "logit_diff",
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
            are replaced together.
        positions: Where (see `Positions`); of `pattern`, query positions.
        direction: `noise`: the clean run is patched with values of the corrupt run (is the part necessary?).
            `denoise`: the corrupt run is patched with clean values (is it sufficient?).
        replacement: `pair` (the other run's value), `mean` (over all real tokens of the corrupt prompts of
            `reference`), `mean-positional` (the same per position), `zero`, token ids `[batch, pos]` of other prompts
            (interchange), or a function of (the base run's value, site) that returns the new value.
        reference: The pairs whose corrupt prompts give the means; by default `pairs`.
        metric: What is measured.
        layers: Of a kind of site, the layers to sweep; by default all.
        units: Of a kind of site, the heads or neurons to sweep; by default all.
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
            f"The metric is {clean:.4g} in the clean and {corrupt:.4g} in the corrupt run; a share of no difference "
            "means nothing. Use the effects themselves."
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
