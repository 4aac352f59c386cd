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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.settings import Setting
from mechinterp.discovery.method import REPLACEMENT, Job, Method
from mechinterp.engines.mask_gradients import mask_gradients
from mechinterp.engines.readout import clean_logits
from mechinterp.engines.replacement import Values, build_replacement
from mechinterp.graphs.scores import Scores
from mechinterp.models.modes import Gradients
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
OBJECTIVES = ("kl", "metric")
MOST = 100_000
"""Steps; examples of a step; drawings of a step."""
SEEDS_APART = 1_000_003
"""Step i of seed s draws with seed s * SEEDS_APART + i."""
MOST_SEED = 2**63 // SEEDS_APART - 1
WARM_UP = 0.5
"""Share of the steps over which the target of edge-pruning falls from 1."""


@dataclass(frozen=True)
class _Block:
    """The examples of one step, with what every run of them shares."""

    chunks: Sequence[tuple[Pairs, Values, Tensor]]
    n: int


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


class _Learning:
    """Parameters, their optimiser and the blocks of examples of one run."""

    def __init__(self, job: Job) -> None:
        self.job, graph, asked = job, job.graph, job.settings
        self.n_steps, self.seed = int(asked["learning_steps"]), int(asked["seed"])
        self.objective = str(asked["objective"])
        if self.objective == "metric" and not job.metric.differentiable:
            raise InputError(f"Metric {job.metric.name!r} has no gradient; learn masks with objective=kl.")
        start, lr = float(asked["start"]), float(asked["lr"])
        self.log_alpha = torch.full((graph.n_units,), start, dtype=torch.float64, requires_grad=True)
        self.multipliers = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        groups = [{"params": [self.log_alpha]}, {"params": [self.multipliers], "maximize": True}]
        self.optimizer = torch.optim.Adam(groups, lr=lr)
        self.unit = graph.unit[graph.possible]
        self.drawings = int(asked["drawings"])
        self.blocks = self._blocks(int(asked["examples"]))
        self.n_runs = 0

    def _blocks(self, size: int) -> list[_Block]:
        job = self.job
        replacement = build_replacement(job.replacement, job.model, job.graph, job.pairs, job.batch_size)
        order = torch.randperm(len(job.pairs), generator=torch.Generator().manual_seed(self.seed)).tolist()
        shuffled = job.pairs[order].to(job.model.device)
        blocks: list[_Block] = []
        at_once = max(1, job.batch_size // self.drawings)  # the drawings run side by side
        for block in shuffled.chunks(size):
            chunks = [(chunk, replacement.on(chunk), clean_logits(job.model, chunk)) for chunk in block.chunks(at_once)]
            blocks.append(_Block(chunks, len(block)))
        return blocks

    def learn(self, penalty: Callable[[Tensor, Tensor, int], Tensor]) -> Float[Tensor, " unit"]:
        """The log alphas after all steps. `penalty` is of the share of open gates, the multipliers and the step."""
        done = self._resume()
        self.job.progress(done, self.n_steps)
        while done < self.n_steps:
            self.optimizer.zero_grad()
            penalty(open_chance(self.log_alpha).mean(), self.multipliers, done).backward()
            generator = torch.Generator().manual_seed(self.seed * SEEDS_APART + done)
            shape = (self.drawings, len(self.log_alpha))
            noise = torch.rand(shape, generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
            gates = hard_concrete(self.log_alpha.expand(shape), noise)
            gates.backward(self._gate_gradient(gates.detach(), self.blocks[done % len(self.blocks)]))
            self.n_runs += self.drawings * self.blocks[done % len(self.blocks)].n
            self.optimizer.step()
            done += 1
            self.job.checkpoint.save(self._state(done))
            self.job.progress(done, self.n_steps)
        return self.log_alpha.detach()

    def _state(self, done: int) -> dict[str, Tensor]:
        state = {"done": torch.tensor(done), "n_runs": torch.tensor(self.n_runs)}
        for name, parameter in (("log_alpha", self.log_alpha), ("multipliers", self.multipliers)):
            state[name] = parameter.detach()
            kept = self.optimizer.state[parameter]
            state |= {f"{name}.{key}": value for key, value in kept.items()}
        return state

    def _resume(self) -> int:
        like = {"done": torch.tensor(0), "n_runs": torch.tensor(0)}
        for name, parameter in (("log_alpha", self.log_alpha), ("multipliers", self.multipliers)):
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            like |= {name: parameter, f"{name}.step": torch.tensor(0.0)}
            like |= {f"{name}.{key}": value for key, value in moments.items()}
        saved = self.job.checkpoint.load(like, {"done": self.n_steps})
        if saved is None:
            return 0
        with Gradients(False) as off, off:
            for name, parameter in (("log_alpha", self.log_alpha), ("multipliers", self.multipliers)):
                parameter.copy_(saved[name])
                keys = {key.partition(".")[2]: value for key, value in saved.items() if key.startswith(name + ".")}
                self.optimizer.state[parameter] = {key: value.clone() for key, value in keys.items()}
        self.n_runs = int(saved["n_runs"])
        return int(saved["done"])

    def _gate_gradient(self, gates: Float[Tensor, "drawing unit"], block: _Block) -> Float[Tensor, "drawing unit"]:
        """The derivative in every gate of the mean loss over examples and drawings."""
        job, possible, total = self.job, self.job.graph.possible, torch.zeros_like(gates)
        metric = get_metric("kl_to_clean") if self.objective == "kl" else job.metric
        cut = torch.zeros(len(gates), *possible.shape, dtype=torch.float64)
        cut[:, possible] = 1 - gates[:, self.unit]
        for chunk, values, reference in block.chunks:

            def loss(logits: Tensor, chunk: Pairs = chunk, reference: Tensor = reference) -> Tensor:
                return torch.stack([-metric.direction * metric(drawn, chunk, reference) for drawn in logits])

            _, gradient = mask_gradients(job.model, job.graph, chunk, cut, values, loss)
            total.index_add_(1, self.unit, -gradient.cpu().double()[:, possible] / (block.n * len(gates)))
        return total

    def scores(self, method: str, log_alpha: Float[Tensor, " unit"]) -> Scores:
        """The chance of every gate that it is more than half open."""
        graph, n = self.job.graph, len(self.job.pairs)
        table = self.job.zeros()
        table[graph.possible] = torch.sigmoid(log_alpha)[self.unit].to(table.dtype) * n
        cost = {"forwards": 2 * n + self.n_runs, "backwards": self.n_runs}
        return self.job.scores(method, table, cost, additive=False)


def _edge_pruning(job: Job) -> Scores:
    target, learning = float(job.settings["target"]), _Learning(job)

    def lagrangian(share: Tensor, multipliers: Tensor, step: int) -> Tensor:
        fallen = min(1.0, (step + 1) / (WARM_UP * learning.n_steps))
        excess = share - (1 + fallen * (target - 1))
        return multipliers[0] * excess + multipliers[1] * excess**2

    return learning.scores("edge-pruning", learning.learn(lagrangian))


def _subnetwork_probing(job: Job) -> Scores:
    penalty, learning = float(job.settings["penalty"]), _Learning(job)
    found = learning.learn(lambda share, multipliers, step: penalty * share + 0 * multipliers.sum())
    return learning.scores("subnetwork-probing", found)


_SHARED = {
    "replacement": REPLACEMENT,
    "learning_steps": Setting(300, "steps of gradient descent", least=1, most=MOST),
    "examples": Setting(4, "examples of a step", least=1, most=MOST),
    "drawings": Setting(8, "drawings of all gates in a step", least=1, most=MOST),
    "lr": Setting(0.1, "learning rate of Adam", least=0),
    "start": Setting(2.0, "log alpha of every gate at the beginning"),
    "objective": Setting("kl", "what is minimised", choices=OBJECTIVES),
    "seed": Setting(0, "the seed of the examples' order and the drawings", least=0, most=MOST_SEED),
}
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
