"""Integrated gradients over the activations of one layer's writers at a time, as scores of edges.

For the heads of a layer (or its MLP, or the input) the path goes from their corrupt to their clean outputs, everything
else as the clean run computes it. The score of an edge from writer w is <clean write less corrupt, mean over the path
of the gradient at the reader's input>; over all readers the scores of a group's edges sum to what patching the whole
group does (completeness), up to the quadrature; not under a post-norm, where heads' writes bend.

Source: Hanna et al. 2024 (arXiv 2403.17806), `EAP-IG-activations` of MIB (Mueller et al. 2025, arXiv 2504.13151).
Deviation: their code adds the gradients of all groups' paths to all edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.edges import check_model, clean_logits, metric_values
from mechinterp.errors import InputError
from mechinterp.gradients import Step, pull_back_heads, pull_back_mlp, resid_site, write_differences
from mechinterp.graph import Graph
from mechinterp.hooks import HookManager, Intervention
from mechinterp.metrics import Metric
from mechinterp.replacement import input_sites, record_writes
from mechinterp.sites import Site
from mechinterp.tasks.pairs import Pairs

END = Site("resid_final")


def activation_path_gradients(
    model: HookManager, graph: Graph, pairs: Pairs, metric: Metric, alphas: Sequence[float]
) -> Float[Tensor, "reader writer"]:
    """Sum over the examples of every edge's score; 0 where there is no edge.

    Cost: two forwards, and per alpha and group a forward and a backward from the group's layer on. Memory: the values
    and gradients of one run, and the writes of all nodes at `d_model`.
    """
    metric.check_answers(pairs)
    check_model(model, graph, pairs)
    if not metric.differentiable:
        raise InputError(
            f"Metric {metric.name!r} has no gradient; score edges by logit_diff, prob_diff or kl_to_clean."
        )
    pairs = pairs.to(model.device)
    dtype = torch.promote_types(model.dtype, torch.float32)
    corrupt = record_writes(model, graph, pairs.corrupt, pairs)
    clean = record_writes(model, graph, pairs.clean, pairs)
    reference = clean_logits(model, pairs) if metric.needs_reference else None
    streams = [Site("resid_pre", layer) for layer in range(model.dims.n_layers)]
    run = model.run(pairs.clean, pairs.mask, record=[*streams, *input_sites(graph)], stop=END)
    writes = write_differences(model, graph, clean, corrupt, slice(None), pairs.clean.shape[1], dtype)
    scores = torch.zeros(graph.possible.shape, dtype=dtype, device=model.device)

    def loss(resid: Tensor) -> Tensor:
        return metric_values(model, pairs, metric, resid, reference)

    for layer, sites, rows in _groups(model, graph):
        ends = {s: (clean.values[str(s)].to(model.dtype), corrupt.values[str(s)].to(model.dtype)) for s in sites}
        readers = _readers_after(model, layer, sites[0])
        start = None if layer is None else (layer, run.values[Site("resid_pre", layer)])
        steps = [_step(model, pairs, loss, ends, readers, start, alpha) for alpha in alphas]
        _contract(model, graph, steps, readers, writes[rows], scores[:, rows])
    return torch.where(graph.possible.to(scores.device), scores / len(alphas), 0.0)


def _groups(model: HookManager, graph: Graph) -> Iterator[tuple[int | None, list[Site], slice]]:
    """(layer, sites, rows of the writers) of every group of writers that is interpolated together."""
    yield None, input_sites(graph), slice(0, graph.n_inputs)
    for layer in range(model.dims.n_layers):
        yield layer, [Site("z", layer)], graph.head_writers(layer)
        if model.dims.has_mlp:
            row = graph.mlp_writer(layer)
            yield layer, [Site("mlp_out", layer)], slice(row, row + 1)


def _readers_after(model: HookManager, layer: int | None, site: Site) -> list[Site]:
    """The sites of the readers that come after the group."""
    dims = model.dims
    found = [Site("mlp_in", layer)] if site.kind == "z" and dims.has_mlp and not dims.parallel else []
    for later in range(0 if layer is None else layer + 1, dims.n_layers):
        found += [Site(channel, later) for channel in "qkv"]
        if dims.has_mlp:
            found.append(Site("mlp_in", later))
    return [*found, END]


def _step(
    model: HookManager,
    pairs: Pairs,
    loss: Callable[[Tensor], Tensor],
    ends: Mapping[Site, tuple[Tensor, Tensor]],
    readers: list[Site],
    start: tuple[int, Tensor] | None,
    alpha: float,
) -> Step:
    edits = [Intervention(site, corrupt + alpha * (clean - corrupt)) for site, (clean, corrupt) in ends.items()]
    record = {s: None for s in readers}
    for site in readers:
        if site.layer is not None:
            record[resid_site(model, site.layer, mlp=site.kind == "mlp_in")] = None
    run = model.run(
        pairs.clean,
        pairs.mask,
        record=list(record),
        interventions=edits,
        grads=readers,
        loss=loss,
        start=start,
        stop=END,
    )
    return Step(_by_site(run.values), _by_site(run.grads))


def _by_site(found: Mapping[Site | str, Tensor]) -> dict[Site, Tensor]:
    return {Site.parse(site) if isinstance(site, str) else site: value for site, value in found.items()}


def _contract(
    model: HookManager,
    graph: Graph,
    steps: list[Step],
    readers: list[Site],
    writes: Float[Tensor, "writer token_and_d_model"],
    scores: Float[Tensor, "reader writer"],
) -> None:
    """Adds the scores of the edges out of one group, in place."""
    every = slice(None)
    for layer in sorted({site.layer for site in readers if site.layer is not None}):
        if Site("q", layer) in readers:
            pulled = pull_back_heads(model, layer, steps, every, writes.dtype, frozen=False).flatten(1)
            first = graph.channel_readers(layer, "q").start
            scores[first : first + len(pulled)] += pulled @ writes.T
        if Site("mlp_in", layer) in readers:
            pulled = pull_back_mlp(model, layer, steps, every, writes.dtype, frozen=False).flatten(1)
            scores[graph.mlp_readers(layer)] += pulled @ writes.T
    gradient = torch.stack([step.gradients[END].to(writes.dtype) for step in steps]).sum(0)
    scores[-1] += writes @ gradient.flatten()


def n_groups(model: HookManager) -> int:
    """How many groups of writers there are."""
    return 1 + model.dims.n_layers * (1 + model.dims.has_mlp)
