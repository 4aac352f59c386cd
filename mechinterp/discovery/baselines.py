"""Baselines that know nothing of the task: `random` and `weight-magnitude`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.settings import Setting
from mechinterp.discovery.method import REPLACEMENT, Job, Method
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
    writers: list[Tensor] = []
    embedding = model.bridge.embed.W_E.detach().to(dtype)
    writers += [_gram(embedding.T) / len(embedding)] * graph.n_inputs
    for layer in range(dims.n_layers):
        attention = layout.attention[layer]
        writers += [_gram(attention.post.project(head).T) for head in attention.W_O.to(dtype)]
        if dims.has_mlp:
            maps = layout.neurons(layer)
            writers.append(_gram(maps.post.project(maps.W_out.to(dtype)).T))
    written = torch.stack(writers).flatten(1)
    total = torch.zeros(graph.possible.shape, dtype=dtype)
    job.progress(0, dims.n_layers)
    for layer in range(dims.n_layers):
        norm = layout.attention[layer].norm
        for channel in "qkv":
            weights = layout.attention[layer].W[channel].to(dtype)
            read = torch.stack([_gram(norm.project_transposed(weight.T).T) for weight in weights])
            total[graph.channel_readers(layer, channel)] = (read.flatten(1) @ written.T).clamp(min=0).sqrt().cpu()
        mlp_norm = layout.mlp_norm[layer]
        if mlp_norm is not None:
            maps = layout.neurons(layer)
            inward = [maps.W_in] if maps.W_gate is None else [maps.W_gate, maps.W_in]
            read = _gram(mlp_norm.project_transposed(torch.cat(inward, 1).to(dtype).T).T).flatten()
            total[graph.mlp_readers(layer)] = (written @ read).clamp(min=0).sqrt().cpu()
        job.progress(layer + 1, dims.n_layers)
    read = _gram(layout.final_norm.project_transposed(layout.W_U.to(dtype).T).T).flatten()
    total[-1] = (written @ read).clamp(min=0).sqrt().cpu()
    total = torch.where(graph.possible, total, 0) * len(job.pairs)
    return job.scores("weight-magnitude", total, {}, additive=False)


def _gram(matrix: Float[Tensor, "d_model n"]) -> Float[Tensor, "d_model d_model"]:
    return matrix @ matrix.T


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
