"""The engine of patching sweeps: many patched runs of the same prompts, each from where it first differs.

A patched run is the base run up to its first patched layer and position. So it starts at that layer with the base
run's residual stream, takes the keys and values of the positions before from the base run, and ends at the metric's
last position. Runs that start at the same place go side by side as one batch, as many as fit the memory budget.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.errors import UnsupportedError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.engines.readout import FINAL, Readout
from mechinterp.models.components import BY_QUERY, Part
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.past import Past
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

MEMORY = {"cpu": 2**26, "cuda": 2**30}
"""Bytes of activations that runs side by side may hold by default: what is fastest on each kind of device."""


def memory_budget(device: torch.device, memory: int | None) -> int:
    """The bytes that runs side by side may hold: `memory`, or the default of the device."""
    return memory or MEMORY.get(device.type, MEMORY["cpu"])


@dataclass(frozen=True)
class Patch:
    """Parts that are replaced together, each where its mask is True."""

    parts: tuple[Part, ...]
    where: tuple[Bool[Tensor, "batch pos"], ...]
    values: tuple[Tensor, ...] | None = None
    """What is written, per part; None: the replacements of the whole sweep."""

    def first(self, width: int) -> int | None:
        """The first of `width` positions where anything is replaced; None if nothing is."""
        found = torch.stack([mask.any(0) for mask in self.where]).any(0)[:width].nonzero()
        return int(found[0]) if len(found) else None

    def rows(self, width: int) -> Bool[Tensor, " batch"]:
        """The examples in which anything of `width` positions is replaced."""
        return torch.stack([mask[:, :width].any(1) for mask in self.where]).any(0)


@dataclass(frozen=True)
class Base:
    """The run that is patched: its tokens, its residual stream before some layers, its keys and values, its metric."""

    tokens: Int[Tensor, "batch pos"]
    resid: Mapping[int, Float[Tensor, "batch pos d_model"]]
    past: Past | None
    values: Float[Tensor, " batch"]
    recorded: Mapping[Site, Tensor]


def run_base(
    model: HookManager,
    readout: Readout,
    tokens: Int[Tensor, "batch pos"],
    *,
    layers: Sequence[int] = (),
    record: Sequence[Site] = (),
    entering: Float[Tensor, "batch pos d_model"] | None = None,
) -> Base:
    """One run, with everything that its patched versions need.

    Args:
        model: The model.
        readout: The metric of the batch.
        tokens: The prompts that are run.
        layers: The layers at which patched runs will start.
        record: Further sites whose values are kept.
        entering: Replaces the input of the first layer.
    """
    sites = [Site("resid_pre", layer) for layer in layers]
    run = model.run(
        tokens,
        readout.pairs.mask,
        record=list(dict.fromkeys([*sites, *record, FINAL])),
        start=None if entering is None else (0, entering),
        keep_past=bool(layers),
        stop=FINAL,
    )
    resid = {layer: run.values[site] for layer, site in zip(layers, sites, strict=True)}
    values = readout.of_resid(run.values[FINAL])
    return Base(tokens, resid, run.past, values, {site: run.values[site] for site in record})


def entry(model: HookManager, part: Part) -> tuple[int, Part]:
    """The layer at which a run can start that patches this part, and the part as that run sees it."""
    site = part.site
    if site.kind == "resid_post" and site.layer is not None and site.layer + 1 < model.dims.n_layers:
        return site.layer + 1, Part(Site("resid_pre", site.layer + 1), part.unit, part.position)
    if site.kind == "final_norm":
        raise UnsupportedError("Site 'final_norm' cannot be patched; patch 'resid_final', which it normalizes.")
    if site.kind == "resid_final":
        return model.dims.n_layers - 1, part
    return (-1 if site.layer is None else site.layer), part


def start_layers(model: HookManager, patches: Sequence[Patch]) -> tuple[int, ...]:
    """Every layer at which a run of the sweep starts."""
    return tuple(sorted({max(0, _start(model, patch)) for patch in patches}))


def _start(model: HookManager, patch: Patch) -> int:
    return min(entry(model, part)[0] for part in patch.parts)


def sweep(
    model: HookManager,
    readout: Readout,
    base: Base,
    patches: Sequence[Patch],
    replacements: Mapping[Site, Tensor],
    *,
    memory: int | None = None,
    progress: Progress = no_progress,
) -> tuple[Float[Tensor, "patch batch"], float]:
    """(the metric of every patched run, the cost in whole forwards of the prompts).

    Args:
        model: The model.
        readout: The metric of the batch.
        base: The run that is patched.
        patches: What is replaced in each run.
        replacements: The values written at every patched site, `[batch, pos, ...]` (or `[batch, head, query, key]`)
            or a shape that broadcasts to it.
        memory: Bytes of activations at a time; by default that of the device.
        progress: Called after every group of runs side by side.
    """
    dims, pairs, budget = model.dims, readout.pairs, memory_budget(model.device, memory)
    n_batch, n_pos = base.tokens.shape
    # Edits of an `intervene` block are written for whole prompts, each once.
    width = int(pairs.answer_pos.max()) + 1 if dims.causal and not model.edited else n_pos
    out = base.values.expand(len(patches), -1).clone()
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    earliest = torch.where(pairs.answer_pos < 0, width, pairs.answer_pos).amin(1)
    patched = torch.stack([patch.rows(width) for patch in patches])
    for i, patch in enumerate(patches):
        first = patch.first(width)
        if first is not None:
            first = min(first, int(earliest[patched[i]].min()))  # an earlier answer is read too
            groups[_start(model, patch), first if base.past is not None else 0].append(i)
    total, done, forwards = sum(map(len, groups.values())), 0, 0.0
    for (layer, first), members in sorted(groups.items()):
        per_token = 24 * dims.d_model + 4 * dims.n_heads * width
        each = n_batch * (width - first) * per_token * model.dtype.itemsize
        for chunk in _split(members, 1 if model.edited else max(1, budget // each)):
            final = _run_side_by_side(
                model, pairs, base, [patches[i] for i in chunk], replacements, layer, slice(first, width)
            )
            values = readout.of_runs(final, len(chunk), first)
            out[chunk] = torch.where(patched[chunk], values, out[chunk])
            done += len(chunk)
            forwards += len(chunk) * (dims.n_layers - max(0, layer)) / dims.n_layers * (width - first) / n_pos
            progress(done, total)
    return out, forwards


def _split(members: list[int], size: int) -> Iterator[list[int]]:
    count = -(-len(members) // size)
    even = -(-len(members) // count)
    return (members[i : i + even] for i in range(0, len(members), even))


def _run_side_by_side(
    model: HookManager,
    pairs: Pairs,
    base: Base,
    patches: Sequence[Patch],
    replacements: Mapping[Site, Tensor],
    layer: int,
    columns: slice,
) -> Float[Tensor, "rows pos d_model"]:
    """The final residual stream of several patched runs, patch by patch, at the positions of `columns`."""
    n = len(patches)
    edits: dict[Site, list[tuple[int, Part, Tensor, Tensor]]] = defaultdict(list)
    for i, patch in enumerate(patches):
        own = patch.values or tuple(replacements[part.site] for part in patch.parts)
        for part, mask, value in zip(patch.parts, patch.where, own, strict=True):
            seen = entry(model, part)[1]
            edits[seen.site].append((i, seen, mask[:, columns], value))
    past = None
    if base.past is not None and columns.start > 0:
        past = base.past.upto(columns.start).repeated(n, max(0, layer))
    start = None if layer < 0 else (layer, base.resid[layer][:, columns].repeat(n, 1, 1))
    mask = pairs.mask[:, columns]
    run = model.run(
        base.tokens[:, columns].repeat(n, 1),
        None if model.dims.causal else mask.repeat(n, 1),
        interventions=[Intervention(site, _edit(n, several, columns)) for site, several in edits.items()],
        record=[FINAL],
        start=start,
        past=past,
        stop=FINAL,
    )
    return run.values[FINAL]


def _edit(n: int, several: Sequence[tuple[int, Part, Tensor, Tensor]], columns: slice) -> Callable[[Tensor], Tensor]:
    """Writes each replacement into the rows of its own run."""

    def edit(value: Tensor) -> Tensor:
        new = value.clone()
        rows = new.unflatten(0, (n, -1))
        for i, part, mask, replacement in several:
            own = rows[i]
            given = _cropped(part.site, replacement, columns, own).to(value.dtype)
            unit = slice(None) if part.unit is None else slice(part.unit, part.unit + 1)
            if part.site.kind in BY_QUERY:  # [batch, head, query, key]
                own[:, unit] = torch.where(mask[:, None, :, None], given[:, unit], own[:, unit])
            else:  # [batch, pos, (unit,) (d)]
                where = mask.reshape(*mask.shape, *[1] * (own.ndim - 2))
                own[:, :, unit] = torch.where(where, given[:, :, unit], own[:, :, unit])
        return new

    return edit


def _cropped(site: Site, replacement: Tensor, columns: slice, like: Tensor) -> Tensor:
    """The replacement at the positions of a run, in the shape of the value there."""
    query = 2 if site.kind in BY_QUERY else 1
    if replacement.shape[query] > 1:
        replacement = replacement.narrow(query, columns.start, columns.stop - columns.start)
    if site.kind in BY_QUERY and replacement.shape[3] > 1:
        replacement = replacement[..., : like.shape[3]]
    return replacement.expand_as(like)
