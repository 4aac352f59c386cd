"""`refine_circuit`: a last exact pass over a circuit, which tries to drop each of its edges and to add others.

Source: ACDC (Conmy et al. 2023, arXiv 2304.14997), here started from a circuit instead of the whole graph, so that only
its own edges are tried, and with a second pass that adds. Of the whole graph, and with nothing added, it is `acdc` with
`order=score`.

One edge is tried after another, each against the circuit as it is by then: dropped for good if that raises the loss by
less than `tau`, the weakest first; added for good if that lowers it by more than `tau`, the strongest first. The loss
is the metric, turned so that lower is better; where nodes are chosen, a node is dropped or added with all edges out of
it. What is run is always the circuit that would be returned: without edges that are on no path from the input to the
logits (under a post-norm they have an effect).

Speed: the next k are tried side by side, as if all of them were going to change the circuit, or as if none were: as the
last one did. The runs up to the first that turns out otherwise are what one-by-one search does; the rest is thrown
away. The layers before the first one in which the k runs differ are run once; an edge that is on no path is not run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.keep import Keep, compute_always
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.settings import Parameter, Setting, check_settings
from mechinterp.discovery.acdc import MOST_AT_ONCE, SHARED, TAU, weakest_first
from mechinterp.discovery.cut_loss import CutLoss
from mechinterp.discovery.method import REPLACEMENT
from mechinterp.discovery.run_state import open_checkpoint
from mechinterp.engines.edge_patching import check_model
from mechinterp.engines.readout import checked_metric
from mechinterp.graphs.circuit import Circuit, on_paths
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.scores import Scores
from mechinterp.graphs.select import EmptyCircuit
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs

REFINE = {
    "tau": TAU,
    "drop": Setting(0, "edges of the circuit that are tried, the weakest first", least=0),
    "add": Setting(0, "edges outside it that are tried, the strongest first", least=0),
    "replacement": REPLACEMENT,
    "at_once": SHARED["at_once"],
}
"""The settings of `refine_circuit`."""


@dataclass(frozen=True)
class _Trial:
    """One edge or node, and whether it is added or dropped."""

    unit: int
    adds: bool

    def of(self, chosen: Bool[Tensor, "reader writer"], graph: Graph) -> Bool[Tensor, "reader writer"]:
        """The chosen edges after it."""
        edges = graph.unit == self.unit
        return chosen | edges if self.adds else chosen & ~edges


@dataclass(frozen=True)
class _Tried:
    """A trial upon those before it, as they are expected to end."""

    trial: _Trial
    chosen: Tensor
    kept: Tensor
    """What of `chosen` is on a path."""
    differs: bool
    """Whether that is another circuit than before the trial."""


@dataclass
class _State:
    """Where the search stands."""

    chosen: Tensor
    """The edges that were not dropped or were added; the circuit is what of them is on a path."""
    loss: float
    done: int = 0
    accepted: bool = True
    """Whether the last trial was accepted: the next ones are expected to do alike."""
    at_once: int = 1

    def saved(self, n_runs: int, n_prefixes: int) -> dict[str, Tensor]:
        """The state as tensors."""
        numbers = {"done": self.done, "at_once": self.at_once, "n_runs": n_runs, "n_prefixes": n_prefixes}
        return {
            "chosen": self.chosen,
            "loss": torch.tensor(self.loss, dtype=torch.float64),
            "accepted": torch.tensor(self.accepted),
            **{name: torch.tensor(value) for name, value in numbers.items()},
        }


def refine_circuit(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    scores: Scores | None = None,
    metric: MetricLike = "kl_to_clean",
    tau: float = 0.01,
    drop: int | None = None,
    add: int = 0,
    replacement: str = "corrupt",
    at_once: int = 8,
    batch_size: int = 32,
    progress: Progress = no_progress,
    resume: str | os.PathLike[str] | None = None,
    keep: Keep = compute_always,
) -> Circuit:
    """The circuit without the edges that it can do without, and with those of the best outside that it lacks.

    Every number is that of a run of the circuit with everything else cut. Dropping an edge raises the loss by less than
    `tau`, adding one lowers it by more than `tau`, each measured on the circuit as it is by then. Edges that are then
    on no path from the input to the logits are left out. `selection` states what was done, and at most how many
    forwards of one example it took (of several passes the sums); `verify` cannot apply it to the scores again, and says
    so.

    Cost: at most a forward for each edge tried, each example, and each time that the expectation about the next ones
    was wrong.

    Raises InputError for bad settings, pairs or a graph of another model, a circuit without scores, a loss that is NaN
    or infinite, and a `resume` file of another run; EmptyCircuit if nothing is left.

    Args:
        model: The model that the circuit was found in.
        circuit: The circuit, of edges or nodes.
        pairs: The examples; not those on which the result is evaluated.
        scores: They give the order; by default the circuit's own.
        metric: The loss, turned so that lower is better.
        tau: What an edge must change, in the metric's unit.
        drop: How many of the circuit's weakest edges (or nodes) to try; by default all.
        add: How many of the strongest edges (or nodes) outside the circuit to try.
        replacement: What a cut edge carries.
        at_once: How many are tried side by side; the result is the same.
        batch_size: How many examples are run at once; the result does not depend on it.
        progress: Called with the number of edges tried, and of all that are to be.
        resume: A file that keeps the state of a long run, as in `score_edges`.
        keep: May load what a finished pass has saved.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> graph, pairs = mi.build_graph(model, level="node"), mi.load_task("ioi").pairs(model, n=4)
    >>> circuit = mi.select(graph, mi.score_edges(model, graph, pairs, method="eap-ig"), nodes=16)
    >>> refined = mi.refine_circuit(model, circuit, pairs, tau=0.05, add=4)
    >>> refined.selection["dropped"] > 0
    True
    """
    graph = circuit.graph
    scores = circuit.scores if scores is None else scores
    if scores is None:
        raise InputError("The circuit has no scores to order its edges by; give scores=.")
    if scores.graph.digest() != graph.digest():
        raise InputError("The scores belong to another graph than the circuit.")
    given = {"tau": tau, "add": add, "replacement": replacement, "at_once": at_once}
    settings = check_settings("refine_circuit", REFINE, given | ({} if drop is None else {"drop": drop}))
    check_model(model, graph, pairs)
    metric = checked_metric(model, pairs, metric)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}.")
    trials = _trials(circuit, scores, drop, add)
    key = {**settings, "circuit": circuit.digest(), "trials": _digest(trials)}
    checkpoint = open_checkpoint(resume, model, graph, pairs, "refine_circuit", metric.name, key)

    def search() -> Mapping[str, Tensor]:
        loss = CutLoss.of(model, graph, pairs, metric, replacement, batch_size)
        cut = graph.possible & ~on_paths(graph, circuit.members)
        state = _State(circuit.members, float(loss.of_masks(cut[None].float(), 0)[0]))
        most = {"done": len(trials), "at_once": MOST_AT_ONCE}
        saved = checkpoint.load(state.saved(loss.n_runs, loss.n_prefixes), most)
        if saved is not None:
            state = _State(saved["chosen"], float(saved["loss"]), int(saved["done"]), bool(saved["accepted"]))
            state.at_once = int(saved["at_once"])
            loss.n_runs, loss.n_prefixes = int(saved["n_runs"]), int(saved["n_prefixes"])
        progress(state.done, len(trials))
        while state.done < len(trials):
            state = _next(loss, state, trials, float(tau), at_once)
            checkpoint.save(state.saved(loss.n_runs, loss.n_prefixes))
            progress(state.done, len(trials))
        return state.saved(loss.n_runs, loss.n_prefixes)

    about = [sorted((name, str(value)) for name, value in key.items()), metric.name, pairs.digest()]
    found = keep(f"refined {json.dumps(about)}", search)
    refined = _circuit(circuit, scores, found, settings, metric, len(pairs))
    checkpoint.clear()
    return refined


def _count(circuit: Circuit, name: str) -> int:
    """What an earlier pass did, as the selection states it."""
    found = circuit.selection.get(name, 0)
    return found if "refined" in circuit.selection and isinstance(found, int) else 0


def _trials(circuit: Circuit, scores: Scores, drop: int | None, add: int) -> list[_Trial]:
    """The circuit's units, the weakest first, then those outside it, the strongest first."""
    own = set(circuit.graph.unit[circuit.kept].tolist())
    order = weakest_first(scores)
    dropped = [_Trial(unit, adds=False) for unit in order if unit in own]
    added = [_Trial(unit, adds=True) for unit in reversed(order) if unit not in own]
    return dropped[:drop] + added[:add]


