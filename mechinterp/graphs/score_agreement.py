"""`score_agreement`: how alike two scores of one graph are, such as those of one model in two precisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.graphs.scores import Scores

SHARES = (0.01, 0.05, 0.1, 0.2)


@dataclass(frozen=True, eq=False)
class ScoreAgreement:
    """How alike two scores are.

    Args:
        correlation: Pearson's, over all units (edges, or nodes).
        rank_correlation: Spearman's; ties share their mean rank. NaN where all scores of one side are the same.
        largest_difference: Of any score, as a share of the largest size of a score of the first.
        sign_changes: The share of units whose scores have different signs.
        overlap: One row per size: `units`, `overlap` (shared units of the two top sets of that size, as a share of it),
            `by chance` (that of two random sets).
        differences: One row per unit, the largest difference first: `name`, `first`, `second`, `difference`.
    """

    correlation: float
    rank_correlation: float
    largest_difference: float
    sign_changes: float
    overlap: pd.DataFrame
    differences: pd.DataFrame

    def __repr__(self) -> str:
        rows = self.overlap.to_dict("records")
        shared = ", ".join(f"{row['overlap']:.0%} of the top {row['units']}" for row in rows)
        return (
            f"ScoreAgreement(correlation {self.correlation:.4f}, of ranks {self.rank_correlation:.4f}, largest "
            f"difference {self.largest_difference:.2g} of the largest score, {self.sign_changes:.1%} change sign; "
            f"{shared})"
        )


def score_agreement(first: Scores, second: Scores) -> ScoreAgreement:
    """How alike two scores of the same graph are: of two precisions, two checkpoints, two methods, two sets of pairs.

    Args:
        first: Scores of a graph.
        second: Other scores of the same graph (of another model with the same dimensions, if need be).

    Raises InputError for scores of two graphs, and for two metrics, whose scores are in different units.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> graph, pairs = mi.build_graph(model), mi.load_task("ioi").pairs(model, n=4)
    >>> eap, ig = (mi.score_edges(model, graph, pairs, method=method) for method in ("eap", "eap-ig"))
    >>> mi.score_agreement(eap, eap).overlap["overlap"].min(), mi.score_agreement(eap, ig).rank_correlation < 1
    (np.float64(1.0), True)
    """
    if first.graph.digest() != second.graph.digest():
        raise InputError("The scores are of two graphs; score the same graph (build_graph with the same arguments).")
    if first.metric != second.metric:
        raise InputError(f"The scores are of two metrics, {first.metric!r} and {second.metric!r}: other units.")
    graph = first.graph
    index, names = tuple(graph.first_of_unit.T), graph.unit_names()
    a, b = (scores.values.double().cpu()[index] for scores in (first, second))
    n = len(a)
    ranks = [_ranks(values) for values in (a, b)]
    rows: list[dict[str, Any]] = []
    for size in sorted({max(1, round(share * n)) for share in SHARES}):
        tops = [set(values.argsort(descending=True, stable=True)[:size].tolist()) for values in (a, b)]
        rows.append({"units": size, "overlap": len(tops[0] & tops[1]) / size, "by chance": size / n})
    difference = b - a
    order = difference.abs().argsort(descending=True, stable=True).tolist()
    table = pd.DataFrame(
        {
            "name": [names[i] for i in order],
            "first": a[order].tolist(),
            "second": b[order].tolist(),
            "difference": difference[order].tolist(),
        }
    )
    largest = float(a.abs().max())
    return ScoreAgreement(
        _correlation(a, b),
        _correlation(*ranks),
        float(difference.abs().max()) / largest if largest > 0 else float("nan"),
        float((a.sign() * b.sign() < 0).double().mean()),
        pd.DataFrame(rows),
        table,
    )


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else float("nan")


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties at their mean."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() + 1) / 2)[inverse]
