"""Scores against a known circuit: ROC-AUC, precision, recall. The circuit must be known under the same ablation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from mechinterp.base.errors import InputError
from mechinterp.graphs.scores import Scores


@dataclass(frozen=True)
class AgainstTruth:
    """How well scores separate the edges of a known circuit from all others."""

    auc: float
    """The probability that an edge of the circuit has a larger magnitude than an edge outside; ties count half."""
    precision: float
    recall: float
    n_selected: int
    n_true: int

    @property
    def recovered(self) -> bool:
        """Whether the selected edges are exactly the true ones."""
        return self.precision == 1 and self.recall == 1


ROUNDING = 1e-5
"""Scores below this share of the strongest count as 0, because in float32 they are rounding errors. Outside a circuit
scores are often exactly 0, so rounding errors at the true edges would rank these first and give AUC 1 to a method that
finds nothing."""


def without_rounding(scores: Scores) -> Scores:
    """The scores, with 0 where the magnitude is below `ROUNDING` of the strongest."""
    magnitude = scores.total.abs()
    return replace(scores, total=torch.where(magnitude >= ROUNDING * magnitude.max(), scores.total, 0))


def against_truth(scores: Scores, truth: Iterable[str], threshold: float = 0.0) -> AgainstTruth:
    """AUC, precision and recall of the scores for the edges of a known circuit.

    Scores below 1e-5 of the strongest count as 0.

    Args:
        scores: The scores; only their magnitude counts.
        truth: The names of the known circuit's edges.
        threshold: Edges with a larger magnitude are selected, for precision and recall.

    Raises:
        InputError: A name is not an edge of the graph, or the truth is empty or the whole graph.
    """
    graph = scores.graph
    true = graph.mask_of(sorted(set(truth)))[graph.possible]
    values = without_rounding(scores).values.cpu().abs().double()[graph.possible]
    n_true = int(true.sum())
    if not 0 < n_true < len(true):
        raise InputError(f"The truth must be some, but not all, of the graph's {len(true)} edges, not {n_true}.")
    # The Mann-Whitney statistic, from the mean ranks of tied values.
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last_ranks = counts.cumsum(0).double()
    ranks = (last_ranks - (counts.double() - 1) / 2)[inverse]
    auc = (float(ranks[true].sum()) - n_true * (n_true + 1) / 2) / (n_true * (len(true) - n_true))
    selected = values > threshold
    hit = int((selected & true).sum())
    n_selected = int(selected.sum())
    return AgainstTruth(auc, hit / n_selected if n_selected else 0.0, hit / n_true, n_selected, n_true)
