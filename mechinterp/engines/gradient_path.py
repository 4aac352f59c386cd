"""GradPath: a path in the space of the inputs that descends from the clean output to the corrupt one.

From the clean input each step of a fixed length goes down the gradient of the squared distance between the logits there
and those of the corrupt prompt, so that the path leaves regions in which the output is flat.

Source: Zhang et al. 2025, EAP-GP (arXiv 2502.06852), equation 8, with the path of the inputs that all nodes share.
Deviations: every example has steps of its own, whose length does not depend on its batch; the distance is that of the
logits at the answer positions, where the metric reads, not at all positions.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.engines.readout import FINAL, answer_logits
from mechinterp.engines.replacement import input_sites
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.token_positions import take_positions
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import NO_ENTRY
from mechinterp.tasks.pairs import Pairs


def gradient_path(
    model: HookManager, graph: Graph, pairs: Pairs, steps: int, length: float = 1.0
) -> list[dict[Site, Tensor]]:
    """The values of the graph's input sites at the points after each step, for `edge_gradients(points=)`.

    An example whose gradient is 0 (its outputs are equal) stays where it is. Cost: a forward of the corrupt prompts,
    and a forward and a backward per step.

    Args:
        model: The model.
        graph: Its graph, which says what the inputs are.
        pairs: The examples, in one batch.
        steps: How many points.
        length: The length of a step, in the units of the residual stream.
    """
    pairs = pairs.to(model.device)
    sites = input_sites(graph)
    run = model.run(pairs.clean, pairs.mask, record=sites, stop=sites[-1])
    target = answer_logits(model, pairs.corrupt, pairs)
    valid = (pairs.answer_pos != NO_ENTRY)[..., None]

    def distance(resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " batch"]:
        logits = model.layout.unembed(take_positions(resid, pairs.answer_pos))
        return torch.where(valid, logits - target, 0).square().sum((1, 2))

    point = {site: run.values[site] for site in sites}
    points: list[dict[Site, Tensor]] = []
    for _ in range(steps):
        run = model.run(
            pairs.clean,
            pairs.mask,
            interventions=[Intervention(site, value) for site, value in point.items()],
            grads=list(point),
            loss=distance,
            stop=FINAL,
        )
        slopes = {site: run.grads[site].to(torch.promote_types(model.dtype, torch.float32)) for site in point}
        norm = torch.stack([slope.flatten(1).square().sum(1) for slope in slopes.values()]).sum(0).sqrt()
        unit = torch.where(norm > 0, length / torch.where(norm > 0, norm, 1), 0)[:, None, None]
        point = {site: (value - unit * slopes[site]).to(value.dtype) for site, value in point.items()}
        points.append(point)
    return points
