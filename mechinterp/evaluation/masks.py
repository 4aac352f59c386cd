"""Many masks of cut edges on the same examples, and the mask that knocks nodes out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.circuit import Circuit
from mechinterp.discovery.method import Progress, no_progress
from mechinterp.edges import run_edges
from mechinterp.errors import InputError
from mechinterp.evaluation.faithfulness import Ablation
from mechinterp.graph import Graph
from mechinterp.hooks import HookManager
from mechinterp.metrics import Metric
from mechinterp.registry import unknown
from mechinterp.replacement import build_replacement
from mechinterp.sites import split_position
from mechinterp.tasks.pairs import Pairs

MASKS_AT_ONCE = 64
"""Masks handed to the engine at a time: those share one run of the corrupt prompts."""


def mask_values(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    cuts: Sequence[Bool[Tensor, "reader writer"]],
    *,
    metric: Metric | str = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> Float[Tensor, "example mask"]:
    """The metric of every example with the edges of each mask cut, float64 on the CPU.

    The full model is the mask that cuts nothing, so that all columns come from the same computation. Cost: one forward
    a mask and example, and one of the corrupt prompts for every 64 masks.

    Raises InputError for no masks and for a batch size below 1, and what `run_edges` raises.
    """
    if not cuts or batch_size < 1:
        raise InputError(f"Give at least one mask, and a batch_size of at least 1; got {len(cuts)} and {batch_size}.")
    values = build_replacement(replacement, model, graph, reference or pairs, batch_size)
    done, total = 0, len(cuts) * len(pairs)
    progress(done, total)
    rows: list[Tensor] = []
    for chunk in pairs.chunks(batch_size):
        columns: list[Tensor] = []
        for first in range(0, len(cuts), MASKS_AT_ONCE):
            some = torch.stack(list(cuts[first : first + MASKS_AT_ONCE]))
            columns.append(run_edges(model, graph, chunk, some, metric=metric, replacement=values))
            done += len(some) * len(chunk)
            progress(done, total)
        rows.append(torch.cat(columns).T.double().cpu())
    return torch.cat(rows)


def knock_out(graph: Graph, nodes: Iterable[str]) -> Bool[Tensor, "reader writer"]:
    """The mask that cuts all outgoing edges of the nodes: no reader sees what they write. Unknown ones are refused.

    `a9.h9@end` is cut at that position only. That is ablating the node's output; its own inputs need no cut, since
    nothing carries what it makes of them.
    """
    mask = torch.zeros_like(graph.possible)
    for name in nodes:
        writer, position = split_position(name)
        if writer not in graph.writer_index:
            raise unknown("node that writes", name, graph.writers)
        if position and position not in graph.positions:
            raise unknown("position of the graph", position, graph.positions)
        here = graph.position == graph.positions.index(position) if position else slice(None)
        mask[here, graph.writer_index[writer]] = True
    return mask & graph.possible


def writers_of(circuit: Circuit, *, inputs: bool) -> tuple[str, ...]:
    """The circuit's nodes that write in it, in the model's order; the graph's inputs only when asked for.

    A head that shares a key or value with one of the circuit is fed by the same edge, and may still write nothing.
    """
    graph = circuit.graph
    left_out = {"logits", *(() if inputs else graph.inputs)}
    written = {graph.writers[w] for w in circuit.kept.any(0).nonzero().flatten().tolist()}
    names = ((name, split_position(name)[0]) for name in circuit.nodes)
    return tuple(name for name, writer in names if writer in written and writer not in left_out)


def check_members(circuit: Circuit, nodes: Iterable[str]) -> None:
    """Return None when the nodes are the circuit's and write, each named once. Raises InputError otherwise."""
    known, seen = set(writers_of(circuit, inputs=True)), set[str]()
    for name in nodes:
        if name not in known:
            raise unknown("node of the circuit", name, known)
        if name in seen:
            raise InputError(f"The node {name!r} is named twice in one set.")
        seen.add(name)


def with_axes(frame: pd.DataFrame, metric: str, ablation: Ablation) -> pd.DataFrame:
    """The frame with the metric and the six axes of the ablation in its `attrs`."""
    frame.attrs.update({"metric": metric, "ablation": asdict(ablation)})
    return frame
