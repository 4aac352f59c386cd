"""Every method on the models with a known circuit: what is run, and what it misses or has too many.

A new method is one line in `ANY_METRIC` or, if it needs answers, in `ANSWERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mechinterp.discovery.method import score_edges
from mechinterp.evaluation.ground_truth import AgainstTruth, against_truth, without_rounding
from mechinterp.graphs.graph import build_graph
from mechinterp.graphs.scores import Scores
from tests.support.hand_circuits import HAND
from tests.support.known_circuits import known

EFFECT = 1e-3
"""The truth's own threshold: an edge counts when it moves an output by more."""
Settings = Mapping[str, tuple[str, Mapping[str, Any]]]
"""What a row is called -> (method, its settings)."""
ANY_METRIC: Settings = {
    "exact": ("exact", {}),
    "acdc": ("acdc", {"tau": EFFECT}),
    "eap-ig": ("eap-ig", {"steps": 10}),
    "eap-ig-activations": ("eap-ig-activations", {"steps": 10}),
    "eap-gp": ("eap-gp", {"steps": 10}),
    "clean-corrupted": ("clean-corrupted", {}),
    "information-flow": ("information-flow", {}),
    "information-flow, from the answer": ("information-flow", {"importance": "from-answer"}),
    "weight-magnitude": ("weight-magnitude", {}),
    "random": ("random", {}),
    "edge-pruning": ("edge-pruning", {"objective": "metric"}),
    "subnetwork-probing": ("subnetwork-probing", {"objective": "metric"}),
    "mattr": ("mattr", {"objective": "metric", "runs": 1}),
}
ANSWERS: Settings = {
    "eap": ("eap", {}),
    "relp": ("relp", {}),
    "gim": ("gim", {}),
    "cd-edges": ("cd-edges", {}),
    "cd": ("cd", {}),
    "ensemble": ("ensemble", {}),
    "path-patching": ("path-patching", {}),
}


LEARNED = ("edge-pruning", "subnetwork-probing")
"""Their scores are chances that a gate is open: an edge is selected above 1/2."""
RANKED = ("mattr",)
"""Their scores are an order and no effect: as many edges are selected as the truth has."""


@dataclass(frozen=True)
class Outcome:
    """One method on one model."""

    against: AgainstTruth
    missed: frozenset[str]
    """True edges that are not selected (above `EFFECT`)."""
    extra: frozenset[str]
    """Other edges that are."""
    at_size: float
    """The share of true edges among as many of the strongest edges; for scores that are in no unit of the metric."""


def run(label: str, name: str, replacement: str = "corrupt", **changed: Any) -> Outcome:
    """A row of `ANY_METRIC` or `ANSWERS` on a compiled model (metric `l2_to_clean`) or one by hand (`logit_diff`).

    The truth of a compiled model is that of the replacement: `corrupt`, or `zero` for methods that take it. `changed`:
    settings other than those of the row.
    """
    method, settings = {**ANY_METRIC, **ANSWERS}[label]
    settings = {**settings, **changed}
    if name in HAND:
        this = HAND[name]()
        scores, truth = score_edges(this.model, this.graph, this.pairs, method=method, **settings), set(this.truth)
    else:
        that = known(name)
        kind = {"corrupt": "derived_resample", "zero": "derived_zero"}[replacement]
        graph, truth = build_graph(that.model, split_input=True), that.truth(kind)
        more: dict[str, Any] = {"metric": "l2_to_clean", "batch_size": 64, **settings}
        if replacement != "corrupt":
            more["replacement"] = replacement
        scores = score_edges(that.model, graph, that.pairs, method=method, **more)
    return outcome(scores, truth, _threshold(method, scores, len(truth)))


def _threshold(method: str, scores: Scores, n_true: int) -> float:
    """Above this an edge is selected."""
    if method in RANKED:
        strength = sorted((abs(value) for value in scores.to_dict().values()), reverse=True)
        return (strength[n_true - 1] + strength[n_true]) / 2
    return 0.5 if method in LEARNED else EFFECT


def outcome(scores: Scores, truth: set[str], threshold: float) -> Outcome:
    """The scores against the truth."""
    scores = without_rounding(scores)
    strength = {name: abs(value) for name, value in scores.to_dict().items()}
    selected = {name for name, value in strength.items() if value > threshold}
    strongest = set(sorted(strength, key=lambda name: -strength[name])[: len(truth)])
    return Outcome(
        against_truth(scores, truth, threshold),
        frozenset(truth - selected),
        frozenset(selected - truth),
        len(strongest & truth) / len(truth),
    )
