"""The exact engine: `run_edges` runs the model with a set of edges cut.

Many masks are run side by side (`edge_logits`), each as one `PatchedRun`. Where the writes of a batch do not fit, some
examples are run at a time, or a window of tokens (`plan_runs`); what runs have in common up to a layer may be run once
(`run_prefix`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.batches import batches, over_batches
from mechinterp.base.errors import InputError
from mechinterp.engines.patched_run import PatchedRun, Prefix
from mechinterp.engines.readout import metric_readout
from mechinterp.engines.replacement import Replacement, Values, corrupt_replacement
from mechinterp.engines.whole_nodes import Cuts, edges_only, whole_nodes
from mechinterp.engines.write_table import (
    PORTS_OF_A_BLOCK,
    TablePlan,
    Unexpanded,
    WriteTable,
    Written,
    plan_table,
    rows_beside,
)
from mechinterp.graphs.families.family import NodeFamily
from mechinterp.graphs.families.write_block import Dense
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.token_positions import places_of
from mechinterp.graphs.write_rows import write_rows
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.modes import Gradients
from mechinterp.tasks.own_metric import MetricLike, as_metric
from mechinterp.tasks.pairs import Pairs

Cut = Bool[Tensor, "*candidate reader writer"] | Float[Tensor, "*candidate reader writer"]
"""True (or 1) where an edge is cut; values between 0 and 1 cut it partly."""


def run_edges(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    cut: Cut,
    *,
    metric: MetricLike = "logit_diff",
    replacement: Replacement | None = None,
    batch_size: int | None = None,
) -> Float[Tensor, "*candidate batch"]:
    """The metric of every example with the edges of each mask cut, exactly, in the units of the metric.

    A cut edge carries the replacement's value: that of the corrupt prompt by default, or a mean or zero. All other
    edges carry what this run computes. The metric's reference is the clean run.

    Cost: one forward of the corrupt prompts, and one patched forward per candidate up to the final residual stream;
    candidates share the layers before the first cut edge. Memory: the writes of one batch, `n_writers * batch * pos *
    d_model` numbers per candidate; neurons without the factor `d_model`. If that is more than 2 GiB, some examples are
    run at a time; if it is for one example, writes are made again for a window of tokens at a time (`plan_runs`).

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
    metric = as_metric(metric)
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
    rows = write_rows(graph)
    graph, masks = rows.graph, rows.masks(masks.to(model.device, wide(model)))
    if _nodes_replaceable(model, graph) and (prefix is None or prefix.cut is None):
        first = 0 if prefix is None else graph.n_writers_at((min(prefix.layer, model.dims.n_layers - 1), 0))
        cuts = whole_nodes(graph, masks, _acts_on(model, graph), first)
    else:
        cuts = edges_only(graph, masks)
    row_bytes = pairs.clean.numel() * model.dims.d_model * max(4, model.dtype.itemsize)
    at_once = 1 if model.edited else WRITES_BUDGET_BYTES // row_bytes  # edits expect the prompts as they are
    for some in _side_by_side(cuts.needed.cpu(), at_once):
        yield from _logits(model, graph, pairs, cuts.rows(some), values, columns, prefix)


