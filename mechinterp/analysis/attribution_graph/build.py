"""`attribution_graph`: the exact direct effects on the features and logits of one prompt, checked in every call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.analysis.attribution_graph.frozen_run import FrozenRun, Seed, check_transcoders, freeze
from mechinterp.analysis.attribution_graph.graph import AttributionGraph, GraphNode
from mechinterp.analysis.attribution_graph.held_run import HELD, backward_in_model
from mechinterp.analysis.phrases import read_prompt, token_of
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.registry import unknown
from mechinterp.features.basis import Basis
from mechinterp.features.load import load_bases
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.modes import Gradients

Targets = Sequence[str | int] | Mapping[str, Mapping[Any, float]]
MOST_TARGETS, ENOUGH = 10, 0.95
"""By default the fewest tokens that together have this probability, at most ten."""
MAX_BYTES = 2**31
STEPS_OF_A_CHOICE = 4
"""Batches of features that are expanded between two choices of what comes next."""


@dataclass(frozen=True, eq=False)
class Active:
    """The active features of one prompt, by layer, position and number.

    Args:
        layer: The layer that each reads.
        position: Its position.
        feature: Its number.
        value: Its activation.
        pre: Its pre-activation.
        constant: What the encoder adds to it whatever it reads.
    """

    layer: Int[Tensor, " feature"]
    position: Int[Tensor, " feature"]
    feature: Int[Tensor, " feature"]
    value: Float[Tensor, " feature"]
    pre: Float[Tensor, " feature"]
    constant: Float[Tensor, " feature"]

    def __len__(self) -> int:
        return len(self.layer)


@dataclass(frozen=True)
class Target:
    """A direction of the logits: name, weights of tokens, probability (for a combination 0), weight in influences."""

    text: str
    token: int
    weights: Mapping[int, float]
    probability: float
    weight: float


def attribution_graph(
    model: HookManager,
    prompt: str | Int[Tensor, " pos"],
    transcoders: str | Sequence[Basis],
    *,
    targets: Targets | None = None,
    max_features: int = 4096,
    constant_positions: int = 0,
    held: str = "norms",
    batch_size: int = 128,
    max_bytes: int = MAX_BYTES,
    progress: Progress = no_progress,
) -> AttributionGraph:
    """The attribution graph of one prompt: direct effects between tokens, features, errors, constants and logits.

    Attention patterns and the scales of all norms are those of the run, and MLPs are replaced by their transcoders plus
    what these miss. So every pre-activation is exactly the sum of the edges into it, which is checked in every call.

    Args:
        model: The model.
        prompt: A text, read by the model's tokenizer as it is, or token ids.
        transcoders: One transcoder per layer, with or without skip, or the layers of a cross-layer transcoder; or where
            `load_bases` finds them. A layer without one is an error as a whole.
        targets: Tokens, as text or ids; or named combinations of tokens, as in `{"he - she": {" he": 1, " she": -1}}`.
            By default the fewest tokens that together have a probability of 0.95, at most ten. All at the last
            position. Tokens count by their probabilities in influences, combinations alike.
        max_features: How many features become nodes at most. If more are active, those of the largest influence are
            chosen, batch by batch, and the others are one node, `rest`.
        constant_positions: Features and errors of so many positions at the beginning count as constants. circuit-tracer
            sets those of the BOS token to zero, which changes what they add up to.
        held: What an edge holds at its value on the prompt, beside the outputs of MLPs. `norms`: attention patterns and
            norm scales; edges then add up. `patterns`: only these. `nothing`: both move, as in an intervention. With
            the last two, edges are derivatives times activations: they predict weak interventions, and do not add up.
        batch_size: Readers that are pulled back side by side.
        max_bytes: What the matrix of edges and a batch may take; InputError beyond.
        progress: Called with the number of expanded features and how many there will be.

    Returns the whole graph; `pruned()` is the part that matters. `weights[r, w]` is in units of the reader's
    pre-activation, of a target in logits (before a soft cap), less the mean of all logits. Positive = it raises it.

    Cost: one forward, and per feature one product with the weights of the layers before it, at every position. Memory:
    `[max_features, active features]` floats, `[batch_size, pos, d_model]` a few times, and the directions of all active
    features. With `held` other than `norms`: a forward and a backward per feature, and the activations of `batch_size`
    runs of the prompt.

    Raises InputError for bases that are no transcoders, unknown targets and graphs that are too large, UnsupportedError
    for a model whose sums do not come out (its pre-activations are not what the frozen map gives), and for `held` other
    than `norms` with transcoders that write before a post-norm.

    Source: Ameisen et al. 2025 (transformer-circuits.pub/2025/attribution-graphs); circuit-tracer. Deviations:
        constants
    are a node, so that sums are exact; the transpose is in closed form instead of by autograd; nothing is set to zero.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> bases = mi.load_bases("bundled:transcoders", model=model)
    >>> graph = mi.attribution_graph(model, torch.tensor([2, 5, 6]), bases)
    >>> graph.about["gap"] < 1e-3, len(graph.targets) <= 10
    (True, True)
    """
    if max_features < 1 or batch_size < 1 or constant_positions < 0:
        raise InputError("`max_features` and `batch_size` are at least 1, `constant_positions` at least 0.")
    if held not in HELD:
        raise unknown("part to hold", held, HELD)
    bases = load_bases(transcoders, model=model) if isinstance(transcoders, str) else tuple(transcoders)
    by_layer = check_transcoders(model, bases)
    if held != "norms" and any(site.kind == "mlp_raw" for basis in bases for site in basis.sites_out):
        raise UnsupportedError(
            f"These transcoders write before a post-norm; edges with {held} held are not supported there. Use held="
            "'norms', the default."
        )
    tokens, _, _ = read_prompt(model, prompt)
    with Gradients(False) as off, off:
        run = freeze(model, tokens, by_layer)
        found = _targets(run, targets)
        active = _active(run, constant_positions)
        _size_of(run, active, len(found), max_features, batch_size).check(max_bytes)
        edges = _Edges(run, active, constant_positions, held)
        rows, chosen = _expanded(edges, found, max_features, batch_size, progress)
        return _graph(run, edges, found, rows, chosen)


@dataclass(frozen=True)
class GraphSize:
    """What an attribution graph will take, before it is made.

    Args:
        positions: Tokens of the prompt.
        active: Active features.
        expanded: How many of them become nodes.
        bytes: The matrix of edges and a batch of readers, as `attribution_graph` counts them for `max_bytes`.
    """

    positions: int
    active: int
    expanded: int
    bytes: int

    def check(self, max_bytes: int) -> None:
        """Return None if the graph fits. Raises InputError otherwise."""
        if self.bytes > max_bytes:
            raise InputError(
                f"The graph of {self.active:,} active features needs {self.bytes / 2**30:.1f} GiB; the limit is "
                f"{max_bytes / 2**30:.1f} GiB (max_bytes). Give a smaller max_features or batch_size, or a shorter "
                "prompt."
            )


def graph_size(
    model: HookManager,
    prompt: str | Int[Tensor, " pos"],
    transcoders: str | Sequence[Basis],
    *,
    targets: Targets | None = None,
    max_features: int = 4096,
    constant_positions: int = 0,
    batch_size: int = 128,
) -> GraphSize:
    """What `attribution_graph` with these arguments will take. One forward, and one encoding by every transcoder.

    Args:
        model: The model.
        prompt: A text or token ids.
        transcoders: As in `attribution_graph`.
        targets: The targets; by default the likeliest tokens.
        max_features: How many features become nodes at most.
        constant_positions: Positions whose features count as constants.
        batch_size: Readers side by side.

    Raises InputError and UnsupportedError as `attribution_graph` does; a graph that is too large is no error here.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> size = mi.graph_size(model, torch.tensor([2, 5, 6]), "bundled:transcoders")
    >>> size.positions, 0 < size.expanded == size.active, size.bytes < 2**24
    (3, True, True)
    """
    if max_features < 1 or batch_size < 1 or constant_positions < 0:
        raise InputError("`max_features` and `batch_size` are at least 1, `constant_positions` at least 0.")
    bases = load_bases(transcoders, model=model) if isinstance(transcoders, str) else tuple(transcoders)
    by_layer = check_transcoders(model, bases)
    tokens, _, _ = read_prompt(model, prompt)
    with Gradients(False) as off, off:
        run = freeze(model, tokens, by_layer)
        n_targets = len(_targets(run, targets))
        return _size_of(run, _active(run, constant_positions), n_targets, max_features, batch_size)


def _size_of(run: FrozenRun, active: Active, n_targets: int, max_features: int, batch_size: int) -> GraphSize:
    n_rows, size = min(max_features, len(active)) + n_targets, run.dtype.itemsize
    n_columns = len(active) + run.n_pos * (run.model.dims.n_layers + 1) + 1
    directions = sum(int((active.layer == at).sum()) * len(b.sites_out) for at, b in run.transcoders.items())
    wide = 6 * batch_size * run.n_pos + directions
    total = size * (n_rows * n_columns + wide * run.model.dims.d_model)
    return GraphSize(run.n_pos, len(active), min(max_features, len(active)), total)


def _targets(run: FrozenRun, targets: Targets | None) -> list[Target]:
    """The targets, with their probabilities at the last position."""
    model = run.model
    logits = model.layout.unembed(run.at("resid_final")[-1])
    probabilities = logits.softmax(-1)

    def several(ids: Sequence[int]) -> list[Target]:
        texts = [str(i) if model.tokenizer is None else str(model.tokenizer.decode([i])) for i in ids]
        texts = [text if texts.count(text) == 1 else f"{text} ({i})" for text, i in zip(texts, ids, strict=True)]
        shares = probabilities[list(ids)].tolist()
        # Where the softmax gives all of them 0 they count alike: with weights of 0 nothing would have an influence.
        weights = shares if any(shares) else [1.0 / len(ids)] * len(ids)
        return [
            Target(text, i, {i: 1.0}, share, by) for text, i, share, by in zip(texts, ids, shares, weights, strict=True)
        ]

    def known(name: str | int) -> int:
        token = token_of(model, name)
        if not 0 <= token < len(logits):
            raise InputError(f"Token {token} is not one of the model's {len(logits)} outputs.")
        return token

    if targets is None:
        best = probabilities.sort(descending=True, stable=True)
        n = int((best.values.cumsum(0) < ENOUGH).sum()) + 1
        return several(best.indices[: min(n, MOST_TARGETS)].tolist())
    if isinstance(targets, str) or not targets:
        raise InputError("`targets` is a list of tokens, as in [' John'], or names combinations of tokens.")
    if isinstance(targets, Mapping):
        return [
            Target(name, -1, {known(token): float(by) for token, by in parts.items()}, 0.0, 1.0 / len(targets))
            for name, parts in targets.items()
        ]
    ids = [known(name) for name in targets]
    if len(set(ids)) != len(ids):
        raise InputError(f"A target is named twice: {', '.join(map(str, targets))}.")
    return several(ids)


def _active(run: FrozenRun, constant_positions: int) -> Active:
    """The active features behind the constant positions, with the check that they are what their encoder gives."""
    parts: dict[str, list[Tensor]] = {name: [] for name in Active.__dataclass_fields__}
    for layer, basis in sorted(run.transcoders.items()):
        x = run.values[basis.sites_in[0]]
        values = basis.encode(x).values.to(run.dtype)
        positions, features = (values != 0).nonzero(as_tuple=True)
        behind = positions >= constant_positions
        positions, features = positions[behind], features[behind]
        reads = basis.reads(features).to(run.dtype) if len(features) else x.new_zeros(0, x.shape[-1])
        constant = basis.b_enc[features].to(run.dtype)
        if basis.subtract_b_dec:
            constant = constant - reads @ basis.b_dec[0].to(run.dtype)
        found = {
            "layer": torch.full_like(positions, layer),
            "position": positions,
            "feature": features,
            "value": values[positions, features],
            "pre": (x[positions] * reads).sum(-1) + constant,
            "constant": constant,
        }
        for name, value in found.items():
            parts[name].append(value)
    return Active(**{name: torch.cat(values) for name, values in parts.items()})


class _Edges:
    """The edges into readers from everything that is written: columns are tokens, bias, errors, features."""

    def __init__(self, run: FrozenRun, active: Active, constant_positions: int, held: str = "norms") -> None:
        self.run, self.active, self.held = run, active, held
        self.layers = [layer for layer in range(run.model.dims.n_layers) if run.has_mlp(layer)]
        self.error_positions = list(range(constant_positions, run.n_pos))
        self.tokens = run.token_writes()
        self.errors = {layer: run.errors(layer) for layer in self.layers}
        self.constants = dict(run.constants())
        for layer in self.layers if constant_positions else ():
            written = self.errors[layer] + self._decoded(layer)
            self.constants["mlp", layer][:constant_positions] += written[:constant_positions]
        self.error_column = run.n_pos + 1
        self.first_feature = self.error_column + len(self.layers) * len(self.error_positions)
        self.n_columns = self.first_feature + len(active)
        self.directions = {layer: self._directions(layer) for layer in self.layers}

    def _decoded(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """What all features add at a layer's MLP, without constants."""
        out = torch.zeros_like(self.run.start())
        every = torch.arange(self.run.n_pos, device=out.device)
        for basis in self.run.transcoders.values():
            for i, site in enumerate(basis.sites_out):
                if site.layer == layer:
                    values = basis.encode(self.run.values[basis.sites_in[0]]).values.to(out)
                    out = out + self.run.written(site.kind, layer, values @ basis.W_dec[:, i].to(out), every)
        return out

    def _directions(self, layer: int) -> list[tuple[int, Int[Tensor, " n"], Float[Tensor, "n d_model"]]]:
        """(position, features, what each adds to the residual stream at this layer's MLP), for every position."""
        active, found = self.active, []
        for at, basis in self.run.transcoders.items():
            for i, site in enumerate(basis.sites_out):
                if site.layer != layer:
                    continue
                for position in self.error_positions:
                    index = ((active.layer == at) & (active.position == position)).nonzero()[:, 0]
                    if len(index):
                        rows = basis.W_dec[active.feature[index], i].to(self.run.dtype)
                        vectors = self.run.written(site.kind, layer, rows, active.position[index])
                        found.append((position, index, vectors * active.value[index, None]))
        return found

    def feature_seeds(self, chosen: Int[Tensor, " n"]) -> tuple[list[Seed], list[float]]:
        """The seeds of features and what constants add to each by itself."""
        active, seeds, own = self.active, list[Seed](), list[float]()
        directions: dict[int, Tensor] = {}
        for layer in active.layer[chosen].unique().tolist():
            here = (active.layer[chosen] == layer).nonzero()[:, 0]
            reads = self.run.transcoders[layer].reads(active.feature[chosen[here]])
            directions |= dict(zip(here.tolist(), reads, strict=True))
        where = zip(active.layer[chosen].tolist(), active.position[chosen].tolist(), strict=True)
        constants = active.constant[chosen].tolist()
        for row, (layer, position) in enumerate(where):
            kind = self.run.transcoders[layer].sites_in[0].kind
            seeds.append(Seed(row, layer, kind, position, directions[row]))
            own.append(constants[row])
        return seeds, own

    def target_seeds(self, targets: Sequence[Target]) -> tuple[list[Seed], list[float]]:
        """The seeds of targets: their columns of the unembedding less the mean column."""
        layout, seeds, own = self.run.model.layout, list[Seed](), list[float]()
        W_U = layout.W_U.to(self.run.dtype)
        mean = W_U.mean(1)
        for row, target in enumerate(targets):
            total = sum(target.weights.values())
            direction = sum((by * W_U[:, token] for token, by in target.weights.items()), -total * mean)
            bias = 0.0
            if layout.b_U is not None:
                bias = sum(by * float(layout.b_U[token]) for token, by in target.weights.items())
                bias -= total * float(layout.b_U.mean())
            n_layers = self.run.model.dims.n_layers
            seeds.append(Seed(row, n_layers, "resid_final", self.run.n_pos - 1, direction))
            own.append(bias)
        return seeds, own

    def rows(self, seeds: Sequence[Seed], own: Sequence[float]) -> Float[Tensor, "row column"]:
        """The edges into the readers of some seeds."""
        run = self.run
        out = run.start().new_zeros(len(seeds), self.n_columns)
        bias = run.n_pos
        if self.held == "norms":
            backward = run.backward(seeds, len(seeds))
        else:
            backward = backward_in_model(run, seeds, len(seeds), self.held)
        for (kind, layer), g in backward:
            out[:, bias] += torch.einsum("rpd,pd->r", g, self.constants[kind, layer])
            if kind == "input":
                out[:, : run.n_pos] = torch.einsum("rpd,pd->rp", g, self.tokens)
            if kind == "mlp":
                first = self.error_column + self.layers.index(layer) * len(self.error_positions)
                some = slice(first, first + len(self.error_positions))
                out[:, some] = torch.einsum("rpd,pd->rp", g, self.errors[layer])[:, self.error_positions]
                for position, index, vectors in self.directions[layer]:
                    out[:, self.first_feature + index] += g[:, position] @ vectors.T
        alone = [constant + run.read_constant(seed) for seed, constant in zip(seeds, own, strict=True)]
        out[:, bias] += torch.tensor(alone, dtype=out.dtype, device=out.device)
        return out


