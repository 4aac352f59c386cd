"""Random circuits whose every edge lies on a path from the input to the logits.

Many masks of cut edges on the same examples, and the mask that knocks nodes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TypeVar

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.registry import unknown
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.replacement import build_replacement
from mechinterp.evaluation.faithfulness import Ablation
from mechinterp.graphs.circuit import Circuit, on_paths
from mechinterp.graphs.graph import Graph
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import split_position
from mechinterp.tasks.metrics import Metric
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


T = TypeVar("T")
PathEdges = list[tuple[int, int]]
"""(reader row, writer row) of every edge of a path, from the logits back or in any order."""


class RandomPaths:
    """Draws paths through a graph, or through a part of its edges, under a seed."""

    def __init__(self, graph: Graph, seed: int, within: Bool[Tensor, "reader writer"] | None = None) -> None:
        if graph.positions or graph.level != "edge":
            raise UnsupportedError("Random circuits of paths are made of single edges at all positions, not of nodes.")
        allowed = graph.possible if within is None else on_paths(graph, within)
        self.graph, self.allowed = graph, allowed
        self.generator = torch.Generator().manual_seed(seed)
        self.edges: PathEdges = [(r, w) for r, w in allowed.nonzero().tolist()]
        self._into = [row.nonzero().flatten().tolist() for row in allowed]
        self._out = [column.nonzero().flatten().tolist() for column in allowed.T]
        # Nodes and inputs from which no allowed edge leads on are no way to go (some heads of a shared K or V, say).
        self._fed_by = [[w for w in row.nonzero().flatten().tolist() if self._out[w]] for row in graph.feeds]
        self._inputs_of = [
            [r for r in column.nonzero().flatten().tolist() if self._into[r]] for column in graph.feeds.T
        ]

    def below(self, n: int) -> int:
        """A random whole number from 0 to n - 1."""
        return int(torch.randint(n, (1,), generator=self.generator))

    def through(self, edge: tuple[int, int]) -> PathEdges:
        """A random path through the edge: at every node one of its inputs, or of its readers, each as likely."""
        path, (reader, writer) = [edge], edge
        while self._fed_by[reader]:  # on to the logits, which feed nothing
            node = self._one_of(self._fed_by[reader])
            reader = self._one_of(self._out[node])
            path.append((reader, node))
        while self._inputs_of[writer]:  # back to an input of the graph, which reads nothing
            reader = self._one_of(self._inputs_of[writer])
            writer = self._one_of(self._into[reader])
            path.append((reader, writer))
        return path

    def circuit(self, n_edges: int) -> Bool[Tensor, "reader writer"]:
        """The edges of random paths, each through a random edge that is not yet in, until there are `n_edges`.

        The last path is kept whole, so that every edge is on a path: there may be a few more than `n_edges`.
        """
        if not 1 <= n_edges <= len(self.edges):
            raise InputError(f"Random paths have from 1 to {len(self.edges)} edges here; got {n_edges!r}.")
        chosen: set[tuple[int, int]] = set()
        for i in torch.randperm(len(self.edges), generator=self.generator).tolist():
            if len(chosen) >= n_edges:
                break
            if self.edges[i] not in chosen:
                chosen.update(self.through(self.edges[i]))
        return self.mask(chosen)

    def added_path(self, kept: Bool[Tensor, "reader writer"]) -> tuple[Bool[Tensor, "reader writer"], tuple[int, int]]:
        """`kept` with a random path through an edge that it has not, and one of the edges that are new."""
        missing = (self.allowed & ~kept).nonzero().tolist()
        if not missing:
            raise InputError("The circuit is the whole graph: no edge can be added to it.")
        r, w = missing[self.below(len(missing))]
        path = self.through((r, w))
        new = [edge for edge in path if not kept[edge]]
        return kept | self.mask(path), self._one_of(new)

    def mask(self, edges: PathEdges | set[tuple[int, int]]) -> Bool[Tensor, "reader writer"]:
        """True at the edges."""
        out = torch.zeros_like(self.graph.possible)
        for edge in edges:
            out[edge] = True
        return out

    def _one_of(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]
