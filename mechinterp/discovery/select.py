"""`select`: a circuit from scores. Knows nothing of the method that made them."""

from __future__ import annotations

import heapq

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.circuit import Circuit, on_paths
from mechinterp.errors import InputError
from mechinterp.graph import Graph
from mechinterp.registry import unknown
from mechinterp.scores import Parameter, Scores

RULES = ("top", "greedy")
ORDERS = ("value", "magnitude")


class EmptyCircuit(InputError):
    """None of the selected edges lies on a path from the input to the logits."""


def select(
    graph: Graph,
    scores: Scores,
    *,
    edges: int | None = None,
    threshold: float | None = None,
    rule: str = "top",
    by: str = "magnitude",
) -> Circuit:
    """The circuit of the best edges, less those that lie on no path from the input to the logits.

    Either `edges` (how many to select) or `threshold` (select every edge above it). `by` orders by `magnitude`, which
    keeps the edges that work against the task too (IOI's negative heads), as is right for a circuit that is to behave
    as the model does; or by signed `value`, helping edges first. `rule="greedy"` grows from the logits back: the best
    edge into what is chosen already, so that little is dropped at the end. Ties go to the edge that comes first in
    the model. The circuit keeps both counts: `n_selected` and `n_edges`.

    Raises InputError when the numbers make no sense, EmptyCircuit when nothing is left.
    """
    if graph.digest() != scores.graph.digest():
        raise InputError("The scores belong to another graph.")
    if (edges is None) == (threshold is None):
        raise InputError("Give either edges= (how many) or threshold= (scores above it), and only one of them.")
    if by not in ORDERS:
        raise unknown("order", by, ORDERS)
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    values = scores.values.cpu()
    strength = values.abs() if by == "magnitude" else values
    parameters: dict[str, Parameter] = {"rule": rule, "by": by}
    if threshold is not None:
        if not threshold == threshold:
            raise InputError("threshold is NaN.")
        if rule == "greedy":
            raise InputError("rule='greedy' takes edges=, not threshold=.")
        chosen = (strength > threshold) & graph.possible
        parameters["threshold"] = float(threshold)
    else:
        assert edges is not None
        if type(edges) is not int or not 1 <= edges <= graph.n_edges:  # a bool is no number of edges
            raise InputError(f"edges must be a whole number from 1 to {graph.n_edges}; got {edges!r}.")
        chosen = (_greedy if rule == "greedy" else _top)(graph, strength, edges)
        parameters["edges"] = edges
    kept = on_paths(graph, chosen)
    if not bool(kept.any()):
        raise EmptyCircuit(
            f"None of the {int(chosen.sum())} selected edges lies on a path from the input to the logits; select more "
            "edges, or use rule='greedy'."
        )
    return Circuit(graph, kept, int(chosen.sum()), parameters, scores)


def _top(graph: Graph, strength: Float[Tensor, "reader writer"], n: int) -> Bool[Tensor, "reader writer"]:
    flat = strength.masked_fill(~graph.possible, -torch.inf).flatten()
    order = flat.argsort(descending=True, stable=True)[:n]
    return torch.zeros_like(graph.possible).flatten().index_fill(0, order, True).view_as(graph.possible)


def _greedy(graph: Graph, strength: Float[Tensor, "reader writer"], n: int) -> Bool[Tensor, "reader writer"]:
    chosen = torch.zeros_like(graph.possible)
    table = strength.tolist()
    heap: list[tuple[float, int, int]] = []
    opened: set[int] = set()

    def open_readers(readers: list[int]) -> None:
        for r in readers:
            if r not in opened:
                opened.add(r)
                for w in graph.possible[r].nonzero().flatten().tolist():
                    heapq.heappush(heap, (-table[r][w], r, w))

    open_readers([len(graph.readers) - 1])
    for _ in range(n):
        if not heap:
            break
        _, r, w = heapq.heappop(heap)
        chosen[r, w] = True
        open_readers(graph.feeds[:, w].nonzero().flatten().tolist())
    return chosen
