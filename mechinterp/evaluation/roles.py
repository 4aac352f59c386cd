"""Roles by measurement: what the heads and MLPs of a circuit do, with predictions that other pairs can refute.

A node gets at most one role, the first that fits, measured on the train pairs (role_evidence.py). In the words of the
IOI paper, where the pairs name the positions of the right answer (`IO`) and of the wrong one (`S2`):

- *name movers* write toward the answer themselves (direct effect) and attend from the answer position to `IO`;
  *negative name movers* attend there, too, and write against it;
- *S-inhibition heads* attend to `S2`, and patching their paths into the movers' queries costs logit difference;
- *backup name movers* attend to `IO`, and write more toward the answer when the movers are replaced.

And on every task: nodes that *write toward (against) the answer* wherever they attend, *previous token, duplicate
token, induction* heads by their detector scores, and heads *from X to Y* by their attention between named positions.

Every member has a line of its own: halfway between its own number and that of the control, the node at the quantile
`control` of all nodes below the limit. Both must be `margin` standard errors away from it; a node that is not that
clear of the control has no role. Each member predicts that it is beyond its line; it keeps its role if this holds on
the test pairs. A role whose nodes, replaced together, cost at least `effect` of the difference between clean and
corrupt prompts predicts that cost, too; the control is the same number of nodes that should not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from mechinterp.analysis.activation_patching import activation_patching
from mechinterp.base.canonical_json import six_digits
from mechinterp.base.keep import Keep, compute_always
from mechinterp.base.progress import Progress, no_progress, part_of
from mechinterp.evaluation.ablation import AblationSetup
from mechinterp.evaluation.measurements import Checked, check_predictions, patching_kind
from mechinterp.evaluation.predictions import (
    Attention,
    Control,
    Detector,
    DirectEffect,
    DirectEffectChange,
    Measure,
    PartsReplaced,
    PathPatched,
    Prediction,
)
from mechinterp.evaluation.role_evidence import (
    Evidence,
    Numbers,
    at_quantile,
    measure_evidence,
    per_batch,
    with_effects,
    with_movers,
)
from mechinterp.evaluation.role_names import attends
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import REST
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Node, split_position
from mechinterp.tasks.pairs import Pairs

CONTROL_SEED = 1
"""Predictions of detectors are checked on other random tokens (seed 1) than the roles were given on (seed 0)."""
PATCHED = (PartsReplaced, PathPatched, DirectEffectChange)
"""The measures that are made on few pairs."""


@dataclass(frozen=True)
class RoleLimits:
    """How strong and how clear a measurement must be to give a node a role."""

    direct: float = 0.05
    """The direct effect, as a share of the whole model's logit difference."""
    detector: float = 0.3
    """The detector score, 0 to 1."""
    attention: float = 0.3
    """The mean attention between two named positions, 0 to 1."""
    path: float = 0.02
    """The cost of patching the paths into the movers' queries, as a share of the logit difference on clean minus that
    on corrupt prompts."""
    backup: float = 0.01
    """The rise of the direct effect when the movers are replaced, as a share of the whole model's logit difference."""
    matters: float = 0.01
    """The cost of replacing the node, as a share of the logit difference on clean minus that on corrupt prompts."""
    effect: float = 0.05
    """The cost of replacing all nodes of a role, as a share of metric(clean) - metric(corrupt)."""
    control: float = 0.75
    """The quantile of all nodes below the limit at which the control is."""
    margin: float = 2.0
    """How many standard errors (of the train mean) a node and its control are away from the line between them."""


@dataclass(frozen=True)
class MeasuredRoles:
    """The roles of a circuit with their evidence."""

    roles: dict[str, dict[str, Any]]
    """Label, description and nodes of each role, by key: pass it to `save_circuit(roles=)`."""
    predictions: tuple[Checked, ...]
    """The predictions that hold on the test pairs: pass them to `save_circuit(predictions=)`."""
    failed: tuple[Checked, ...]
    """The predictions that do not hold there; a node whose membership failed has no role."""
    evidence: pd.DataFrame
    """One row per head and MLP of the circuit: role, direct effect, cost of replacing it, detectors, attention."""
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""


