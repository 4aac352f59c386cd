"""`direction_readers`: which heads and MLPs read a direction: its effect through one reader's input at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from mechinterp.analysis.directions import Direction
from mechinterp.base.batches import over_batches
from mechinterp.base.errors import InputError
from mechinterp.engines.grid import Grid, numbered
from mechinterp.engines.patch_direction import patch_direction
from mechinterp.engines.readout import FINAL, checked_metric, metric_readout
from mechinterp.graphs.graph import build_graph
from mechinterp.models.components import Part, Positions, parse_part, position_sets
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs


def direction_readers(
    model: HookManager,
    pairs: Pairs,
    direction: Direction,
    readers: Sequence[str | Sequence[str]] | None = None,
    *,
    positions: Positions = None,
    patching: Literal["noise", "denoise"] = "noise",
    metric: MetricLike = "logit_diff",
    batch_size: int | None = None,
) -> Grid:
    """A Grid (reader, example): what the direction does to the metric through the input of each reader alone.

    In the run of the clean prompts (`noise`) one reader sees the residual stream with the direction's reading of the
    corrupt prompts, everything else of its input as it is; after it the model runs as usual. So this is path patching
    out of the direction, with the meaning `direct`. All readers together are the direction patched at its site,
    exactly.

    Args:
        model: The model.
        pairs: Clean and corrupt prompts.
        direction: At a residual stream: `resid_pre`, `resid_post` or `resid_final`.
        readers: Inputs of heads (`a9.h9<q>`, `a5.kv1<k>`), MLPs (`m7`) and `logits`, or sets of them that read
            together; by default every one after the site.
        positions: Where the direction is patched, one set; by default at all positions.
        patching: `noise`: the clean run, with the corrupt reading; `denoise`: the other way round.
        metric: What is measured. Positive = the path helps the task, as in `activation_patching`.
        batch_size: Examples at a time; by default all.

    Cost: two forwards, and one forward per reader or set.

    Raises InputError for readers before the site, other names and other sites.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.orient_pairs(mi.load_task("subject_verb_agreement").pairs(model, n=8))
    >>> direction = mi.find_direction(model, pairs, "resid_pre.3", "end")
    >>> grid = mi.direction_readers(model, pairs, direction, ["m3", "logits"], positions="end")
    >>> grid.labels["reader"]
    ('m3', 'logits')
    """
    metric, chosen = checked_metric(model, pairs, metric), patch_direction(patching)
    end = _end(model, direction.site)
    pairs = pairs.to(model.device)
    if readers is None:
        readers = [name for name in build_graph(model).readers if _layer(name, model) >= end]
    members = [[entry] if isinstance(entry, str) else list(entry) for entry in readers]
    labels = tuple(" + ".join(several) for several in members)
    if not labels or len(set(labels)) != len(labels) or not all(members):
        raise InputError("Name at least one reader, and each set once.")
    sets = [[_reader(model, name, end) for name in several] for several in members]
    where = position_sets(pairs, positions)
    if len(where.labels) != 1:
        raise InputError(f"`positions` must be one set here; write [({', '.join(map(repr, where.labels))})].")
    place = FINAL if end == model.dims.n_layers else Site("resid_pre", end)

    def patched(batch: Pairs, rows: slice) -> dict[str, Tensor]:
        readout = metric_readout(model, batch, metric)
        base_tokens, other_tokens = chosen.tokens(batch)
        base = model.run(base_tokens, batch.mask, record=list(dict.fromkeys([place, FINAL])), stop=FINAL).values
        other = model.run(other_tokens, batch.mask, record=[place], stop=place).values[place]
        wide = torch.promote_types(base[place].dtype, torch.float32)
        amount = direction.reading(other.to(wide)) - direction.reading(base[place].to(wide))
        amount = torch.where(where.masks[0][rows].to(amount.device), amount, 0)
        change = amount[..., None] * direction.write.to(amount)
        before = readout.of_resid(base[FINAL])
        after: list[Tensor] = []
        for parts in sets:
            final = [change.to(wide) if any(part.site == FINAL for part in parts) else torch.zeros_like(change)]
            inner = [part for part in parts if part.site != FINAL]
            run = model.run(
                base_tokens, batch.mask, record=[FINAL], stop=FINAL, interventions=_edits(model, inner, change)
            )
            after.append(readout.of_resid(run.values[FINAL].to(wide) + final[0].to(wide)))
        return {"effect": chosen.effect(before, torch.stack(after), metric)}

    found = over_batches(pairs, batch_size, patched, {"effect": -1})
    about = {
        "analysis": "path patching out of a direction",
        "direction": repr(direction),
        "patching": patching,
        "metric": metric.name,
        "sign": "positive = the path helps the task",
    }
    axes = {"reader": labels, "example": numbered(len(pairs))}
    return Grid(found["effect"], axes, "effect", metric.unit, about, {"forwards": 2.0 + len(sets)})


def _end(model: HookManager, site: Site) -> int:
    """The first layer that reads the stream at the site; the number of layers for the final one."""
    after = {"resid_pre": 0, "resid_post": 1}
    model.resolve(site)
    if site == FINAL:
        return model.dims.n_layers
    if site.kind not in after or site.layer is None:
        raise InputError(
            f"'{site}' is not a residual stream between layers; take 'resid_pre', 'resid_post', 'resid_final'."
        )
    return site.layer + after[site.kind]


def _layer(name: str, model: HookManager) -> int:
    return model.dims.n_layers if name == "logits" else int(name[1:].partition(".")[0].partition("<")[0])


def _reader(model: HookManager, name: str, end: int) -> Part:
    if name == "logits":
        return Part(FINAL)
    part = parse_part(model, name)
    kind = part.site.kind
    if kind == "mlp_out":
        model.resolve(Site("mlp_in", part.site.layer))
        part = Part(Site("mlp_in", part.site.layer), None, part.position)
    elif kind not in ("q", "k", "v") or part.unit is None:
        raise InputError(
            f"{name!r} is not a reader; name 'logits', a head's input ('a9.h9<q>', '<k>' or '<v>') or 'm7'."
        )
    if part.position is not None:
        raise InputError(f"Give the positions as `positions`, where the direction is patched; got {name!r}.")
    if (part.site.layer or 0) < end:
        raise InputError(f"{name!r} reads before the direction's site; it can only be read from layer {end} on.")
    return part


def _edits(model: HookManager, parts: Sequence[Part], change: Tensor) -> list[Intervention]:
    """The edits by which these readers see the residual stream of their own run with the change added."""
    seen: dict[Site, Tensor] = {}
    edits: list[Intervention] = []

    def note(site: Site) -> Intervention:
        def keep(value: Tensor) -> Tensor:
            seen[site] = value
            return value

        return Intervention(site, keep)

    streams: dict[Site, None] = {}
    for part in parts:
        streams[_stream(model, part.site)] = None
    edits += [note(site) for site in streams]
    heads: dict[Site, list[int]] = {}
    for part in parts:
        if part.unit is not None:
            heads.setdefault(part.site, []).append(part.unit)
        else:
            edits.append(Intervention(part.site, _mlp(model, part.site, seen, change)))
    return edits + [Intervention(site, _heads(model, site, units, seen, change)) for site, units in heads.items()]


def _stream(model: HookManager, site: Site) -> Site:
    """The residual stream that a reader's input is read from."""
    parallel = model.dims.parallel or site.kind != "mlp_in"
    return Site("resid_pre" if parallel else "resid_mid", site.layer)


def _mlp(model: HookManager, site: Site, seen: dict[Site, Tensor], change: Tensor) -> Callable[[Tensor], Tensor]:
    def edit(value: Tensor) -> Tensor:
        resid = seen[_stream(model, site)].to(change.dtype)
        layer = site.layer or 0
        moved = model.layout.read_mlp(layer, resid + change) - model.layout.read_mlp(layer, resid)
        return (value.to(moved.dtype) + moved).to(value.dtype)

    return edit


def _heads(
    model: HookManager, site: Site, units: Sequence[int], seen: dict[Site, Tensor], change: Tensor
) -> Callable[[Tensor], Tensor]:
    def edit(value: Tensor) -> Tensor:
        resid = seen[_stream(model, site)].to(change.dtype)
        layer, n = site.layer or 0, value.shape[2]
        before, after = (
            model.layout.read_heads(layer, site.kind, stream.expand(n, *stream.shape))
            for stream in (resid, resid + change)
        )
        new = value.clone()
        for unit in units:
            new[:, :, unit] = (value[:, :, unit].to(before.dtype) + after[unit] - before[unit]).to(value.dtype)
        return new

    return edit
