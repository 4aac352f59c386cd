"""A direction or subspace as a node: which parts write it, which read it, and the paths through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mechinterp.analysis.direct_logit_attribution import direct_logit_attribution
from mechinterp.analysis.directions import Direction, read_pairs
from mechinterp.analysis.path_patching import path_patching
from mechinterp.base.batches import over_batches
from mechinterp.base.errors import InputError
from mechinterp.engines.grid import Grid, numbered
from mechinterp.engines.patch_direction import patch_direction
from mechinterp.engines.readout import FINAL, Readout, checked_metric, metric_readout
from mechinterp.features.activations import Identity
from mechinterp.features.basis import Basis
from mechinterp.features.dictionary import Dictionary
from mechinterp.graphs.graph import build_graph
from mechinterp.models.components import Part, Position, Positions, parse_part, position_index, position_sets
from mechinterp.models.direction_readout import DirectionReadout
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs

OFFSET = {"unembed.bias": "offset"}
"""What the bias of the logits is called where these are the reading of a direction."""


def direction_readers(
    model: HookManager,
    pairs: Pairs,
    direction: Direction | Basis,
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
        direction: A direction or a linear subspace (`subspace_basis`, `svd_basis`, `leace_basis`, `concept_basis`), at
            a residual stream: `resid_pre`, `resid_post` or `resid_final`.
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
    basis = linear_basis(direction)
    into = _Readers.of(model, basis, readers)
    pairs = pairs.to(model.device)
    where = position_sets(pairs, positions)
    if len(where.labels) != 1:
        raise InputError(f"`positions` must be one set here; write [({', '.join(map(repr, where.labels))})].")

    def patched(batch: Pairs, rows: slice) -> dict[str, Tensor]:
        base = into.base(model, chosen.tokens(batch)[0], batch)
        other = model.run(chosen.tokens(batch)[1], batch.mask, record=[into.place], stop=into.place).values[into.place]
        amounts = basis.encode(other.to(base.at_site.dtype)).values - basis.encode(base.at_site).values
        amounts = torch.where(where.masks[0][rows].to(amounts.device)[..., None], amounts, 0)
        readout = metric_readout(model, batch, metric)
        after = into.after(model, batch, base, readout, amounts @ basis.writes().to(amounts))
        return {"effect": chosen.effect(readout.of_resid(base.final), after, metric)}

    found = over_batches(pairs, batch_size, patched, {"effect": -1})
    axes = {"reader": into.labels, "example": numbered(len(pairs))}
    about = _about("path patching out of a direction", direction, patching, metric)
    return Grid(found["effect"], axes, "effect", metric.unit, about, {"forwards": 2.0 + len(into.sets)})


def direction_paths(
    model: HookManager,
    pairs: Pairs,
    direction: Direction | Basis,
    senders: str | Sequence[str | Sequence[str]] = "nodes",
    readers: Sequence[str | Sequence[str]] | None = None,
    *,
    position: Position | None = None,
    meaning: Literal["direct", "mlps-recomputed"] = "direct",
    patching: Literal["noise", "denoise"] = "noise",
    metric: MetricLike = "logit_diff",
    batch_size: int | None = None,
) -> Grid:
    """A Grid (sender, reader, example): the effect of each sender on the metric through the direction and one reader.

    The direction is a node between them: the senders' writes of the other prompt change its reading by the paths of
    `meaning`; the change of the reading alone then reaches the reader. All senders and all readers together are the
    direction patched at its site and position, exactly.

    Args:
        model: The model.
        pairs: Clean and corrupt prompts.
        direction: As for `direction_readers`.
        senders: `nodes` (the input, heads and MLPs before the site), or a list of nodes and sets of nodes.
        readers: As for `direction_readers`.
        position: Where the direction is read and patched, one token of each prompt; by default the direction's own.
        meaning: How a sender reaches the direction; see `path_patching`.
        patching: `noise`: the clean run, with the senders' corrupt writes; `denoise`: the other way round.
        metric: What is measured. Positive = the path helps the task.
        batch_size: Examples at a time; by default all.

    Cost: three forwards for each feature of the basis, and one forward per sender and reader.

    Raises InputError as `direction_readers` and `path_patching` do.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.orient_pairs(mi.load_task("subject_verb_agreement").pairs(model, n=8))
    >>> direction = mi.find_direction(model, pairs, "resid_pre.3", "end")
    >>> mi.direction_paths(model, pairs, direction, ["a2.h0", "m2"], ["m3", "logits"]).values.shape
    torch.Size([2, 2, 8])
    """
    metric, chosen = checked_metric(model, pairs, metric), patch_direction(patching)
    basis, pairs = linear_basis(direction), pairs.to(model.device)
    into = _Readers.of(model, basis, readers)
    at = _position_of(direction, position)
    own = read_pairs(pairs, at)
    received = [
        path_patching(
            readout, own, senders, meaning=meaning, direction=patching, metric="direction", batch_size=batch_size
        )
        for readout in _readouts(model, basis)
    ]
    names = received[0].labels.get("sender")
    if names is None:
        raise InputError("`senders` are 'nodes' or a list of nodes here; got 'heads'.")
    # An effect is positive where the sender helps the reading; what changes is less that, with `noise`.
    amounts = torch.stack([grid.values[:, 0] for grid in received], -1) * (-1 if chosen.noise else 1)
    index = position_index(pairs, at)

    def patched(batch: Pairs, rows: slice) -> dict[str, Tensor]:
        base = into.base(model, chosen.tokens(batch)[0], batch)
        readout = metric_readout(model, batch, metric)
        before, after = readout.of_resid(base.final), list[Tensor]()
        for amount in amounts[:, rows].to(base.at_site):
            change = torch.zeros_like(base.at_site)
            change[torch.arange(len(batch)), index[rows]] = amount @ basis.writes().to(amount)
            after.append(into.after(model, batch, base, readout, change))
        return {"effect": chosen.effect(before, torch.stack(after), metric)}

    found = over_batches(pairs, batch_size, patched, {"effect": -1})
    axes = {"sender": names, "reader": into.labels, "example": numbered(len(pairs))}
    about = _about("path patching through a direction", direction, patching, metric)
    about |= {"meaning": meaning, "position": str(at)}
    cost = {"forwards": 1.0 + len(received) * 2 + len(names) * len(into.sets)}
    return Grid(found["effect"], axes, "effect", metric.unit, about, cost)


def direction_writers(
    model: HookManager,
    pairs: Pairs,
    direction: Direction | Basis,
    position: Position | None = None,
    *,
    prompt: Literal["clean", "corrupt"] = "clean",
    refine: Sequence[str] = (),
    batch_size: int | None = None,
) -> Grid:
    """A Grid (node, feature, example): what every head, MLP and bias writes along a direction or subspace.

    With the `offset` that counts as 0, they add up to the reading of the direction (to every coordinate of the
    subspace). What a node does to it by all paths is `path_patching(read_direction(model, direction), ...)`.

    Args:
        model: The model.
        pairs: The prompts.
        direction: As for `direction_readers`.
        position: Where it is read; by default the direction's own.
        prompt: Which prompts of the pairs.
        refine: Nodes to split further, as in `direct_logit_attribution`.
        batch_size: Examples at a time; by default all.

    Cost: one forward up to the site for each feature.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.orient_pairs(mi.load_task("subject_verb_agreement").pairs(model, n=8))
    >>> direction = mi.find_direction(model, pairs, "resid_pre.3", "end")
    >>> written = mi.direction_writers(model, pairs, direction)
    >>> written.axes
    ('node', 'feature', 'example')
    """
    basis = linear_basis(direction)
    own = read_pairs(pairs, _position_of(direction, position))
    parts = [
        direct_logit_attribution(readout, own, 0, prompt=prompt, refine=refine, batch_size=batch_size)
        for readout in _readouts(model, basis)
    ]
    named = [[OFFSET.get(name, name) for name in part.labels["node"]] for part in parts]
    nodes = list(dict.fromkeys(name for names in named for name in names))
    wide = torch.zeros(len(nodes), len(parts), len(own), dtype=parts[0].values.dtype)
    for i, part in enumerate(parts):  # a part that is 0 for one feature, such as an offset, has no row there
        wide[[nodes.index(name) for name in named[i]], i] = part.values.to(wide)
    axes = {"node": tuple(nodes), "feature": numbered(len(parts)), "example": numbered(len(own))}
    about = {**parts[0].about, "direction": repr(direction), "sign": "positive = raises the reading"}
    about["sums_to"] = "the reading"
    return Grid(wide, axes, "attribution", "units of the direction", about, {"forwards": float(len(parts))})


def linear_basis(direction: Direction | Basis) -> Dictionary:
    """The basis of a direction, or a basis that is a linear subspace of one site. Raises InputError for another one."""
    basis = direction.basis if isinstance(direction, Direction) else direction
    linear = isinstance(basis, Dictionary) and isinstance(basis.activation, Identity) and basis.normalize == "none"
    if not isinstance(basis, Dictionary) or not linear or basis.sites_in != basis.sites_out or len(basis.sites_in) != 1:
        raise InputError(
            "Give a direction (mi.find_direction) or a linear subspace of one site (mi.subspace_basis, svd_basis, "
            "leace_basis, concept_basis); of a dictionary's feature, mi.given_direction(site, basis.writes([17])[0])."
        )
    return basis


def _position_of(direction: Direction | Basis, position: Position | None) -> Position:
    if position is not None:
        return position
    return direction.position if isinstance(direction, Direction) else -1


def _readouts(model: HookManager, basis: Dictionary) -> list[DirectionReadout]:
    """A model that reads each coordinate of a linear basis."""
    offsets = -basis.encode(torch.zeros_like(basis.b_dec[0])).values
    return [
        DirectionReadout(model, basis.sites_in[0], read, float(offset), basis.sha256)
        for read, offset in zip(basis.reads(), offsets, strict=True)
    ]


def _about(analysis: str, direction: Direction | Basis, patching: str, metric: Metric) -> dict[str, Any]:
    return {
        "analysis": analysis,
        "direction": repr(direction),
        "patching": patching,
        "metric": metric.name,
        "sign": "positive = the path helps the task",
    }


@dataclass(frozen=True)
class _Base:
    """The run that is patched."""

    tokens: Tensor
    at_site: Tensor
    final: Tensor


@dataclass(frozen=True)
class _Readers:
    """Sets of readers after one residual stream."""

    place: Site
    sets: list[list[Part]]
    labels: tuple[str, ...]

    @classmethod
    def of(cls, model: HookManager, basis: Dictionary, readers: Sequence[str | Sequence[str]] | None) -> _Readers:
        """The readers of these names. Raises InputError for others."""
        end = _end(model, basis.sites_in[0])
        if readers is None:
            readers = [name for name in build_graph(model).readers if _layer(name, model) >= end]
        members = [[entry] if isinstance(entry, str) else list(entry) for entry in readers]
        labels = tuple(" + ".join(several) for several in members)
        if not labels or len(set(labels)) != len(labels) or not all(members):
            raise InputError("Name at least one reader, and each set once.")
        sets = [[_reader(model, name, end) for name in several] for several in members]
        return cls(FINAL if end == model.dims.n_layers else Site("resid_pre", end), sets, labels)

    def base(self, model: HookManager, tokens: Tensor, batch: Pairs) -> _Base:
        """The run that is patched, in float32 or better."""
        run = model.run(tokens, batch.mask, record=list(dict.fromkeys([self.place, FINAL])), stop=FINAL).values
        wide = torch.promote_types(run[self.place].dtype, torch.float32)
        return _Base(tokens, run[self.place].to(wide), run[FINAL])

    def after(self, model: HookManager, batch: Pairs, base: _Base, readout: Readout, change: Tensor) -> Tensor:
        """The metric `[set, example]` where the stream that each set reads has `change` added."""
        after: list[Tensor] = []
        for parts in self.sets:
            final = change if any(part.site == FINAL for part in parts) else torch.zeros_like(change)
            inner = [part for part in parts if part.site != FINAL]
            edits = _edits(model, inner, change)
            run = model.run(base.tokens, batch.mask, record=[FINAL], stop=FINAL, interventions=edits)
            after.append(readout.of_resid(run.values[FINAL].to(change.dtype) + final))
        return torch.stack(after)


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