@dataclass(frozen=True)
class Condition:
    """A measurement that members of a role have in common, and who can be their control."""

    measure: Callable[[str], Measure]
    numbers: Numbers
    limit: float
    """The least value of a member, or the largest if it is negative."""
    pool: Sequence[str]
    """The nodes of which the control is taken."""
    words: str = ""
    """What the prediction's name says after the node."""

    @property
    def sign(self) -> int:
        """1 if members have large values, -1 if they have negative ones."""
        return 1 if self.limit > 0 else -1

    def reached(self, node: str) -> bool:
        """Whether the node is at or beyond the limit."""
        value = self.numbers.mean.get(node)
        return value is not None and self.sign * value >= abs(self.limit)

    def control(self, quantile: float) -> str | None:
        """The node at the quantile of those below the limit, in the direction of the role."""
        values = self.numbers.mean
        below = {n: self.sign * values[n] for n in self.pool if n in values and not self.reached(n)}
        return next(iter(at_quantile(below, quantile)), None)

    def prediction(self, label: str, node: str, limits: RoleLimits) -> Prediction | None:
        """That the node is beyond its line and the control is not; None if the two are not clear of the line."""
        control = self.control(limits.control)
        mean, error = self.numbers.mean, self.numbers.error
        value = self.sign * mean[node]
        other = 0.0 if control is None else max(0.0, self.sign * mean[control])
        noise = max(error[node], 0.0 if control is None else error[control])
        if not (value - other) / 2 > limits.margin * noise:
            return None
        controls = () if control is None else (Control(measure=self.measure(control)),)
        line = self.sign * (value + other) / 2
        return predicted(f"{label}: {node}{self.words}", self.measure(node), line, controls)


@dataclass(frozen=True)
class _Role:
    key: str
    label: str
    description: str
    conditions: tuple[Condition, ...]
    among: frozenset[str]
    """The nodes that can have the role."""
    position: str | None = None
    """The named position at which members have the role; None: at all of them."""
    matters: bool = True
    """Whether replacing a member must cost something."""

    def reached(self, node: str) -> bool:
        return node in self.among and all(condition.reached(node) for condition in self.conditions)

    def predictions(self, node: str, limits: RoleLimits) -> tuple[Prediction, ...]:
        """What a member predicts; empty if the node does not have the role."""
        if not self.reached(node):
            return ()
        found = [condition.prediction(self.label, node, limits) for condition in self.conditions]
        clear = tuple(prediction for prediction in found if prediction is not None)
        return clear if len(clear) == len(found) else ()

    def at_position(self, names: Sequence[str]) -> list[str]:
        """Those of a node's names that are at the position of the role."""
        return [name for name in names if self.position is None or split_position(name)[1] in ("", self.position)]


