"""The first-order engine: `edge_gradients` estimates the effect of every edge from gradients.

For an edge from writer w to reader r the estimate is `<write of w in the clean run - its replacement, gradient of
the metric at r's residual input>`: the derivative of `run_edges` in the direction of cutting the edge (source:
edge attribution patching, Syed et al. 2023, arXiv 2310.10348; with integrated gradients over the inputs, Hanna et
al. 2024, arXiv 2403.17806). Nothing is frozen: gradients go through the norm before each reader.

Speed: forwards and backwards of the plain model; gradients are kept at q, k, v and the MLP input, `[batch, pos, head,
d_head]`, and pulled back to the residual stream one layer at a time. With u the standardized residual, s its scale
and W the weights of the norm and the projection, the pulled-back gradient of a head is
`W' g / s - u <u, W' g> / (d_model s)`, and `<u, W' g> = <q - constant, g>` is available as a scalar per head and token.
So a layer needs one batched product and one pass for the second term; a block of layers needs one product with all
writes, which are read from memory once for each block.

`activation_path_gradients` integrates gradients over the activations of one layer's writers at a time. For the heads of
a layer (or its MLP, or the input) the path goes from their corrupt to their clean outputs; everything else is computed
as in the clean run. The score of an edge from writer w is <clean write - corrupt write, mean over the path of the
gradient at the reader's input>. Over all readers, the scores of a group's edges sum to the effect of patching the whole
group (completeness), up to the quadrature error; except under a post-norm, where heads' writes are not linear in z.
Source: Hanna et al. 2024 (arXiv 2403.17806), `EAP-IG-activations` of MIB (Mueller et al. 2025, arXiv 2504.13151).
Deviation: their code adds the gradients of all groups' paths to all edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.engines.edge_patching import check_model
from mechinterp.engines.readout import FINAL, Readout, metric_readout
from mechinterp.engines.replacement import CompactWrites, Replacement, Values, input_sites, record_writes, write_sites
from mechinterp.engines.write_table import PORTS_OF_A_BLOCK
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.token_positions import places_of
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.pairs import Pairs

TOKEN_BUDGET_BYTES = 2**28
"""Writes and readers' gradients are expanded to d_model for as many tokens at a time as fit in this many bytes."""


@dataclass(frozen=True)
class Backward:
    """A modified backward pass: rules as edits of gradients, and constant scales of all norms."""

    edits: Callable[[], list[Intervention]]
    """Makes the edits for one run."""
    loss: Callable[[Readout], Callable[[Tensor], Tensor]]
    """The metric of every example as a function of the final residual stream, with the rules in its backward."""


@dataclass(frozen=True)
class Step:
    """One forward and backward: values and gradients at the readers' inputs, all tokens flattened."""

    values: dict[Site, Tensor]
    gradients: dict[Site, Tensor]


def edge_gradients(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    metric: Metric,
    *,
    replacement: Replacement | None = None,
    alphas: Sequence[float] = (1.0,),
    points: Sequence[Mapping[Site, Tensor]] | None = None,
    backward: Backward | None = None,
) -> Float[Tensor, "reader writer"]:
    """Sum over the examples of the estimated drop of the metric when each edge is cut; 0 where there is no edge.

    The sign is that of clean minus patched, in the units of the metric; sums are in float32 or better. Cost: a forward
    of the corrupt prompts, a forward and a backward per alpha or point, a forward of the clean prompts if 1 is not
    among the alphas, and one contraction.

    Args:
        model: The model.
        graph: Its graph, from `build_graph`.
        pairs: The examples, in one batch.
        metric: A differentiable metric.
        replacement: What a cut edge carries; by default the corrupt run's writes.
        alphas: Gradients are averaged over runs on the inputs `corrupt + alpha * (clean - corrupt)`; by default only
            the clean run.
        points: Instead of `alphas`, the values of the input sites of each run whose gradients are averaged.
        backward: A modified backward pass, whose rules replace the gradient.

    Raises InputError for a metric without a gradient, and for pairs or a graph of another model.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> graph, pairs = mi.build_graph(model), mi.load_task("ioi").pairs(model, n=2)
    >>> scores = mi.edge_gradients(model, graph, pairs, mi.get_metric("logit_diff"))
    >>> scores.shape == graph.possible.shape
    True
    """
    metric.check_answers(pairs)
    check_model(model, graph, pairs)
    if not metric.differentiable:
        raise InputError(
            f"Metric {metric.name!r} has no gradient; score edges by logit_diff, prob_diff or kl_to_clean."
        )
    pairs = pairs.to(model.device)
    corrupt = record_writes(model, graph, pairs.corrupt, pairs)
    values: Values = corrupt if replacement is None or replacement.kind == "corrupt" else replacement.on(pairs)
    readout = metric_readout(model, pairs, metric)
    inputs = _on_the_line(model, graph, pairs, corrupt, alphas) if points is None else points
    clean = None if None in inputs else record_writes(model, graph, pairs.clean, pairs)
    steps: list[Step] = []
    for point in inputs:
        step = _step(model, graph, readout, point, backward)
        if point is None:
            clean = _clean_writes(model, graph, step)
        steps.append(_readers_only(step))
    assert clean is not None
    return _contract(model, graph, pairs, steps, clean, values, frozen=backward is not None) / len(steps)


