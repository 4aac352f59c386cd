"""`select`: a circuit from scores. Knows nothing of the method that made them."""

from __future__ import annotations

import heapq
import re
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.base.errors import InputError, clip
from mechinterp.base.registry import unknown
from mechinterp.base.settings import Parameter
from mechinterp.graphs.circuit import Circuit, on_paths
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.scores import Scores
from mechinterp.graphs.select_ilp import TIME_LIMIT, best_edges

RULES = ("top", "greedy", "ilp")
ORDERS = ("value", "magnitude")
PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,9})?) ?%")


class EmptyCircuit(InputError):
    """None of the selected edges lies on a path from the input to the logits."""


def select(
    graph: Graph,
    scores: Scores,
    *,
    edges: int | str | None = None,
    nodes: int | str | None = None,
    threshold: float | None = None,
    rule: str = "top",
    by: str = "magnitude",
    ratio: float | None = None,
    time_limit: float = TIME_LIMIT,
) -> Circuit:
    """The circuit of the best edges, without those that are not on a path from the input to the logits.

    Give one of `edges`, `nodes` and `threshold`. Ties go to the edge that comes first in the model. The circuit keeps
    both counts: `n_selected` and `n_edges`.

    - `rule="top"`: the best edges of all.
    - `rule="greedy"` grows from the logits back: each time the best edge into the nodes already chosen, so that little
      is dropped at the end.
    - `rule="ilp"`: the circuit of exactly that many edges with the highest total (see `graphs.select_ilp`); nothing is
      dropped.

    Raises InputError for invalid numbers and if `ilp` cannot prove the best circuit in time, EmptyCircuit if nothing
    is left.

    Source of `ratio` and `ilp`: Nikankin et al. 2025 (arXiv 2510.25786), who also combine the two; here the ratio goes
    with `top` only.

    Args:
        graph: The graph.
        scores: The scores of its edges.
        edges: How many edges to select, or their share of the graph: "5%".
        nodes: The same for nodes, on a graph with `level="node"`; a node is selected with all edges out of it.
        threshold: Select every edge above this.
        rule: "top", "greedy" or "ilp".
        by: "magnitude", which also keeps the edges that work against the task (IOI's negative heads), as a circuit
            that behaves like the model must; or "value", helping edges first.
        ratio: With `top`: int(ratio * edges) of the edges are the best ones of positive score, as far as they go; the
            others are the largest in magnitude of the rest.
        time_limit: Seconds that `ilp` may take. Not recorded, since the circuit does not depend on it.
    """
    if graph is not scores.graph and graph.digest() != scores.graph.digest():
        raise InputError("The scores belong to another graph.")
    unit = f"{graph.level}s"
    size = nodes if graph.level == "node" else edges
    if (edges if graph.level == "node" else nodes) is not None:
        raise InputError(f"The graph's level is {graph.level!r}: give {unit}=, how many of them to select.")
    if (size is None) == (threshold is None):
        raise InputError(f"Give either {unit}= (how many) or threshold= (scores above it), and only one of them.")
    check_selection(graph, rule=rule, by=by, ratio=ratio, threshold=threshold)
    values = scores.values.cpu()
    strength = values.abs() if by == "magnitude" else values
    parameters: dict[str, Parameter] = {"rule": rule, "by": by}
    if threshold is not None:
        chosen = (strength > threshold) & graph.possible
        parameters["threshold"] = float(threshold)
    else:
        assert size is not None
        n = unit_count(graph, size)
        parameters[unit] = n
        if rule == "ilp":
            chosen = best_edges(graph, strength, n, time_limit=time_limit)
        elif rule == "greedy":
            chosen = _greedy(graph, strength, n)
        elif ratio is not None:
            chosen = _by_ratio(graph, values, n, ratio)
            parameters["ratio"] = float(ratio)
        else:
            chosen = best_units(graph, strength, n)
    kept = on_paths(graph, chosen)
    if not bool(kept.any()):
        raise EmptyCircuit(
            f"None of the {int(chosen.sum())} selected edges lies on a path from the input to the logits; select more "
            "edges, or use rule='greedy' or 'ilp'."
        )
    return Circuit(graph, kept, int(chosen.sum()), parameters, scores)