def measured_roles(
    model: HookManager,
    circuit: Circuit,
    train: Pairs,
    test: Pairs,
    *,
    metric: str = "logit_diff",
    replacement: str = "corrupt",
    limits: RoleLimits | None = None,
    n_patched: int = 20,
    batch_size: int = 32,
    progress: Progress = no_progress,
    keep: Keep = compute_always,
) -> MeasuredRoles:
    """The roles of the circuit's heads and MLPs, assigned on `train`, with predictions that hold on `test`.

    In the view of `read_direction` the reading takes the place of the logit difference (pairs: those of
    `Direction.pairs`): a direct effect is what the node adds to the reading on clean prompts, less on corrupt ones.

    If the graph has named positions, a node has its role at the position where it was measured. What the model or the
    pairs do not allow to measure (no wrong answers, no tokenizer, no named positions) is left out; `notes` say so.

    Cost: on `train` two forwards, on `test` one or two; on the first `n_patched` of each, two patched runs per role,
    and of train also a backward, one patched run per node that could have a role and does not cost next to nothing by
    first order, and the paths of at most 13 heads.

    Source: detectors as in `head_scores`; direct effects, name movers and their negative and backup heads, and
    S-inhibition as in Wang et al. 2022 (arXiv 2211.00593), sections 3.1 to 3.4; the limits and the order of the roles
    are ours.

    Args:
        model: The model that the circuit was found in.
        circuit: The circuit.
        train: The pairs that roles are assigned on.
        test: The pairs that predictions are checked on.
        metric: The name of the metric in which the cost of replacing a whole role is stated.
        replacement: What replaces a whole role: `corrupt`, `mean`, `mean-positional` or `zero`.
        limits: How strong and clear a measurement must be; by default `RoleLimits()`.
        n_patched: The number of train and of test pairs for patched runs.
        batch_size: How many examples to run at a time.
        progress: Called with the percentage done and 100.
        keep: Around the patched runs on the train pairs; may load what an earlier run has saved.
    """
    limits = limits or RoleLimits()
    setup = AblationSetup.of(model, circuit.graph, train, metric, replacement, None, batch_size, progress)

    def of_part(first: int, last: int) -> AblationSetup:
        return replace(setup, progress=part_of(progress, first, last))

    evidence = measure_evidence(of_part(0, 25), circuit, n_patched)
    places = _Places.of(train, circuit.graph.answers)
    could = [node for node in evidence.own() if any(r.reached(node) for r in _roles(evidence, limits, places))]
    evidence = with_effects(evidence, of_part(25, 50), could, limits.matters, keep)
    movers = _movers(evidence, limits, places)
    least = limits.path * evidence.span
    evidence = with_movers(evidence, of_part(50, 65), movers, least, limits.control, keep)
    progress(65, 100)
    roles = _roles(evidence, limits, places)
    members: dict[str, dict[str, tuple[Prediction, ...]]] = {}
    for node in evidence.own():
        for role in roles:
            stated = role.predictions(node, limits) if role.at_position(evidence.names[node]) else ()
            if stated and (not role.matters or _matters(evidence, node, limits)):
                members.setdefault(role.key, {})[node] = stated
                break
    every = [prediction for some in members.values() for stated in some.values() for prediction in stated]
    checked = _check(of_part(65, 85), every, test, n_patched)
    held = {entry.prediction.name for entry in checked if entry.ok}
    described: dict[str, dict[str, Any]] = {}
    for role in (role for role in roles if role.key in members):
        kept = [node for node, stated in members[role.key].items() if {p.name for p in stated} <= held]
        nodes = tuple(name for node in kept for name in role.at_position(evidence.names[node]))
        if nodes:
            described[role.key] = {"label": role.label, "description": role.description, "nodes": nodes}
    effects = _predict_effects(of_part(85, 93), described, evidence, limits, keep)
    checked = (*checked, *_check(of_part(93, 100), effects, test, n_patched))
    progress(100, 100)
    role_of = {split_position(name)[0]: role["label"] for role in described.values() for name in role["nodes"]}
    return MeasuredRoles(
        described,
        tuple(entry for entry in checked if entry.ok),
        tuple(entry for entry in checked if not entry.ok),
        evidence.to_frame(role_of),
        evidence.notes,
    )


def _matters(evidence: Evidence, node: str, limits: RoleLimits) -> bool:
    """Whether replacing the node costs enough; true if it could not be measured at all."""
    if not evidence.direct:
        return True
    return node in evidence.effects and abs(evidence.effects[node]) >= limits.matters * evidence.span


def _check(setup: AblationSetup, predictions: Sequence[Prediction], test: Pairs, n_patched: int) -> tuple[Checked, ...]:
    """The predictions checked: those of patched runs on the first test pairs, the others on all; in their order."""
    found: dict[str, Checked] = {}
    groups = [
        (test, [p for p in predictions if not isinstance(p.measure, PATCHED)]),
        (test[:n_patched], [p for p in predictions if isinstance(p.measure, PATCHED)]),
    ]
    for i, (pairs, some) in enumerate(groups):
        report = part_of(setup.progress, 50 * i, 50 * i + 50)
        checked = check_predictions(setup.model, some, pairs, batch_size=setup.batch_size, progress=report)
        found |= {entry.prediction.name: entry for entry in checked}
    return tuple(found[prediction.name] for prediction in predictions)