def _expanded(
    edges: _Edges, targets: Sequence[Target], max_features: int, batch_size: int, progress: Progress
) -> tuple[Float[Tensor, "row column"], Int[Tensor, " feature"]]:
    """(the edges into the targets, then into the chosen features; which these are), in the order of their layers.

    If not all are expanded, the next ones are always those of the largest influence by what is known so far.
    """
    active = edges.active
    total = min(max_features, len(active))
    rows = [edges.rows(*edges.target_seeds(targets))]
    left = torch.ones(len(active), dtype=torch.bool, device=active.layer.device)
    done = torch.zeros(0, dtype=torch.long, device=left.device)
    while len(done) < total:
        n = total - len(done)
        if total < len(active):
            n = min(n, STEPS_OF_A_CHOICE * batch_size)
            known = _influence_so_far(edges, torch.cat(rows), done, targets)
            order = torch.where(left, known, -1.0).argsort(descending=True, stable=True)
        else:
            order = torch.arange(len(active), device=left.device)
        chosen = order[:n].sort().values  # by layer, so that a batch starts late
        for batch in chosen.split(batch_size):
            rows.append(edges.rows(*edges.feature_seeds(batch)))
            progress(len(done) + len(batch), total)
            done = torch.cat([done, batch])
        left[chosen] = False
    order = done.argsort()
    n_targets = len(targets)
    every = torch.cat(rows)
    return torch.cat([every[:n_targets], every[n_targets:][order]]), done[order]