def check_selection(
    graph: Graph,
    *,
    rule: str = "top",
    by: str = "magnitude",
    ratio: float | None = None,
    threshold: float | None = None,
) -> None:
    """Return None when `select` takes these together on this graph. Raises InputError otherwise."""
    if by not in ORDERS:
        raise unknown("order", by, ORDERS)
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    if rule != "top" and (graph.level == "node" or graph.positions):
        raise InputError(f"rule={rule!r} selects edges at all positions; for nodes and named positions take 'top'.")
    if isinstance(threshold, (bool, str)) or (threshold is not None and threshold != threshold):
        raise InputError(f"threshold is a number; got {clip(repr(threshold), 60)}.")
    if threshold is not None and rule != "top":
        raise InputError(f"rule={rule!r} takes edges=, not threshold=.")
    _check_ratio(ratio, rule, by, threshold)


def sized(graph: Graph, size: int | str) -> dict[str, Any]:
    """The keyword of `select` for that many edges, or nodes where the graph's level is `node`."""
    return {f"{graph.level}s": size}


def unit_count(graph: Graph, size: int | str) -> int:
    """How many edges (or nodes) that is: a number as it is, a share such as `"5%"` rounded down, but at least 1."""
    if isinstance(size, str):
        found = PERCENT.fullmatch(size.strip())
        percent = Fraction(found[1]) if found else Fraction(0)
        if not 0 < percent <= 100:
            raise InputError(
                f"{graph.level}s is a whole number or a share above 0 and up to 100%, such as '5%'; got "
                f"{clip(size, 60)!r}."
            )
        return max(1, int(percent * graph.n_units / 100))
    if type(size) is not int or not 1 <= size <= graph.n_units:  # a bool is not a number of edges
        raise InputError(
            f"{graph.level}s must be a whole number from 1 to {graph.n_units}, or a share such as '5%'; got {size!r}."
        )
    return size


def _check_ratio(ratio: float | None, rule: str, by: str, threshold: float | None) -> None:
    if ratio is None:
        return
    if isinstance(ratio, (bool, str)) or not 0 <= ratio <= 1:
        raise InputError(f"ratio is the share of edges of positive score, from 0 to 1; got {clip(repr(ratio), 60)}.")
    if rule != "top" or threshold is not None:
        raise InputError("ratio= goes with rule='top' and edges= only.")
    if by != "magnitude":
        raise InputError("ratio= orders one part by value and the rest by magnitude; leave by= out.")


def best_units(graph: Graph, strength: Float[Tensor, "reader writer"], n: int) -> Bool[Tensor, "reader writer"]:
    """The edges of the `n` strongest units; ties go to the one that comes first in the model."""
    first = graph.first_of_unit
    order = strength[first[:, 0], first[:, 1]].argsort(descending=True, stable=True)[:n]
    chosen = torch.zeros(graph.n_units, dtype=torch.bool).index_fill(0, order, True)
    return chosen[graph.unit.clamp(min=0)] & graph.possible


def _by_ratio(
    graph: Graph, values: Float[Tensor, "reader writer"], n: int, ratio: float
) -> Bool[Tensor, "reader writer"]:
    n_first = int(Fraction(str(float(ratio))) * n)  # 0.29 of 100 is 29, which 0.29 * 100 is not
    first = best_units(graph, values, n_first) & (values > 0)
    n_rest = n - len(graph.unit[first].unique())
    return first | best_units(graph, values.abs().masked_fill(first, -torch.inf), n_rest)


def _greedy(graph: Graph, strength: Float[Tensor, "reader writer"], n: int) -> Bool[Tensor, "reader writer"]:
    edges: list[tuple[int, int]] = []
    table = strength.tolist()
    heap: list[tuple[float, int, int]] = []
    opened: set[int] = set()
    inputs_of: dict[int, list[int]] = {}
    for r, w in graph.feeds.nonzero().tolist():
        inputs_of.setdefault(w, []).append(r)

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
        edges.append((r, w))
        open_readers(inputs_of.get(w, []))
    chosen = torch.zeros_like(graph.possible)
    chosen[tuple(torch.tensor(edges).T)] = True
    return chosen