@dataclass(frozen=True)
class _Places:
    """The named positions with a meaning for the IOI paper's roles; None where there is no such position."""

    answers: str | None
    """Where the answer is read, as the graph names it."""
    end: str | None
    """The named position at which the answer is read in every example."""
    right: str | None
    """The first position at which a right answer's token stands in every example."""
    wrong: str | None
    """The last position at which a wrong answer's token stands in every example."""

    @staticmethod
    def of(pairs: Pairs, answers: str | None) -> _Places:
        """The places that the pairs name."""

        def holds(name: str, answers: Any) -> bool:
            if answers is None:
                return False
            token = pairs.clean.gather(1, pairs.positions[name][:, None])
            return bool((token == answers).any(1).all())

        end = [n for n, at in pairs.positions.items() if bool((pairs.answer_pos == at[:, None]).all())]
        right = [name for name in pairs.positions if holds(name, pairs.right)]
        wrong = [name for name in pairs.positions if holds(name, pairs.wrong)]
        return _Places(answers or None, next(iter(end), None), next(iter(right), None), next(iter(wrong[-1:]), None))

    @property
    def name(self) -> str:
        """`name ` where the task moves names, as IOI does; else nothing."""
        return "name " if self.right == "IO" else ""

    @property
    def inhibited(self) -> str:
        """The paper's name of S-inhibition heads; another one where it is not the subject that is inhibited."""
        return "S-inhibition heads" if self.wrong == "S2" else "inhibition heads"


def _movers(evidence: Evidence, limits: RoleLimits, places: _Places) -> tuple[str, ...]:
    """The movers: the circuit's (name) movers, or else its heads that write toward the answer."""
    roles = {role.key: role for role in _roles(evidence, limits, places)}
    for key in ("movers", "toward_heads"):
        if key in roles:
            own = [n for n in evidence.own() if roles[key].predictions(n, limits) and _matters(evidence, n, limits)]
            if own:
                return tuple(own)
    return ()


def _roles(evidence: Evidence, limits: RoleLimits, places: _Places) -> list[_Role]:
    """Every role that a node could have, in the order in which they are tried."""
    paper, late = _by_paths(evidence, limits, places)
    return [
        *_writing(evidence, limits, places),
        *paper,
        *_detecting(evidence, limits),
        *_attending(evidence, limits),
        *late,
    ]


def _to(evidence: Evidence, limits: RoleLimits, query: str | None, key: str | None) -> tuple[Condition, frozenset[str]]:
    """Attention from one position to another, and the heads for which it is the strongest from there."""
    numbers = evidence.attention.get((query or "", key or ""), Numbers())
    own = frozenset(head for head in numbers.mean if evidence.strongest(head, query) == (query, key))
    measure = partial(_attention, query or "", key or "")
    words = f" attends from {_quoted(query or '')} to {_quoted(key or '')}"
    return Condition(measure, numbers, limits.attention, evidence.heads, words), own


def _writing(evidence: Evidence, limits: RoleLimits, places: _Places) -> Iterable[_Role]:
    """Movers, negative movers, and all that writes toward or against the answer."""
    if not evidence.total > 0:
        return
    direct = evidence.direct.mean
    mostly = {node for node, value in direct.items() if abs(value) >= abs(evidence.effects.get(node, 0.0)) / 2}
    attends, own = _to(evidence, limits, places.end, places.right)
    least = limits.direct * evidence.total
    on = evidence.explained
    writes = f"a direct effect of at least {limits.direct:.0%} of {on.total}"
    half = "and on the train pairs at least half of what replacing the node costs"
    heads = frozenset(evidence.heads) & mostly
    toward, against = (Condition(_direct, evidence.direct, sign * least, evidence.heads) for sign in (1, -1))
    for key, name, condition, words in (
        ("movers", f"{places.name}mover heads", toward, "toward"),
        ("negative_movers", f"negative {places.name}mover heads", against, "against"),
    ):
        described = (
            f"Attends from {places.end} to {places.right} and writes {words} what stands there: on the train pairs "
            f"attention of at least {limits.attention:g}, {writes}, {half}."
        )
        yield _Role(key, name, described, (condition, attends), heads & own, places.answers)
    for words, sign in (("toward", 1), ("against", -1)):
        for kind, what in (("head", "heads"), ("mlp", "MLPs")):
            pool = evidence.of_kind(kind)
            described = f"Writes {words} {on.right} itself: on the train pairs {writes}, {half}."
            condition = Condition(_direct, evidence.direct, sign * least, pool)
            label, nodes = f"{what} that write {words} {on.aim}", frozenset(pool) & mostly
            yield _Role(f"{words}_{what.lower()}", label, described, (condition,), nodes, places.answers)


