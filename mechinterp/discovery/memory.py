"""What scoring and running circuits take in bytes, from one example of each, and the largest batch that fits.

Runs of the model, with gradients or with edges cut, take in proportion to the examples side by side; one example of
each kind is counted operation by operation. `run_costs.py` prints it, and `--batch-size auto` chooses by it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mechinterp.base.errors import InputError
from mechinterp.base.peak_memory import PeakMemory
from mechinterp.base.settings import Parameter
from mechinterp.discovery.ensemble import NAME, parse_members
from mechinterp.discovery.method import METHODS
from mechinterp.engines.attribution_memory import OneExample, attribution_bytes, measure_example, weight_bytes
from mechinterp.engines.edge_patching import WRITES_BUDGET_BYTES, plan_runs, run_edges
from mechinterp.engines.mask_gradients import examples_at_once, mask_gradients, plan_gradients
from mechinterp.engines.replacement import corrupt_replacement
from mechinterp.graphs.graph import Graph
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.own_metric import MetricLike, as_metric
from mechinterp.tasks.pairs import Pairs

CIRCUITS = 16
"""About as many circuits are run side by side when a size is chosen, where `WRITES_BUDGET_BYTES` allows it."""
AUTO_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
AUTO_SHARE = 0.5
"""Of the memory of the device, for weights and everything else."""


@dataclass(frozen=True)
class RunMemory:
    """Bytes that single examples take, and the weights."""

    weights: int
    attribution: OneExample
    patched: int
    """A run with edges cut."""
    masked: int | None
    """A run with a learned mask and its backward; None: the method learns none."""
    n_points: int
    """At how many points the method takes gradients."""
    drawings: int


def measure_memory(
    model: HookManager, graph: Graph, pairs: Pairs, metric: MetricLike, method: str, settings: Mapping[str, Parameter]
) -> RunMemory:
    """What one example takes. Cost: a few forwards and backwards of one example.

    Raises InputError for a metric without a gradient.
    """
    metric = as_metric(metric)
    if not metric.differentiable or metric.needs_reference:
        metric = get_metric("logit_diff")  # what is kept does not depend on it
    members = _members(method, settings)
    one, masked = pairs[:1].to(model.device), None
    attribution = measure_example(model, graph, pairs, metric)
    # Half of the edges, so that every reader is computed again.
    cut = (torch.rand(graph.possible.shape, generator=torch.Generator().manual_seed(0)) < 0.5) & graph.possible
    with PeakMemory() as patched:
        run_edges(model, graph, one, cut, metric=metric)
    drawings = [int(asked["drawings"]) for asked in members if "learning_steps" in asked]
    if drawings:
        values = corrupt_replacement(model, graph).on(one)

        def loss(logits: torch.Tensor) -> torch.Tensor:
            return torch.stack([metric(drawn, one, None) for drawn in logits])

        with PeakMemory() as used:
            mask_gradients(model, graph, one, cut[None].double(), values, loss)
        masked = used.peak
    return RunMemory(
        weight_bytes(model),
        attribution,
        patched.peak,
        masked,
        max(map(_n_points, members)),
        max(drawings, default=1),
    )


def _members(method: str, settings: Mapping[str, Parameter]) -> list[Mapping[str, Parameter]]:
    """The settings of the method, or of each member of an ensemble: they are scored one after another."""
    asked = {**METHODS.get(method).defaults, **settings}
    if method != NAME:
        return [asked]
    return [{**METHODS.get(name).defaults, **given} for name, given in parse_members(str(asked["methods"]))]


def _n_points(asked: Mapping[str, Parameter]) -> int:
    start = asked.get("warm_start")
    points = METHODS.get(str(start)).defaults if start not in (None, "none") else asked
    return int(points.get("steps", 1))


def run_bytes(model: HookManager, graph: Graph, memory: RunMemory, batch_size: int) -> Mapping[str, int]:
    """Bytes by part at a batch size; `total` is the largest that is there at one time, with the weights.

    Beside the parts of `attribution_bytes` these are `learned masks` and `patched runs`, each at its own time.
    """
    parts = dict(attribution_bytes(model, graph, memory.attribution, batch_size, memory.n_points))
    stages = [parts.pop("total")]
    if memory.masked is not None:
        parts["learned masks"] = memory.masked * _side_by_side(model, graph, memory, batch_size)
        stages.append(parts["learned masks"])
    one = _patched_bytes(model, graph, memory, batch_size)
    parts["patched runs"] = max(one, min(CIRCUITS * one, WRITES_BUDGET_BYTES))
    stages.append(parts["patched runs"])
    return {"weights": memory.weights, **parts, "total": memory.weights + max(stages)}


def _side_by_side(model: HookManager, graph: Graph, memory: RunMemory, batch_size: int) -> int:
    """Runs with a learned mask that are done together: examples times drawings, if that fits."""
    n_pos, drawings = memory.attribution.n_pos, memory.drawings
    n = examples_at_once(model, graph, n_pos, batch_size, drawings)
    return n if plan_gradients(model, graph, (n, n_pos), drawings).tokens is not None else n * drawings


def _patched_bytes(model: HookManager, graph: Graph, memory: RunMemory, batch_size: int) -> int:
    """A run of a batch with edges cut: all of it at once, some examples at a time, or in windows of tokens."""
    n_pos = memory.attribution.n_pos
    plan = plan_runs(model, graph, (batch_size, n_pos))
    if plan.tokens is not None:  # so it was for the example that was measured
        return batch_size * (memory.patched - plan.nbytes) + plan.nbytes
    at_once = min(plan.examples, batch_size)
    return at_once * memory.patched + (batch_size - at_once) * memory.attribution.cache // 2


def device_bytes(device: torch.device) -> int:
    """The memory of a device, or of this machine for the CPU; not what is free just now, which changes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def auto_batch_size(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    *,
    metric: MetricLike = "logit_diff",
    method: str = "eap-ig",
    settings: Mapping[str, Parameter] | None = None,
    budget: int | None = None,
) -> int:
    """The largest batch of 1, 2, 4, ..., 128 examples whose scores and patched runs fit a budget, by the estimate.

    It depends on the model, the lengths of the pairs, the method and the size of the device, not on what else is
    running, so that the same run chooses the same batch. Cost: a few forwards and backwards of one example.

    Args:
        model: The model.
        graph: Its graph.
        pairs: The examples; no batch is larger than twice their number.
        metric: The metric of the run.
        method: How edges are scored.
        settings: Parameters of the method.
        budget: Bytes for weights and everything else; by default half of the memory of the model's device.

    Raises InputError if a batch of one does not fit.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> graph, pairs = mi.build_graph(model), mi.load_task("ioi").pairs(model, n=4)
    >>> mi.auto_batch_size(model, graph, pairs, budget=2**30) in (4, 8)
    True
    """
    budget = int(AUTO_SHARE * device_bytes(model.device)) if budget is None else budget
    memory = measure_memory(model, graph, pairs, metric, method, settings or {})
    sizes = [size for size in AUTO_SIZES if size < 2 * len(pairs)]
    taken = {size: run_bytes(model, graph, memory, size)["total"] for size in sizes}
    return _largest(sizes, taken, budget)


def _largest(sizes: Sequence[int], taken: Mapping[int, int], budget: int) -> int:
    fits = [size for size in sizes if taken[size] <= budget]
    if not fits:
        raise InputError(
            f"One example at a time takes about {taken[sizes[0]] / 2**30:.2g} GiB with the weights, more than the "
            f"{budget / 2**30:.2g} GiB that a run may take; take a larger device, dtype='bfloat16' or shorter prompts."
        )
    return max(fits)
