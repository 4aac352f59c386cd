"""Many runs of the same prompts, each with other features replaced; as many side by side as fit the memory budget.

A run starts at the layer that the first basis reads, with the base run's residual stream. Features are replaced in the
run itself, so that a set with features of several layers means what it says: all of them have the new activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.progress import Progress, no_progress
from mechinterp.engines.patch_sweep import memory_budget
from mechinterp.engines.readout import FINAL, Readout
from mechinterp.features.addresses import FeaturePart
from mechinterp.models.feature_basis import FeatureBasis, Features
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True)
class FeaturePatch:
    """Features that are replaced together, each where its mask is True."""

    parts: tuple[FeaturePart, ...]
    where: tuple[Bool[Tensor, "batch pos"], ...]


@dataclass(frozen=True)
class Coded:
    """The features of one run and what their reconstruction misses at every output site."""

    features: Features
    errors: Mapping[Site, Tensor]


def coded(
    model: HookManager, pairs: Pairs, tokens: Int[Tensor, "batch pos"], bases: Sequence[FeatureBasis]
) -> dict[FeatureBasis, Coded]:
    """The features and errors of every basis in one run. One forward."""
    sites = [site for basis in bases for site in (*basis.sites_in, *basis.sites_out)]
    run = model.run(tokens, pairs.mask, record=list(dict.fromkeys(sites)), stop=FINAL)
    found: dict[FeatureBasis, Coded] = {}
    for basis in bases:
        read = {site: run.values[site] for site in basis.sites_in}
        features = basis.encode(next(iter(read.values())) if len(read) == 1 else read)
        decoded = basis.decode(features)
        found[basis] = Coded(features, {site: run.values[site] - decoded[site] for site in basis.sites_out})
    return found


def feature_sweep(
    model: HookManager,
    readout: Readout,
    tokens: Int[Tensor, "batch pos"],
    patches: Sequence[FeaturePatch],
    base: Mapping[FeatureBasis, Coded],
    new: Mapping[FeatureBasis, Coded],
    *,
    memory: int | None = None,
    progress: Progress = no_progress,
) -> tuple[Float[Tensor, "patch batch"], float]:
    """(the metric of every patched run, the cost in whole forwards of the prompts).

    Args:
        model: The model.
        readout: The metric of the batch.
        tokens: The prompts that are run and patched.
        patches: What is replaced in each run.
        base: The features and errors of the plain run of these prompts.
        new: What replaces them.
        memory: Bytes of activations at a time; by default that of the device.
        progress: Called after every group of runs side by side.
    """
    pairs = readout.pairs
    layer = min(_layer(model, site) for basis in base for site in basis.sites_in)
    start = None
    if layer > 0:
        entry = Site("resid_pre", layer)
        start = (layer, model.run(tokens, pairs.mask, record=[entry], stop=entry).values[entry])
    widest = max(code.features.values[0].numel() for code in base.values())
    each = 8 * len(tokens) * (widest + 24 * tokens.shape[1] * model.dims.d_model)
    size = 1 if model.edited else max(1, memory_budget(model.device, memory) // (4 * each))
    values: list[Tensor] = []
    for first in range(0, len(patches), size):
        chunk = patches[first : first + size]
        n = len(chunk)
        run = model.run(
            tokens.repeat(n, 1),
            pairs.mask.repeat(n, 1),
            interventions=_edits(chunk, base, new),
            record=[FINAL],
            start=None if start is None else (start[0], start[1].repeat(n, 1, 1)),
            stop=FINAL,
        )
        values.append(readout.of_runs(run.values[FINAL], n, 0))
        progress(first + n, len(patches))
    share = (model.dims.n_layers - max(0, layer)) / model.dims.n_layers
    return torch.cat(values), len(patches) * share + (start is not None)


def _layer(model: HookManager, site: Site) -> int:
    if site.layer is None:
        return model.dims.n_layers - 1 if site.kind in ("resid_final", "final_norm") else -1
    return site.layer


def _edits(
    patches: Sequence[FeaturePatch], base: Mapping[FeatureBasis, Coded], new: Mapping[FeatureBasis, Coded]
) -> list[Intervention]:
    """The edits of all runs side by side: of the activations first, then of the errors."""
    used = {part.basis for patch in patches for part in patch.parts}
    edits = [Intervention(basis, _of_features(patches, basis, new[basis])) for basis in base if basis in used]
    for basis in base:
        if any(part.basis == basis and part.feature is None for patch in patches for part in patch.parts):
            for site in basis.sites_out:
                change = new[basis].errors[site] - base[basis].errors[site]
                edits.append(Intervention(site, _of_errors(patches, basis, change)))
    return edits


def _of_features(patches: Sequence[FeaturePatch], basis: FeatureBasis, new: Coded) -> Callable[[Tensor], Tensor]:
    def edit(value: Tensor) -> Tensor:
        rows = value.clone().unflatten(0, (len(patches), -1))
        for own, patch in zip(rows, patches, strict=True):
            for part, mask in zip(patch.parts, patch.where, strict=True):
                if part.basis == basis and part.feature is not None:
                    given = new.features.values[..., part.feature].to(own)
                    own[..., part.feature] = torch.where(mask, given, own[..., part.feature])
        return rows.flatten(0, 1)

    return edit


def _of_errors(patches: Sequence[FeaturePatch], basis: FeatureBasis, change: Tensor) -> Callable[[Tensor], Tensor]:
    def edit(value: Tensor) -> Tensor:
        rows = value.clone().unflatten(0, (len(patches), -1))
        for own, patch in zip(rows, patches, strict=True):
            for part, mask in zip(patch.parts, patch.where, strict=True):
                if part.basis == basis and part.feature is None:
                    own += torch.where(mask.reshape(*mask.shape, *[1] * (change.ndim - 2)), change, 0).to(own)
        return rows.flatten(0, 1)

    return edit
