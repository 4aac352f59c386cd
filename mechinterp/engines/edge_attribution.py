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
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.engines.edge_patching import check_model, wide
from mechinterp.engines.readout import FINAL, Readout, metric_readout
from mechinterp.engines.replacement import (
    CompactWrites,
    Replacement,
    Values,
    compact_writes,
    input_sites,
    record_writes,
    write_sites,
)
from mechinterp.engines.write_table import PORTS_OF_A_BLOCK, layer_blocks
from mechinterp.graphs.families.family import NodeFamily, NodeSite
from mechinterp.graphs.families.normed_ports import DirectionGradients, Step
from mechinterp.graphs.families.write_block import LowRank
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.token_positions import places_of
from mechinterp.graphs.token_windows import Window, token_windows, tokens_inside
from mechinterp.graphs.write_rows import write_rows
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.own_metric import MetricLike, as_metric
from mechinterp.tasks.pairs import Pairs

TOKEN_BUDGET_BYTES = 2**28
"""Writes and readers' gradients are expanded to d_model for as many tokens at a time as fit in this many bytes."""
STEPS_BUDGET_BYTES = 2**30
"""Gradients of as many points of a path are kept, and contracted together, as fit in this many bytes; at least one."""


@dataclass(frozen=True)
class Backward:
    """A modified backward pass: rules as edits of gradients, and constant scales of all norms."""

    edits: Callable[[], list[Intervention]]
    """Makes the edits for one run."""
    loss: Callable[[Readout], Callable[[Tensor], Tensor]]
    """The metric of every example as a function of the final residual stream, with the rules in its backward."""


def edge_gradients(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    metric: MetricLike,
    *,
    replacement: Replacement | None = None,
    alphas: Sequence[float] = (1.0,),
    points: Sequence[Mapping[Site, Tensor]] | None = None,
    backward: Backward | None = None,
) -> Float[Tensor, "reader writer"]:
    """Sum over the examples of the estimated drop of the metric when each edge is cut; 0 where there is no edge.

    The sign is that of clean minus patched, in the units of the metric; sums are in float32 or better. Cost: a forward
    of the corrupt prompts, a forward and a backward per alpha or point, a forward of the clean prompts if 1 is not
    among the alphas, and a contraction of all points, or of as many at a time as fit in `STEPS_BUDGET_BYTES`: so memory
    does not grow with the points.

    Args:
        model: The model.
        graph: Its graph, from `build_graph`.
        pairs: The examples, in one batch.
        metric: A differentiable metric, its name, or a function of logits and pairs.
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
    metric = as_metric(metric)
    metric.check_answers(pairs)
    check_model(model, graph, pairs)
    if not metric.differentiable:
        raise InputError(
            f"Metric {metric.name!r} has no gradient; score edges by logit_diff, prob_diff or kl_to_clean."
        )
    pairs, rows = pairs.to(model.device), write_rows(graph)
    graph = rows.graph
    corrupt = record_writes(model, graph, pairs.corrupt, pairs)
    values: Values = corrupt if replacement is None or replacement.kind == "corrupt" else replacement.on(pairs)
    readout = metric_readout(model, pairs, metric)
    n, at = _on_the_line(model, graph, pairs, corrupt, alphas) if points is None else (len(points), points.__getitem__)
    # The clean run first, which is a point too: it gives the writes, without which nothing can be contracted.
    order = sorted(range(n), key=lambda i: points is not None or alphas[i] != 1.0)
    clean = None if points is None and 1.0 in alphas else record_writes(model, graph, pairs.clean, pairs)
    kept: dict[int, Step] = {}
    scores = _no_scores(model, graph)
    for done, i in enumerate(order, 1):
        step = _step(model, graph, readout, at(i), backward, writes=clean is None)
        if clean is None:
            clean = compact_writes(model, graph, step.values)
        kept[i] = _readers_only(graph, step)
        if done == n or (len(kept) + 1) * kept[i].nbytes > STEPS_BUDGET_BYTES:
            steps = [kept[i] for i in sorted(kept)]  # in the order of the path: so are the sums
            _contract(model, graph, pairs, steps, clean, values, scores, frozen=backward is not None)
            kept.clear()
    return rows.tables(torch.where(graph.possible.to(scores.device), scores, 0.0) / n)


def _no_scores(model: HookManager, graph: Graph) -> Float[Tensor, "reader writer"]:
    return torch.zeros(graph.possible.shape, dtype=wide(model), device=model.device)


def first_step(model: HookManager, graph: Graph, pairs: Pairs, metric: MetricLike) -> tuple[Step, CompactWrites]:
    """The values and gradients at the clean point, as they are kept, and the writes there: to see what they take."""
    pairs = pairs.to(model.device)
    step = _step(model, graph, metric_readout(model, pairs, as_metric(metric)), None, None, writes=True)
    return _readers_only(graph, step), compact_writes(model, graph, step.values)


def _on_the_line(
    model: HookManager, graph: Graph, pairs: Pairs, corrupt: CompactWrites, alphas: Sequence[float]
) -> tuple[int, Callable[[int], dict[Site, Tensor] | None]]:
    """How many points there are, and the values of the input sites at each; None for the clean run."""
    ends = None if all(alpha == 1.0 for alpha in alphas) else _input_ends(model, graph, pairs, corrupt)

    def at(i: int) -> dict[Site, Tensor] | None:
        if alphas[i] == 1.0 or ends is None:
            return None
        return {site: other + alphas[i] * (own - other) for site, (own, other) in ends.items()}

    return len(alphas), at


def _input_ends(
    model: HookManager, graph: Graph, pairs: Pairs, corrupt: CompactWrites
) -> dict[Site, tuple[Tensor, Tensor]]:
    """The clean and the corrupt value of every input site."""
    sites = input_sites(graph)
    run = model.run(pairs.clean, pairs.mask, record=sites, stop=sites[-1])
    return {site: (run.values[site], corrupt.values[site].to(model.dtype)) for site in sites}


def _reader_sites(graph: Graph) -> list[NodeSite]:
    """The sites of every input of a node, and the logits' input."""
    return [*(ports.site for family in graph.families for ports in family.ports), FINAL]


