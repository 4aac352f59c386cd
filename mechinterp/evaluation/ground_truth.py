"""Scores against a circuit that is known: ROC-AUC, precision, recall. A truth found under another ablation is none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from mechinterp.base.errors import InputError
from mechinterp.graphs.scores import Scores


@dataclass(frozen=True)
class AgainstTruth:
    """How well scores tell the edges of a known circuit from the others."""

    auc: float
    """The chance that an edge of the circuit scores higher in magnitude than another one; ties count half."""
    precision: float
    recall: float
    n_selected: int
    n_true: int

    @property
    def recovered(self) -> bool:
        """Whether the selected edges are exactly the true ones."""
        return self.precision == 1 and self.recall == 1


ROUNDING = 1e-5
"""Scores below this share of the strongest count as 0: in float32 they are rounding. Outside a circuit scores are often
exactly 0, so rounding at the true edges would rank them first and give AUC 1 to a method that sees nothing."""


def without_rounding(scores: Scores) -> Scores:
    """The scores, 0 where they are below `ROUNDING` of the strongest."""
    size = scores.total.abs()
    return replace(scores, total=torch.where(size >= ROUNDING * size.max(), scores.total, 0))


def against_truth(scores: Scores, truth: Iterable[str], threshold: float = 0.0) -> AgainstTruth:
    """`scores` against the names of the circuit's edges; selected are the edges above `threshold` in magnitude.

    What is rounding beside the strongest score counts as 0 (see `ROUNDING`).

    Raises InputError for names that are no edges of the graph, and for a truth that is empty or the whole graph.
    """
    graph = scores.graph
    true = graph.mask_of(sorted(set(truth)))[graph.possible]
    values = without_rounding(scores).values.cpu().abs().double()[graph.possible]
    n_true = int(true.sum())
    if not 0 < n_true < len(true):
        raise InputError(f"A truth has some of the graph's {len(true)} edges, not {n_true}.")
    # Mann-Whitney by mean ranks.
    ordered, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts.double() - 1) / 2)[inverse]
    assert len(ordered) == len(counts)
    auc = (float(ranks[true].sum()) - n_true * (n_true + 1) / 2) / (n_true * (len(true) - n_true))
    selected = values > threshold
    hit = int((selected & true).sum())
    n_selected = int(selected.sum())
    return AgainstTruth(auc, hit / n_selected if n_selected else 0.0, hit / n_true, n_selected, n_true)