def _influence_so_far(
    edges: _Edges, rows: Tensor, done: Tensor, targets: Sequence[Target]
) -> Float[Tensor, " feature"]:
    """The influence of all active features along the edges that are known."""
    size = rows.abs()
    size[:, edges.run.n_pos] = 0
    size /= size.sum(1, keepdim=True).clamp(min=1e-30)
    weight = torch.tensor([target.weight for target in targets], dtype=rows.dtype, device=rows.device)
    flow = torch.cat([weight, weight.new_zeros(len(done))])
    total = rows.new_zeros(len(edges.active))
    for _ in range(edges.run.model.dims.n_layers + 1):  # a path has at most one feature per layer
        reached = (flow @ size)[edges.first_feature :]
        total += reached
        flow = torch.cat([torch.zeros_like(weight), reached[done]])
    return total


def _graph(
    run: FrozenRun, edges: _Edges, targets: Sequence[Target], rows: Tensor, chosen: Int[Tensor, " feature"]
) -> AttributionGraph:
    """The graph of the computed rows, after checking that each sums to what its reader reads."""
    active, model, n_targets = edges.active, run.model, len(targets)
    final = model.layout.final_norm(run.at("resid_final")[-1])
    logits = final @ model.layout.W_U.to(final)
    logits = logits if model.layout.b_U is None else logits + model.layout.b_U.to(logits)
    logits = logits - logits.mean()
    read = torch.stack(
        [sum((logits[t] * by for t, by in one.weights.items()), logits.new_zeros(())) for one in targets]
    )
    if not bool(rows.isfinite().all()):
        raise UnsupportedError(f"{model.info.architecture}: some edges are not finite in {run.dtype}.")
    gap = {"gap": _gap(run, rows, torch.cat([read, active.pre[chosen]]))} if edges.held == "norms" else {}
    n = edges.first_feature
    every = torch.cat([rows[n_targets:], rows[:n_targets]])  # features, then targets
    kept = every[:, n + chosen]
    rest = every[:, n:].sum(1) - kept.sum(1)
    has_rest = len(chosen) < len(active)
    weights = torch.cat([every[:, :n], *([rest[:, None]] if has_rest else []), kept], 1)
    ids, words = run.tokens.tolist(), _words(model, run.tokens)
    nodes = [GraphNode("token", -1, p, ids[p], text=words[p]) for p in range(run.n_pos)]
    nodes.append(GraphNode("bias"))
    nodes += [GraphNode("error", layer, p) for layer in edges.layers for p in edges.error_positions]
    nodes += [GraphNode("rest")] * has_rest
    columns = (getattr(active, name)[chosen].tolist() for name in ("layer", "position", "feature", "value", "pre"))
    for layer, position, feature, value, pre in zip(*columns, strict=True):
        nodes.append(GraphNode("feature", layer, position, feature, run.transcoders[layer].name, "", value, pre))
    for target, logit in zip(targets, read.tolist(), strict=True):
        nodes.append(
            GraphNode(
                "target", -1, run.n_pos - 1, target.token, "", target.text, target.probability, logit, target.weight
            )
        )
    about: dict[str, Any] = {
        **gap,
        "held": edges.held,
        "active_features": len(active),
        "transcoders": [str(basis.source) for basis in run.transcoders.values()],
        "targets": {target.text: {str(t): by for t, by in target.weights.items()} for target in targets},
        "bytes": weights.numel() * weights.element_size(),
    }
    bases = {basis.name: basis.sha256 for basis in run.transcoders.values()}
    return AttributionGraph(tuple(ids), words, tuple(nodes), weights, model.info.name, bases, (), about)


def _gap(run: FrozenRun, rows: Float[Tensor, "row column"], read: Float[Tensor, " row"]) -> float:
    """The largest difference between a row's sum and what its reader reads, as a share of the sizes in the row.

    Raises UnsupportedError when it is not rounding.
    """
    size = rows.abs().sum(1) + 1e-6
    worst = float(((rows.sum(1) - read).abs() / size).max())
    coarse = run.model.dtype not in (torch.float32, torch.float64)
    if not worst < (5e-2 if coarse else 1e-3):
        raise UnsupportedError(
            f"{run.model.info.architecture}: with frozen patterns and scales the edges into a node do not add up to "
            "what "
            f"it reads (off by {worst:.2g} of their sizes), so an attribution graph would not be exact on this model."
        )
    return worst


def _words(model: HookManager, tokens: Int[Tensor, " pos"]) -> tuple[str, ...]:
    if model.tokenizer is None:
        return tuple(f" {int(token)}" for token in tokens)
    return tuple(str(model.tokenizer.decode([int(token)])) for token in tokens)