def _streams(graph: Graph) -> list[Site]:
    """The states of the residual stream that are read."""
    return list(dict.fromkeys(family.stream for family in graph.families if family.ports))


def _step(
    model: HookManager,
    graph: Graph,
    readout: Readout,
    point: Mapping[Site, Tensor] | None,
    backward: Backward | None,
    *,
    writes: bool,
) -> Step:
    """The run at a point, with its gradients; with its writes if they are wanted."""
    pairs = readout.pairs
    edits = [] if backward is None else backward.edits()
    if point is not None:
        edits += [Intervention(site, value) for site, value in point.items()]
    grads = _reader_sites(graph)
    record = [*(write_sites(graph) if writes else ()), *_read_sites(graph)]
    run = model.run(
        pairs.clean,
        pairs.mask,
        record=list(dict.fromkeys(record)),
        interventions=edits,
        grads=grads,
        loss=readout.of_resid if backward is None else backward.loss(readout),
        stop=FINAL,
    )
    return Step(_by_site(run.values), _by_site(run.grads))


def _by_site(found: Mapping[NodeSite | str, Tensor]) -> dict[NodeSite, Tensor]:
    return {Site.parse(site) if isinstance(site, str) else site: value for site, value in found.items()}


def _read_sites(graph: Graph) -> list[NodeSite]:
    """The sites whose values a gradient is pulled back with."""
    return [*_streams(graph), *(ports.site for f in graph.families for ports in f.ports if ports.by_port)]


def _readers_only(graph: Graph, step: Step) -> Step:
    """The step without the values that only writers need."""
    return Step({site: step.values[site] for site in _read_sites(graph)}, step.gradients)


