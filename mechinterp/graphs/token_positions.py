"""Which tokens of a batch each named position of a graph is, and the rows at given positions."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.graphs.graph import Graph
from mechinterp.tasks.metrics import NO_ENTRY
from mechinterp.tasks.pairs import Pairs


def places_of(graph: Graph, pairs: Pairs) -> list[Tensor] | None:
    """Per position of the graph, its tokens in the flattened batch (`row * n_pos + pos`); None for no positions.

    Every token, padding too, is in exactly one. Raises InputError for a position that the pairs do not name, two names
    of one token, and answers elsewhere than where the graph has them.
    """
    if not graph.positions:
        return None
    *named, rest = range(len(graph.positions))
    table = torch.full_like(pairs.clean, rest)
    rows = torch.arange(len(pairs), device=pairs.device)
    for i in named:
        name = graph.positions[i]
        if name not in pairs.positions:
            raise unknown("position", name, pairs.positions)
        at = pairs.positions[name]
        if bool((taken := table[rows, at] != rest).any()):
            row = int(taken.nonzero()[0])
            other = graph.positions[int(table[row, at[row]])]
            raise InputError(
                f"In example {row} the positions {other!r} and {name!r} are the same token; name only one of them."
            )
        table[rows, at] = i
    answers = table.gather(1, pairs.answer_pos.clamp(min=0))
    elsewhere = (answers != graph.positions.index(graph.answers)) & (pairs.answer_pos != NO_ENTRY)
    if bool(elsewhere.any()):
        row, column = (int(i) for i in elsewhere.nonzero()[0])
        found = graph.positions[int(answers[row, column])]
        raise InputError(
            f"Example {row} has its answer at {found!r}, but the graph has the answers at {graph.answers!r}; build it "
            f"with answers={found!r}."
        )
    flat = table.flatten()
    return [(flat == i).nonzero().flatten() for i in range(len(graph.positions))]


def take_positions(
    value: Float[Tensor, "batch pos d"], positions: Int[Tensor, "batch n"]
) -> Float[Tensor, "batch n d"]:
    """The rows of `value` at the positions (row 0 where a position is -1, no entry; metrics skip those)."""
    index = positions.to(value.device).clamp(min=0)
    return value.gather(1, index[..., None].expand(-1, -1, value.shape[-1]))
