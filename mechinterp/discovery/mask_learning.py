"""`edge-pruning` and `subnetwork-probing`: a mask over the edges (or nodes) learned by gradient descent.

Every edge has a gate between cut (0) and kept (1), drawn anew at each step from a hard-concrete distribution (Louizos
et al. 2018, arXiv 1712.01312: beta 2/3, stretched to [-0.1, 1.1]) with one parameter, `log alpha`; cut edges carry
their replacement. What is minimised is the KL divergence of the circuit from the full model at the answers, with

* `edge-pruning` (Bhaskar et al. 2024, arXiv 2406.16778): a Lagrangian that brings the expected share of open gates to
  `target`, which falls linearly over the first half of the steps;
* `subnetwork-probing` (Cao et al. 2021, arXiv 2104.03514, as adapted by Conmy et al. 2023): `penalty` times the
  expected share of open gates. The papers' masks are of nodes: build the graph with `level="node"` for those.

The score of an edge is sigmoid(log alpha), the chance that its gate is more than half open, and above 1/2 where the
gate without noise is: not an effect on the metric. `target` and `penalty` are of gates that are open at all
(`open_chance`). Deviations: each step takes several drawings of all gates (`drawings`) on few examples; edge-pruning's
second set of gates, of whole nodes, is left out; exact replacement instead of weights' own masks.

Why several drawings: where a model has flat steps (a sharp attention, a ReLU between two thresholds), the slope of the
loss in a gate is 0 in nearly all drawings and huge in a few. With one drawing a step the penalty, which is always
there, closes such gates before a slope is seen. 8 drawings of 4 examples cost what one drawing of 32 does.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.settings import Setting
from mechinterp.discovery.gate_learning import SHARED, GateLearning
from mechinterp.discovery.method import Job, Method
from mechinterp.graphs.scores import Scores

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
WARM_UP = 0.5
"""Share of the steps over which the target of edge-pruning falls from 1."""


def hard_concrete(
    log_alpha: Float[Tensor, "*unit"], noise: Float[Tensor, "*unit"] | None = None
) -> Float[Tensor, "*unit"]:
    """Gates in [0, 1] for uniform noise in (0, 1); without noise the gates that are kept at the end."""
    if noise is None:
        soft = torch.sigmoid(log_alpha)
    else:
        soft = torch.sigmoid((noise.log() - (1 - noise).log() + log_alpha) / BETA)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def open_chance(log_alpha: Float[Tensor, "*unit"]) -> Float[Tensor, "*unit"]:
    """The chance that a drawn gate is not 0.

    >>> float(open_chance(torch.tensor([0.0]))) > 0.5
    True
    """
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


class _Masks:
    """The hard-concrete gates of one run: `log_alpha`, and the multipliers of a Lagrangian."""

    def __init__(self, job: Job) -> None:
        start = float(job.settings["start"])
        self.log_alpha = torch.full((job.graph.n_units,), start, dtype=torch.float64)
        self.multipliers = torch.zeros(2, dtype=torch.float64)
        parameters = {"log_alpha": self.log_alpha, "multipliers": self.multipliers}
        self.learning = GateLearning(job, parameters, maximized=("multipliers",))

    def draw(self, step: int, generator: torch.Generator) -> Float[Tensor, "drawing unit"]:
        shape = (self.learning.drawings, len(self.log_alpha))
        noise = torch.rand(shape, generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        return hard_concrete(self.log_alpha.expand(shape), noise)

    @property
    def share(self) -> Float[Tensor, ""]:
        """The expected share of open gates."""
        return open_chance(self.log_alpha).mean()

    def scores(self, method: str) -> Scores:
        """The chance of every gate that it is more than half open."""
        job = self.learning.job
        table = self.learning.table(torch.sigmoid(self.log_alpha.detach())) * len(job.pairs)
        return job.scores(method, table, self.learning.cost, additive=False)


def _edge_pruning(job: Job) -> Scores:
    target, masks = float(job.settings["target"]), _Masks(job)

    def lagrangian(step: int) -> Tensor:
        fallen = min(1.0, (step + 1) / (WARM_UP * masks.learning.n_steps))
        excess = masks.share - (1 + fallen * (target - 1))
        return masks.multipliers[0] * excess + masks.multipliers[1] * excess**2

    masks.learning.learn(masks.draw, lagrangian)
    return masks.scores("edge-pruning")


def _subnetwork_probing(job: Job) -> Scores:
    penalty, masks = float(job.settings["penalty"]), _Masks(job)
    masks.learning.learn(masks.draw, lambda step: penalty * masks.share + 0 * masks.multipliers.sum())
    return masks.scores("subnetwork-probing")


_SHARED = {**SHARED, "start": Setting(2.0, "log alpha of every gate at the beginning")}
EDGE_PRUNING = Method(
    "edge-pruning",
    "A mask over edges learned by gradient descent, to a target share of edges",
    "Bhaskar et al. 2024, arXiv 2406.16778",
    _edge_pruning,
    {**_SHARED, "target": Setting(0.1, "the share of edges to keep", above=0, below=1)},
    threshold=0.5,
    graphs="own",
)
SUBNETWORK_PROBING = Method(
    "subnetwork-probing",
    "A mask learned by gradient descent, each open gate at a price",
    "Cao et al. 2021, arXiv 2104.03514; Conmy et al. 2023, arXiv 2304.14997",
    _subnetwork_probing,
    {**_SHARED, "penalty": Setting(1.0, "the price of an open gate", above=0)},
    threshold=0.5,
    graphs="own",
)
