"""`exact`: every edge replaced alone, by the exact engine. The reference that the other methods estimate."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mechinterp.discovery.method import METHODS, Method, Progress
from mechinterp.edges import answer_logits, edge_logits
from mechinterp.graph import Graph
from mechinterp.hooks import HookManager
from mechinterp.metrics import Metric
from mechinterp.replacement import build_replacement
from mechinterp.scores import Parameter, Scores
from mechinterp.tasks.pairs import Pairs

EDGES_AT_ONCE = 64
"""Masks made at a time: neighbours in this order cut the same layer, so they share the run before it."""


def _exact(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    metric: Metric,
    settings: Mapping[str, Parameter],
    batch_size: int,
    progress: Progress,
) -> Scores:
    """Drop of the metric when one edge is cut, edge by edge; edges into one layer share the run before it."""
    kind = str(settings["replacement"])
    replacement = build_replacement(kind, model, graph, pairs, batch_size)
    edges = graph.possible.nonzero()
    total = torch.zeros(graph.possible.shape, dtype=torch.promote_types(model.dtype, torch.float32))
    done, n_runs = 0, len(edges) * len(pairs)
    progress(0, n_runs)
    for chunk in pairs.to(model.device).chunks(batch_size):
        clean = answer_logits(model, chunk.clean, chunk)
        full = metric(clean, chunk, clean)
        values = replacement.on(chunk)
        for some in edges.split(EDGES_AT_ONCE):
            cut = torch.zeros(len(some), *graph.possible.shape)
            cut[torch.arange(len(some)), some[:, 0], some[:, 1]] = 1
            for (r, w), logits in zip(some.tolist(), edge_logits(model, graph, chunk, cut, values), strict=True):
                drop = metric.direction * (full - metric(logits, chunk, clean)).sum()
                total[r, w] += drop.cpu().to(total.dtype)
            done += len(some) * len(chunk)
            progress(done, n_runs)
    cost = {"forwards": n_runs + 2 * len(pairs), "backwards": 0}
    return Scores(graph, total, len(pairs), "exact", metric.name, kind, dict(settings), cost)


METHODS.register(
    "exact",
    Method(
        "exact",
        "Every edge replaced alone (as many forwards as edges)",
        "activation patching of single edges; Conmy et al. 2023, arXiv 2304.14997, for the edges",
        _exact,
        {"replacement": "corrupt"},
    ),
)
