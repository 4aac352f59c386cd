"""Baselines that know nothing of the task: `random` and `weight-magnitude`."""

from __future__ import annotations

import torch

from mechinterp.base.settings import Setting
from mechinterp.discovery.method import REPLACEMENT, Job, Method
from mechinterp.graphs.families.family import gram
from mechinterp.graphs.scores import Scores


def _random(job: Job) -> Scores:
    """Scores drawn from a normal distribution, the same for the same seed on every machine."""
    graph, seed = job.graph, int(job.settings["seed"])
    drawn = torch.randn(graph.n_units, generator=torch.Generator().manual_seed(seed))
    total = torch.where(graph.possible, drawn[graph.unit.clamp(min=0)] * len(job.pairs), 0)
    return job.scores("random", total, {}, additive=False)


def _weight_magnitude(job: Job) -> Scores:
    """The Frobenius norm of the product of the writer's output matrix and the reader's input matrix.

    Norms' weights and centring are part of a reader's matrix. The input writes the embedding matrix divided by the root
    of its rows, so that it is one typical token.
    """
    model, graph = job.model, job.graph
    layout, dims = model.layout, model.dims
    dtype = torch.promote_types(model.dtype, torch.float32)
    # |O R|^2 = <O'O, R R'>: one square matrix for each node.
    written = torch.stack([one for family in graph.families for one in family.written_grams(model)]).flatten(1)
    total = torch.zeros(graph.possible.shape, dtype=dtype)
    job.progress(0, dims.n_layers)
    for family in graph.families:
        grams = family.read_grams(model)
        for ports, rows in graph.sites_of(family):
            read = torch.stack([next(grams) for _ in ports.names]).flatten(1)
            total[rows] = (read @ written.T).clamp(min=0).sqrt().cpu()
        job.progress(family.layer + 1, dims.n_layers)
    read = gram(layout.final_norm.project_transposed(layout.W_U.to(dtype).T).T).flatten()
    total[-1] = (written @ read).clamp(min=0).sqrt().cpu()
    total = torch.where(graph.possible, total, 0) * len(job.pairs)
    return job.scores("weight-magnitude", total, {}, additive=False)


RANDOM = Method(
    "random",
    "Random scores: the baseline that every method must beat",
    "Mueller et al. 2025, arXiv 2504.13151",
    _random,
    {"seed": Setting(0, "the seed of the scores"), "replacement": REPLACEMENT},
    graphs="own",
)
WEIGHT_MAGNITUDE = Method(
    "weight-magnitude",
    "Size of the product of the writer's and the reader's weights; no data",
    "Elhage et al. 2021 (virtual weights), as a baseline",
    _weight_magnitude,
    {"replacement": REPLACEMENT},
)
