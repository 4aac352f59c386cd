"""The claims about how a circuit was found: the model's performance, the curve, the size, the scores, the stability."""

from __future__ import annotations

import math
from typing import Any

from mechinterp.base.canonical_json import six_digits
from mechinterp.base.progress import Progress, StageProgress
from mechinterp.base.settings import check_settings
from mechinterp.circuit_file.records import score_table, task_of, tolerance_for
from mechinterp.circuit_file.schema import (
    CircuitFile,
    CurveRecord,
    PerformanceRecord,
    SizeRule,
    TaskPairs,
    TaskRecord,
    Tolerance,
)
from mechinterp.circuit_file.setting_types import REFINEMENT, SELECTION
from mechinterp.circuit_file.verify.claims import Ledger
from mechinterp.circuit_file.verify.coverage import RESCORED, refined
from mechinterp.discovery.method import METHODS, score_edges
from mechinterp.discovery.stable import (
    BLOCKS,
    STABLE,
    CircuitStability,
    block_resamples,
    resampled_scores,
    stability_at,
    stable_scores,
)
from mechinterp.evaluation.sizes import SPREAD_AT, CurvePoint, Levels, SizeSearch, chosen_size, smallest_faithful
from mechinterp.evaluation.task_check import TaskCheck, check_performance
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.scores import Scores
from mechinterp.graphs.select import select
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.pairs import Pairs

BOOTSTRAP = "bootstrap_"
"""Prefix of the settings of `stable_scores` among those of the method."""
STABILITY_TOLERANCE = Tolerance(relative=0, absolute=0.02)
"""Of shares of resamples: near ties between edges may be broken otherwise on another machine."""


def stated_limit(stated: Tolerance, dtype: str, own: Tolerance | None, name: str, ledger: Ledger) -> Tolerance:
    """The tolerance to use. A file that states a looser one than its dtype needs fails a claim."""
    usual = tolerance_for(dtype)
    strict = stated.relative <= usual.relative and stated.absolute <= usual.absolute
    if not strict:
        detail = f"looser than {dtype} needs (relative {usual.relative:g}, absolute {usual.absolute:g})"
        ledger.failed(f"{name}.tolerance", detail)
    return own or (stated if strict else usual)


def check_task_performance(
    document: CircuitFile,
    stated: PerformanceRecord,
    model: HookManager,
    pairs: dict[str, Pairs],
    limit: Tolerance | None,
    batch_size: int,
    ledger: Ledger,
) -> None:
    """Record whether the full model does the task as well as stated."""
    if stated.pairs not in pairs:
        ledger.failed("performance", f"not run: the pairs {stated.pairs!r} are not what the file states")
        return
    with ledger.claimed("performance"):
        mine = pairs[stated.pairs]
        templates = _templates(document, stated, len(mine))
        found = check_performance(
            model, mine, metric=stated.metric, templates=templates, batch_size=batch_size, seed=stated.seed
        )
        limit = stated_limit(stated.tolerance, document.model.dtype, limit, "performance", ledger)
        ledger.equal("performance.n_examples", found.n_examples, stated.n_examples)
        for name in ("clean", "corrupt", "difference", "difference_ci", "accuracy", "accuracy_ci"):
            ledger.close(f"performance.{name}", getattr(found, name), getattr(stated, name), limit)
        _check_templates(found, stated, limit, ledger)


def _templates(document: CircuitFile, stated: PerformanceRecord, n: int) -> tuple[str, ...] | None:
    """The template of each example; None if the task does not tell."""
    made = document.pairs[stated.pairs].made_from
    if not isinstance(document.task, TaskRecord) or not isinstance(made, TaskPairs) or made.skip is not None:
        return None
    return task_of(document.task).row_templates(made.split, made.seed, n)


def _check_templates(found: TaskCheck, stated: PerformanceRecord, limit: Tolerance, ledger: Ledger) -> None:
    """Record whether each template has the stated examples, accuracy and difference; one that was left out fails."""
    got = [(text, n) for text, n, _, _ in found.by_template]
    expected = [(row.template, row.n_examples) for row in stated.by_template]
    if ledger.equal("performance.by_template", got, expected):
        numbers = tuple((accuracy, difference) for _, _, accuracy, difference in found.by_template)
        rows = tuple((row.accuracy, row.difference) for row in stated.by_template)
        ledger.close("performance.by_template, numbers", numbers, rows, limit)


def check_size(document: CircuitFile, curve: CurveRecord, size: SizeRule, n_units: int, ledger: Ledger) -> None:
    """Record whether the rule, applied to the stated curve, gives the size."""
    parameters = document.selection.parameters
    points = _points(curve)
    with ledger.claimed("selection.size"):
        got = parameters.get("nodes", parameters.get("edges"))
        if size.target is not None:
            again = smallest_faithful(points, size.target)
        else:
            again = chosen_size(points, n_units, _levels(size))
        ledger.equal("selection.size", got, again)


