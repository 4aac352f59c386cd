"""Path patching: how the metric changes when a change reaches the receivers from the senders by chosen paths only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.base.batches import over_batches
from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.registry import unknown
from mechinterp.engines.grid import Grid, numbered
from mechinterp.engines.part_sets import every_node, parse_sets
from mechinterp.engines.patch_direction import PatchDirection, patch_direction
from mechinterp.engines.patch_sweep import Base, Patch, entry, memory_budget, run_base, sweep
from mechinterp.engines.readout import FINAL, Readout, checked_metric, metric_readout
from mechinterp.engines.residual_paths import Senders, Values, mediate, walk
from mechinterp.features.addresses import refuse_features
from mechinterp.models.components import Part, Positions, parse_part, position_sets
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Node, Site
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs

_INSTEAD = (
    "the direct path from or into a feature is an edge of a graph with features: run_edges(model, graph, pairs, "
    "graph.mask_of(['m1.f17->a3.h0<q>'])) with build_graph(model, features=...)"
)
MEANINGS = {
    "direct": "direct edges only (Goldowsky-Dill et al. 2023)",
    "mlps-recomputed": "all other heads frozen, MLPs between recomputed (Wang et al. 2022)",
}


def path_patching(
    model: HookManager,
    pairs: Pairs,
    senders: str | Sequence[str | Sequence[str]] = "heads",
    receivers: str | Sequence[str] = "logits",
    *,
    via: Sequence[Sequence[str]] = (),
    meaning: Literal["direct", "mlps-recomputed"] = "mlps-recomputed",
    positions: Positions = None,
    direction: Literal["noise", "denoise"] = "noise",
    metric: MetricLike = "logit_diff",
    batch_size: int | None = None,
    memory: int | None = None,
    progress: Progress = no_progress,
) -> Grid:
    """The effect of each sender on the metric through the paths to the receivers: positive = the path helps the task.

    The base run is the clean one (`noise`; senders carry their corrupt values) or the corrupt one (`denoise`; clean
    values). With everything else as in the base run, the change of the senders' writes changes the receivers' inputs:

    - `direct`: along the edges sender -> receiver only. Source: Goldowsky-Dill et al. 2023 (arXiv 2304.05969); for
      one edge this is `run_edges` with that edge cut.
    - `mlps-recomputed`: all other heads are frozen and the MLPs between are recomputed, so that paths through MLPs
      count. Source: Wang et al. 2022 (arXiv 2211.00593), section 3.1 and appendix B.

    After the receivers the model runs as usual. Under a post-norm (Gemma-2) a direct write is the head's share of the
    normed sum in its own run; with `mlps-recomputed` the layer's output is recomputed with the sender's z replaced.

    Axes: those of the senders, pos, example; in units of the metric, as in `activation_patching` (`fraction` works
    here too); NaN where an example has no such position.

    Args:
        model: The model.
        pairs: Clean and corrupt prompts.
        senders: `heads` (all, axes layer and head), `nodes` (the input, heads and MLPs; axis sender), or a list of
            nodes (`a9.h9`, `m3`, `input`, each with an optional `@S2` or `@4`) and of sets of nodes that send together.
        receivers: `logits`, or inputs that receive together: `a9.h9<q>` (`a5.kv1<k>` where query heads share it),
            `m7`, `resid_pre.5`, each with an optional position.
        via: Sets of mediators between them: `[["a5.h5<k>"], ["a7.h9<v>", "m7"]]` goes from the senders to the first
            set, from its heads and MLPs to the second, and from these to the receivers, each hop with the same meaning.
        meaning: `direct` or `mlps-recomputed`, see above.
        positions: The positions of the senders, where they do not name their own.
        direction: `noise` or `denoise`.
        metric: What is measured.
        batch_size: Examples at a time; by default all.
        memory: Bytes of candidates side by side; by default four times that of `activation_patching`.
        progress: Called after every group of candidates of a batch.

    Cost: two forwards. To the logits no further forward, only the MLPs of later layers at the answer positions; to
    other receivers the MLPs at every position, and per sender the share of a forward after the first receiver.
    Memory: also the writes of `batch_size` examples.

    Raises InputError for names that do not exist, a sender that is not a writer, a receiver that is not an input of a
    reader, and inside an `intervene` block; UnsupportedError for an MLP that cannot be run separately, and for features
    of a dictionary: their direct paths are edges of `build_graph(features=)`.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=8)
    >>> movers = mi.path_patching(model, pairs, "heads", "logits", positions="end").mean()
    >>> movers.axes, movers.at(pos="end").top(1)["layer"].tolist()[0] >= 2
    (('layer', 'head', 'pos'), True)
    >>> to_query = mi.path_patching(model, pairs, ["a0.h1", "a1.h0"], ["a2.h1<v>", "a2.h3<v>"], meaning="direct")
    >>> to_query.labels["sender"]
    ('a0.h1', 'a1.h0')
    """
    metric = checked_metric(model, pairs, metric)
    chosen = patch_direction(direction)
    if meaning not in MEANINGS:
        raise unknown("meaning", meaning, MEANINGS)
    if model.edited:
        raise InputError("Paths cannot be patched inside `intervene`: its edits would not take effect along the paths.")
    for names in (senders, receivers, *via):
        refuse_features("Path patching", names, _INSTEAD)
    pairs = pairs.to(model.device)
    labels, sets = _senders(model, senders)
    into = _receivers(model, receivers)
    hops = [_receivers(model, hop) for hop in via]
    if any(part.site == FINAL for hop in hops for part in hop):
        raise InputError("The logits cannot be a mediator; they can only be `receivers`.")
    for parts in [*sets, into, *hops]:
        if positions is not None and parts in sets and any(part.position is not None for part in parts):
            raise InputError("Sender positions are given twice: after an '@' and as `positions`; use one of the two.")
    pos_labels = position_sets(pairs, positions).labels

    def patched(batch: Pairs, _: slice) -> dict[str, Tensor | float]:
        readout = metric_readout(model, batch, metric)
        job = _Job(model, readout, meaning == "mlps-recomputed", chosen, memory, progress)
        effect, (clean, corrupt), cost = job.run(_sender_masks(batch, sets, positions), into, hops)
        return {
            "effect": effect,
            "ends": torch.stack([clean.double().sum().cpu(), corrupt.double().sum().cpu()]),
            "forwards": cost * len(batch) / len(pairs),
        }

    found = over_batches(pairs, batch_size, patched, {"effect": -1, "ends": "sum", "forwards": "sum"})
    shape = [len(names) for names in labels.values()]
    clean_value, corrupt_value = (found["ends"] / len(pairs)).tolist()
    about = {
        "analysis": "path patching",
        "meaning": MEANINGS[meaning],
        "receivers": receivers if isinstance(receivers, str) else list(receivers),
        "via": [list(hop) for hop in via],
        "direction": direction,
        "metric": metric.name,
        "metric_direction": metric.direction,
        "sign": "positive = the path helps the task",
        "clean_value": clean_value,
        "corrupt_value": corrupt_value,
        "examples": len(pairs),
    }
    axes = {**labels, "pos": pos_labels, "example": numbered(len(pairs))}
    values = found["effect"].unflatten(0, [*shape, len(pos_labels)])
    return Grid(values, axes, "effect", metric.unit, about, {"forwards": float(found["forwards"])})


@dataclass(frozen=True)
class _Job:
    """One batch of pairs and how it is patched."""

    model: HookManager
    readout: Readout
    recompute: bool
    direction: PatchDirection
    memory: int | None
    progress: Progress

    def run(
        self, senders: Senders, into: tuple[Part, ...], hops: list[tuple[Part, ...]]
    ) -> tuple[Float[Tensor, "candidate batch"], tuple[Tensor, Tensor], float]:
        """(the effect of every candidate, the metric of the clean and of the corrupt run, the cost in forwards)."""
        model, pairs, dims = self.model, self.readout.pairs, self.model.dims
        tokens = self.direction.tokens(pairs)
        every = [site for layer in range(dims.n_layers) for site in _sites(model, layer)]
        sites = [*every, FINAL]
        to_logits = into[0].site == FINAL
        layers = () if to_logits else (min(max(0, entry(model, part)[0]) for part in into),)
        base = run_base(model, self.readout, tokens[0], layers=layers, record=sites)
        other = run_base(model, self.readout, tokens[1], record=sites)
        present = senders.where.flatten(1, 2).any(-1).unflatten(1, (len(senders.nodes), -1)).any(1)
        at = pairs.answer_pos.clamp(min=0) if to_logits and not hops else None
        old, new = (_values(run, at) for run in (base, other))
        if at is not None:
            index = at[None, None].expand(*senders.where.shape[:2], -1, -1)
            senders = Senders(senders.nodes, senders.where.gather(3, index))
        n = len(senders.where)
        each = old[Site("resid_pre", 0)].numel() * 8 * max(4, model.dtype.itemsize)
        size = max(1, (self.memory or 4 * memory_budget(model.device, None)) // each)
        patched, cost = [], 2.0 + (self.readout.reference is not None)
        for rows in torch.arange(n).split(size):
            values, further = self._candidates(base, old, new, senders.rows(rows), into, hops)
            patched.append(values)
            cost += further
            self.progress(int(rows[-1]) + 1, n)
        ends = self.direction.swap(base.values, other.values)
        effect = self.direction.effect(base.values, torch.cat(patched), self.readout.metric)
        return torch.where(present, effect, torch.nan), ends, cost

    def _candidates(
        self,
        base: Base,
        old: Values,
        new: Values,
        senders: Senders,
        into: tuple[Part, ...],
        hops: list[tuple[Part, ...]],
    ) -> tuple[Float[Tensor, "candidate batch"], float]:
        """The metric of every candidate, and the cost in forwards of all examples."""
        model, pairs, cost = self.model, self.readout.pairs, 0.0
        for hop in hops:
            inputs = walk(model, old, new, senders, hop, recompute_mlps=self.recompute)
            masks = [_mask(pairs, part) for part in hop]
            senders, new, share = mediate(model, pairs, base.tokens, old, hop, masks, inputs)
            cost += share
        received = walk(model, old, new, senders, into, recompute_mlps=self.recompute)
        if into[0].site != FINAL:
            patches = [
                Patch(
                    into,
                    tuple(_mask(pairs, part) for part in into),
                    tuple(_unit(part, v[i]) for part, v in zip(into, received, strict=True)),
                )
                for i in range(len(senders.where))
            ]
            values, share = sweep(model, self.readout, base, patches, {}, memory=self.memory)
            return values, cost + share
        final = received[0]
        if hops:
            index = pairs.answer_pos.clamp(min=0)[None, :, :, None].expand(len(final), -1, -1, final.shape[-1])
            final = final.gather(2, index)
        return self.readout.of_answers(final), cost


def _sites(model: HookManager, layer: int) -> list[Site]:
    kinds = ["resid_pre", "z"]
    if model.dims.has_mlp:
        kinds += ["mlp_out"] if model.dims.parallel else ["resid_mid", "mlp_out"]
    return [Site(kind, layer) for kind in kinds]


def _values(run: Base, at: Tensor | None) -> Values:
    """The recorded values with a candidate axis of 1, at the positions `at` only if given."""
    found: dict[Site, Tensor] = {}
    for site, value in run.recorded.items():
        if at is not None:
            index = at.reshape(*at.shape, *[1] * (value.ndim - 2)).expand(-1, -1, *value.shape[2:])
            value = value.gather(1, index)
        found[site] = value.to(torch.promote_types(value.dtype, torch.float32))[None]
    return Values(found)


def _unit(part: Part, value: Tensor) -> Tensor:
    """The value of one head with an axis for the heads, as a site has it."""
    return value if part.unit is None else value[:, :, None]


def _mask(pairs: Pairs, part: Part) -> Bool[Tensor, "batch pos"]:
    return position_sets(pairs, None if part.position is None else [part.position]).masks[0]


def _senders(
    model: HookManager, senders: str | Sequence[str | Sequence[str]]
) -> tuple[dict[str, tuple[str, ...]], list[tuple[Part, ...]]]:
    """(the labels of the senders' axes, the set of parts of every entry in order)."""
    dims = model.dims
    if senders == "heads":
        labels = {"layer": numbered(dims.n_layers), "head": numbered(dims.n_heads)}
        return labels, [
            (Part(Site("z", layer), head),) for layer in range(dims.n_layers) for head in range(dims.n_heads)
        ]
    if senders == "nodes":
        every = every_node(dims)
        return {"sender": tuple(every)}, [(parse_part(model, name),) for name in every]
    names, sets = parse_sets(model, senders, "sender")
    for name, parts in zip(names, sets, strict=True):
        for member, part in zip(name.split(" + "), parts, strict=True):
            if _node(part) is None:
                raise InputError(f"{member!r} is not a sender; senders are heads ('a9.h9'), MLPs ('m3') and 'input'.")
    return {"sender": names}, sets


def _node(part: Part) -> Node | None:
    layer = part.site.layer or 0
    if part.site.kind == "z" and part.unit is not None:
        return Node("head", layer, part.unit)
    if part.site.kind == "mlp_out":
        return Node("mlp", layer)
    return Node("input") if part.site == Site("resid_pre", 0) else None


def _receivers(model: HookManager, receivers: str | Sequence[str]) -> tuple[Part, ...]:
    """The parts at the readers' sites. Raises InputError for a name that is not an input of a reader."""
    names = [receivers] if isinstance(receivers, str) else list(receivers)
    if not names or len(set(names)) != len(names):
        raise InputError(f"`receivers` names at least one input, each once; got {names}.")
    if "logits" in names:
        if len(names) > 1:
            raise InputError("The logits cannot be combined with other receivers; measure those in a separate call.")
        return (Part(FINAL),)
    found: list[Part] = []
    for name in names:
        part = parse_part(model, name)
        if part.site.kind == "mlp_out":
            model.resolve(Site("mlp_in", part.site.layer))
            part = Part(Site("mlp_in", part.site.layer), None, part.position)
        elif part.site.kind == "resid_post":
            part = entry(model, part)[1]
        if part.site.kind not in ("q", "k", "v", "mlp_in", "resid_pre", "resid_mid") or (
            part.site.kind in "qkv" and part.unit is None
        ):
            raise InputError(
                f"{name!r} is not a receiver; receivers are 'logits', a head's input ('a9.h9<q>', '<k>' or '<v>'), an "
                "MLP ('m7') or the residual stream ('resid_pre.5')."
            )
        found.append(part)
    return tuple(found)


def _sender_masks(pairs: Pairs, sets: Sequence[tuple[Part, ...]], positions: Positions) -> Senders:
    """Every candidate's senders: sender by sender, position by position."""
    nodes = tuple(dict.fromkeys(node for parts in sets for part in parts if (node := _node(part)) is not None))
    chosen = position_sets(pairs, positions).masks
    where = torch.zeros(len(sets), len(chosen), len(nodes), *pairs.mask.shape, dtype=torch.bool, device=pairs.device)
    for i, parts in enumerate(sets):
        for part in parts:
            row = nodes.index(_node(part))  # pyright: ignore[reportArgumentType]
            where[i, :, row] |= chosen if part.position is None else _mask(pairs, part)[None]
    return Senders(nodes, where.flatten(0, 1))