def _logits(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    cuts: Cuts,
    values: Values,
    columns: Tensor | None,
    prefix: Prefix | None,
) -> Float[Tensor, "candidate batch n_answer n_columns"]:
    """The logits of candidates that are run side by side: all examples together if their table of writes fits."""
    n, n_tokens = len(cuts.edges), pairs.clean.numel()
    needed = cuts.needed.any(0).cpu()
    together = prefix is not None or model.edited  # edits expect the prompts as they are
    plan = plan_runs(model, graph, pairs.clean.shape, needed=needed, n_candidates=n, together=together)
    window = n_tokens if plan.tokens is None and prefix is not None and prefix.unexpanded else plan.tokens
    found: list[Tensor] = []
    for rows, batch in batches(pairs, plan.examples):
        own = values if len(batch) == len(pairs) else values.rows((rows, slice(None)))
        logits = PatchedRun(model, graph, batch, cuts, own, prefix, window).run(columns)
        found.append(logits.unflatten(0, (n, -1)))
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def plan_runs(
    model: HookManager,
    graph: Graph,
    shape: Sequence[int],
    *,
    needed: Bool[Tensor, " writer"] | None = None,
    n_candidates: int = 1,
    together: bool = False,
) -> TablePlan:
    """How a batch of prompts is run with edges cut: all at once, some examples at a time, or in windows of tokens.

    Args:
        model: The model.
        graph: Its graph.
        shape: Examples and tokens of the batch.
        needed: The writers whose edges are cut; by default all.
        n_candidates: Masks that are run side by side.
        together: Whether the examples must be run together.
    """
    n_examples, n_pos = shape
    in_full = torch.ones(len(graph.writers), dtype=torch.bool) if needed is None else needed.clone()
    for family in graph.families:
        if family.low_rank:
            in_full[graph.writers_of(family)] = False
    rows = int(in_full.sum()) + rows_beside(graph)
    return plan_table(graph, n_candidates * rows, n_examples, n_pos, wide(model).itemsize, together=together)


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


def run_prefix(
    model: HookManager, graph: Graph, pairs: Pairs, values: Values, layer: int, cut: Tensor | None = None
) -> Prefix:
    """The run of a batch up to `layer` (the number of layers: all of it), for `edge_logits`. One forward at most.

    `cut` are the edges that are cut in it, `[reader, writer]`; by default none.
    """
    rows = write_rows(graph)
    graph = rows.graph
    with Gradients(False) as off, off:
        masks = torch.zeros(1, *graph.possible.shape, device=model.device)
        if cut is not None:
            cut = rows.masks(cut.to(masks))
            layer = _before_later_writes(graph, cut, layer)
            n = graph.readers_before[layer]
            masks[0, :n] = cut[:n]
        plan = plan_runs(model, graph, pairs.clean.shape, together=True)
        run = _PrefixRun(model, graph, pairs, edges_only(graph, masks.to(wide(model))), values, window=plan.tokens)
        resid, cuts = run.shared(layer), None if cut is None else run.cuts.edges[0]
        return Prefix(layer, resid, run.written, cuts, {family: dict(now) for family, now in run.noted.items() if now})


def _before_later_writes(graph: Graph, cut: Tensor, layer: int) -> int:
    """The layer, or an earlier one: that of the first features which cut edges change and which write later, too."""
    first = graph.readers_before
    starts = {family.starts for family in graph.families if family.starts < family.layer}
    return min([layer, *(one for one in starts if bool(cut[first[one] : first[one + 1]].any()))])


class _PrefixRun(PatchedRun):
    """A run without cuts, which keeps all writes."""

    def _table(self) -> WriteTable:
        self.written: dict[NodeFamily, Written] = {}
        return super()._table()

    def _needed(self) -> Tensor:
        return torch.ones(len(self.graph.writers), dtype=torch.bool)

    def keep(self, family: NodeFamily, block: Written) -> None:
        super().keep(family, block)
        if not isinstance(block, Unexpanded) and not family.low_rank:
            block = Dense(block.dense().clone())
        self.written[family] = block


def _nodes_replaceable(model: HookManager, graph: Graph) -> bool:
    """Whether a node's write can be replaced where it is written; edits of an `intervene` block might undo it."""
    return not model.edited and all(model.has(family.output) for family in graph.families)


def _acts_on(model: HookManager, graph: Graph) -> Bool[Tensor, "reader writer"]:
    """The writers on whose writes a reader acts: those that it feeds; where one norm is for all heads of a layer, all
    of these."""
    found = graph.feeds.clone()
    for family in graph.families:
        if family.writes_together(model):
            found[graph.readers_of(family), graph.writers_of(family)] = True
    return found


def wide(model: HookManager) -> torch.dtype:
    """The dtype of sums: float32 or better."""
    return torch.promote_types(model.dtype, torch.float32)


def check_model(model: HookManager, graph: Graph, pairs: Pairs) -> None:
    """Return None when the graph and the token ids fit the model. Raises InputError otherwise."""
    if graph.dims != model.dims:
        raise InputError("The graph was built for a model of other dimensions; build it with build_graph(model).")
    for family in graph.families:
        family.check(model)
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
