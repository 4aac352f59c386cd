"""`acdc_orders`: how much the circuit that `acdc` finds depends on the order in which edges are tried.

Where two edges can do the same job, the one that is tried first goes and the other stays. So one search shows one of
several circuits. What all orders keep is needed in each of them; the rest was a choice of the order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import pandas as pd

from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.discovery.method import score_edges
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.scores import Scores
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True, eq=False)
class AcdcOrders:
    """What `acdc` kept in each of several orders; edges, or nodes where those are chosen."""

    scores: Mapping[str, Scores]
    """Those of each order (`reverse`, `score`, `random 0`), as `score_edges` gives them."""

    @property
    def kept(self) -> dict[str, frozenset[str]]:
        """The names of what each order kept."""
        return {name: _kept(scores) for name, scores in self.scores.items()}

    @property
    def core(self) -> frozenset[str]:
        """What every order kept."""
        return frozenset.intersection(*self.kept.values())

    @property
    def union(self) -> frozenset[str]:
        """What some order kept."""
        return frozenset.union(*self.kept.values())

    @property
    def mean_jaccard(self) -> float:
        """The mean over pairs of orders of what both kept as a share of what either kept; 1 if all kept the same."""
        shares = [_jaccard(a, b) for a, b in combinations(self.kept.values(), 2)]
        return sum(shares) / len(shares)

    def frequency(self) -> pd.DataFrame:
        """A tidy table, the most frequent first: what was kept at all, and in what share of the orders."""
        kept = self.kept.values()
        rows = [(name, sum(name in one for one in kept) / len(kept)) for name in sorted(self.union)]
        frame = pd.DataFrame(rows, columns=["kept", "share of orders"])
        return frame.sort_values("share of orders", ascending=False, kind="stable", ignore_index=True)

    def to_frame(self) -> pd.DataFrame:
        """One row an order: how many it kept, how many of those no other order lacks, and its Jaccard to each order."""
        kept, core = self.kept, self.core
        rows = [
            {"order": name, "kept": len(one), "core": len(core)}
            | {f"jaccard to {other}": _jaccard(one, two) for other, two in kept.items()}
            for name, one in kept.items()
        ]
        return pd.DataFrame(rows)


def acdc_orders(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    *,
    tau: float,
    seeds: int = 3,
    metric: MetricLike = "kl_to_clean",
    replacement: str = "corrupt",
    at_once: int = 8,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> AcdcOrders:
    """The edges that `acdc` keeps in reverse order, by score, and in `seeds` random orders.

    Cost: as many searches as orders. Raises InputError as `score_edges` does, and for a negative number of seeds.

    Args:
        model: The model.
        graph: Its graph, of edges or nodes.
        pairs: The examples.
        tau: The threshold of `acdc`, in the metric's unit.
        seeds: How many random orders, with `order_seed` from 0 up.
        metric: What the loss is.
        replacement: What a cut edge carries.
        at_once: How many edges are tried side by side; the result is the same.
        batch_size: How many examples are run at once.
        progress: Called with the number of orders done, and of all.
    """
    if type(seeds) is not int or seeds < 0:
        raise InputError(f"seeds is the number of random orders, at least 0; got {seeds!r}.")
    orders = [("reverse", "reverse", 0), ("score", "score", 0), *((f"random {i}", "random", i) for i in range(seeds))]
    found: dict[str, Scores] = {}
    for i, (name, order, seed) in enumerate(orders):
        progress(i, len(orders))
        found[name] = score_edges(
            model,
            graph,
            pairs,
            method="acdc",
            metric=metric,
            batch_size=batch_size,
            replacement=replacement,
            tau=tau,
            order=order,
            order_seed=seed,
            at_once=at_once,
        )
    progress(len(orders), len(orders))
    return AcdcOrders(found)


def _kept(scores: Scores) -> frozenset[str]:
    graph, first = scores.graph, scores.graph.first_of_unit
    values = scores.values[first[:, 0], first[:, 1]].tolist()
    return frozenset(name for name, value in zip(graph.unit_names(), values, strict=True) if value > 0)


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0
