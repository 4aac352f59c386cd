"""Masks of cut edges: the metric under each, the mask that knocks nodes out, and the nodes that can be knocked out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.base.batches import over_batches
from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.engines.edge_patching import run_edges
from mechinterp.evaluation.ablation import Ablation, AblationSetup
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import Graph
from mechinterp.models.sites import split_position
from mechinterp.tasks.pairs import Pairs

MASKS_AT_ONCE = 64
"""How many masks the engine gets at a time; these share one run of the corrupt prompts."""


def mask_values(setup: AblationSetup, cuts: Sequence[Bool[Tensor, "reader writer"]]) -> Float[Tensor, "example mask"]:
    """The metric of each example with the edges of each mask cut, float64 on the CPU.

    For the full model give the mask that cuts nothing, so that all columns come from the same computation. Cost: one
    forward per mask and example, and one of the corrupt prompts for every 64 masks.

    Raises InputError when no mask is given, and whatever `run_edges` raises.
    """
    if not cuts:
        raise InputError("Give at least one mask.")
    values = setup.build_replacement()
    done, total = 0, len(cuts) * len(setup.pairs)
    setup.progress(done, total)

    def run(batch: Pairs, rows: slice) -> Mapping[str, Tensor]:
        nonlocal done
        columns: list[Tensor] = []
        for first in range(0, len(cuts), MASKS_AT_ONCE):
            masks = torch.stack(list(cuts[first : first + MASKS_AT_ONCE]))
            columns.append(run_edges(setup.model, setup.graph, batch, masks, metric=setup.metric, replacement=values))
            done += len(masks) * len(batch)
            setup.progress(done, total)
        return {"values": torch.cat(columns).T.double().cpu()}

    return over_batches(setup.pairs, setup.batch_size, run, {"values": 0})["values"]


def knock_out(graph: Graph, nodes: Iterable[str]) -> Bool[Tensor, "reader writer"]:
    """The mask that cuts all outgoing edges of the nodes, so that no reader sees what they write.

    `a9.h9@end` is cut at that position only. This ablates the output of a node; its inputs need not be cut, because
    nothing else passes them on. Raises InputError for a node that is not in the graph.
    """
    mask = torch.zeros_like(graph.possible)
    for name in nodes:
        writer, position = split_position(name)
        if writer not in graph.writer_index:
            raise unknown("node that writes", name, graph.writers)
        if position and position not in graph.positions:
            raise unknown("position of the graph", position, graph.positions)
        rows = graph.position == graph.positions.index(position) if position else slice(None)
        mask[rows, graph.writer_index[writer]] = True
    return mask & graph.possible


def writers_of(circuit: Circuit, *, inputs: bool) -> tuple[str, ...]:
    """The circuit's nodes that have an outgoing edge in it, in the model's order.

    A head that shares its key or value with a head of the circuit is fed by the same edge but need not write anything.

    Args:
        circuit: The circuit.
        inputs: Whether the graph's inputs count.
    """
    graph = circuit.graph
    left_out = {"logits", *(() if inputs else graph.inputs)}
    written = {graph.writers[w] for w in circuit.kept.any(0).nonzero().flatten().tolist()}
    names = ((name, split_position(name)[0]) for name in circuit.nodes)
    return tuple(name for name, writer in names if writer in written and writer not in left_out)


def check_members(circuit: Circuit, nodes: Iterable[str]) -> None:
    """Return None when all nodes write in the circuit and none is named twice. Raises InputError otherwise."""
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
