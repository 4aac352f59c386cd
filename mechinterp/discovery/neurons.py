"""`top_neurons`: the neurons that matter most, as separate nodes of a graph."""

from __future__ import annotations

import torch
from torch import Tensor

from mechinterp.analysis.attribution import attribution_patching
from mechinterp.base.batches import over_batches
from mechinterp.base.errors import InputError
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs


def top_neurons(
    model: HookManager,
    pairs: Pairs,
    n: int,
    *,
    metric: MetricLike = "logit_diff",
    method: str = "eap-ig-inputs",
    steps: int = 5,
    batch_size: int = 32,
) -> dict[int, tuple[int, ...]]:
    """The `n` neurons of largest estimated effect (either sign), by layer: `neurons` of `build_graph`.

    The effect is that of `attribution_patching` of `mlp_post`, summed over positions, mean over examples. A graph of
    all neurons does not fit for most models: its tables hold readers x writers (37 thousand writers for GPT-2 small),
    so only the strongest become nodes. Ties go to the earlier neuron.

    Raises InputError for more neurons than the model has, UnsupportedError for MLPs without neurons.

    Args:
        model: The model.
        pairs: The examples.
        n: How many neurons.
        metric: A metric or its name.
        method: As in `attribution_patching`.
        steps: Integration steps, as in `attribution_patching`.
        batch_size: How many examples are run at once.
    """

    def effects(chunk: Pairs, _: slice) -> dict[str, Tensor]:
        grid = attribution_patching(model, chunk, "mlp_post", method=method, steps=steps, metric=metric)
        return {"effect": grid.values.nansum(2).sum(-1).cpu()}  # (layer, neuron, pos, example)

    total = over_batches(pairs, batch_size, effects, {"effect": "sum"})["effect"]
    if type(n) is not int or not 1 <= n <= total.numel():
        raise InputError(f"The model has {total.numel()} neurons; got {n!r} to take.")
    best = total.flatten().abs().argsort(descending=True, stable=True)[:n]
    layers, neurons = best // total.shape[1], best % total.shape[1]
    return {layer: tuple(sorted(neurons[layers == layer].tolist())) for layer in torch.unique(layers).tolist()}
