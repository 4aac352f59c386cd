"""`cd`: circuit discovery by contextual decomposition, from the logits back.

Source: Hsu et al. 2024 (arXiv 2407.00886; ICLR 2025) and its public code. Every node is decomposed to the logits; the
strongest become targets; every node is decomposed to the targets' inputs; the strongest of these are the next targets;
and so on until no new node is found. As in the paper, a score counts all that a node gives to a target, on any path,
so the score of an edge is not that of the direct edge alone. Deviations: MLPs are nodes too (`mlps`); a target's
inputs are scored by channel, so that the result has edges; an edge is weighed by the strength with which its target
was found, so that edges of all rounds are on one scale, that of the logits; and presets other than the authors' own
can be chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.analysis.contextual import decompose
from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress
from mechinterp.base.settings import Parameter, Setting
from mechinterp.discovery.method import REPLACEMENT, Job, Method
from mechinterp.engines.decomposition.rules import PRESETS
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.means import MEANS, site_means
from mechinterp.engines.replacement import build_replacement
from mechinterp.graphs.circuit import on_paths
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.scores import Scores
from mechinterp.models.components import Part, parse_part
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.pairs import Pairs

SCORES = ("dot", "l1")
"""Of a target's input t = r + i with replacement m: dot is <r, t - m> / <t - m, t - m>, signed; l1 is |r| / (|r| +
|i|), at least 0. Both are sums over tokens and examples, numerator and denominator each."""
CHANNELS = ("qkv", "q", "k", "v", "z")
REPLACEMENTS = {"corrupt": "pair", "mean": "mean", "mean-positional": "mean-positional", "zero": "zero"}
MEMORY = 2**28
"""Bytes of relevant parts at targets that are kept at a time."""


@dataclass
class Search:
    """The state of one discovery."""

    model: HookManager
    graph: Graph
    pairs: Pairs
    settings: Mapping[str, Parameter]
    progress: Progress
    sources: tuple[str, ...]
    table: Float[Tensor, "reader writer"]
    means: Mapping[Site, Tensor]
    """Of every source's and every target's site, when the replacement is a mean; computed once."""
    forwards: float = 0.0
    rounds: int = 0
    strength: dict[str, float] = field(default_factory=dict[str, float])
    """Per node of the circuit, how strongly it was found; the sign is that of its effect."""

    def decompose(self, pairs: Pairs, targets: list[str]) -> Mapping[str, Tensor]:
        """The relevant part of each target for every source, `[source, example, ...]`; NaN at padding."""
        kind = REPLACEMENTS[str(self.settings["replacement"])]
        found = decompose(
            self.model,
            pairs,
            list(self.sources),
            self.means if kind in MEANS else None,
            targets=list(targets),
            preset=str(self.settings["preset"]),
            replacement=kind,
        )
        self.forwards += found.cost["forwards"] * len(pairs)
        self.totals = found.total
        return {name: value[:, 0] for name, value in found.relevant.items()}


def _cd(job: Job) -> Scores:
    model, graph, settings, batch_size, progress = job.model, job.graph, job.settings, job.batch_size, job.progress
    _check(job.metric, graph)
    pairs = job.pairs.to(model.device)
    dims = model.dims
    sources = tuple(name for name in graph.writers if settings["mlps"] or not name.startswith("m"))
    table = torch.zeros(graph.possible.shape, dtype=torch.promote_types(model.dtype, torch.float32))
    means = _means(model, pairs, settings, batch_size)
    search = Search(model, graph, pairs, settings, progress, sources, table, means)
    search.forwards += len(pairs) * (str(settings["replacement"]) in MEANS)
    progress(0, dims.n_layers + 1)
    first = _logit_scores(search, batch_size)
    columns = [graph.writer_index[name] for name in sources]
    table[-1, columns] = first
    frontier = _strongest(search, {name: float(value) for name, value in zip(sources, first, strict=True)})
    while frontier:
        search.rounds += 1
        progress(min(search.rounds, dims.n_layers), dims.n_layers + 1)
        frontier = _strongest(search, _score_inputs(search, frontier, batch_size))
    kept = [*graph.inputs, *search.strength]
    if settings["prune"]:
        kept = _pruned(search, kept, job.metric, batch_size)
    mask = _circuit(search, kept)
    progress(dims.n_layers + 1, dims.n_layers + 1)
    cost = {"forwards": round(search.forwards), "backwards": 0}
    total = torch.where(mask, table, 0) * len(pairs)
    return job.scores("cd", total, cost, additive=False)


def _means(
    model: HookManager, pairs: Pairs, settings: Mapping[str, Parameter], batch_size: int
) -> Mapping[Site, Tensor]:
    kind = REPLACEMENTS[str(settings["replacement"])]
    if kind not in MEANS:
        return {}
    kinds = ["q", "k", "v", "z", *(["mlp_in", "mlp_out"] if model.dims.has_mlp else [])]
    sites = [Site("resid_pre", 0), *(Site(name, layer) for layer in range(model.dims.n_layers) for name in kinds)]
    return site_means(model, pairs, sites, kind, batch_size)


def _check(metric: Metric, graph: Graph) -> None:
    if metric.name != "logit_diff":
        raise InputError(f"'cd' decomposes logits, so its metric is 'logit_diff'; got {metric.name!r}.")
    if graph.split_input:
        raise InputError("'cd' takes the input as one node; build the graph without split_input.")


def between(graph: Graph, nodes: list[str]) -> Bool[Tensor, "reader writer"]:
    """Every edge from one of the nodes to an input of another, or to the logits."""
    chosen = torch.tensor([name in set(nodes) for name in graph.writers])
    reads = (graph.feeds & chosen).any(1)
    reads[-1] = True
    return graph.possible & chosen[None, :] & reads[:, None]


def _circuit(search: Search, nodes: list[str]) -> Bool[Tensor, "reader writer"]:
    """The scored edges between the nodes that are on a path from the input to the logits."""
    return on_paths(search.graph, between(search.graph, nodes) & (search.table != 0))


def _logit_scores(search: Search, batch_size: int) -> Float[Tensor, " source"]:
    """The mean relevance of every source for the answers' direction, in logits."""
    found: list[Tensor] = []
    for chunk in search.pairs.chunks(batch_size):
        found.append(search.decompose(chunk, ["answers"])["answers"])
    return torch.cat(found, -1).mean(-1).cpu().to(search.table.dtype)