def _levels(size: SizeRule | None) -> Levels:
    """The levels of a size rule; the usual ones where there is none."""
    if size is None or size.low is None:
        return Levels()
    assert size.high is not None and size.kl_share is not None  # the schema asks for all or none
    assert size.most is not None and size.agreement is not None
    return Levels(size.low, size.high, size.kl_share, size.most, size.agreement)


def _points(curve: CurveRecord) -> list[CurvePoint]:
    return [
        CurvePoint(p.n_selected, p.n_edges, p.faithfulness, p.faithfulness_ci, p.kl, p.passing) for p in curve.points
    ]


def check_curve(
    document: CircuitFile,
    curve: CurveRecord,
    model: HookManager,
    scores: Scores,
    pairs: dict[str, Pairs],
    limit: Tolerance | None,
    batch_size: int,
    progress: Progress,
    ledger: Ledger,
) -> None:
    """Record whether every point of the curve is what it states."""
    parameters: dict[str, Any] = dict(document.selection.parameters)
    if document.selection.size is not None:
        check_size(document, curve, document.selection.size, scores.graph.n_units, ledger)
    if curve.pairs not in pairs:
        ledger.failed("curve", f"not run: the pairs {curve.pairs!r} are not what the file states")
        return
    if curve.folds is not None:
        ledger.notes.append(
            f"The curve was cross-fitted in {curve.folds} folds, which need scores of their own; it was not run again."
        )
        return
    with ledger.claimed("curve"):
        how = {key: parameters[key] for key in ("rule", "by", "ratio") if key in parameters}
        check_settings("select", SELECTION, how)
        points, size = _points(curve), document.selection.size
        search = SizeSearch(
            model,
            scores,
            [(scores, pairs[curve.pairs])],
            how,
            curve.metric,
            curve.replacement,
            batch_size,
            levels=_levels(size),
            seed=curve.seed or 0,
        )
        search.measure([point.n_selected for point in points], progress)
        again = [search.point(point.n_selected) for point in points]
        limit = limit or tolerance_for(document.model.dtype)
        ledger.equal("curve.n_edges", tuple(p.n_edges for p in again), tuple(p.n_edges for p in points))
        got, stated = (tuple(six_digits(p.faithfulness) for p in line) for line in (again, points))
        ledger.close("curve.faithfulness", got, stated, limit)
        if curve.kl_empty is not None:
            shares = [tuple(p.passing for p in line) for line in (again, points)]
            ledger.close("curve.passing", shares[0], shares[1], STABILITY_TOLERANCE)
            ledger.close("curve.kl", tuple(p.kl for p in again), tuple(p.kl for p in points), limit)
            ledger.close("curve.kl_empty", search.kl_empty, curve.kl_empty, limit)
            ledger.close("curve.intervals", tuple(p.interval for p in again), tuple(p.interval for p in points), limit)
        if size is not None and size.low is not None:
            _check_spread(size, search.resampled_sizes(), ledger)


def _check_spread(size: SizeRule, found: list[float], ledger: Ledger) -> None:
    """Record whether the stated spread is that of these sizes of resamples, up to the tolerance of shares."""
    off = int(STABILITY_TOLERANCE.absolute * len(found))
    low, high = (found[at - off : at + off + 1] for at in (SPREAD_AT, len(found) - 1 - SPREAD_AT))
    stated, none = size.spread, "many choose none"
    ok = math.isinf(high[-1]) if stated is None else low[0] <= stated[0] <= low[-1] and high[0] <= stated[1] <= high[-1]
    expected = none if stated is None else f"{stated[0]} to {stated[1]}"
    got = none if math.isinf(high[off]) else f"{low[off]:g} to {high[off]:g}"
    ledger.holds("selection.size.spread", ok, expected, got)


def before_refining(document: CircuitFile, circuit: Circuit) -> Circuit:
    """The circuit that the rule of the file selects; of one that was not refined the circuit itself.

    Raises InputError if the file states no such rule.
    """
    if not refined(document) or circuit.scores is None:
        return circuit
    rule: dict[str, Any] = {name: value for name, value in circuit.selection.items() if name not in REFINEMENT}
    check_settings("select", SELECTION, rule)
    return select(circuit.graph, circuit.scores, **rule)


def check_refinement(document: CircuitFile, circuit: Circuit, ledger: Ledger) -> None:
    """Record whether a refined circuit has no more units outside of what was selected than it says were added."""
    with ledger.claimed("selection.added"):
        before, added = before_refining(document, circuit), circuit.selection.get("added", 0)
        new = len(circuit.graph.unit[circuit.kept & ~before.members].unique())
        ok = isinstance(added, int) and new <= added
        ledger.holds("selection.added", ok, f"at most {added} outside of the selection", f"{new}")