def _on_the_line(
    model: HookManager, graph: Graph, pairs: Pairs, corrupt: CompactWrites, alphas: Sequence[float]
) -> list[dict[Site, Tensor] | None]:
    """The values of the input sites at each alpha; None for the clean run."""
    if all(alpha == 1.0 for alpha in alphas):
        return [None for _ in alphas]
    ends = _input_ends(model, graph, pairs, corrupt)
    return [
        None if alpha == 1.0 else {site: other + alpha * (own - other) for site, (own, other) in ends.items()}
        for alpha in alphas
    ]


def _input_ends(
    model: HookManager, graph: Graph, pairs: Pairs, corrupt: CompactWrites
) -> dict[Site, tuple[Tensor, Tensor]]:
    """The clean and the corrupt value of every input site."""
    sites = input_sites(graph)
    run = model.run(pairs.clean, pairs.mask, record=sites, stop=sites[-1])
    return {site: (run.values[site], corrupt.values[str(site)].to(model.dtype)) for site in sites}


def _reader_sites(model: HookManager) -> list[Site]:
    sites = [Site(channel, layer) for layer in range(model.dims.n_layers) for channel in "qkv"]
    if model.dims.has_mlp:
        sites += [Site("mlp_in", layer) for layer in range(model.dims.n_layers)]
    return [*sites, FINAL]


def resid_site(model: HookManager, layer: int, *, mlp: bool) -> Site:
    return Site("resid_mid" if mlp and not model.dims.parallel else "resid_pre", layer)


def _step(
    model: HookManager,
    graph: Graph,
    readout: Readout,
    point: Mapping[Site, Tensor] | None,
    backward: Backward | None,
) -> Step:
    dims, pairs = model.dims, readout.pairs
    edits = [] if backward is None else backward.edits()
    if point is not None:
        edits += [Intervention(site, value) for site, value in point.items()]
    grads = _reader_sites(model)
    record = {site: None for site in [*write_sites(model, graph), *grads]}
    for layer in range(dims.n_layers):
        record[resid_site(model, layer, mlp=False)] = None
        if dims.has_mlp:
            record[resid_site(model, layer, mlp=True)] = None
    run = model.run(
        pairs.clean,
        pairs.mask,
        record=list(record),
        interventions=edits,
        grads=grads,
        loss=readout.of_resid if backward is None else backward.loss(readout),
        stop=FINAL,
    )
    return Step(_by_site(run.values), _by_site(run.grads))


def _by_site(found: Mapping[Site | str, Tensor]) -> dict[Site, Tensor]:
    return {Site.parse(site) if isinstance(site, str) else site: value for site, value in found.items()}


def _clean_writes(model: HookManager, graph: Graph, step: Step) -> CompactWrites:
    dtype = torch.promote_types(model.dtype, torch.float32)
    kept = {str(site): step.values[site].to(dtype) for site in write_sites(model, graph)}
    return CompactWrites(model, kept, graph.split_input)


def _readers_only(step: Step) -> Step:
    """The step without the values that only writers need."""
    kept = {s: v for s, v in step.values.items() if s.kind in ("q", "k", "v", "resid_pre", "resid_mid", "resid_final")}
    return Step(kept, step.gradients)