def _digest(trials: list[_Trial]) -> str:
    return hashlib.sha256(str([(trial.unit, trial.adds) for trial in trials]).encode()).hexdigest()


def _next(loss: CutLoss, state: _State, trials: list[_Trial], tau: float, most: int) -> _State:
    """The state after the next trials, up to the first that does not do what was expected of it."""
    graph = loss.graph
    some = trials[state.done : state.done + state.at_once]
    tried: list[_Tried] = []
    expected = state.chosen
    kept = first = on_paths(graph, expected)
    for trial in some:
        chosen = trial.of(expected, graph)
        after = on_paths(graph, chosen)
        tried.append(_Tried(trial, chosen, after, not torch.equal(after, kept)))
        if state.accepted:
            expected, kept = chosen, after
    losses = iter(_losses(loss, first, [one.kept for one in tried if one.differs]))
    chosen, before, done = state.chosen, state.loss, state.done
    for one in tried:
        done += 1
        after = next(losses) if one.differs else before
        accepted = before - after > tau if one.trial.adds else after - before < tau
        if accepted:
            chosen, before = one.chosen, after
        if accepted != state.accepted:
            return _State(chosen, before, done, accepted, max(1, state.at_once // 2))
    return _State(chosen, before, done, state.accepted, min(most, 2 * len(some)))


def _losses(loss: CutLoss, first: Bool[Tensor, "reader writer"], kept: list[Tensor]) -> list[float]:
    """The loss of each circuit; the layers in which they are all as `first` are run once."""
    if not kept:
        return []
    masks = torch.stack(kept)
    readers = (masks != first).any(0).any(-1).nonzero()
    layer = loss.graph.layer_of_reader(int(readers[0]))
    return loss.of_masks((loss.graph.possible & ~masks).float(), layer).tolist()


def _circuit(
    circuit: Circuit,
    scores: Scores,
    found: Mapping[str, Tensor],
    settings: dict[str, Parameter],
    metric: Metric,
    n_examples: int,
) -> Circuit:
    """The refined circuit, from the last state. Raises EmptyCircuit if no edge is left."""
    graph, chosen = circuit.graph, found["chosen"]
    kept = on_paths(graph, chosen)
    if not bool(kept.any()):
        raise EmptyCircuit(
            f"Every edge could be dropped for less than tau={settings['tau']} of {metric.name}; give a smaller tau."
        )
    own, left = (set(graph.unit[mask].tolist()) for mask in (circuit.members, chosen))
    per_example = int(found["n_runs"]) + int(found["n_prefixes"]) + 1 + metric.needs_reference
    per_example += str(settings["replacement"]).startswith("mean")
    stated: dict[str, Parameter] = {
        "refined": metric.name,
        "tau": settings["tau"],
        "dropped": len(own - left) + _count(circuit, "dropped"),
        "added": len(left - own) + _count(circuit, "added"),
        "refined_on": n_examples,
        "refined_with": settings["replacement"],
        "forwards": per_example * n_examples + _count(circuit, "forwards"),
    }
    return Circuit(graph, kept, int(chosen.sum()), {**circuit.selection, **stated}, scores)
