"""`mattr`: Matryoshka attribution. One learned strength per edge (or node) orders the circuits of all sizes at once.

At every step several sizes k are drawn, each gives soft top-k gates, and what is minimised is the mean KL divergence of
these circuits from the full model, so the order is trained for all sizes together, and every smaller circuit is part of
every larger one. With strengths s, a gate is sigmoid((s - t) / temperature), where the threshold t makes the gates sum
to k; the gradient goes through t, too.

Strengths live on the log axis of sizes: they begin at -log(rank / n) in the order of `warm_start`'s scores, so that an
edge enters at size e**-s * n, and the sizes are drawn evenly on that axis, between `smallest` and all edges, one in
each of `drawings` equal parts of it. Every second step runs the hard gates (the k best are kept, all others are cut),
as in the circuits that are evaluated, with the gradient of the soft ones (straight-through, Bengio et al. 2013, arXiv
1308.3432); the others run the soft gates.

Source: the Matryoshka attribution submission to MIB (Mueller et al. 2025, arXiv 2504.13151), named after Matryoshka
representations (Kusupati et al. 2022, arXiv 2205.13147). Deviations: sizes are drawn on the log axis instead of evenly,
several at a step; the KL divergence to the full model instead of cross-entropy to its answer; the warm start.

The score of an edge is log((n + 1) / rank) of its final rank, above 0 for all: not an effect on the metric.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.base.checkpoint import Checkpoint
from mechinterp.base.progress import no_progress
from mechinterp.base.settings import Setting
from mechinterp.discovery.gate_learning import MOST, SHARED, GateLearning
from mechinterp.discovery.method import METHODS, Job, Method, by_unit
from mechinterp.graphs.scores import Scores

LAST_LR = 0.1
"""The learning rate falls linearly to this share of itself."""


class TopKGates(torch.autograd.Function):
    """Gates whose sum is k, per drawing; the hard ones keep the gradient of the soft ones."""

    @staticmethod
    def forward(ctx: Any, strength: Tensor, sizes: Tensor, temperature: float, hard: bool) -> Tensor:
        soft = soft_top_k(strength, sizes, temperature)
        ctx.save_for_backward(soft)
        ctx.temperature = temperature
        return hard_top_k(strength, sizes).to(soft.dtype) if hard else soft

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (soft,) = ctx.saved_tensors
        slope = soft * (1 - soft) / ctx.temperature
        # The threshold moves with the strengths so that the sum stays k.
        shift = (gradient * slope).sum(1, keepdim=True) / slope.sum(1, keepdim=True).clamp(min=1e-12)
        return ((gradient - shift) * slope).sum(0), None, None, None


def soft_top_k(
    strength: Float[Tensor, " unit"], sizes: Float[Tensor, " drawing"], temperature: float
) -> Float[Tensor, "drawing unit"]:
    """sigmoid((strength - t) / temperature), with t such that the gates sum to the size (by bisection).

    >>> soft_top_k(torch.tensor([0.0, 1.0, 5.0]).double(), torch.tensor([1.0]).double(), 0.1).sum().round(decimals=6)
    tensor(1., dtype=torch.float64)
    """
    low = torch.full_like(sizes, float(strength.min()) - 40 * temperature)
    high = torch.full_like(sizes, float(strength.max()) + 40 * temperature)
    for _ in range(60):
        middle = (low + high) / 2
        too_many = torch.sigmoid((strength - middle[:, None]) / temperature).sum(1) > sizes
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return torch.sigmoid((strength - low[:, None]) / temperature)


def hard_top_k(strength: Float[Tensor, " unit"], sizes: Float[Tensor, " drawing"]) -> Bool[Tensor, "drawing unit"]:
    """The strongest units, as many as the size (rounded); ties go to the first."""
    rank = torch.empty_like(strength, dtype=torch.long)
    rank[strength.argsort(descending=True, stable=True)] = torch.arange(len(strength))
    return rank < sizes.round()[:, None]


class _Order:
    """The strengths of all runs, which take turns at the steps."""

    def __init__(self, job: Job, start: Tensor) -> None:
        asked = job.settings
        self.smallest = min(float(int(asked["smallest"])), float(job.graph.n_units))
        self.temperature = float(asked["temperature"])
        n_runs = int(asked["runs"])
        rows = torch.arange(len(job.pairs))[None]
        if n_runs > 1:
            generator = torch.Generator().manual_seed(int(asked["seed"]))
            rows = torch.randint(len(job.pairs), (n_runs, len(job.pairs)), generator=generator)
        self.names = [f"strength{i}" for i in range(n_runs)]
        parameters = {name: start.clone() for name in self.names}
        self.learning = GateLearning(job, parameters, runs=[job.pairs[drawn] for drawn in rows])

    def draw(self, step: int, generator: torch.Generator) -> Float[Tensor, "drawing unit"]:
        """Gates at sizes evenly on the log axis, one in each equal part of it; hard ones in every second step."""
        strength = self.learning.parameters[self.names[step % len(self.names)]]
        n = self.learning.drawings
        at = (torch.arange(n, dtype=torch.float64) + torch.rand(n, generator=generator, dtype=torch.float64)) / n
        sizes = self.smallest * (len(strength) / self.smallest) ** at
        hard = (step // len(self.names)) % 2 == 0
        return TopKGates.apply(strength, sizes, self.temperature, hard)  # pyright: ignore[reportReturnType]

    def values(self) -> Float[Tensor, "run unit"]:
        """log((n + 1) / rank) of every unit in every run."""
        found = torch.stack([self.learning.parameters[name].detach() for name in self.names])
        rank = found.argsort(dim=1, descending=True, stable=True).argsort(dim=1).double() + 1
        return ((found.shape[1] + 1) / rank).log()


def _mattr(job: Job) -> Scores:
    graph, start, before = job.graph, torch.zeros(job.graph.n_units, dtype=torch.float64), {}
    first = graph.first_of_unit
    if job.settings["warm_start"] != "none":
        method = METHODS.get(str(job.settings["warm_start"]))
        settings = {**method.defaults, "replacement": job.replacement}
        known = method.run(replace(job, settings=settings, progress=no_progress, checkpoint=Checkpoint()))
        total = by_unit(graph, method.name, known.total)
        strength, before = total[first[:, 0], first[:, 1]].abs().double(), known.cost
        rank = strength.argsort(descending=True, stable=True).argsort().double() + 1
        start = -(rank / len(rank)).log()
    order = _Order(job, start)
    order.learning.learn(order.draw, decay=lambda done: 1 - (1 - LAST_LR) * done)
    values = order.values()
    table = order.learning.table(values.mean(0)) * len(job.pairs)
    cost = {name: order.learning.cost[name] + before.get(name, 0) for name in order.learning.cost}
    samples = values[:, order.learning.unit] if len(values) > 1 else None
    return job.scores("mattr", table, cost, additive=False, samples=samples)


WARM_STARTS = ("none", "eap", "eap-ig", "relp", "cd-edges")
MATTR = Method(
    "mattr",
    "Matryoshka attribution: one learned order of the edges, for circuits of all sizes",
    "MIB submission 2026; Mueller et al. 2025, arXiv 2504.13151",
    _mattr,
    {
        **SHARED,
        "learning_steps": Setting(120, "steps of gradient descent of each run", least=1, most=MOST),
        "drawings": Setting(4, "sizes that are drawn in a step", least=1, most=MOST),
        "lr": Setting(0.2, "learning rate of Adam, on the log axis of sizes; it falls to a tenth", least=0),
        "runs": Setting(4, "runs on examples drawn again, whose orders are averaged; 1: on all", least=1, most=64),
        "smallest": Setting(4, "the smallest size that is drawn", least=1),
        "temperature": Setting(0.5, "of the soft gates, on the log axis of sizes", above=0, most=100),
        "warm_start": Setting("eap-ig", "the method whose order it begins with", choices=WARM_STARTS),
    },
    graphs="own",
)