def check_stability(document: CircuitFile, circuit: Circuit, ledger: Ledger) -> None:
    """Record whether the stated shares of resamples agree with each other; `check_scores_again` measures them."""
    stated = document.stability
    if stated is None:
        return
    counts = [(edge.frequency or 0.0) * stated.resamples for edge in document.edges]
    whole = all(abs(count - round(count)) < 1e-4 * stated.resamples for count in counts)
    ledger.holds(
        "stability.frequency", whole, f"multiples of 1/{stated.resamples}", "they are" if whole else "they are not"
    )
    shares, differing = _shares(document, circuit.graph)
    if circuit.graph.level == "node":
        ledger.equal("stability.frequency of a node, the same for its edges", differing, 0)
    n_core = sum(share >= stated.core_share - 1e-6 for share in shares.values())
    ledger.equal("stability.n_core", stated.n_core, n_core)
    with ledger.claimed("stability.jaccard_by_chance"):
        n, n_all = before_refining(document, circuit).n_units, circuit.graph.n_units
        limit = Tolerance(relative=1e-5, absolute=0.0)
        ledger.close("stability.jaccard_by_chance", n / (2 * n_all - n), stated.jaccard_by_chance, limit)


def _shares(document: CircuitFile, graph: Graph) -> tuple[dict[int, float], int]:
    """The stated share of resamples of every unit of the circuit, and how many edges state another one than it."""
    shares, differing = dict[int, float](), 0
    for edge in document.edges:
        share = edge.frequency or 0.0
        differing += shares.setdefault(int(graph.unit[graph.edge_index(edge.name)]), share) != share
    return shares, differing


def check_scores_again(
    document: CircuitFile,
    model: HookManager,
    circuit: Circuit,
    scores: Scores,
    pairs: dict[str, Pairs],
    limit: Tolerance | None,
    batch_size: int,
    progress: StageProgress,
    ledger: Ledger,
) -> None:
    """Record whether the discovery gives these scores again, and its resamples the stated stability."""
    stated = document.discovery
    if stated is None or stated.pairs not in pairs:
        ledger.failed(RESCORED, "not run: the pairs of the discovery are not known or not what the file states")
        return
    with ledger.claimed(RESCORED):
        settings: dict[str, Any] = dict(stated.parameters)
        stable = {name: settings.pop(f"{BOOTSTRAP}{name}") for name in STABLE if f"{BOOTSTRAP}{name}" in settings}
        check_settings("stable_scores", STABLE, stable)
        known = METHODS.get(stated.method).settings
        check_settings(f"method {stated.method!r}", known, settings)  # other arguments, such as `resume`, are refused
        mine = pairs[stated.pairs]
        asked: dict[str, Any] = {
            "method": stated.method,
            "metric": stated.metric.name,
            "batch_size": batch_size,
            **settings,
        }

        def show(done: int, total: int) -> None:
            progress("scores", done, total)

        found = document.stability
        if stable:
            again, samples = stable_scores(model, scores.graph, mine, progress=show, **asked, **stable).scores, None
        elif found is not None and found.kind == BLOCKS:
            rows = block_resamples(len(mine), found.resamples, found.seed)
            again, samples = resampled_scores(model, scores.graph, mine, rows, asked, show)
        else:
            again = score_edges(model, scores.graph, mine, progress=show, **asked)
            samples = again.samples
        limit = limit or tolerance_for(document.model.dtype)
        expected = score_table(scores).double()
        gap = float((score_table(again).double() - expected).abs().max())
        most = limit.absolute + limit.relative * float(expected.abs().max())
        ok = gap <= most
        ledger.equal(RESCORED, ok, True, f"the largest difference is {gap:.3g}, allowed is {most:.3g}")
        if found is None:
            return
        if samples is None or len(samples) != found.resamples:
            ledger.failed("stability again", f"the method makes no {found.resamples} resamples")
            return
        parameters: dict[str, Any] = dict(document.selection.parameters)
        size = parameters.get(f"{scores.graph.level}s", before_refining(document, circuit).n_units)
        how = {name: parameters[name] for name in ("rule", "by", "ratio") if name in parameters}
        _compare_stability(document, stability_at(again, samples, size, **how), ledger)


def _compare_stability(document: CircuitFile, again: CircuitStability, ledger: Ledger) -> None:
    stated, graph = document.stability, again.circuit.graph
    assert stated is not None
    ledger.close("stability.jaccard again", again.jaccard, stated.jaccard, STABILITY_TOLERANCE)
    shares, _ = _shares(document, graph)
    outside = [n / len(shares) for n in (again.n_often_outside, stated.n_often_outside)]
    ledger.close(f"stability.n_often_outside again, per {graph.level}", outside[0], outside[1], STABILITY_TOLERANCE)
    first = again.frequency[tuple(graph.first_of_unit.T)]
    gaps = [abs(float(first[unit]) - share) for unit, share in shares.items()]
    ledger.close("stability.frequency again, mean difference", sum(gaps) / len(gaps), 0.0, STABILITY_TOLERANCE)