def _by_paths(evidence: Evidence, limits: RoleLimits, places: _Places) -> tuple[list[_Role], list[_Role]]:
    """(the roles by way of the movers in the paper's words, those of nodes that attend elsewhere)."""
    first, later = list[_Role](), list[_Role]()
    heads = frozenset(evidence.heads)
    if evidence.paths:
        queries = tuple(f"{mover}<q>" for mover in evidence.movers)
        least = limits.path * evidence.span
        path = Condition(
            partial(_path, queries, evidence.explained.metric), evidence.paths, least, evidence.path_control
        )
        costs = (
            f"patching its paths into the queries of {', '.join(evidence.movers)} costs at least {limits.path:.0%} of "
            f"{evidence.explained.total} on the train pairs"
        )
        attends, own = _to(evidence, limits, places.end, places.wrong)
        described = f"Attends from {places.end} to {places.wrong}, and {costs}."
        first.append(
            _Role("inhibition", places.inhibited, described, (path, attends), own, places.answers, matters=False)
        )
        label = "heads that write to the movers' queries"
        later.append(_Role("to_queries", label, f"{costs[0].upper()}{costs[1:]}.", (path,), heads, matters=False))
    if evidence.changes:
        least = limits.backup * abs(evidence.total)
        change = Condition(partial(_change, evidence.movers), evidence.changes, least, evidence.heads)
        rises = (
            f"its direct effect rises by at least {limits.backup:.0%} of {evidence.explained.total} when "
            f"{', '.join(evidence.movers)} are replaced, on the train pairs"
        )
        attends, own = _to(evidence, limits, places.end, places.right)
        label = f"backup {places.name}mover heads"
        described = f"Attends from {places.end} to {places.right}, and {rises}."
        first.append(_Role("backup_movers", label, described, (change, attends), own, places.answers, matters=False))
        label, described = "heads that compensate for the movers", f"{rises[0].upper()}{rises[1:]}."
        later.append(_Role("compensating", label, described, (change,), heads, places.answers, matters=False))
    return first, later


def _detecting(evidence: Evidence, limits: RoleLimits) -> Iterable[_Role]:
    """Previous token, duplicate token and induction heads."""
    for kind, numbers in evidence.detectors.items():
        name = kind.replace("_", " ")
        described = f"On random tokens said twice: {name} score of at least {limits.detector:g}."
        measure = partial(_detector, kind, evidence.detector_length)
        condition = Condition(measure, numbers, limits.detector, evidence.heads)
        yield _Role(kind, f"{name} heads", described, (condition,), frozenset(evidence.heads))


def _attending(evidence: Evidence, limits: RoleLimits) -> Iterable[_Role]:
    """Heads from one named position to another."""
    strongest = {head: evidence.strongest(head) for head in evidence.heads}
    for (query, key), numbers in evidence.attention.items():
        described = f"Attends from {query} to {key} with at least {limits.attention:g} (mean over the train prompts)."
        own = frozenset(head for head in evidence.heads if strongest[head] == (query, key))
        first, last = _quoted(query), _quoted(key)
        condition = Condition(partial(_attention, query, key), numbers, limits.attention, evidence.heads)
        yield _Role(f"{first}_to_{last}", attends(query, key), described, (condition,), own, query)


