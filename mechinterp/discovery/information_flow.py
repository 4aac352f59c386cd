"""`information-flow`: how near each write is to the residual stream that a reader gets, in the clean run alone.

Source: Ferrando & Voita 2024 (arXiv 2403.00824), with the benchmark's form of it (Mueller et al. 2025, arXiv
2504.13151, "IFR"; EAP-IG's method `information-flow-routes`) as the default. The importance of a term x of a sum y is
its proximity `max(0, |y|_1 - |y - x|_1)` over the proximities of all terms. Here y is the residual stream at a
reader's input and the terms are the earlier writers' writes.

What it does not see: the corrupt prompt (a write that is the same in both counts in full), the metric and the answer
tokens, the norm and the weights of the reader (so, per reader, q, k and v of all heads of a layer score the same), and
biases, which are part of y but no term. It depends on the basis: processed weights (centred, folded) give other scores
than raw ones. Scores are never negative and say nothing about helping or hurting.

`importance=per-reader` is the mean over an example's tokens, every reader by itself, the logits too. With
`importance=from-answer` importances are multiplied along the way from the logits at the answer positions, so a reader
counts by what its own component matters for the answer. A head passes its importance on to each of q (where it
stands), k and v (at the sources, by the proximity of each attention-weighted value vector to the head's write; where
these cancel so that none is near, nothing is passed on). The paper keeps edges above a threshold on the way down and
has no edges into queries and keys; the products and those edges are ours.

Deviations from EAP-IG: the input is token plus position embedding; under a post-norm a write is the head's share of
the normed sum; where all proximities are 0 the importances are 0 (there NaN).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.settings import Setting
from mechinterp.discovery.method import REPLACEMENT, Job, Method
from mechinterp.engines.edge_attribution import TOKEN_BUDGET_BYTES
from mechinterp.engines.replacement import write_sites
from mechinterp.graphs.families.family import Recorded
from mechinterp.graphs.families.heads import Heads
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.scores import Scores
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

IMPORTANCES = ("per-reader", "from-answer")


def proximities(
    terms: Float[Tensor, "*axes term d_model"], sums: Float[Tensor, "*axes sum d_model"]
) -> Float[Tensor, "*axes sum term"]:
    """max(0, |sum|_1 - |sum - term|_1) of every term and sum; exactly 0 for a term that is 0.

    >>> import torch
    >>> proximities(torch.tensor([[1.0, 0.0], [0.0, -3.0], [9.0, 9.0]]), torch.tensor([[2.0, 4.0]])).tolist()
    [[1.0, 0.0, 0.0]]
    """
    # The zero vector's distance is the norm, summed in the same order as the others.
    with_zero = torch.nn.functional.pad(terms, (0, 0, 0, 1))
    distances = torch.cdist(sums, with_zero, p=1)
    return (distances[..., -1:] - distances[..., :-1]).clamp(min=0)


def shares(near: Float[Tensor, "*axes term"]) -> Float[Tensor, "*axes term"]:
    """Proximities over their sum; 0 where they are all 0."""
    total = near.sum(-1, keepdim=True)
    return torch.where(total > 0, near / torch.where(total > 0, total, 1), 0)


def streams_of(graph: Graph) -> tuple[list[Site], Int[Tensor, " reader"]]:
    """The residual streams that are read, in order, and for every reader which of them it reads."""
    readers = [family for family in graph.families if family.ports]
    sites = list(dict.fromkeys([*(family.stream for family in readers), Site("resid_final")]))
    index = [sites.index(family.stream) for family in readers for ports in family.ports for _ in ports.names]
    return sites, torch.tensor([*index, len(sites) - 1])


Values = Recorded


def stream_importances(model: HookManager, graph: Graph, values: Values) -> Float[Tensor, "batch pos stream writer"]:
    """The importance of every earlier write for every residual stream; `values` hold `write_sites` and the streams.

    Over the writers they add up to 1, or to 0 where every proximity is 0. Memory: one layer's writes at a time.
    """
    sites, reads = streams_of(graph)
    streams = torch.stack([values[site] for site in sites], 2)
    before = torch.zeros(len(sites), len(graph.writers), dtype=torch.bool)
    before[reads] = graph.possible
    near = streams.new_zeros(*streams.shape[:3], len(graph.writers))
    for rows, writes in _writes(model, graph, values):
        first = int(before[:, rows].any(1).int().argmax())
        near[..., first:, rows] = proximities(writes, streams[:, :, first:])
    return shares(torch.where(before.to(near.device), near, 0))


def _writes(
    model: HookManager, graph: Graph, values: Values
) -> Iterator[tuple[slice, Float[Tensor, "batch pos writer d_model"]]]:
    """(rows of the graph's writers, their writes), family by family."""
    for family in graph.families:
        yield graph.writers_of(family), family.writes(model, values).dense().movedim(0, 2)


def source_importances(model: HookManager, layer: int, values: Values) -> Float[Tensor, "batch head query key"]:
    """How much each source position matters for each head's write: shares of the attention-weighted value vectors.

    Cost: head x query x key x d_model; keys after the query are skipped where attention is causal.
    """
    maps = model.layout.attention[layer]
    pattern, v = values[Site("pattern", layer)], values[Site("v", layer)]
    v = v.repeat_interleave(model.dims.n_heads // model.dims.n_kv_heads, 2)
    moved = einsum(v, maps.W_O.to(v.dtype), "batch key head d_head, head d_head d_model -> batch head key d_model")
    moved = maps.post.project(moved)  # the scale of a post-norm is common to all sources
    out = torch.zeros_like(pattern)
    for query in range(pattern.shape[2]):
        n_keys = query + 1 if model.dims.causal else pattern.shape[3]
        terms = pattern[:, :, query, :n_keys, None] * moved[:, :, :n_keys]
        out[:, :, query, :n_keys] = shares(proximities(terms, terms.sum(2, keepdim=True)))[:, :, 0]
    return out


def _information_flow(job: Job) -> Scores:
    """The sum over examples of every edge's importance. Cost: one forward, without the unembedding."""
    importance = str(job.settings["importance"])
    total = job.sum_over_batches(
        lambda chunk: edge_importances(job.model, job.graph, chunk.to(job.model.device), importance=importance)
    )
    return job.scores("information-flow", total, {"forwards": len(job.pairs), "backwards": 0})


def edge_importances(
    model: HookManager, graph: Graph, pairs: Pairs, *, importance: str = "per-reader"
) -> Float[Tensor, "reader writer"]:
    """The sum over the examples of the importance of every edge in the clean run, at least 0; 0 where there is no edge.

    One forward, and the distances of all writes to all later streams: n_streams x writers x tokens x d_model / 2.
    """
    attention = ["pattern", "v"] if importance == "from-answer" else []
    sites = [*write_sites(graph), *streams_of(graph)[0]]
    sites += [Site(name, layer) for layer in range(model.dims.n_layers) for name in attention]
    wanted = list(dict.fromkeys(sites))
    run = model.run(pairs.clean, pairs.mask, record=wanted, stop=Site("resid_final"))
    dtype = torch.promote_types(model.dtype, torch.float32)
    dims, n_pos = model.dims, pairs.clean.shape[1]
    n_streams = len(streams_of(graph)[0])
    each = n_streams * (len(graph.writers) + dims.d_model) + 3 * (dims.n_heads + 1) * dims.d_model
    rows = max(1, TOKEN_BUDGET_BYTES // (each * n_pos * dtype.itemsize))
    out = torch.zeros(graph.possible.shape, dtype=dtype, device=model.device)
    follow = _from_answer if importance == "from-answer" else _per_reader
    for first in range(0, len(pairs), rows):
        chunk = slice(first, first + rows)
        out += follow(model, graph, pairs[chunk], {site: run.values[site][chunk].to(dtype) for site in wanted})
    return torch.where(graph.possible.to(out.device), out, 0)


def _at_real_tokens(model: HookManager, graph: Graph, pairs: Pairs, values: Values) -> Tensor:
    return torch.where(pairs.mask[:, :, None, None], stream_importances(model, graph, values), 0)


def _per_reader(model: HookManager, graph: Graph, pairs: Pairs, values: Values) -> Float[Tensor, "reader writer"]:
    """The mean over each example's tokens."""
    found = _at_real_tokens(model, graph, pairs, values)
    by_stream = (found.sum(1) / pairs.mask.sum(1)[:, None, None]).sum(0)
    return by_stream[streams_of(graph)[1].to(by_stream.device)]


def _from_answer(model: HookManager, graph: Graph, pairs: Pairs, values: Values) -> Float[Tensor, "reader writer"]:
    """Importances times what the reader matters for the answer, from the logits back."""
    found = _at_real_tokens(model, graph, pairs, values)
    reads = streams_of(graph)[1].tolist()
    out = found.new_zeros(graph.possible.shape)
    flow = found.new_zeros(*found.shape[:2], len(graph.writers))  # how much each write matters, so far

    def read(row: int, weight: Float[Tensor, "batch pos"]) -> None:
        given = weight[..., None] * found[:, :, reads[row]]
        out[row] += given.sum((0, 1))
        flow.add_(given)

    valid = pairs.answer_pos >= 0
    answers = found.new_zeros(found.shape[:2])
    answers.scatter_add_(1, pairs.answer_pos.clamp(min=0), (valid / valid.sum(1, keepdim=True)).to(found.dtype))
    read(len(graph.readers) - 1, answers)
    for family in reversed(graph.families):
        own = at_sources = flow[..., graph.writers_of(family)].clone()
        if isinstance(family, Heads):
            sources = source_importances(model, family.layer, values)
            sources = torch.where(pairs.mask[:, None, :, None], sources, 0)
            at_sources = einsum(own, sources, "batch query head, batch head query key -> batch key head")
        for ports, rows in graph.sites_of(family):
            given = at_sources if ports.everywhere else own  # keys and values matter where they stand
            for row, fed in zip(range(rows.start, rows.stop), ports.feeds, strict=True):
                read(row, given[..., fed.start : fed.stop].sum(-1))
    return out


INFORMATION_FLOW = Method(
    "information-flow",
    "Information flow routes: proximity of each write to what a reader reads, in the clean run alone",
    "Ferrando & Voita 2024, arXiv 2403.00824; per reader as in Mueller et al. 2025, arXiv 2504.13151",
    _information_flow,
    {
        "importance": Setting("per-reader", "whether importances are those for the answer", choices=IMPORTANCES),
        "replacement": REPLACEMENT,  # not used here, but recorded: what the circuit will be evaluated with
    },
    additive=True,
)