def _contract(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    steps: list[Step],
    clean: CompactWrites,
    values: Values,
    scores: Float[Tensor, "reader writer"],
    *,
    frozen: bool,
) -> None:
    """Adds differences of writes times readers' gradients, summed over tokens, a window of tokens at a time.

    Where there is no edge it may add numbers without a meaning.
    """
    places, (n_examples, n_pos) = places_of(graph, pairs), pairs.clean.shape
    for window in token_windows(n_examples, n_pos, tokens_at_once(model, graph)):
        writes = write_differences(model, graph, graph.families, clean, values, window)
        here = None if places is None else tokens_inside(places, window, n_pos)
        for layers in layer_blocks(graph):
            _score_layers(model, graph, layers, steps, window, writes, scores, here, frozen=frozen)
        gradient = sum(step.gradients[FINAL][window].to(scores) for step in steps)
        assert isinstance(gradient, Tensor)
        writes.score(gradient[None], slice(-1, None), scores, n_common=len(graph.writers))


def tokens_at_once(model: HookManager, graph: Graph) -> int:
    """How many tokens' writes and readers' gradients fit in `TOKEN_BUDGET_BYTES`."""
    most_ports = max(len(_ports(graph, range(layer, layer + 1))) for layer in range(model.dims.n_layers))
    low_rank = any(family.low_rank for family in graph.families)  # its products take as much again
    n_rows = _n_dense(graph.families) + max(most_ports, PORTS_OF_A_BLOCK) * (1 + low_rank)
    return max(1, TOKEN_BUDGET_BYTES // (n_rows * model.dims.d_model * wide(model).itemsize))


def _range(rows: slice) -> range:
    return range(rows.start, rows.stop)


def _n_dense(families: Sequence[NodeFamily]) -> int:
    return sum(len(family.writers) for family in families if not family.low_rank)


def _ports(graph: Graph, layers: range) -> range:
    """The ports of some layers."""
    n = graph.n_positions
    return range(graph.readers_before[layers.start] // n, graph.readers_before[layers.stop] // n)


@dataclass(frozen=True)
class WriteDifferences:
    """Every writer's clean write minus its replacement, for some tokens."""

    graph: Graph
    rows: Float[Tensor, "dense_writer token_and_d_model"]
    writers: Int[Tensor, " dense_writer"]
    """The writer of every row."""
    low_rank: LowRank | None
    """`[writer, token]`, of those that are activations times directions."""
    low_rank_writers: Int[Tensor, " low_rank_writer"]
    same: Int[Tensor, " low_rank_writer"] | None
    """Of each of these the first that has its activations, being another row of the same writer; None: all differ."""

    def score(
        self,
        gradients: Float[Tensor, "port *axes d_model"],
        readers: slice | Int[Tensor, " port"],
        scores: Float[Tensor, "reader writer"],
        n_writers: int | None = None,
        tokens: Int[Tensor, " token"] | None = None,
        n_common: int = 0,
    ) -> None:
        """Adds gradients times the first `n_writers` writes to the scores of the readers, over all or some tokens.

        Of the first `n_common`, which all these readers have, rows of one writer may be scored as one, in the first.
        """
        n_writers = len(self.graph.writers) if n_writers is None else n_writers
        n = int((self.writers < n_writers).sum())
        rows, gradients = self.rows[:n], gradients.flatten(1, -2)
        if tokens is not None:
            d_model = gradients.shape[-1]
            gradients, rows = gradients[:, tokens], rows.unflatten(1, (-1, d_model))[:, tokens].flatten(1)
        flat = gradients.flatten(1)
        found = (rows @ flat[0])[None] if len(flat) == 1 else flat @ rows.T
        at = readers if isinstance(readers, slice) else readers[:, None]
        scores[at, self.writers[:n]] += found
        if (thin := self._low_rank(n_common, n_writers, tokens)) is not None:
            scores[at, thin[1]] += thin[0].inner(gradients)

    def _low_rank(self, n_common: int, n_writers: int, tokens: Tensor | None) -> tuple[LowRank, Tensor] | None:
        """Those of the first writers that are activations times directions, at all or some tokens, and their columns;
        None: none are. Rows with the same activations among the first `n_common` are one, of their summed directions.
        """
        n = 0 if self.low_rank is None else int((self.low_rank_writers < n_writers).sum())
        if self.low_rank is None or not n:
            return None
        values, directions, columns = self.low_rank.values[:n], self.low_rank.directions[:n], self.low_rank_writers[:n]
        if self.same is not None:
            first, m = torch.arange(n, device=columns.device), int((columns < n_common).sum())
            first[:m] = self.same[:m]
            kept, index = first.unique(return_inverse=True)
            directions = directions.new_zeros(len(kept), directions.shape[1]).index_add(0, index, directions)
            values, columns = values[kept], columns[kept]
        return LowRank(values if tokens is None else values[:, tokens], directions), columns

    def score_directions(
        self,
        gradients: DirectionGradients,
        readers: slice,
        scores: Float[Tensor, "reader writer"],
        n_writers: int,
        tokens: Int[Tensor, " token"] | None = None,
        n_common: int = 0,
    ) -> None:
        """The same for ports that are one number each."""
        n = int((self.writers < n_writers).sum())
        rows = self.rows[:n].unflatten(1, (-1, gradients.directions.shape[1]))
        if tokens is not None:
            gradients, rows = gradients.at(tokens), rows[:, tokens]
        scores[readers, self.writers[:n]] += gradients.inner(rows)
        if (thin := self._low_rank(n_common, n_writers, tokens)) is not None:
            scores[readers, thin[1]] += gradients.inner_low_rank(thin[0].values, thin[0].directions)


def write_differences(
    model: HookManager,
    graph: Graph,
    families: Sequence[NodeFamily],
    clean: CompactWrites,
    values: Values,
    window: Window,
) -> WriteDifferences:
    """The clean writes of every writer of some families minus their replacements; of one that has parts, the rest.

    The parts of a writer must be among the families.
    """
    kept, replaced = clean.rows(window), values.rows(window)
    shape = kept.values[families[0].sites[0]].shape[:2]
    writers = [w for f in families if not f.low_rank for w in _range(graph.writers_of(f))]
    out = torch.empty(len(writers), *shape, model.dims.d_model, dtype=wide(model), device=model.device)
    thin: list[LowRank] = []
    others = [w for f in families if f.low_rank for w in _range(graph.writers_of(f))]
    first = 0
    row_of: dict[str, int] = {}
    for family in families:
        block = replaced.differences(family, kept.values)
        if isinstance(block, LowRank):
            thin.append(LowRank(block.values.flatten(1).to(out), block.directions.to(out)))
        else:
            row_of |= {name: first + i for i, name in enumerate(family.writers)}
            out[first : first + len(family.writers)] = block.dense()
            first += len(family.writers)
        if family.part_of is not None:
            out[row_of[family.part_of]] -= block.total().to(out.device)
    low_rank = None
    if thin:
        low_rank = LowRank(torch.cat([one.values for one in thin]), torch.cat([one.directions for one in thin]))
    index, other_index = (torch.tensor(some, dtype=torch.long, device=model.device) for some in (writers, others))
    same = _same_activations([family for family in families if family.low_rank], thin)
    same = None if same is None else same.to(model.device)
    return WriteDifferences(graph, out.flatten(1), index, low_rank, other_index, same)


def _same_activations(families: Sequence[NodeFamily], blocks: Sequence[LowRank]) -> Int[Tensor, " row"] | None:
    """Of every row the first one of its writer that has the same activations; None if that is always the row itself."""
    first = torch.arange(sum(len(block.values) for block in blocks))
    seen: dict[NodeFamily, tuple[Tensor, Tensor]] = {}
    found, start = False, 0
    for family, block in zip(families, blocks, strict=True):
        rows = slice(start, start + len(block.values))
        start = rows.stop
        if family.origin in seen and torch.equal(seen[family.origin][1], block.values):
            first[rows], found = seen[family.origin][0], True
        seen.setdefault(family, (first[rows], block.values))
    return first if found else None


def _score_layers(
    model: HookManager,
    graph: Graph,
    layers: range,
    steps: list[Step],
    window: Window,
    writes: WriteDifferences,
    scores: Tensor,
    places: list[Tensor] | None,
    *,
    frozen: bool,
) -> None:
    """Adds the scores of every edge into some layers, and numbers without a meaning where there is no edge."""
    d_model = model.dims.d_model
    n_tokens = writes.rows.shape[1] // d_model
    here = [family for family in graph.families if family.ports and family.layer in layers]
    seen = [graph.n_writers_at(family.reads) for family in here if family.reads is not None]
    n_writers, n_common = max(seen, default=0), min(seen, default=0)
    thin: dict[NodeFamily, DirectionGradients] = {}
    for family in here:
        found = family.direction_gradients(model, steps, window, writes.rows.dtype, frozen=frozen)
        if found is not None:
            thin[family] = found
    full = [family for family in here if family not in thin]
    rows = [row for family in full for row in _range(graph.ports_of(family))]
    gradients = writes.rows.new_empty(len(rows), n_tokens, d_model)
    pulled_back(model, graph, full, steps, window, gradients, frozen=frozen)
    at = {site.site: rows.index(own.start) for family in full for site, own in graph.sites_of(family)}
    for family, found in thin.items():
        for site in family.ports:
            if site.follows is not None:
                gradients[at[site.follows]] -= found.total()
    n, first = graph.n_positions, graph.readers_before[layers.start]
    for i, tokens in enumerate([None] if places is None else places):  # the rows of a reader are its positions
        readers = slice(first + i, first + n * len(rows), n)
        if thin:
            readers = torch.tensor(rows, device=scores.device) * n + i
        writes.score(gradients, readers, scores, n_writers, tokens, n_common)
        for family, found in thin.items():
            own = graph.readers_of(family)
            rows_here = slice(own.start + i, own.stop, n)
            writes.score_directions(found, rows_here, scores, n_writers, tokens, n_common)


def pulled_back(
    model: HookManager,
    graph: Graph,
    families: Sequence[NodeFamily],
    steps: Sequence[Step],
    window: Window,
    out: Float[Tensor, "port token d_model"],
    *,
    frozen: bool,
) -> None:
    """Writes to `out` the gradient at the residual stream of every port of some families, one after the other.

    From that of a site are taken those of the sites that are computed from it and are ports themselves. Each is
    computed on the device of its layer.
    """
    rows: dict[NodeSite, slice] = {}
    first = 0
    for family in families:
        own = graph.ports_of(family)
        family.pull_back(model, steps, window, out[first : first + own.stop - own.start], frozen=frozen)
        for ports, its in graph.sites_of(family):
            rows[ports.site] = slice(first + its.start - own.start, first + its.stop - own.start)
        first += own.stop - own.start
    for ports in (ports for family in families for ports in family.ports):
        if ports.follows is not None:
            out[rows[ports.follows]] -= out[rows[ports.site]].sum(0, keepdim=True)


def activation_path_gradients(
    model: HookManager, graph: Graph, pairs: Pairs, metric: Metric, alphas: Sequence[float]
) -> Float[Tensor, "reader writer"]:
    """Sum over the examples of every edge's score; 0 where there is no edge.

    Cost: two forwards, and per alpha and group a forward and a backward from the group's layer on. Memory: the values
    and gradients of one run, or of as many as fit in `STEPS_BUDGET_BYTES`.
    """
    metric.check_answers(pairs)
    check_model(model, graph, pairs)
    if not metric.differentiable:
        raise InputError(
            f"Metric {metric.name!r} has no gradient; score edges by logit_diff, prob_diff or kl_to_clean."
        )
    pairs, rows = pairs.to(model.device), write_rows(graph)
    graph = rows.graph
    corrupt = record_writes(model, graph, pairs.corrupt, pairs)
    clean = record_writes(model, graph, pairs.clean, pairs)
    readout = metric_readout(model, pairs, metric)
    streams = [Site("resid_pre", layer) for layer in range(model.dims.n_layers)]
    run = model.run(pairs.clean, pairs.mask, record=[*streams, *input_sites(graph)], stop=FINAL)
    scores = _no_scores(model, graph)

    for group in _groups(graph):
        sites = [site for family in group if family.part_of is None for site in family.sites]
        ends = {s: (clean.values[s].to(model.dtype), corrupt.values[s].to(model.dtype)) for s in sites}
        readers = [f for f in graph.families if f.reads is not None and f.reads >= group[0].written]
        layer = group[0].layer
        start = None if group[0].written == (0, 0) else (layer, run.values[Site("resid_pre", layer)])
        steps: list[Step] = []
        for done, alpha in enumerate(alphas, 1):
            steps.append(_activation_step(model, readout, ends, readers, start, alpha))
            if done == len(alphas) or (len(steps) + 1) * steps[-1].nbytes > STEPS_BUDGET_BYTES:
                _contract_activations(model, graph, steps, readers, group, clean, corrupt, scores)
                steps.clear()
    return rows.tables(torch.where(graph.possible.to(scores.device), scores / len(alphas), 0.0))


def _groups(graph: Graph) -> Iterator[list[NodeFamily]]:
    """Families that are interpolated together: the inputs, and every other one with the parts of its writers."""
    yield list(graph.families[: graph.n_inputs])
    for family in graph.families[graph.n_inputs :]:
        if family.part_of is None:
            yield [family, *graph.parts_of(family)]


def _activation_step(
    model: HookManager,
    readout: Readout,
    ends: Mapping[NodeSite, tuple[Tensor, Tensor]],
    readers: Sequence[NodeFamily],
    start: tuple[int, Tensor] | None,
    alpha: float,
) -> Step:
    edits = [Intervention(site, corrupt + alpha * (clean - corrupt)) for site, (clean, corrupt) in ends.items()]
    sites = [*(ports.site for family in readers for ports in family.ports), FINAL]
    run = model.run(
        readout.pairs.clean,
        readout.pairs.mask,
        record=list(dict.fromkeys([*sites, *(family.stream for family in readers)])),
        interventions=edits,
        grads=sites,
        loss=readout.of_resid,
        start=start,
        stop=FINAL,
    )
    return Step(_by_site(run.values), _by_site(run.grads))


def _contract_activations(
    model: HookManager,
    graph: Graph,
    steps: list[Step],
    readers: Sequence[NodeFamily],
    group: Sequence[NodeFamily],
    clean: CompactWrites,
    corrupt: CompactWrites,
    scores: Float[Tensor, "reader writer"],
) -> None:
    """Adds the scores of the edges out of one group, in place."""
    n_examples, n_pos = steps[0].gradients[FINAL].shape[:2]
    for window in token_windows(n_examples, n_pos, tokens_at_once(model, graph)):
        writes = write_differences(model, graph, group, clean, corrupt, window)
        n_tokens = writes.rows.shape[1] // model.dims.d_model
        for family in readers:
            if family.part_of is not None:
                continue
            together = [family, *(part for part in graph.parts_of(family) if part.ports)]
            ports = slice(graph.ports_of(family).start, graph.ports_of(together[-1]).stop)
            pulled = writes.rows.new_empty(ports.stop - ports.start, n_tokens, model.dims.d_model)
            pulled_back(model, graph, together, steps, window, pulled, frozen=False)
            n = graph.n_positions
            writes.score(pulled, slice(n * ports.start, n * ports.stop), scores)
        gradient = torch.stack([step.gradients[FINAL][window].to(scores) for step in steps]).sum(0)
        writes.score(gradient[None], slice(-1, None), scores)


def n_groups(graph: Graph) -> int:
    """How many groups of writers there are."""
    return len(list(_groups(graph)))