def _quoted(position: str) -> str:
    """The name of a position, in quotes if it contains a " to " of its own."""
    return repr(position) if " " in position or "_to_" in position else position


def _direct(node: str) -> Measure:
    return DirectEffect(node=node)


def _detector(kind: str, length: int, node: str) -> Measure:
    return Detector.model_validate({"head": node, "pattern": kind, "length": length, "seed": CONTROL_SEED})


def _attention(query: str, key: str, node: str) -> Measure:
    return Attention(head=node, query=query, key=key)


def _path(queries: tuple[str, ...], metric: str, node: str) -> Measure:
    return PathPatched(senders=(node,), receivers=queries, metric=metric)


def _change(movers: tuple[str, ...], node: str) -> Measure:
    return DirectEffectChange(node=node, replaced=movers)


def _replaced(metric: str, replacement: str, parts: tuple[str, ...]) -> Measure:
    return PartsReplaced.model_validate({"parts": parts, "replacement": replacement, "metric": metric})


def predicted(name: str, measure: Measure, value: float, controls: tuple[Control, ...]) -> Prediction:
    """The prediction that a measurement is at least a positive number, or at most a negative one."""
    relation = ">=" if value > 0 else "<="
    return Prediction(name=name, measure=measure, relation=relation, value=six_digits(value), controls=controls)


def _predict_effects(
    setup: AblationSetup, roles: Mapping[str, Mapping[str, Any]], evidence: Evidence, limits: RoleLimits, keep: Keep
) -> list[Prediction]:
    """For each role that matters: replacing its nodes together costs more than halfway from the control to its cost."""
    roles = {key: role for key, role in roles.items() if not any(name.endswith(f"@{REST}") for name in role["nodes"])}
    controls = {key: _unimportant(evidence, role["nodes"]) for key, role in roles.items()}
    parts = list(dict.fromkeys([*(role["nodes"] for role in roles.values()), *filter(None, controls.values())]))
    if not parts:
        return []

    def replaced() -> dict[str, Tensor]:
        grid = activation_patching(
            setup.model,
            evidence.patched_pairs,
            parts,
            metric=setup.metric,
            replacement=patching_kind(setup.replacement),
            batch_size=setup.batch_size,
            progress=per_batch(setup, evidence.patched_pairs),
        )
        ends = torch.tensor([float(grid.about[end]) for end in ("clean_value", "corrupt_value")], dtype=torch.float64)
        return {"effects": grid.mean().values[:, 0], "ends": ends}

    found = keep(f"roles: effects of {parts}", replaced)
    whole = abs(float(found["ends"][0] - found["ends"][1]))
    effect_of = dict(zip(parts, found["effects"].tolist(), strict=True))
    measure = partial(_replaced, setup.metric.name, setup.replacement)
    predictions: list[Prediction] = []
    for key, role in roles.items():
        effect, control = effect_of[role["nodes"]], controls[key]
        sign = 1 if effect > 0 else -1
        other = max(0.0, sign * effect_of[control]) if control else 0.0
        if not abs(effect) >= max(limits.effect * whole, other):  # false for NaN, too
            continue
        against = (Control(measure=measure(control)),) if control else ()
        value = sign * (abs(effect) + other) / 2
        predictions.append(predicted(f"{role['label']}: effect", measure(role["nodes"]), value, against))
    return predictions


def _unimportant(evidence: Evidence, role: Sequence[str]) -> tuple[str, ...]:
    """As many nodes of each kind as the role has, or as many as there are.

    Nodes outside the circuit come first; then those of the smallest cost when replaced (as measured, else by first
    order), then of the smallest direct effect.
    """
    own = {split_position(name)[0] for name in role}
    chosen: list[str] = []

    def importance(node: str) -> tuple[bool, float, float]:
        return node in evidence.names, abs(evidence.estimate(node) or 0.0), abs(evidence.direct.mean.get(node, 0.0))

    for kind in ("head", "mlp"):
        count = sum(Node.parse(node).kind == kind for node in own)
        chosen += sorted((node for node in evidence.of_kind(kind) if node not in own), key=importance)[:count]
    return tuple(sorted(chosen))
