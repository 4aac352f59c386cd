"""What makes the result of a circuit file doubtful, as its own numbers say. It stands beside the result everywhere."""

from __future__ import annotations

from collections.abc import Iterable

from mechinterp.circuit_file.limits import FEW
from mechinterp.circuit_file.schema import CircuitFile, EvaluationRecord, PerformanceRecord, StabilityRecord
from mechinterp.circuit_file.summary import n_chosen
from mechinterp.circuit_file.verify.claims import FileWarning

CHANCE = 0.5
"""The accuracy of answers at random: a right and a wrong answer are compared."""
LOW, HIGH = 0.9, 1.1
"""A faithful circuit lies between these."""
STABLE_JACCARD, STABLE_CORE = 0.8, 0.6
WIDE = 0.3
"""An interval whose half is more than this share of its value is wide."""
SPREAD = 1.44
"""A size chosen within 20 % up and down of its median spans less than this ratio."""


def doubts(document: CircuitFile) -> tuple[FileWarning, ...]:
    """What to know before the first evaluation of a file is believed; empty if nothing speaks against it."""
    found: list[FileWarning] = []
    if document.performance is not None:
        found += _of_performance(document.performance)
    if document.evaluation:
        found += _of_evaluation(document, document.evaluation[0])
    if document.stability is not None:
        found += _of_stability(document, document.stability)
    return tuple(found)


def _of_performance(check: PerformanceRecord) -> Iterable[FileWarning]:
    low, high = check.difference_ci
    if not low > 0:
        text = f"{check.metric} of clean minus corrupt prompts is {check.difference:.3g} [{low:.3g}, {high:.3g}]"
        yield FileWarning("task not done", f"the model does not do the task: {text}")
    elif (high - low) / 2 > WIDE * check.difference:
        text = f"the full model's {check.metric} is uncertain, so every ratio to it is: {check.difference:.3g}"
        yield FileWarning("uncertain denominator", f"{text} [{low:.3g}, {high:.3g}]")
    if check.accuracy is not None and check.accuracy_ci is not None and check.accuracy_ci[0] <= CHANCE:
        low, high = check.accuracy_ci
        text = f"the full model's accuracy is {check.accuracy:.0%} [{low:.0%}, {high:.0%}], not above chance"
        yield FileWarning("task not done", text)


def _of_evaluation(document: CircuitFile, entry: EvaluationRecord) -> Iterable[FileWarning]:
    low, high = entry.faithfulness_ci
    about = f"{entry.faithfulness:.2f} [{low:.2f}, {high:.2f}]"
    if entry.faithfulness > HIGH:
        text = f"faithfulness {about} is above 1: what works against the task is missing from the circuit"
        yield FileWarning("overshoot", text)
    elif document.selection.size is not None and not (low >= LOW and high <= HIGH):
        yield FileWarning(
            "not faithful beyond doubt", f"the interval of faithfulness on {entry.pairs!r} leaves [0.9, 1.1]: {about}"
        )
    if 2 * entry.n_edges > entry.n_edges_graph and document.graph.granularity == "edge":
        text = f"{entry.n_edges:,} of {entry.n_edges_graph:,} edges are kept, more than half: hardly an explanation"
        yield FileWarning("large circuit", text)
    if document.performance is not None and document.performance.n_examples < FEW:
        yield FileWarning("few train examples", f"the circuit was found with {document.performance.n_examples} pairs")
    if entry.n_examples < FEW:
        yield FileWarning("few held-out examples", f"the circuit was evaluated on {entry.n_examples} pairs")


def _of_stability(document: CircuitFile, found: StabilityRecord) -> Iterable[FileWarning]:
    n, what = n_chosen(document), f"{document.graph.granularity}s"
    if found.jaccard < STABLE_JACCARD:
        text = (
            f"two circuits of resampled examples share {found.jaccard:.0%} of their {what} (mean of {found.resamples})"
        )
        yield FileWarning("unstable circuit", f"{text}; by chance {found.jaccard_by_chance:.0%}")
    if found.n_core < STABLE_CORE * n:
        text = (
            f"only {found.n_core:,} of {n:,} {what} are in {found.core_share:.0%} of the circuits of resampled examples"
        )
        yield FileWarning("small core", text)
    size = document.selection.size
    if size is not None and size.spread is not None and size.spread[1] > SPREAD * size.spread[0]:
        text = f"other examples would choose from {size.spread[0]:,} to {size.spread[1]:,} {what}"
        yield FileWarning("uncertain size", text)
    if size is not None and size.low is not None and size.spread is None:
        yield FileWarning("uncertain size", "many resamples of the examples choose no size at all")