def _contract(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    steps: list[Step],
    clean: CompactWrites,
    values: Values,
    *,
    frozen: bool,
) -> Float[Tensor, "reader writer"]:
    """Differences of writes times readers' gradients, summed over tokens, a chunk of tokens at a time."""
    dims = model.dims
    dtype = torch.promote_types(model.dtype, torch.float32)
    scores = torch.zeros(graph.possible.shape, dtype=dtype, device=model.device)
    n_rows = len(graph.writers) + max(_ports(model), PORTS_OF_A_BLOCK)
    budget = max(1, TOKEN_BUDGET_BYTES // (n_rows * dims.d_model * dtype.itemsize))
    n_pos = pairs.clean.shape[1]
    rows = max(1, budget // n_pos)
    for first in range(0, len(pairs), rows):
        chunk = slice(first, first + rows)
        writes = write_differences(model, graph, clean, values, chunk, n_pos, dtype)
        places = places_of(graph, pairs[chunk])
        for layers in _blocks(model):
            _score_layers(model, graph, layers, steps, chunk, writes, scores, places, frozen=frozen)
        gradient = sum(step.gradients[FINAL][chunk].to(dtype) for step in steps)
        assert isinstance(gradient, Tensor)
        scores[-1] += writes @ gradient.flatten()
    return torch.where(graph.possible.to(scores.device), scores, 0.0)


def write_differences(
    model: HookManager,
    graph: Graph,
    clean: CompactWrites,
    values: Values,
    chunk: slice,
    n_pos: int,
    dtype: torch.dtype,
) -> Float[Tensor, "writer token_and_d_model"]:
    """Every writer's clean write minus its replacement."""
    dims = model.dims
    n_rows = len(clean.z(0)[chunk])
    out = torch.empty(len(graph.writers), n_rows, n_pos, dims.d_model, dtype=dtype, device=model.device)
    kept, replaced = clean.rows(chunk), values.rows(chunk)
    for row, name in enumerate(graph.inputs):
        torch.sub(kept.inputs(name), replaced.inputs(name), out=out[row])
    for layer in range(dims.n_layers):
        out[graph.head_writers(layer)] = replaced.head_differences(layer, kept.z(layer))
        if dims.has_mlp:
            torch.sub(kept.mlp(layer), replaced.mlp(layer), out=out[graph.mlp_writer(layer)])
        if own := graph.neurons_of(layer):
            post, neurons = kept.values[f"mlp_post.{layer}"], graph.neuron_writers(layer)
            out[neurons] = replaced.neuron_differences(layer, post, torch.tensor(own, device=model.device))
            out[graph.mlp_writer(layer)] -= out[neurons].sum(0)
    return out.flatten(1)


def _ports(model: HookManager) -> int:
    """How many readers a layer has, positions not told apart."""
    dims = model.dims
    return dims.n_heads + 2 * dims.n_kv_heads + dims.has_mlp


def _blocks(model: HookManager) -> Iterator[range]:
    """The layers, a few at a time."""
    size, n_layers = max(1, round(PORTS_OF_A_BLOCK / _ports(model))), model.dims.n_layers
    return (range(first, min(first + size, n_layers)) for first in range(0, n_layers, size))


def _score_layers(
    model: HookManager,
    graph: Graph,
    layers: range,
    steps: list[Step],
    chunk: slice,
    writes: Tensor,
    scores: Tensor,
    places: list[Tensor] | None,
    *,
    frozen: bool,
) -> None:
    """Adds the scores of every edge into some layers, and numbers without a meaning where there is no edge."""
    dims, ports = model.dims, _ports(model)
    n_writers = graph.n_writers_before(layers[-1], mlp=dims.has_mlp)
    first = graph.channel_readers(layers[0], "q").start
    n_heads = ports - dims.has_mlp
    gradients = writes.new_empty(ports * len(layers), writes.shape[1] // dims.d_model, dims.d_model)
    for layer, own in zip(layers, gradients.split(ports), strict=True):
        pull_back_heads(model, layer, steps, chunk, own[:n_heads], frozen=frozen)
        if dims.has_mlp:
            own[n_heads] = pull_back_mlp(model, layer, steps, chunk, writes.dtype, frozen=frozen)[0]
    if places is None:
        scores[first : first + len(gradients), :n_writers] += gradients.flatten(1) @ writes[:n_writers].T
        return
    by_token = writes[:n_writers].unflatten(1, (-1, dims.d_model))
    for i, tokens in enumerate(places):  # the rows of a reader are its positions
        rows = slice(first + i, first + len(gradients) * len(places), len(places))
        scores[rows, :n_writers] += gradients[:, tokens].flatten(1) @ by_token[:, tokens].flatten(1).T


def pull_back_heads(
    model: HookManager,
    layer: int,
    steps: list[Step],
    chunk: slice,
    out: Float[Tensor, "reader tokens d_model"],
    *,
    frozen: bool,
) -> None:
    """Writes to `out` the gradient at the residual input of every q, k and v of a layer, summed over the steps."""
    maps = model.layout.attention[layer]
    norm = maps.norm
    dtype = out.dtype
    resids = [step.values[resid_site(model, layer, mlp=False)][chunk].to(dtype).flatten(0, 1) for step in steps]
    scales = [norm.scale(resid) for resid in resids]
    first = 0
    projections: list[list[Tensor]] = [[] for _ in steps]
    for channel in "qkv":
        weight, constant = model.layout.folded(layer, channel, dtype)
        total: Tensor | None = None
        for i, (step, scale) in enumerate(zip(steps, scales, strict=True)):
            site = Site(channel, layer)
            gradient = rearrange(step.gradients[site][chunk].to(dtype), "b p h d -> h (b p) d") / scale
            value = rearrange(step.values[site][chunk].to(dtype), "b p h d -> h (b p) d")
            total = gradient if total is None else total + gradient
            if norm.kind != "none" and not frozen:
                projections[i].append(((value - constant[:, None]) * gradient).sum(-1) / model.dims.d_model)
        assert total is not None
        if norm.kind == "layer":
            weight = weight - weight.mean(1, keepdim=True)
        torch.bmm(total, weight.transpose(1, 2), out=out[first : first + len(weight)])
        first += len(weight)
    if norm.kind != "none" and not frozen:
        for resid, parts in zip(resids, projections, strict=True):
            out.addcmul_(norm.standardize(resid), torch.cat(parts)[..., None], value=-1)


def pull_back_mlp(
    model: HookManager, layer: int, steps: list[Step], chunk: slice, dtype: torch.dtype, *, frozen: bool
) -> Float[Tensor, "1 tokens d_model"]:
    """The gradient at the residual input of a layer's MLP, summed over the steps."""
    norm = model.layout.mlp_norm[layer]
    assert norm is not None
    total: Tensor | None = None
    for step in steps:
        resid = step.values[resid_site(model, layer, mlp=True)][chunk].to(dtype).flatten(0, 1)
        gradient = step.gradients[Site("mlp_in", layer)][chunk].to(dtype).flatten(0, 1)
        pulled = norm.project_transposed(gradient) / norm.scale(resid)
        if norm.kind != "none" and not frozen:
            standard = norm.standardize(resid)
            pulled = pulled - standard * (standard * pulled).mean(-1, keepdim=True)
        total = pulled if total is None else total + pulled
    assert total is not None
    return total[None]


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
    readout = metric_readout(model, pairs, metric)
    streams = [Site("resid_pre", layer) for layer in range(model.dims.n_layers)]
    run = model.run(pairs.clean, pairs.mask, record=[*streams, *input_sites(graph)], stop=FINAL)
    writes = write_differences(model, graph, clean, corrupt, slice(None), pairs.clean.shape[1], dtype)
    scores = torch.zeros(graph.possible.shape, dtype=dtype, device=model.device)

    for layer, sites, rows in _groups(model, graph):
        ends = {s: (clean.values[str(s)].to(model.dtype), corrupt.values[str(s)].to(model.dtype)) for s in sites}
        readers = _readers_after(model, layer, sites[0])
        start = None if layer is None else (layer, run.values[Site("resid_pre", layer)])
        steps = [_activation_step(model, readout, ends, readers, start, alpha) for alpha in alphas]
        _contract_activations(model, graph, steps, readers, writes[rows], scores[:, rows])
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
    return [*found, FINAL]


def _activation_step(
    model: HookManager,
    readout: Readout,
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
        readout.pairs.clean,
        readout.pairs.mask,
        record=list(record),
        interventions=edits,
        grads=readers,
        loss=readout.of_resid,
        start=start,
        stop=FINAL,
    )
    return Step(_by_site(run.values), _by_site(run.grads))


def _contract_activations(
    model: HookManager,
    graph: Graph,
    steps: list[Step],
    readers: list[Site],
    writes: Float[Tensor, "writer token_and_d_model"],
    scores: Float[Tensor, "reader writer"],
) -> None:
    """Adds the scores of the edges out of one group, in place."""
    every, dims = slice(None), model.dims
    for layer in sorted({site.layer for site in readers if site.layer is not None}):
        if Site("q", layer) in readers:
            pulled = writes.new_empty(dims.n_heads + 2 * dims.n_kv_heads, writes.shape[1])
            into = pulled.unflatten(1, (-1, dims.d_model))
            pull_back_heads(model, layer, steps, every, into, frozen=False)
            first = graph.channel_readers(layer, "q").start
            scores[first : first + len(pulled)] += pulled @ writes.T
        if Site("mlp_in", layer) in readers:
            pulled = pull_back_mlp(model, layer, steps, every, writes.dtype, frozen=False).flatten(1)
            scores[graph.mlp_readers(layer)] += pulled @ writes.T
    gradient = torch.stack([step.gradients[FINAL].to(writes.dtype) for step in steps]).sum(0)
    scores[-1] += writes @ gradient.flatten()


def n_groups(model: HookManager) -> int:
    """How many groups of writers there are."""
    return 1 + model.dims.n_layers * (1 + model.dims.has_mlp)