def _strongest(search: Search, scores: Mapping[str, float]) -> list[str]:
    """The `top` strongest nodes; those that are not in the circuit yet become the next targets."""
    nodes = [name for name in scores if name not in search.graph.inputs and scores[name] != 0]
    ordered = sorted(nodes, key=lambda name: -abs(scores[name]))[: int(search.settings["top"])]
    new = [name for name in ordered if name not in search.strength]
    search.strength.update({name: scores[name] for name in new})
    return new


def readers_of(search: Search, nodes: list[str]) -> dict[int, tuple[str, float]]:
    """Per reader of the nodes, the target that is read for it and the node's strength (the strongest, if shared)."""
    graph, channels = search.graph, str(search.settings["channels"])
    found: dict[int, tuple[str, float]] = {}
    for node in nodes:
        strength = search.strength[node]
        for row in graph.feeds[:, graph.writer_index[node]].nonzero().flatten().tolist():
            reader = graph.readers[row]
            if reader == node:
                target = f"mlp_in.{node[1:]}"
            elif channels == "z":
                target = node
            elif reader[-2] in channels:
                target = reader
            else:
                continue
            stronger = _strongest_of(search, row)
            if stronger not in nodes or (row in found and abs(found[row][1]) >= abs(strength)):
                continue  # a key/value head that is shared was scored, or is, with the strongest node that it feeds
            found[row] = (target, strength)
    return found


def _strongest_of(search: Search, row: int) -> str:
    """The strongest node of the circuit that a reader feeds."""
    fed = [search.graph.writers[i] for i in search.graph.feeds[row].nonzero().flatten().tolist()]
    return max((name for name in fed if name in search.strength), key=lambda name: abs(search.strength[name]))


