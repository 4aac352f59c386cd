"""Several methods on one task, compared at the same circuit sizes, on the same examples, under the same ablation.

The sizes and the two areas are those of MIB (Mueller et al. 2025, arXiv 2504.13151): CPR is the area under faithfulness
against the share of edges, which are selected by signed score; CMD is the area between faithfulness and 1, with edges
selected by magnitude. Both use the trapezoid rule over the share itself, from 0.1 % to all edges. A method whose
circuits do nothing until every edge is included has CPR 0.25 and CMD 0.75. Most of either area comes from circuits
with more than 20 % of the edges, so the table also has the smallest sizes that reach 80 % and 90 %, and an area over
the logarithm of the share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from mechinterp.base.settings import Parameter
from mechinterp.graphs.scores import Scores
from mechinterp.graphs.select import best_units

MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The ten shares of edges at which MIB evaluates; a size is the share of the edges, rounded down."""
LEVELS = (0.8, 0.9)
"""The levels of faithfulness for which the table has the smallest size."""


@dataclass(frozen=True)
class MethodResult:
    """One method: its scores, and the faithfulness of its circuits by size, on held-out pairs."""

    scores: Scores
    by_value: tuple[float, ...]
    by_magnitude: tuple[float, ...]
    seconds: float

    def cpr(self, shares: Sequence[float]) -> float:
        """The area under faithfulness, with circuits selected by signed score."""
        return area(shares, self.by_value)

    def cmd(self, shares: Sequence[float]) -> float:
        """The area between faithfulness and 1, with circuits selected by magnitude; 0 if all are perfectly faithful."""
        return area(shares, [abs(1 - value) for value in self.by_magnitude])

    def log_area(self, shares: Sequence[float]) -> float:
        """The mean faithfulness over the logarithm of the share, with circuits selected by magnitude."""
        logs = [math.log(share) for share in shares]
        return area(logs, self.by_magnitude) / (logs[-1] - logs[0])

    def reaches(self, sizes: Sequence[int], level: float) -> int | None:
        """The smallest of the sizes whose circuit (by magnitude) is at least that faithful, or None."""
        return next((n for n, value in zip(sizes, self.by_magnitude, strict=True) if value >= level), None)


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_methods`."""

    results: Mapping[str, MethodResult]
    shares: tuple[float, ...]
    sizes: tuple[int, ...]
    about: Mapping[str, Parameter]

    def to_frame(self) -> pd.DataFrame:
        """One row per method, the best CMD first: the areas, the smallest sizes that reach 80 and 90 %, the cost."""
        units = f"{next(iter(self.results.values())).scores.graph.level}s"
        rows = [
            {
                "method": name,
                "CPR": result.cpr(self.shares),
                "CMD": result.cmd(self.shares),
                "log area": result.log_area(self.shares),
                **{f"{units}@{level:.0%}": result.reaches(self.sizes, level) for level in LEVELS},
                "forwards": result.scores.cost.get("forwards", 0) / result.scores.count,
                "backwards": result.scores.cost.get("backwards", 0) / result.scores.count,
                "seconds": result.seconds,
            }
            for name, result in self.results.items()
        ]
        frame = pd.DataFrame(rows).sort_values("CMD", ignore_index=True, kind="stable")
        return frame.astype({f"{units}@{level:.0%}": "Int64" for level in LEVELS})

    def curves(self) -> pd.DataFrame:
        """A tidy table: method, edges, share, order (`value`, `magnitude`), faithfulness."""
        rows = [
            (name, size, share, order, value)
            for name, result in self.results.items()
            for order, values in (("value", result.by_value), ("magnitude", result.by_magnitude))
            for size, share, value in zip(self.sizes, self.shares, values, strict=True)
        ]
        return pd.DataFrame(rows, columns=["method", "edges", "share", "order", "faithfulness"])

    def overlap(self, edges: int) -> pd.DataFrame:
        """Jaccard index of the top edges of each two methods.

        Args:
            edges: How many edges each method selects, by magnitude; edges of score 0 are not selected.
        """
        masks = {name: top_edges(result.scores, edges, "magnitude") for name, result in self.results.items()}
        table = {
            a: {b: float((x & y).sum() / max(1, int((x | y).sum()))) for b, y in masks.items()}
            for a, x in masks.items()
        }
        return pd.DataFrame(table)


def top_edges(scores: Scores, edges: int, by: str) -> Bool[Tensor, "reader writer"]:
    """The `edges` best edges (or nodes) by signed value or magnitude; edges of score 0 only if all are selected."""
    graph = scores.graph
    if edges >= graph.n_units:
        return graph.possible.clone()
    if edges < 1:
        return torch.zeros_like(graph.possible)
    values = scores.values.cpu()
    return best_units(graph, values.abs() if by == "magnitude" else values, edges) & (values != 0)


def area(x: Sequence[float], y: Sequence[float]) -> float:
    """The area under y over x by the trapezoid rule.

    >>> area([0.0, 1.0], [0.0, 2.0])
    1.0
    """
    return sum((b - a) * (p + q) / 2 for a, b, p, q in zip(x, x[1:], y, y[1:], strict=False))
