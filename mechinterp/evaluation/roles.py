"""Roles by measurement: what the heads and MLPs of a circuit do, with predictions that other pairs can refute.

A node gets at most one role, the first that fits, measured on the train pairs:

- *writes toward (against) the answer*: its direct effect is at least `direct` of the whole logit difference, and at
  least half of what replacing it costs, so that most of its effect is direct;
- *previous token, duplicate token, induction*: its detector score on repeated random tokens is at least `detector`;
- *from X to Y*: its mean attention from one named position to another is at least `attention` (its strongest pair of
  positions counts).

A node whose replacement costs less than `matters` of the difference between clean and corrupt prompts gets no role.
Each member of a role predicts that it is beyond a threshold: the limit of the role, or the midpoint between the weakest
member and the strongest node below the limit if that is stricter; that node is the negative control. A member keeps its
role if this holds on the test pairs. A role whose nodes, replaced together, cost at least `effect` of the difference
between clean and corrupt prompts predicts that cost, too; the control is the same number of nodes that should not
matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from mechinterp.analysis.activation_patching import activation_patching
from mechinterp.analysis.direct_logit_attribution import direct_logit_attribution
from mechinterp.analysis.head_detectors import TARGETS, attention_between, head_scores
from mechinterp.base.canonical_json import six_digits
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.evaluation.ablation import AblationSetup
from mechinterp.evaluation.measurements import Checked, check_predictions, patching_kind
from mechinterp.evaluation.predictions import (
    Attention,
    Control,
    Detector,
    DirectEffect,
    Measure,
    PartsReplaced,
    Prediction,
)
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import REST
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Node, split_position
from mechinterp.tasks.pairs import Pairs

DETECTOR_LENGTH = 25
CONTROL_SEED = 1
"""Predictions of detectors are checked on other random tokens (seed 1) than the roles were given on (seed 0)."""
ByNode = Mapping[str, float]
"""A number per node."""


@dataclass(frozen=True)
class Evidence:
    """Means over the examples, by node; empty where something could not be measured (`notes` say why)."""

    nodes: tuple[str, ...]
    """All heads of the model, and the MLPs whose neurons are not separate nodes."""
    names: Mapping[str, Sequence[str]]
    """The nodes of the circuit, with their names in it (several if the graph has named positions)."""
    direct: ByNode
    """The direct effect of every node: logits toward the right answers."""
    logit_diff: float
    """The sum of all direct effects: the logit difference of the whole model."""
    effects: ByNode
    """For each node of the circuit, the logit difference that replacing its output by the corrupt one costs."""
    span: float
    """|logit difference on clean prompts - logit difference on corrupt prompts|."""
    detectors: Mapping[str, ByNode]
    """For each kind of detector, the scores of all heads."""
    detector_length: int
    """How many random tokens the detectors repeat; fewer than usual if the context or the vocabulary is small."""
    attention: Mapping[tuple[str, str], ByNode]
    """For each query position and earlier key position, the mean attention of all heads."""
    notes: tuple[str, ...]

    @property
    def heads(self) -> tuple[str, ...]:
        """All heads of the model."""
        return self.of_kind("head")

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """The nodes of a kind: `head` or `mlp`."""
        return tuple(node for node in self.nodes if Node.parse(node).kind == kind)

    def strongest(self, head: str) -> tuple[str, str] | None:
        """The (query, key) positions between which the head attends most; None if no attention was measured."""
        return max(self.attention, key=lambda pair: self.attention[pair][head], default=None)

    def to_frame(self, role_of: Mapping[str, str]) -> pd.DataFrame:
        """One row per head and MLP of the circuit, with its role ("" for none)."""
        rows: list[dict[str, object]] = []
        for node in (node for node in self.nodes if node in self.names):
            row: dict[str, object] = {"node": node, "role": role_of.get(node, "")}
            if self.direct:
                row["direct effect"] = self.direct[node]
                row["replacing it"] = self.effects[node]
            row |= {kind.replace("_", " "): values.get(node) for kind, values in self.detectors.items()}
            pair = self.strongest(node) if node in self.heads else None
            row |= {"attends": None, "attention": None} if self.attention else {}
            if pair is not None:
                row |= {"attends": " -> ".join(pair), "attention": self.attention[pair][node]}
            rows.append(row)
        return pd.DataFrame(rows)


def measure_evidence(setup: AblationSetup, circuit: Circuit) -> Evidence:
    """The evidence about the circuit's nodes on the pairs of the setup.

    Cost: three forwards, and one patched run per head and MLP of the circuit; the detectors run on tokens of their own.
    """
    model, dims, batch_size = setup.model, setup.model.dims, setup.batch_size
    heads = tuple(f"a{layer}.h{head}" for layer in range(dims.n_layers) for head in range(dims.n_heads))
    names: dict[str, list[str]] = {}
    for name in circuit.nodes:
        names.setdefault(split_position(name)[0], []).append(name)
    mlps = [f"m{layer}" for layer in range(dims.n_layers) if dims.has_mlp]
    split = circuit.graph.split_mlps
    nodes = (*heads, *(name for name in mlps if name not in split))
    notes: list[str] = []
    if split:
        notes.append(f"No roles for {', '.join(split)}, whose neurons are separate nodes, nor for those neurons.")

    def of_heads(values: Tensor) -> ByNode:
        return dict(zip(heads, values.flatten().tolist(), strict=True))

    direct, logit_diff, effects, span = dict[str, float](), 0.0, dict[str, float](), 0.0
    try:
        direct, logit_diff, effects, span = _measure_effects(setup, nodes, [node for node in nodes if node in names])
    except (InputError, UnsupportedError) as error:
        notes.append(f"Direct effects were not measured: {error}")
    detectors: dict[str, ByNode] = {}
    length = min(DETECTOR_LENGTH, (dims.n_ctx - 1) // 2, dims.d_vocab // 2)
    try:
        for kind in TARGETS:
            detectors[kind] = of_heads(head_scores(model, kind, length=length, batch_size=batch_size).mean().values)
    except (InputError, UnsupportedError) as error:
        notes.append(f"Detectors were not measured: {error}")
    attention: dict[tuple[str, str], ByNode] = {}
    try:
        grid = attention_between(model, setup.pairs, batch_size=batch_size).mean()
        for query, key in _earlier_keys(setup.pairs):
            attention[query, key] = of_heads(grid.at(query=query, key=key).values)
    except (InputError, UnsupportedError) as error:
        notes.append(f"Attention between named positions was not measured: {error}")
    return Evidence(nodes, names, direct, logit_diff, effects, span, detectors, length, attention, tuple(notes))


def _measure_effects(
    setup: AblationSetup, nodes: Sequence[str], own: Sequence[str]
) -> tuple[dict[str, float], float, dict[str, float], float]:
    """The direct effects of the nodes and their sum; what replacing each of the circuit's `own` costs, and the span."""
    model, pairs, batch_size = setup.model, setup.pairs, setup.batch_size
    parts = direct_logit_attribution(model, pairs, batch_size=batch_size).mean()
    direct = {node: float(parts.at(node=node)) for node in nodes}
    logit_diff = float(parts.values.sum())
    if not own:
        return direct, logit_diff, {}, 0.0
    n_batches, finished = -(-len(pairs) // batch_size), 0

    def over_all_batches(done: int, total: int) -> None:
        nonlocal finished
        setup.progress(finished * total + done, n_batches * total)
        finished += done == total

    costs = activation_patching(model, pairs, own, batch_size=batch_size, progress=over_all_batches)
    effects = dict(zip(own, costs.mean().values[:, 0].tolist(), strict=True))
    span = abs(float(costs.about["clean_value"]) - float(costs.about["corrupt_value"]))
    return direct, logit_diff, effects, span


def _earlier_keys(pairs: Pairs) -> Iterable[tuple[str, str]]:
    """Every (query, key) of named positions with the key earlier than the query in every example."""
    order = torch.stack(list(pairs.positions.values()))
    for q, query in enumerate(pairs.positions):
        for k, key in enumerate(pairs.positions):
            if bool((order[q] > order[k]).all()):
                yield query, key


@dataclass(frozen=True)
class RoleLimits:
    """How strong a measurement must be to give a node a role."""

    direct: float = 0.1
    """The direct effect, as a share of the whole model's logit difference."""
    detector: float = 0.3
    """The detector score, 0 to 1."""
    attention: float = 0.3
    """The mean attention between two named positions, 0 to 1."""
    matters: float = 0.01
    """The cost of replacing the node, as a share of the logit difference on clean minus that on corrupt prompts."""
    effect: float = 0.05
    """The cost of replacing all nodes of a role, as a share of metric(clean) - metric(corrupt)."""


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
class _Role:
    key: str
    label: str
    description: str
    measure: Callable[[str], Measure]
    values: ByNode
    """The measurement on each node that can have the role."""
    limit: float
    """The least value of a member, or the largest if it is negative."""
    position: str | None = None
    """The named position at which members have the role; None: at all of them."""
    others: ByNode = field(default_factory=dict[str, float])
    """The measurement on nodes that can only be controls."""

    def fits(self, node: str) -> bool:
        value = self.values.get(node)
        return value is not None and (value >= self.limit if self.limit > 0 else value <= self.limit)

    def at_position(self, names: Sequence[str]) -> list[str]:
        """Those of a node's names that are at the position of the role."""
        return [name for name in names if self.position is None or split_position(name)[1] in ("", self.position)]

    def prediction_name(self, node: str) -> str:
        """The name of the prediction that makes the node a member."""
        return f"{self.label}: {node}"


def measured_roles(
    model: HookManager,
    circuit: Circuit,
    train: Pairs,
    test: Pairs,
    *,
    metric: str = "logit_diff",
    replacement: str = "corrupt",
    limits: RoleLimits | None = None,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> MeasuredRoles:
    """The roles of the circuit's heads and MLPs, assigned on `train`, with predictions that hold on `test`.

    If the graph has named positions, a node has its role at the position where it was measured. What the model or the
    pairs do not allow to measure (no wrong answers, no tokenizer, no named positions) is left out; `notes` say so.

    Cost: on `train` three forwards, one patched run per head and MLP of the circuit and two per role; on `test` two
    forwards and two patched runs per role.

    Source: detectors as in `head_scores`; direct effects as in Wang et al. 2022 (arXiv 2211.00593); the limits and the
    order of the roles are ours.

    Args:
        model: The model that the circuit was found in.
        circuit: The circuit.
        train: The pairs that roles are assigned on.
        test: The pairs that predictions are checked on.
        metric: The name of the metric in which the cost of replacing a whole role is stated.
        replacement: What replaces a whole role: `corrupt`, `mean`, `mean-positional` or `zero`.
        limits: How strong a measurement must be; by default `RoleLimits()`.
        batch_size: How many examples to run at a time.
        progress: Called with the number of patched runs done and their total.
    """
    limits = limits or RoleLimits()
    setup = AblationSetup.of(model, circuit.graph, train, metric, replacement, None, batch_size, progress)
    evidence = measure_evidence(setup, circuit)
    roles = _candidates(evidence, limits, circuit.graph.answers or None)
    members: dict[str, list[str]] = {}
    for node, names in ((node, evidence.names[node]) for node in evidence.nodes if node in evidence.names):
        if evidence.effects and abs(evidence.effects[node]) < limits.matters * evidence.span:
            continue
        role = next((role for role in roles if role.fits(node) and role.at_position(names)), None)
        if role is not None:
            members.setdefault(role.key, []).append(node)
    roles = [role for role in roles if role.key in members]
    memberships = [prediction for role in roles for prediction in _memberships(role, members[role.key])]
    checked = check_predictions(model, memberships, test, batch_size=batch_size)
    held = {entry.prediction.name for entry in checked if entry.ok}
    described: dict[str, dict[str, Any]] = {}
    for role in roles:
        kept = [node for node in members[role.key] if role.prediction_name(node) in held]
        nodes = tuple(name for node in kept for name in role.at_position(evidence.names[node]))
        if nodes:
            described[role.key] = {"label": role.label, "description": role.description, "nodes": nodes}
    effects = _predict_effects(setup, described, evidence, limits)
    checked = (*checked, *check_predictions(model, effects, test, batch_size=batch_size))
    role_of = {split_position(name)[0]: role["label"] for role in described.values() for name in role["nodes"]}
    return MeasuredRoles(
        described,
        tuple(entry for entry in checked if entry.ok),
        tuple(entry for entry in checked if not entry.ok),
        evidence.to_frame(role_of),
        evidence.notes,
    )


def _candidates(evidence: Evidence, limits: RoleLimits, answers: str | None) -> list[_Role]:
    """Every role that a node could have, in the order in which they are tried."""
    roles: list[_Role] = []
    mostly = {node: v for node, v in evidence.direct.items() if abs(v) >= abs(evidence.effects.get(node, 0.0)) / 2}
    for words, sign in (("toward", 1), ("against", -1)) if evidence.logit_diff > 0 else ():
        for kind, what in (("head", "heads"), ("mlp", "MLPs")):
            values = {node: mostly[node] for node in evidence.of_kind(kind) if node in mostly}
            others = {node: evidence.direct[node] for node in evidence.of_kind(kind) if node not in mostly}
            described = (
                f"Writes {words} the right answers itself: a direct effect of at least {limits.direct:.0%} of the "
                "logit difference, and on the train pairs at least half of what replacing the node costs."
            )
            label, limit = f"{what} that write {words} the answer", sign * limits.direct * evidence.logit_diff
            roles.append(_Role(f"{words}_{what.lower()}", label, described, _direct, values, limit, answers, others))
    for kind, values in evidence.detectors.items():
        name = kind.replace("_", " ")
        described = f"On random tokens said twice: {name} score of at least {limits.detector:g}."
        measure = partial(_detector, kind, evidence.detector_length)
        roles.append(_Role(kind, f"{name} heads", described, measure, values, limits.detector))
    strongest = {head: evidence.strongest(head) for head in evidence.heads}
    for (query, key), values in evidence.attention.items():
        described = f"Attends from {query} to {key} with at least {limits.attention:g} (mean over the clean prompts)."
        own = {head: v for head, v in values.items() if strongest[head] == (query, key)}
        others = {head: v for head, v in values.items() if head not in own and v < limits.attention}
        first, last = _quoted(query), _quoted(key)
        label, measure = f"heads from {first} to {last}", partial(_attention, query, key)
        roles.append(_Role(f"{first}_to_{last}", label, described, measure, own, limits.attention, query, others))
    return roles


def _quoted(position: str) -> str:
    """The name of a position, in quotes if it contains a " to " of its own."""
    return repr(position) if " " in position or "_to_" in position else position


def _direct(node: str) -> Measure:
    return DirectEffect(node=node)


def _detector(kind: str, length: int, node: str) -> Measure:
    return Detector.model_validate({"head": node, "pattern": kind, "length": length, "seed": CONTROL_SEED})


def _attention(query: str, key: str, node: str) -> Measure:
    return Attention(head=node, query=query, key=key)


def _replaced(metric: str, replacement: str, parts: tuple[str, ...]) -> Measure:
    return PartsReplaced.model_validate({"parts": parts, "replacement": replacement, "metric": metric})


def _memberships(role: _Role, members: Sequence[str]) -> list[Prediction]:
    """For each member: it is beyond the threshold of the role, and the strongest node below the limit is not."""
    sign = 1 if role.limit > 0 else -1
    weakest = min(sign * role.values[node] for node in members)
    below = {n: sign * v for n, v in {**role.others, **role.values}.items() if not role.fits(n) and sign * v < weakest}
    control = max(below, key=lambda node: below[node], default=None)
    other = abs(role.limit) if control is None else max(0.0, below[control])
    controls = () if control is None else (Control(measure=role.measure(control)),)
    threshold = sign * max(abs(role.limit), (weakest + other) / 2)
    return [_predict(role.prediction_name(node), role.measure(node), threshold, controls) for node in members]


def _predict(name: str, measure: Measure, value: float, controls: tuple[Control, ...]) -> Prediction:
    relation = ">=" if value > 0 else "<="
    return Prediction(name=name, measure=measure, relation=relation, value=six_digits(value), controls=controls)


def _predict_effects(
    setup: AblationSetup, roles: Mapping[str, Mapping[str, Any]], evidence: Evidence, limits: RoleLimits
) -> list[Prediction]:
    """For each role that matters: replacing its nodes together costs more than halfway from the control to its cost."""
    roles = {key: role for key, role in roles.items() if not any(name.endswith(f"@{REST}") for name in role["nodes"])}
    controls = {key: _unimportant(evidence, role["nodes"]) for key, role in roles.items()}
    parts = list(dict.fromkeys([*(role["nodes"] for role in roles.values()), *filter(None, controls.values())]))
    if not parts:
        return []
    kind = patching_kind(setup.replacement)
    grid = activation_patching(
        setup.model, setup.pairs, parts, metric=setup.metric, replacement=kind, batch_size=setup.batch_size
    )
    whole = abs(float(grid.about["clean_value"]) - float(grid.about["corrupt_value"]))
    effect_of = dict(zip(parts, grid.mean().values[:, 0].tolist(), strict=True))
    replaced = partial(_replaced, setup.metric.name, setup.replacement)
    predictions: list[Prediction] = []
    for key, role in roles.items():
        effect, control = effect_of[role["nodes"]], controls[key]
        sign = 1 if effect > 0 else -1
        other = max(0.0, sign * effect_of[control]) if control else 0.0
        if not abs(effect) >= max(limits.effect * whole, other):  # false for NaN, too
            continue
        against = (Control(measure=replaced(control)),) if control else ()
        value = sign * (abs(effect) + other) / 2
        predictions.append(_predict(f"{role['label']}: effect", replaced(role["nodes"]), value, against))
    return predictions


def _unimportant(evidence: Evidence, role: Sequence[str]) -> tuple[str, ...]:
    """As many nodes of each kind as the role has, or as many as there are.

    Nodes outside the circuit come first, those of the smallest direct effect first; then the circuit's nodes, those of
    the smallest effect first.
    """
    own = {split_position(name)[0] for name in role}
    chosen: list[str] = []
    for kind in ("head", "mlp"):
        count = sum(Node.parse(node).kind == kind for node in own)
        others = [node for node in evidence.of_kind(kind) if node not in own]
        others.sort(key=lambda node: (abs(evidence.effects.get(node, 0.0)), abs(evidence.direct.get(node, 0.0))))
        chosen += others[:count]
    return tuple(sorted(chosen))