def _score_inputs(search: Search, nodes: list[str], batch_size: int) -> dict[str, float]:
    """Scores the edges into the nodes; returns every source's strongest of these."""
    readers = readers_of(search, nodes)
    targets = sorted({target for target, _ in readers.values()})
    shares: dict[str, Tensor] = {}
    dims = search.model.dims
    each = len(search.sources) * search.pairs.clean.shape[1] * dims.d_model * 8
    rows = max(1, min(batch_size, MEMORY // each))
    at_once = max(1, MEMORY // (each * rows))
    for low in range(0, len(targets), at_once):
        shares |= _shares(search, targets[low : low + at_once], rows)
    columns = [search.graph.writer_index[name] for name in search.sources]
    best = dict.fromkeys(search.sources, 0.0)
    for row, (target, strength) in readers.items():
        scores = torch.where(search.graph.possible[row, columns], strength * shares[target], 0)
        search.table[row, columns] = scores.to(search.table.dtype)
        for name, score in zip(search.sources, scores.tolist(), strict=True):
            best[name] = score if abs(score) > abs(best[name]) else best[name]
    return best


def _shares(search: Search, targets: list[str], rows: int) -> dict[str, Float[Tensor, " source"]]:
    """Every source's share of every target, by setting `score`."""
    parts = {target: parse_part(search.model, target) for target in targets}
    kind = REPLACEMENTS[str(search.settings["replacement"])]
    sites = list(dict.fromkeys(part.site for part in parts.values()))
    above: dict[str, Tensor] = {target: torch.zeros(()) for target in targets}
    below: dict[str, Tensor] = {target: torch.zeros(()) for target in targets}
    for chunk in search.pairs.chunks(rows):
        base = search.means if kind != "pair" else _corrupt_values(search, chunk, sites)
        relevant = search.decompose(chunk, targets)
        real = chunk.mask[..., None]
        for target, part in parts.items():
            total = torch.where(real, search.totals[target], 0)
            r = torch.where(real, relevant[target], 0)
            if search.settings["score"] == "l1":
                upper, lower = r.abs(), r.abs() + (total - r).abs()
            else:
                away = total - torch.where(real, _of_unit(base[part.site], part), 0) if kind != "zero" else total
                upper, lower = r * away, away.pow(2)[None]
            above[target] = above[target] + upper.flatten(1).sum(1).cpu()
            below[target] = below[target] + lower.flatten(1).sum(1).cpu()
    return {t: torch.where(below[t] > 0, above[t] / torch.where(below[t] > 0, below[t], 1), 0) for t in targets}


def _corrupt_values(search: Search, chunk: Pairs, sites: list[Site]) -> Mapping[Site, Tensor]:
    search.forwards += len(chunk)
    run = search.model.run(chunk.corrupt, chunk.mask, record=sites, stop=Site("resid_final"))
    return {site: run.values[site] for site in sites}


def _of_unit(value: Tensor, part: Part) -> Tensor:
    return value if part.unit is None else value[:, :, part.unit]


def _pruned(search: Search, kept: list[str], metric: Metric, batch_size: int) -> list[str]:
    """Drops nodes, the weakest first, as long as the circuit loses less than `tolerance` of the metric's range."""
    graph, model = search.graph, search.model
    replacement = build_replacement(str(search.settings["replacement"]), model, graph, search.pairs, batch_size)

    def value(nodes: list[str] | None) -> float:
        cut = torch.zeros_like(graph.possible) if nodes is None else graph.possible & ~_circuit(search, nodes)
        found = run_edges(
            model, graph, search.pairs, cut, metric=metric, replacement=replacement, batch_size=batch_size
        )
        search.forwards += 2 * len(search.pairs)
        return float(found.mean())

    allowed = float(str(search.settings["tolerance"])) * abs(value(None) - value([]))
    now = value(kept)
    for node in sorted(search.strength, key=lambda name: abs(search.strength[name])):
        without = [name for name in kept if name != node]
        then = value(without)
        if then >= now - allowed:
            kept, now = without, max(now, then)
    return kept


CD = Method(
    "cd",
    "Contextual decomposition of every node, from the logits back",
    "Hsu et al. 2024, arXiv 2407.00886",
    _cd,
    {
        "replacement": REPLACEMENT,
        "preset": Setting("frozen-remove", "the rules of the decomposition", choices=tuple(PRESETS)),
        "top": Setting(8, "nodes taken in each round", least=1),
        "score": Setting("dot", "how much of a target's input is relevant", choices=SCORES),
        "channels": Setting("qkv", "which inputs of a head are targets", choices=CHANNELS),
        "mlps": Setting(True, "whether MLPs are nodes"),
        "prune": Setting(False, "whether nodes that do not matter are dropped at the end"),
        "tolerance": Setting(0.01, "the loss that dropping a node may cost, as a share of the metric's range", least=0),
    },
    threshold=0.0,
)
