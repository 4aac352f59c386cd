"""The exact engine: `run_edges` runs the model with a set of edges cut.

`PatchedRun` is one forward with edges cut, on which everything else that cuts edges is built. A reader without a cut
edge keeps the model's own input. Any other reader gets `resid - sum over cut writers (current write - replacement)`
(see `write_table.py`), and its norm and projection are computed again, per head. If the graph has named positions,
each position has its own sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.batches import over_batches
from mechinterp.base.errors import InputError
from mechinterp.engines.readout import metric_readout
from mechinterp.engines.replacement import Replacement, Values, corrupt_replacement
from mechinterp.engines.whole_nodes import Cuts, edges_only, whole_nodes
from mechinterp.engines.write_table import PORTS_OF_A_BLOCK, WriteTable
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.token_positions import places_of, take_positions
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.modes import Gradients
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import Metric, get_metric
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True)
class Prefix:
    """The run of one batch up to a layer, which later patched runs share."""

    layer: int
    resid: Float[Tensor, "batch pos d_model"]
    differences: Float[Tensor, "earlier_writer 1 batch pos d_model"]
    """Each earlier writer's write minus its replacement."""
    cut: Float[Tensor, "reader writer"] | None = None
    """The cut edges of the readers before the layer; None: there are none."""


def run_prefix(
    model: HookManager, graph: Graph, pairs: Pairs, values: Values, layer: int, cut: Tensor | None = None
) -> Prefix:
    """The run of a batch up to `layer` (the number of layers: all of it), for `edge_logits`. One forward at most.

    `cut` are the edges that are cut in it, `[reader, writer]`; by default none.
    """
    with Gradients(False) as off, off:
        masks = torch.zeros(1, *graph.possible.shape, device=model.device)
        if cut is not None:
            rows = readers_before(graph, layer)
            masks[0, :rows] = cut[:rows].to(masks)
        run = _PrefixRun(model, graph, pairs, edges_only(graph, masks.to(wide(model))), values)
        resid = run.shared(layer)
        before = graph.n_writers_before(layer, mlp=False) if layer < model.dims.n_layers else len(graph.writers)
        writes = run.table.kept(slice(0, before)).unflatten(2, pairs.clean.shape).clone()
        return Prefix(layer, resid, writes, None if cut is None else run.cuts.edges[0])


