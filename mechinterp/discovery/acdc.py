"""`acdc`: automatic circuit discovery, one edge after another.

Source: Conmy et al. 2023 (arXiv 2304.14997). Every edge is cut in turn; it stays cut when that raises the loss by less
than `tau`. The loss is the metric, turned so that lower is better; with `kl_to_clean` that is the paper's KL
divergence. The order decides which of several circuits is found (`acdc_orders` compares them):

* `reverse`, the paper's: readers from the logits to the first layer; of a reader, the latest writer first; nodes, where
  those are chosen, in reverse order too;
* `score`: the weakest first, by the magnitude of the `eap-ig` score with the same metric; ties as in `reverse`;
* `random`: drawn with `order_seed`.

Deviations: the order among one reader's writers is fixed (the paper's code takes a set's), and several next edges are
tried at once.

Speed: the next k edges are cut one upon the other in k runs side by side, as if each were going to stay cut. The runs
up to the first edge that must be kept are what one-by-one search does; the rest is thrown away. So the kept set is
the same. The layers before the first one with a cut edge are run once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.base.checkpoint import Checkpoint
from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.settings import Parameter, Setting, check_settings
from mechinterp.discovery.cut_loss import CutLoss, layer_of
from mechinterp.discovery.method import REPLACEMENT, Job, Method, score_edges
from mechinterp.engines.edge_patching import check_model
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.scores import Scores
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.own_metric import MetricLike, as_metric
from mechinterp.tasks.pairs import Pairs

MOST_AT_ONCE = 64
ORDERS = ("reverse", "score", "random")
ORDER_STEPS = 5
"""Of the `eap-ig` that order `score` goes by."""
FINEST = 1e-4
"""Scores that differ by less than this share of the strongest tie: rounding must not decide an order."""
TAU = Setting(0.01, "the loss that a kept edge must save", above=0)
SHARED = {
    "replacement": REPLACEMENT,
    "order": Setting("reverse", "the order in which edges are tried", choices=ORDERS),
    "order_seed": Setting(0, "the seed of order 'random'", least=0),
    "at_once": Setting(8, "edges tried side by side; the result is the same", least=1, most=MOST_AT_ONCE),
}
"""What several searches of `acdc_thresholds` share."""


@dataclass
class _Search:
    """The loss of a mask, and the order of the units."""

    job: Job
    loss: CutLoss
    order: tuple[int, ...]
    """All units, in the order in which they are tried."""


@dataclass
class _State:
    """Where the search stands for thresholds that have decided alike so far."""

    taus: tuple[float, ...]
    cut: Tensor
    kept: Tensor
    loss: float
    done: int = 0
    at_once: int = 1


def _acdc(job: Job) -> Scores:
    """The score of a kept edge is what cutting it added to the loss, at least tau; of a cut one 0."""
    tau, at_once = job.settings["tau"], job.settings["at_once"]
    search, state = _begin(job, (float(tau),))
    saved = job.checkpoint.load(_saved(search, state), {"done": job.graph.n_units, "at_once": MOST_AT_ONCE})
    if saved is not None:
        state.cut, state.kept, state.done = saved["cut"], saved["kept"], int(saved["done"])
        state.loss, state.at_once = float(saved["loss"]), int(saved["at_once"])
        search.loss.n_runs = int(saved["n_runs"])
    job.progress(state.done, job.graph.n_units)
    while state.done < job.graph.n_units:
        (state,) = _decide(search, state, int(at_once))
        job.checkpoint.save(_saved(search, state))
        job.progress(state.done, job.graph.n_units)
    return _scores(job, state, search.loss.n_runs)


def _saved(search: _Search, state: _State) -> dict[str, Tensor]:
    numbers = {"done": state.done, "n_runs": search.loss.n_runs, "at_once": state.at_once}
    loss = torch.tensor(state.loss, dtype=torch.float64)
    return {
        "cut": state.cut,
        "kept": state.kept,
        "loss": loss,
        **{name: torch.tensor(value) for name, value in numbers.items()},
    }


def acdc_thresholds(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    taus: Sequence[float],
    *,
    metric: MetricLike = "kl_to_clean",
    replacement: str = "corrupt",
    order: str = "reverse",
    order_seed: int = 0,
    at_once: int = 8,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> dict[float, Scores]:
    """The scores of method `acdc` for each of several thresholds. Runs are shared as long as thresholds decide alike.

    `cost` is that of all thresholds together. Raises InputError as `score_edges` does, and for taus that are not
    different numbers above 0.

    Args:
        model: The model.
        graph: Its graph, of edges or nodes.
        pairs: The examples to score with.
        taus: The thresholds, in the metric's unit.
        metric: The loss, turned so that lower is better.
        replacement: What a cut edge carries.
        order: The order in which edges are tried: reverse, score or random.
        order_seed: The seed of the random order.
        at_once: How many edges are tried side by side; the result is the same.
        batch_size: How many examples are run at once.
        progress: Called with the number of edges that all thresholds have decided, and of all.
    """
    if not taus or len(set(taus)) != len(taus):
        raise InputError(f"taus must be different numbers, at least one; got {list(taus)}.")
    for tau in taus:
        TAU.check("taus", tau)
    check_model(model, graph, pairs)
    given = {"replacement": replacement, "order": order, "order_seed": order_seed, "at_once": at_once}
    settings: dict[str, Parameter] = check_settings("acdc_thresholds", SHARED, given)
    chosen = as_metric(metric)
    job = Job(model, graph, pairs, chosen, settings, batch_size, progress, Checkpoint())
    search, first = _begin(job, tuple(float(tau) for tau in taus))
    open_states, finished = [first], dict[float, _State]()
    while open_states:  # the one that is furthest back first, so that layers' prefixes are shared
        state = open_states.pop(min(range(len(open_states)), key=lambda i: open_states[i].done))
        if state.done == graph.n_units:
            finished.update({tau: state for tau in state.taus})
        else:
            open_states += _decide(search, state, at_once)
        progress(min([s.done for s in open_states], default=graph.n_units), graph.n_units)
    out: dict[float, Scores] = {}
    for tau in taus:
        mine = replace(job, settings={**settings, "tau": float(tau)})
        out[tau] = replace(_scores(mine, finished[float(tau)], search.loss.n_runs), pairs=pairs)
    return out


def _begin(job: Job, taus: tuple[float, ...]) -> tuple[_Search, _State]:
    order = _order(job)
    loss = CutLoss.of(job.model, job.graph, job.pairs, job.metric, job.replacement, job.batch_size)
    cut = torch.zeros_like(job.graph.possible)
    search = _Search(job, loss, order)
    first = float(loss.of_masks(cut[None].float(), layer_of(job.graph, order[0]))[0])
    return search, _State(taus, cut, job.zeros(), first)


def _order(job: Job) -> tuple[int, ...]:
    """All units, in the order of setting `order`."""
    order, seed, n = job.settings["order"], int(job.settings["order_seed"]), job.graph.n_units
    if order == "random":
        return tuple(torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist())
    reverse = range(n - 1, -1, -1)
    if order == "reverse":
        return tuple(reverse)
    if not job.metric.differentiable:
        raise InputError(
            f"Metric {job.metric.name!r} has no gradient, so there are no scores to order by; take order='reverse' or "
            "'random'."
        )
    scores = score_edges(
        job.model,
        job.graph,
        job.pairs,
        method="eap-ig",
        metric=job.metric,
        batch_size=job.batch_size,
        steps=ORDER_STEPS,
        replacement=job.replacement,
    )
    return weakest_first(scores)


def weakest_first(scores: Scores) -> tuple[int, ...]:
    """All units by the magnitude of their scores, the weakest first; ties in reverse order of the model."""
    graph = scores.graph
    first = graph.first_of_unit
    strength = scores.values[first[:, 0], first[:, 1]].abs().double()
    steps = (strength / strength.max().clamp(min=1e-30) / FINEST).round().tolist()
    return tuple(sorted(range(graph.n_units - 1, -1, -1), key=lambda unit: steps[unit]))


def _decide(search: _Search, state: _State, most: int) -> list[_State]:
    """The state after the next units, up to the first that a threshold keeps; one state for each way they decide."""
    graph = search.job.graph
    some = search.order[state.done : state.done + state.at_once]
    layer = min(layer_of(graph, some[0]), _first_layer(graph, state.cut))
    some = list(takewhile(lambda unit: layer_of(graph, unit) >= layer, some))  # their runs start at the same layer
    edges = [graph.unit == unit for unit in some]
    losses = search.loss.of_masks(_one_upon_the_other(state.cut, edges), layer)
    cut, loss, done = state.cut, state.loss, state.done
    for mask, value in zip(edges, losses.tolist(), strict=True):
        done += 1
        keep = tuple(tau for tau in state.taus if value - loss >= tau)
        if keep:
            fewer = max(1, state.at_once // 2)
            kept = torch.where(mask, torch.as_tensor(value - loss, dtype=state.kept.dtype), state.kept)
            states = [_State(keep, cut, kept, loss, done, fewer)]
            rest = tuple(tau for tau in state.taus if tau not in keep)
            return states + ([_State(rest, cut | mask, state.kept, value, done, fewer)] if rest else [])
        cut, loss = cut | mask, value
    return [_State(state.taus, cut, state.kept, loss, done, min(most, 2 * len(some)))]


def _scores(job: Job, state: _State, n_runs: int) -> Scores:
    per_example = n_runs + 2 + job.metric.needs_reference + job.graph.dims.n_layers
    steps = ORDER_STEPS if job.settings["order"] == "score" else 0  # with the corrupt run one forward more
    cost = {"forwards": (per_example + steps + (steps > 0)) * len(job.pairs), "backwards": steps * len(job.pairs)}
    return job.scores("acdc", state.kept * len(job.pairs), cost, additive=False)


def _first_layer(graph: Graph, cut: Bool[Tensor, "reader writer"]) -> int:
    """The first layer that reads a cut edge; the number of layers where none is cut."""
    readers = cut.any(1).nonzero()
    return graph.layer_of_reader(int(readers[0])) if len(readers) else graph.dims.n_layers


def _one_upon_the_other(cut: Bool[Tensor, "reader writer"], units: list[Tensor]) -> Float[Tensor, "unit reader writer"]:
    """The mask with the first unit cut, too, with the first two, and so on."""
    masks: list[Tensor] = []
    for unit in units:
        cut = cut | unit
        masks.append(cut)
    return torch.stack(masks).float()


ACDC = Method(
    "acdc",
    "Automatic circuit discovery: every edge cut for good unless that costs tau",
    "Conmy et al. 2023, arXiv 2304.14997",
    _acdc,
    {"replacement": REPLACEMENT, "tau": TAU, **SHARED},
    threshold=0.0,
    graphs="own",
)
