"""Gradient descent on gates: each edge (or node) has a gate between cut (0) and kept (1), and a loss over drawn gates.

What the gates are drawn from is the method's: `mask_learning.py` (hard concrete gates with a price or a target) and
`matryoshka.py` (soft top-k gates at random sizes). Here are the examples of each step, the exact gradient of the loss
in every gate, Adam, and the state of a killed run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.checkpoint import Checkpoint
from mechinterp.base.errors import InputError
from mechinterp.base.settings import Setting
from mechinterp.base.shards import ALONE, State, agree, current, fold_shared, relayed, share, sharing
from mechinterp.discovery.method import REPLACEMENT, Job
from mechinterp.engines.mask_gradients import examples_at_once, mask_gradients
from mechinterp.engines.readout import clean_logits
from mechinterp.engines.replacement import Values, build_replacement
from mechinterp.models.modes import Gradients
from mechinterp.tasks.metrics import Metric, get_metric
from mechinterp.tasks.pairs import Pairs

OBJECTIVES = ("kl", "metric")
MOST = 100_000
"""Steps; examples of a step; drawings of a step."""
SEEDS_APART = 1_000_003
"""Step i of seed s draws with seed s * SEEDS_APART + i."""
MOST_SEED = 2**63 // SEEDS_APART - 1
SHARED = {
    "replacement": REPLACEMENT,
    "learning_steps": Setting(300, "steps of gradient descent", least=1, most=MOST),
    "examples": Setting(4, "examples of a step", least=1, most=MOST),
    "drawings": Setting(8, "drawings of all gates in a step", least=1, most=MOST),
    "lr": Setting(0.1, "learning rate of Adam", least=0),
    "objective": Setting("kl", "what is minimised", choices=OBJECTIVES),
    "seed": Setting(0, "the seed of the examples' order and the drawings", least=0, most=MOST_SEED),
}
"""The settings that all learned masks have."""


KEPT_BYTES = 2**29
"""Replacements and logits of the examples are kept if they take no more; otherwise each step makes its own again."""


@dataclass(frozen=True)
class Block:
    """Some examples of a step, with what every run of them shares: replacements and logits of the full model."""

    pairs: Pairs
    values: Values
    reference: Tensor


class GateLearning:
    """Parameters, their optimiser and the examples of each step.

    Args:
        job: What the method was given; its settings have those of `SHARED`.
        parameters: What is learned, in float64, by name.
        maximized: The names of the parameters that ascend.
        runs: The examples of several runs that take turns at the steps, each with the parameter of its number; by
            default one run with all examples. Processes that share the work take some runs each.
    """

    def __init__(
        self,
        job: Job,
        parameters: Mapping[str, Tensor],
        *,
        maximized: Sequence[str] = (),
        runs: Sequence[Pairs] | None = None,
    ) -> None:
        self.job, asked = job, job.settings
        runs = [job.pairs] if runs is None else runs
        self.n_steps, self.seed = int(asked["learning_steps"]) * len(runs), int(asked["seed"])
        objective = str(asked["objective"])
        if objective == "metric" and not job.metric.differentiable:
            raise InputError(f"Metric {job.metric.name!r} has no gradient; learn masks with objective=kl.")
        self.metric: Metric = get_metric("kl_to_clean") if objective == "kl" else job.metric
        self.parameters = {name: value.requires_grad_() for name, value in parameters.items()}
        groups = [{"params": [value], "maximize": name in maximized} for name, value in self.parameters.items()]
        self.lr = float(asked["lr"])
        self.optimizer = torch.optim.Adam(groups, lr=self.lr)
        self.unit = job.graph.unit[job.graph.possible]
        self.drawings = int(asked["drawings"])
        self.replacement = build_replacement(job.replacement, job.model, job.graph, job.pairs, job.batch_size)
        self.turns = [self._shuffled(pairs, number) for number, pairs in enumerate(runs)]
        self.kept: dict[tuple[int, int, int], Block] = {}
        self.keeps = sum(map(len, runs)) * self._bytes_of_example() <= KEPT_BYTES
        self.n_runs = 0

    def _shuffled(self, pairs: Pairs, number: int) -> list[Pairs]:
        """The examples of the steps of one run, in random order."""
        generator = torch.Generator().manual_seed(self.seed + number * SEEDS_APART)
        order = torch.randperm(len(pairs), generator=generator).tolist()
        return list(pairs[order].to(self.job.model.device).chunks(int(self.job.settings["examples"])))

    def _bytes_of_example(self) -> int:
        """About what the replacements and the logits of one example take."""
        dims, pairs = self.job.model.dims, self.job.pairs
        writes = pairs.clean.shape[1] * dims.d_model * (1 + 2 * dims.n_layers)
        return 4 * (writes + dims.d_vocab_out * pairs.answer_pos.shape[1])

    def examples(self, step: int) -> list[tuple[tuple[int, int, int], Pairs]]:
        """The examples of a step, some at a time, each with its place: the runs take turns, and each goes round its
        examples."""
        run, at = step % len(self.turns), (step // len(self.turns)) % len(self.turns[step % len(self.turns)])
        job = self.job
        at_once = examples_at_once(job.model, job.graph, job.pairs.clean.shape[1], job.batch_size, self.drawings)
        return [((run, at, i), chunk) for i, chunk in enumerate(self.turns[run][at].chunks(at_once))]

    def block(self, place: tuple[int, int, int], chunk: Pairs) -> Block:
        """Some examples of a step, with what every run of them shares."""
        if place in self.kept:
            return self.kept[place]
        block = Block(chunk, self.replacement.on(chunk), clean_logits(self.job.model, chunk))
        if self.keeps:
            self.kept[place] = block
        return block

    def learn(
        self,
        draw: Callable[[int, torch.Generator], Tensor],
        penalty: Callable[[int], Tensor] | None = None,
        decay: Callable[[float], float] | None = None,
    ) -> None:
        """Return None after all steps, with `parameters` learned.

        Args:
            draw: The gates `[drawing, unit]` of a step, as a function of the parameters.
            penalty: What is added to the loss at a step.
            decay: The share of the learning rate when a share of the steps is done; by default always 1.
        """
        if len(self.turns) == 1 or current().count == 1:
            self._learn(draw, penalty, decay, range(len(self.turns)), self.job.checkpoint)
            return
        own = share(len(self.turns), current().index, current().count)
        checkpoint, error = self.job.checkpoint.of_process(), None
        try:
            with sharing(ALONE):
                self._learn(draw, penalty, decay, own, checkpoint)
        except Exception as raised:  # raised in all processes by `agree`
            error = raised
        agree(error)
        self._exchange(own)
        checkpoint.clear()

    def _learn(
        self,
        draw: Callable[[int, torch.Generator], Tensor],
        penalty: Callable[[int], Tensor] | None,
        decay: Callable[[float], float] | None,
        runs: range,
        checkpoint: Checkpoint,
    ) -> None:
        """The steps of some of the runs."""
        done = self._resume(checkpoint)
        self.job.progress(done, self.n_steps)
        while done < self.n_steps:
            if done % len(self.turns) in runs:
                self._step(done, draw, penalty, decay)
            done += 1
            checkpoint.save(self._state(done))
            self.job.progress(done, self.n_steps)

    def _step(
        self,
        step: int,
        draw: Callable[[int, torch.Generator], Tensor],
        penalty: Callable[[int], Tensor] | None,
        decay: Callable[[float], float] | None,
    ) -> None:
        self.optimizer.zero_grad()
        if decay is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * decay(step / self.n_steps)
        if penalty is not None:
            penalty(step).backward()
        gates = draw(step, torch.Generator().manual_seed(self.seed * SEEDS_APART + step))
        chunks = self.examples(step)
        gates.backward(self._gate_gradient(gates.detach(), chunks))
        self.n_runs += len(gates) * sum(len(chunk) for _, chunk in chunks)
        self.optimizer.step()

    def _exchange(self, own: range) -> None:
        """Gives every process what the others have learned: each parameter is that of the run with its number."""
        names = list(self.parameters)

        def add_own(state: State) -> State:
            count = state.get("n_runs", torch.tensor(0)) + self.n_runs
            return {**state, **{names[run]: self.parameters[names[run]].detach() for run in own}, "n_runs": count}

        found = relayed(add_own)
        self.n_runs = int(found["n_runs"])
        with Gradients(False) as off, off:
            for name, parameter in self.parameters.items():
                parameter.copy_(found[name])

    def _state(self, done: int) -> dict[str, Tensor]:
        state = {"done": torch.tensor(done), "n_runs": torch.tensor(self.n_runs)}
        for name, parameter in self.parameters.items():
            state |= _fresh(name, parameter.detach())
            state |= {f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return state

    def _resume(self, checkpoint: Checkpoint) -> int:
        like = {"done": torch.tensor(0), "n_runs": torch.tensor(0)}
        for name, parameter in self.parameters.items():
            like |= _fresh(name, parameter)
        saved = checkpoint.load(like, {"done": self.n_steps})
        if saved is None:
            return 0
        with Gradients(False) as off, off:
            for name, parameter in self.parameters.items():
                parameter.copy_(saved[name])
                keys = {key.partition(".")[2]: value for key, value in saved.items() if key.startswith(name + ".")}
                self.optimizer.state[parameter] = {key: value.clone() for key, value in keys.items()}
        self.n_runs = int(saved["n_runs"])
        return int(saved["done"])

    def _gate_gradient(
        self, gates: Float[Tensor, "drawing unit"], chunks: Sequence[tuple[tuple[int, int, int], Pairs]]
    ) -> Float[Tensor, "drawing unit"]:
        """The derivative in every gate of the mean loss over examples and drawings; processes take some chunks each."""
        job, possible, metric = self.job, self.job.graph.possible, self.metric
        cut = torch.zeros(len(gates), *possible.shape, dtype=torch.float64)
        cut[:, possible] = 1 - gates[:, self.unit]
        n = len(gates) * sum(len(chunk) for _, chunk in chunks)

        def gradient_of(number: int) -> Tensor:
            block = self.block(*chunks[number])

            def loss(logits: Tensor) -> Tensor:
                return torch.stack(
                    [-metric.direction * metric(drawn, block.pairs, block.reference) for drawn in logits]
                )

            _, gradient = mask_gradients(job.model, job.graph, block.pairs, cut, block.values, loss)
            return -gradient.cpu().double()[:, possible] / n

        def add(state: State, gradient: Tensor) -> State:
            total = state["total"] if state else torch.zeros_like(gates)
            return {"total": total.index_add_(1, self.unit, gradient)}

        return fold_shared(len(chunks), gradient_of, add)["total"]

    @property
    def cost(self) -> dict[str, int]:
        """How many forwards and backwards of one prompt it took."""
        n = len(self.job.pairs)
        return {"forwards": 2 * n + self.n_runs, "backwards": self.n_runs}

    def table(self, values: Float[Tensor, " unit"]) -> Float[Tensor, "reader writer"]:
        """Every edge with the value of its unit; 0 where there is no edge."""
        table = self.job.zeros()
        table[self.job.graph.possible] = values[self.unit].to(table.dtype)
        return table


def _fresh(name: str, parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter that Adam has not moved yet."""
    zeros = {f"{name}.{key}": torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
    return {name: parameter, f"{name}.step": torch.tensor(0.0), **zeros}