def readers_before(graph: Graph, layer: int) -> int:
    """How many readers come before a layer."""
    return layer * ((len(graph.readers) - 1) // graph.dims.n_layers)


class PatchedRun:
    """One forward of (candidate x batch) prompts with edges cut; used for that run only."""

    def __init__(
        self,
        model: HookManager,
        graph: Graph,
        pairs: Pairs,
        cuts: Cuts,
        values: Values,
        prefix: Prefix | None = None,
    ) -> None:
        self.model, self.graph, self.pairs, self.values = model, graph, pairs, values
        self.cuts, self.n = cuts, len(cuts.edges)
        self.whole, self.replaced = self._whole(), cuts.nodes.any(0).any(-1).cpu()
        self.table = self._table()
        self.resid: Tensor | None = None
        self.prefix = prefix
        self.seen: dict[str, Tensor] = {}
        self.apart: Tensor | None = None
        self.excess: Tensor | None = None
        """What replaced nodes wrote since the last edit, minus their replacements."""

    def _table(self) -> WriteTable:
        return WriteTable(self.graph, self.cuts.edges, *self._rows())

    def _rows(self) -> tuple[list[Tensor] | None, Tensor, Tensor, tuple[int, int, int]]:
        n_batch, n_pos = self.pairs.clean.shape
        shape = (n_batch, n_pos, self.model.dims.d_model)
        return places_of(self.graph, self.pairs), self._read_together(), self._needed(), shape

    def _needed(self) -> Bool[Tensor, " writer"]:
        """The writers that some reader does not see as they are."""
        return self.cuts.needed.any(0).cpu()

    def _whole(self) -> Bool[Tensor, "candidate port"]:
        """Which readers have no cut edge at any position."""
        n, uncut = self.graph.n_positions, (self.cuts.edges == 0).all(-1).cpu()
        return torch.cat([uncut[:, :-1].unflatten(1, (-1, n)).all(-1), uncut[:, -1:]], 1)

    def _read_together(self) -> Bool[Tensor, " port"]:
        """Which ports are read: from the first to the last of a layer's channels with a cut edge."""
        read = torch.zeros(self.whole.shape[1], dtype=torch.bool)
        for layer in range(self.model.dims.n_layers):
            if channels := self._channels(layer):
                read[self._between(layer, channels)] = True
            if self.model.dims.has_mlp and self._cut(mlp := self._mlp_port(layer)):
                read[mlp] = True
        read[-1] = self._cut(slice(-1, None))
        return read

    def _cut(self, ports: slice) -> bool:
        """Whether any candidate cuts an edge into one of the ports."""
        return not bool(self.whole[:, ports].all())

    def _ports(self, layer: int, channel: str) -> slice:
        readers, n = self.graph.channel_readers(layer, channel), self.graph.n_positions
        return slice(readers.start // n, readers.stop // n)

    def _mlp_port(self, layer: int) -> slice:
        first = self.graph.mlp_readers(layer).start // self.graph.n_positions
        return slice(first, first + 1)

    def _channels(self, layer: int) -> str:
        """The channels of a layer with a cut edge."""
        return "".join(channel for channel in "qkv" if self._cut(self._ports(layer, channel)))

    def _between(self, layer: int, channels: str) -> slice:
        return slice(self._ports(layer, channels[0]).start, self._ports(layer, channels[-1]).stop)

    def run(self, columns: Tensor | None) -> Float[Tensor, "rows n_answer n_columns"]:
        """Logits at the answer positions; the rows are candidate by candidate."""
        with Gradients(False) as off, off:
            seen = self.read_logits(self._final_resid())
            at = repeat(self.pairs.answer_pos, "batch n_answer -> (candidate batch) n_answer", candidate=self.n)
            return self.model.layout.unembed(take_positions(seen, at), columns)

    def _final_resid(self) -> Float[Tensor, "candidate batch pos d_model"]:
        """The final residual stream, the layers before the first cut edge run once for all candidates."""
        first, last = self._first_cut_layer(), Site("resid_final")
        n_layers = self.model.dims.n_layers
        tokens, mask, start = self.pairs.clean, self.pairs.mask, None
        if self.prefix is not None and self._begins_as(self.prefix, first):
            first, before = self.prefix.layer, self.prefix.differences
            self.table.keep(slice(0, len(before)), before.expand(-1, self.n, *before.shape[2:]))
            shared = self.prefix.resid
        else:
            shared = self.shared(first) if first > 0 else None
        if first == n_layers:
            assert shared is not None
            return self.fold(shared)
        if shared is not None and first > 0:
            start = (first, self._repeated(shared))
        plan = self.plan(range(first, n_layers))
        run = self.model.run(
            self._repeated(tokens),
            self._repeated(mask),
            interventions=plan,
            record=[last],
            start=start,
            stop=last,
        )
        return self.fold(run.values[last])

    def _begins_as(self, prefix: Prefix, first: int) -> bool:
        """Whether all candidates cut the edges of the prefix, and no others before its layer; `first` is the first
        layer with a cut edge."""
        if prefix.cut is None:
            return prefix.layer <= first
        rows = readers_before(self.graph, prefix.layer)
        return bool((self.cuts.edges[:, :rows] == prefix.cut[:rows]).all())

    def shared(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before a layer, run once for all candidates; the writes until then are kept."""
        stop = Site("resid_pre", layer) if layer < self.model.dims.n_layers else Site("resid_final")
        plan = self.plan(range(layer))
        return self.model.run(self.pairs.clean, self.pairs.mask, interventions=plan, record=[stop], stop=stop).values[
            stop
        ]

    def _repeated(self, value: Tensor) -> Tensor:
        return value.repeat(self.n, *[1] * (value.ndim - 1))

    def _first_cut_layer(self) -> int:
        """The layer where the first edge is cut or the first node replaced; the number of layers if there is none."""
        per_layer = (self.whole.shape[1] - 1) // self.model.dims.n_layers
        cut = (~self.whole.all(0)).nonzero()
        first = int(cut[0]) // per_layer if len(cut) else self.model.dims.n_layers
        replaced = self.replaced.nonzero()
        return min([first, *(self.graph.layer_of(w) for w in replaced[:1, 0].tolist())])

    def plan(self, layers: range) -> list[Intervention]:
        graph, dims = self.graph, self.model.dims
        plan: list[Intervention] = []
        if graph.split_input and 0 in layers:
            taps = [(Site(name), self._input_tap(i, name)) for i, name in enumerate(graph.inputs)]
            plan += [Intervention(site, tap) for site, tap in taps]
        for layer in layers:
            channels = self._channels(layer)
            plan.append(Intervention(Site("resid_pre", layer), self._resid_tap(layer, channels)))
            plan += [Intervention(Site(c, layer), self._head_edit(layer, c)) for c in channels]
            if self._used(graph.head_writers(layer)):
                plan.append(Intervention(Site("z", layer), self._z_tap(layer)))
            if self._replaced(graph.head_writers(layer)):
                plan.append(Intervention(Site("attn_out", layer), self._replace))
            if dims.has_mlp:
                if not dims.parallel:
                    plan.append(Intervention(Site("resid_mid", layer), self._keep_resid))
                if self._cut(self._mlp_port(layer)):
                    plan.append(Intervention(Site("mlp_in", layer), self._mlp_edit(layer)))
                if graph.neurons_of(layer):
                    plan.append(Intervention(Site("mlp_post", layer), self._neuron_tap(layer)))
                mlp = slice(graph.mlp_writer(layer), graph.neuron_writers(layer).stop)
                if self._used(mlp):
                    plan.append(Intervention(Site("mlp_out", layer), self._mlp_tap(layer)))
                if self._replaced(mlp):
                    plan.append(Intervention(Site("mlp_out", layer), self._replace))
        return plan

    def fold(self, value: Tensor) -> Tensor:
        """`[candidate, batch, ...]`; a run shared by all candidates is expanded along the candidate axis."""
        shared = value.shape[0] == len(self.pairs)
        return value[None].expand(self.n, *value.shape) if shared else value.unflatten(0, (self.n, len(self.pairs)))

    def _keep_resid(self, value: Tensor) -> Tensor:
        self.resid = value
        return value

    def _used(self, writers: slice) -> bool:
        """Whether any of the writers is kept or replaced."""
        return bool(self.table.needed[writers].any()) or self._replaced(writers)

    def _replaced(self, writers: slice) -> bool:
        return bool(self.replaced[writers].any())

    def _input_tap(self, index: int, name: str):
        writers = slice(index, index + 1)

        def tap(value: Tensor) -> Tensor:
            self.keep(writers, (self.fold(value) - self.values.inputs(name))[None])
            return self._replace(value) if self._replaced(writers) else value

        return tap

    def _resid_tap(self, layer: int, channels: str):
        def tap(value: Tensor) -> Tensor:
            if layer == 0 and not self.graph.split_input and self._used(slice(0, 1)):
                value = self._input_tap(0, "input")(value)
            if channels:  # q, k and v together, so that their sums share one pass over the writes
                self.seen = self.read_heads(layer, channels, self.fold(value))
            return self._keep_resid(value)

        return tap

    def _z_tap(self, layer: int):
        def tap(value: Tensor) -> Tensor:
            z = self.fold(value).to(self.table.rows.dtype)
            self.keep(self.graph.head_writers(layer), self.values.head_differences(layer, z))
            return value

        return tap

    def _neuron_tap(self, layer: int):
        chosen = torch.tensor(self.graph.neurons_of(layer), device=self.model.device)

        def tap(value: Tensor) -> Tensor:
            post = self.fold(value).to(self.table.rows.dtype)
            self.apart = self.values.neuron_differences(layer, post, chosen)
            self.keep(self.graph.neuron_writers(layer), self.apart)
            return value

        return tap

    def _mlp_tap(self, layer: int):
        row = self.graph.mlp_writer(layer)

        def tap(value: Tensor) -> Tensor:
            difference = self.fold(value) - self.values.mlp(layer)
            if self.graph.neurons_of(layer):
                assert self.apart is not None
                difference = difference - self.apart.sum(0)
            self.keep(slice(row, row + 1), difference[None])
            return value

        return tap

    def keep(self, writers: slice, differences: Float[Tensor, "writer candidate batch pos d_model"]) -> None:
        """Stores writers' current writes minus their replacements, where a reader needs them."""
        self.table.keep(writers, differences)
        if self._replaced(writers):
            at = self._where_replaced(writers).to(differences.device)
            total = torch.where(at, differences, 0).sum(0)
            self.excess = total if self.excess is None else self.excess + total

    def _where_replaced(self, writers: slice) -> Bool[Tensor, "writer candidate batch pos 1"]:
        nodes = self.cuts.nodes[:, writers].transpose(0, 1)  # [writer, candidate, position]
        if self.table.tokens is None:
            return nodes[..., None, None]
        place = torch.empty(self.pairs.clean.numel(), dtype=torch.long, device=nodes.device)
        for i, tokens in enumerate(self.table.tokens):
            place[tokens] = i
        return nodes[..., place].unflatten(2, self.pairs.clean.shape)[..., None]

    def _replace(self, value: Tensor) -> Tensor:
        """The value with the replacements of the nodes that wrote it last, where these are replaced."""
        assert self.excess is not None
        excess, self.excess = self.excess, None
        return (self.fold(value) - excess).flatten(0, 1).to(value.dtype)

    def read_heads(
        self, layer: int, channels: str, resid: Float[Tensor, "candidate batch pos d_model"]
    ) -> dict[str, Float[Tensor, "rows pos head d_head"]]:
        """q, k or v of every head, from what it reads of the residual stream."""
        together = self._between(layer, channels)
        seen = self.table.seen(together, self.graph.n_writers_before(layer, mlp=False), resid).flatten(1, 2)
        found: dict[str, Tensor] = {}
        for channel in channels:
            ports = self._ports(layer, channel)
            mine = seen[ports.start - together.start : ports.stop - together.start]
            found[channel] = self.by_token(self.model.layout.read_heads(layer, channel, mine))
        return found

    def by_token(self, read: Float[Tensor, "head token d_head"]) -> Float[Tensor, "rows pos head d_head"]:
        """What heads read, in the order of the model's own values."""
        return read.unflatten(1, (-1, self.pairs.clean.shape[1])).permute(1, 2, 0, 3)

    def read_one(
        self, ports: slice, n_writers: int, resid: Float[Tensor, "candidate batch pos d_model"]
    ) -> Float[Tensor, "rows pos d_model"]:
        """What one port reads of the residual stream."""
        return self.table.seen(ports, n_writers, resid)[0].view(-1, *resid.shape[2:])

    def read_logits(self, resid: Float[Tensor, "candidate batch pos d_model"]) -> Float[Tensor, "rows pos d_model"]:
        """What the logits read of the final residual stream."""
        if not self._cut(slice(-1, None)):
            return resid.flatten(0, 1).to(self.table.rows.dtype)
        n_ports = self.whole.shape[1]
        return self.read_one(slice(n_ports - 1, n_ports), len(self.graph.writers), resid)

    def _unless_whole(self, ports: slice, own: Tensor, new: Tensor) -> Tensor:
        """The new value; the model's own, to the last bit, for a reader without a cut edge."""
        whole = self.whole[:, ports]
        if not bool(whole.any()):
            return new
        rows = whole.repeat_interleave(len(self.pairs), 0).to(own.device)
        return torch.where(rows[:, None, :, None] if own.ndim == 4 else rows[:, :, None], own, new)

    def _head_edit(self, layer: int, channel: str):
        ports = self._ports(layer, channel)

        def edit(value: Tensor) -> Tensor:
            return self._unless_whole(ports, value, self.seen[channel].to(value.dtype))

        return edit

    def _mlp_edit(self, layer: int):
        port, before = self._mlp_port(layer), self.graph.n_writers_before(layer, mlp=True)

        def edit(value: Tensor) -> Tensor:
            assert self.resid is not None
            seen = self.read_one(port, before, self.fold(self.resid))
            return self._unless_whole(port, value, self.model.layout.read_mlp(layer, seen).to(value.dtype))

        return edit


class _PrefixRun(PatchedRun):
    """A run without cuts, which keeps all writes."""

    def _needed(self) -> Tensor:
        return torch.ones(len(self.graph.writers), dtype=torch.bool)


Cut = Bool[Tensor, "*candidate reader writer"] | Float[Tensor, "*candidate reader writer"]
"""True (or 1) where an edge is cut; values between 0 and 1 cut it partly."""


def run_edges(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    cut: Cut,
    *,
    metric: Metric | str = "logit_diff",
    replacement: Replacement | None = None,
    batch_size: int | None = None,
) -> Float[Tensor, "*candidate batch"]:
    """The metric of every example with the edges of each mask cut, exactly, in the units of the metric.

    A cut edge carries the replacement's value: that of the corrupt prompt by default, or a mean or zero. All other
    edges carry what this run computes. The metric's reference is the clean run.

    Cost: one forward of the corrupt prompts, and one patched forward per candidate up to the final residual stream;
    candidates share the layers before the first cut edge. Memory: the writes of one batch, `n_writers * batch * pos *
    d_model` numbers per candidate.

    Args:
        model: The model.
        graph: Its graph, from `build_graph`, which names the rows and columns of the masks.
        pairs: The examples.
        cut: One mask `[reader, writer]`, or several `[candidate, reader, writer]`: True (1) where an edge is cut.
        metric: The metric or its name.
        replacement: What cut edges carry (see `mechinterp.engines.replacement`); by default the corrupt run's writes.
        batch_size: Examples per batch; by default all at once. It does not change the result.

    Raises InputError for a mask of another graph or with NaN, and for pairs or a graph of another model.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> graph, pairs = mi.build_graph(model), mi.load_task("ioi").pairs(model, n=2)
    >>> tuple(mi.run_edges(model, graph, pairs, graph.possible).shape)
    (2,)
    """
    metric = get_metric(metric) if isinstance(metric, str) else metric
    metric.check_answers(pairs)
    check_model(model, graph, pairs)
    masks = check_cut(graph, cut)
    replacement = replacement or corrupt_replacement(model, graph)

    def patched(batch: Pairs, _: slice) -> dict[str, Tensor]:
        readout = metric_readout(model, batch, metric)
        runs = edge_logits(model, graph, batch, masks, replacement.on(batch), readout.columns)
        return {"values": torch.stack([readout.of_logits(logits) for logits in runs])}

    out = over_batches(pairs.to(model.device), batch_size, patched, {"values": -1})["values"]
    return out if cut.ndim == 3 else out[0]


WRITES_BUDGET_BYTES = 2**29
"""As many masks run side by side as have writes that fit in this many bytes, and at most 64."""


def edge_logits(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    masks: Float[Tensor, "candidate reader writer"],
    values: Values,
    columns: Int[Tensor, " n_columns"] | None = None,
    prefix: Prefix | None = None,
) -> Iterator[Float[Tensor, "batch n_answer n_columns"]]:
    """For each mask, the logits at the answer positions of one batch (of all tokens, or of `columns` only).

    With a `prefix` (see `run_prefix`) the layers before it are not run, if every mask cuts the same edges there.
    """
    masks = masks.to(model.device, wide(model))
    if _nodes_replaceable(model) and (prefix is None or prefix.cut is None):
        first = 0 if prefix is None else graph.n_writers_before(min(prefix.layer, model.dims.n_layers - 1), mlp=False)
        cuts = whole_nodes(graph, masks, _acts_on(model, graph), first)
    else:
        cuts = edges_only(graph, masks)
    row_bytes = pairs.clean.numel() * model.dims.d_model * max(4, model.dtype.itemsize)
    at_once = 1 if model.edited else WRITES_BUDGET_BYTES // row_bytes  # edits expect the prompts as they are
    for some in _side_by_side(cuts.needed.cpu(), at_once):
        logits = PatchedRun(model, graph, pairs, cuts.rows(some), values, prefix).run(columns)
        yield from logits.unflatten(0, (-1, len(pairs)))


def _side_by_side(needed: Bool[Tensor, "candidate writer"], most_rows: int) -> Iterator[slice]:
    """Neighbours that need about the same writers, of which no more than `most_rows` are kept in all."""
    first, union = 0, needed[0]
    own = (needed.sum(1) + PORTS_OF_A_BLOCK).tolist()  # the sums of a block take as much memory as writes do
    for stop in range(1, len(needed) + 1):
        if stop < len(needed):
            union = union | needed[stop]
            rows, n = int(union.sum()) + PORTS_OF_A_BLOCK, stop + 1 - first
            if n <= 64 and n * rows <= most_rows and rows <= 1.5 * min(own[first : stop + 1]):
                continue
            union = needed[stop]
        yield slice(first, stop)
        first = stop


def _nodes_replaceable(model: HookManager) -> bool:
    """Whether a node's write can be replaced where it is written; edits of an `intervene` block might undo it."""
    return not model.edited and all(model.has(Site("attn_out", layer)) for layer in range(model.dims.n_layers))


def _acts_on(model: HookManager, graph: Graph) -> Bool[Tensor, "reader writer"]:
    """The writers on whose writes a reader acts: those that it feeds; under a post-norm, which is one for all heads of
    a layer, all of these."""
    found = graph.feeds.clone()
    for layer, maps in enumerate(model.layout.attention):
        if maps.post.kind != "none":
            readers = slice(graph.channel_readers(layer, "q").start, graph.channel_readers(layer, "v").stop)
            found[readers, graph.head_writers(layer)] = True
    return found


def wide(model: HookManager) -> torch.dtype:
    """The dtype of sums: float32 or better."""
    return torch.promote_types(model.dtype, torch.float32)


def check_model(model: HookManager, graph: Graph, pairs: Pairs) -> None:
    """Return None when the graph and the token ids fit the model. Raises InputError otherwise."""
    if graph.dims != model.dims:
        raise InputError("The graph was built for a model of other dimensions; build it with build_graph(model).")
    for layer in range(graph.dims.n_layers):
        own = graph.neurons_of(layer)
        if own and max(own) >= (d_mlp := model.layout.neurons(layer).W_out.shape[0]):
            raise InputError(f"The graph has neuron m{layer}.n{max(own)}; that layer has neurons 0 to {d_mlp - 1}.")
    places_of(graph, pairs)
    pairs.check_vocabulary(model.dims.d_vocab, model.dims.d_vocab_out)


def check_cut(graph: Graph, cut: Tensor) -> Float[Tensor, "candidate reader writer"]:
    """The masks as floats with a candidate axis. Raises InputError for a wrong shape, NaN or an impossible edge."""
    masks = cut if cut.ndim == 3 else cut[None]
    if masks.ndim != 3 or tuple(masks.shape[1:]) != tuple(graph.possible.shape) or not len(masks):
        raise InputError(
            f"`cut` must be a mask [reader, writer] = {list(graph.possible.shape)}, or several; got {list(cut.shape)}."
        )
    masks = masks.float() if masks.dtype == torch.bool else masks
    if not bool(((masks >= 0) & (masks <= 1)).all()):
        raise InputError("`cut` must hold values from 0 (kept) to 1 (cut); got other values or NaN.")
    impossible = (masks != 0).any(0).cpu() & ~graph.possible
    if bool(impossible.any()):
        r, w = (int(i) for i in impossible.nonzero()[0])
        raise InputError(f"`cut` selects {graph.edge_name(r, w)}, which is not an edge of the graph.")
    return masks
