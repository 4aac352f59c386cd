"""What `edge_gradients` takes at its peak, in bytes by part, from one example that is run and from sizes.

One forward and backward of one example is counted operation by operation (`PeakMemory`); what is kept and expanded
beside it is known from the sizes of the graph. All of it but the contraction grows with the examples of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mechinterp.base.peak_memory import PeakMemory
from mechinterp.engines.edge_attribution import STEPS_BUDGET_BYTES, first_step, tokens_at_once
from mechinterp.engines.edge_patching import wide
from mechinterp.engines.write_table import layer_blocks
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.token_windows import token_windows
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True)
class OneExample:
    """Bytes that one example takes, at the length that all of the pairs have."""

    run: int
    """The peak of a forward and backward: what autograd keeps, values and gradients."""
    kept: int
    """What is kept of it until it is contracted."""
    cache: int
    """The writes of the clean and of the corrupt run."""
    n_pos: int


def weight_bytes(model: HookManager) -> int:
    """The bytes of all parameters and buffers, each once; of a model on several devices those on the main one."""
    module = model.bridge.original_model
    every = [part for part in (*module.parameters(), *module.buffers()) if part.device == model.device]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in every}.values())


def measure_example(model: HookManager, graph: Graph, pairs: Pairs, metric: MetricLike) -> OneExample:
    """What the first of the pairs takes. Cost: two forwards and backwards of one example."""
    one = pairs[:1]
    first_step(model, graph, one, metric)  # what the model makes in its first run and keeps is not counted
    with PeakMemory() as used:
        step, writes = first_step(model, graph, one, metric)
    return OneExample(used.peak, step.nbytes, 2 * writes.nbytes, one.clean.shape[1])


def attribution_bytes(
    model: HookManager, graph: Graph, one: OneExample, batch_size: int, n_points: int = 1
) -> Mapping[str, int]:
    """The bytes of `edge_gradients` by part, on top of the weights; `total` is the peak: not all are there at once.

    Args:
        model: The model.
        graph: Its graph.
        one: What one example takes, from `measure_example`.
        batch_size: How many examples are run at once.
        n_points: At how many points gradients are taken.
    """
    kept, run = batch_size * one.kept, batch_size * one.run
    at_once = min(n_points, max(1, STEPS_BUDGET_BYTES // kept))
    inputs = 2 * batch_size * one.n_pos * model.dims.d_model * wide(model).itemsize if n_points > 1 else 0
    parts = {
        "activations": run + inputs,
        "gradients of earlier points": (at_once - 1) * kept,
        "cache": batch_size * one.cache,
        "contraction": _contraction_bytes(model, graph, batch_size, one.n_pos),
        "scores": 2 * graph.possible.numel() * wide(model).itemsize,
    }
    running = parts["activations"] + parts["gradients of earlier points"]
    contracting = at_once * kept + parts["contraction"]
    return {**parts, "total": parts["cache"] + parts["scores"] + max(running, contracting)}


def _contraction_bytes(model: HookManager, graph: Graph, batch_size: int, n_pos: int) -> int:
    """Writes and readers' gradients at `d_model` of a window of tokens, and the weights of one layer."""
    dims, size = model.dims, wide(model).itemsize
    rows, columns = next(token_windows(batch_size, n_pos, tokens_at_once(model, graph)))
    n_tokens = (rows.stop - rows.start) * (columns.stop - columns.start)
    dense = sum(len(family.writers) for family in graph.families if not family.low_rank)
    widest = max(len(family.writers) for family in graph.families if not family.low_rank)
    n, before = graph.n_positions, graph.readers_before
    ports = max((before[layers.stop] - before[layers.start]) // n for layers in layer_blocks(graph))
    expanded = dense + max(2 * widest, ports + 8)  # while the writes are made; while they are contracted
    if graph.positions:
        expanded += dense + ports  # those at one position, side by side
    weights = 2 * dims.d_model * dims.d_head * (dims.n_heads + 2 * dims.n_kv_heads)
    return size * (expanded * n_tokens * dims.d_model + weights)
