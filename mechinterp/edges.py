"""The exact engine: `run_edges` runs the model with a set of edges cut; how, patched_run.py says."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import InputError
from mechinterp.graph import Graph
from mechinterp.hooks import HookManager
from mechinterp.metrics import Metric, get_metric
from mechinterp.patched_run import PatchedRun, Prefix
from mechinterp.places import places_of, take_positions
from mechinterp.replacement import Replacement, Values, corrupt_replacement
from mechinterp.sites import Site
from mechinterp.tasks.pairs import Pairs

Cut = Bool[Tensor, "*candidate reader writer"] | Float[Tensor, "*candidate reader writer"]
"""True (or 1) where an edge is cut; values between 0 and 1 cut it in part."""


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
    """The metric of every example with the edges of each mask cut, exactly.

    `cut` is one mask `[reader, writer]` or several `[candidate, reader, writer]`, which run side by side. A cut edge
    carries the replacement's value: that of the corrupt prompt by default, or a mean or zero (see
    `mechinterp.replacement`). All other edges carry what this run computes. The metric's reference is the clean run.

    Cost: one forward of the corrupt prompts and one patched forward per candidate, up to the final residual stream;
    layers before the first cut edge are not run again when several candidates share them. Memory: the writes of one
    batch, `n_writers * batch * pos * d_model` numbers per candidate.

    Raises InputError for a mask of another graph or with NaN, and for pairs or a graph of another model.
    """
    metric = get_metric(metric) if isinstance(metric, str) else metric
    metric.check_answers(pairs)
    check_model(model, graph, pairs)
    masks = check_cut(graph, cut)
    replacement = replacement or corrupt_replacement(model, graph)
    results: list[Tensor] = []
    for chunk in pairs.to(model.device).chunks(batch_size or len(pairs)):
        reference = clean_logits(model, chunk) if metric.needs_reference else None
        columns = metric.columns(chunk)
        rows: list[Tensor] = []
        for logits in edge_logits(model, graph, chunk, masks, replacement.on(chunk), columns):
            if columns is None:
                rows.append(metric(logits, chunk, reference))
            else:
                rows.append(metric.on_columns(logits, columns, chunk))
        results.append(torch.stack(rows))
    out = torch.cat(results, dim=-1)
    return out if cut.ndim == 3 else out[0]


WRITES_BUDGET_BYTES = 2**29
"""Masks run side by side as long as their writes fit in this many bytes."""


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

    `prefix` (see `run_prefix`) spares the layers before its own, where no edge of any mask may be cut.
    """
    size = len(graph.writers) * pairs.clean.numel() * model.dims.d_model * max(4, model.dtype.itemsize)
    # Edits of an `intervene` block are for the prompts as they are, each once.
    at_once = 1 if model.edited else max(1, min(64, WRITES_BUDGET_BYTES // size))
    for some in masks.split(at_once):
        logits = PatchedRun(model, graph, pairs, some.to(model.device), values, prefix).run(columns)
        yield from logits.unflatten(0, (len(some), len(pairs)))


def clean_logits(model: HookManager, pairs: Pairs) -> Float[Tensor, "batch n_answer d_vocab"]:
    """The clean run's logits at the answer positions."""
    return answer_logits(model, pairs.clean, pairs)


def answer_logits(model: HookManager, tokens: Tensor, pairs: Pairs) -> Float[Tensor, "batch n_answer d_vocab"]:
    """The logits at the answer positions of any prompts shaped like `pairs`."""
    run = model.run(tokens, pairs.mask, record=[Site("resid_final")], stop=Site("resid_final"))
    return model.layout.unembed(take_positions(run.values[Site("resid_final")], pairs.answer_pos))


def metric_values(
    model: HookManager,
    pairs: Pairs,
    metric: Metric,
    resid: Float[Tensor, "batch pos d_model"],
    reference: Float[Tensor, "batch n_answer d_vocab"] | None = None,
) -> Float[Tensor, " batch"]:
    """The metric of every example from its final residual stream, in float32 or better; differentiable in it.

    Only the logits that the metric needs are computed. `reference` are the clean run's, for metrics that compare.
    """
    wide = take_positions(resid, pairs.answer_pos).to(torch.promote_types(resid.dtype, torch.float32))
    columns = metric.columns(pairs)
    logits = model.layout.unembed(wide, columns)
    return metric(logits, pairs, reference) if columns is None else metric.on_columns(logits, columns, pairs)


def check_model(model: HookManager, graph: Graph, pairs: Pairs) -> None:
    """Return None when the graph and the token ids can be this model's. Raises InputError otherwise."""
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
            f"A cut mask is [reader, writer] = {list(graph.possible.shape)}, or several; got {list(cut.shape)}."
        )
    masks = masks.float() if masks.dtype == torch.bool else masks
    if not bool(((masks >= 0) & (masks <= 1)).all()):
        raise InputError("A cut mask holds values from 0 (kept) to 1 (cut); got something else, or NaN.")
    impossible = (masks != 0).any(0).cpu() & ~graph.possible
    if bool(impossible.any()):
        r, w = (int(i) for i in impossible.nonzero()[0])
        raise InputError(f"The cut mask names {graph.edge_name(r, w)}, which is not an edge of the graph.")
    return masks
