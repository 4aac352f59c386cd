"""Roles by measurement: what the heads and MLPs of a circuit do, each with predictions that other examples can refute.

A node gets at most one role, the first that fits, measured on the train pairs:

- *writes toward (against) the answer*: its direct effect is at least `direct` of the whole logit difference, and at
  least half of what replacing it costs, so that this is most of what it does;
- *previous token, duplicate token, induction*: its detector score on random tokens is at least `detector`;
- *from X to Y*: its mean attention from one named position to another is at least `attention` (its strongest pair).

A node that costs less than `matters` of what the corrupt prompts cost gets none. Every member predicts that it is
beyond the line of its role: the limit, or halfway between the weakest member and the strongest node below the limit,
where that is further; that node is the negative control. It stays if that holds on the test pairs. A role whose nodes,
replaced together, cost at least `effect` of what the corrupt prompts cost predicts that too; the control is as many
other nodes that should not matter.

What is measured on the nodes of a circuit to say what they do: direct effects, detectors, attention, replacement.
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
from mechinterp.evaluation.measurements import Checked, check_predictions
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
Values = Mapping[str, float]
"""A number per node."""


@dataclass
class Evidence:
    """Means over the examples, by node; empty where something could not be measured (`notes` say why)."""

    nodes: tuple[str, ...]
    """All heads of the model, and the MLPs that are whole."""
    names: dict[str, list[str]]
    """Those that the circuit has, with their names in it (several where positions are told apart)."""
    direct: Values = field(default_factory=dict[str, float])
    """Of all nodes: logits toward the right answers."""
    logit_diff: float = 0.0
    """Of the whole model: what all direct effects sum to."""
    effects: Values = field(default_factory=dict[str, float])
    """Of the circuit's nodes: what replacing the node by its value on the corrupt prompt costs in logit difference."""
    span: float = 0.0
    """|logit difference on clean less on corrupt prompts|."""
    detectors: dict[str, Values] = field(default_factory=dict[str, Values])
    """Per kind of detector, of all heads."""
    detector_length: int = DETECTOR_LENGTH
    """Of the random tokens that are said twice: fewer where the context or the vocabulary is small."""
    attention: dict[tuple[str, str], Values] = field(default_factory=dict[tuple[str, str], Values])
    """Per query and earlier key, of all heads."""
    notes: list[str] = field(default_factory=list[str])

    @property
    def heads(self) -> tuple[str, ...]:
        """All heads of the model."""
        return self.of_kind("head")

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """The nodes that are heads, or MLPs (`mlp`)."""
        return tuple(node for node in self.nodes if Node.parse(node).kind == kind)

    def strongest(self, head: str) -> tuple[str, str] | None:
        """(query, key) of the named positions between which the head attends most; None where none are measured."""
        return max(self.attention, key=lambda pair: self.attention[pair][head], default=None)

    def to_frame(self, role_of: Mapping[str, str]) -> pd.DataFrame:
        """One row a head or MLP of the circuit, with its role ("" for none)."""
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


def measure_evidence(
    model: HookManager, circuit: Circuit, pairs: Pairs, batch_size: int, progress: Progress = no_progress
) -> Evidence:
    """The evidence on these pairs. Cost: three forwards, one patched run per head and MLP of the circuit; detectors
    have tokens of their own.
    """
    dims = model.dims
    heads = tuple(f"a{layer}.h{head}" for layer in range(dims.n_layers) for head in range(dims.n_heads))
    names: dict[str, list[str]] = {}
    for name in circuit.nodes:
        names.setdefault(split_position(name)[0], []).append(name)
    mlps = [f"m{layer}" for layer in range(dims.n_layers) if dims.has_mlp]
    split = circuit.graph.split_mlps
    found = Evidence((*heads, *(name for name in mlps if name not in split)), names)
    if split:
        found.notes.append(f"No roles for {', '.join(split)} and the neurons taken out of them.")

    found.detector_length = min(DETECTOR_LENGTH, (dims.n_ctx - 1) // 2, dims.d_vocab // 2)

    def of_heads(values: Tensor) -> Values:
        return dict(zip(heads, values.flatten().tolist(), strict=True))

    try:
        _measure_effects(found, model, pairs, batch_size, progress)
    except (InputError, UnsupportedError) as error:
        found.direct, found.effects = {}, {}
        found.notes.append(f"Direct effects were not measured: {error}")
    try:
        for kind in TARGETS:
            scores = head_scores(model, kind, length=found.detector_length, batch_size=batch_size)
            found.detectors[kind] = of_heads(scores.mean().values)
    except (InputError, UnsupportedError) as error:
        found.notes.append(f"Detectors were not measured: {error}")
    try:
        grid = attention_between(model, pairs, batch_size=batch_size).mean()
        for query, key in _backward(pairs):
            found.attention[query, key] = of_heads(grid.at(query=query, key=key).values)
    except (InputError, UnsupportedError) as error:
        found.notes.append(f"Attention between named positions was not measured: {error}")
    return found


def _measure_effects(found: Evidence, model: HookManager, pairs: Pairs, batch_size: int, progress: Progress) -> None:
    parts = direct_logit_attribution(model, pairs, batch_size=batch_size).mean()
    found.direct = {node: float(parts.at(node=node)) for node in found.nodes}
    found.logit_diff = float(parts.values.sum())
    own = [node for node in found.nodes if node in found.names]
    if own:
        n_batches, finished = -(-len(pairs) // batch_size), 0

        def count(done: int, total: int) -> None:
            nonlocal finished
            progress(finished * total + done, n_batches * total)
            finished += done == total

        effects = activation_patching(model, pairs, own, batch_size=batch_size, progress=count)
        found.effects = dict(zip(own, effects.mean().values[:, 0].tolist(), strict=True))
        found.span = abs(float(effects.about["clean_value"]) - float(effects.about["corrupt_value"]))


def _backward(pairs: Pairs) -> Iterable[tuple[str, str]]:
    """Every (query, key) of named positions of which the key is earlier in every example."""
    order = torch.stack(list(pairs.positions.values()))
    for q, query in enumerate(pairs.positions):
        for k, key in enumerate(pairs.positions):
            if bool((order[q] > order[k]).all()):
                yield query, key


CONTROL_SEED = 1
"""Predictions of detectors are checked on other random tokens (seed 1) than the roles were given on (seed 0)."""


@dataclass(frozen=True)
class RoleLimits:
    """From where on a measurement makes a role."""

    direct: float = 0.1
    """Direct effect as a share of the whole model's logit difference."""
    detector: float = 0.3
    attention: float = 0.3
    matters: float = 0.01
    """Of replacing the node, as a share of the logit difference on clean less on corrupt prompts."""
    effect: float = 0.05
    """Of replacing all nodes of a role, as a share of metric(clean) - metric(corrupt)."""


@dataclass(frozen=True)
class MeasuredRoles:
    """The roles of a circuit with their evidence."""

    roles: dict[str, dict[str, Any]]
    """By key what `save_circuit(roles=)` takes: label, description, nodes."""
    predictions: tuple[Checked, ...]
    """What holds on the test pairs: for `save_circuit(predictions=)`."""
    failed: tuple[Checked, ...]
    """What did not hold there; nodes that a role lost by it are in no role."""
    evidence: pd.DataFrame
    """One row a head or MLP of the circuit: role, direct effect, what replacing it costs, detectors, attention."""
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""


@dataclass(frozen=True)
class _Role:
    key: str
    label: str
    description: str
    measure: Callable[[str], Measure]
    values: Values
    """What was measured on the nodes that can have the role."""
    limit: float
    """Members are at least this; at most, where it is negative."""
    position: str | None = None
    """Where the members do it; None: everywhere."""
    others: Values = field(default_factory=dict[str, float])
    """What was measured on nodes that can be controls only."""

    def fits(self, node: str) -> bool:
        value = self.values.get(node)
        return value is not None and (value >= self.limit if self.limit > 0 else value <= self.limit)

    def places(self, names: Sequence[str]) -> list[str]:
        """Those of a node's names that are where the role is."""
        return [name for name in names if self.position is None or split_position(name)[1] in ("", self.position)]

    def name_of(self, node: str) -> str:
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
    """The roles of the circuit's heads and MLPs, given on `train`, with predictions that hold on `test`.

    Where the graph names positions, a node has its role at the position where it was measured. What a model or a task
    does not allow (no wrong answers, no tokenizer, no named positions) is left out and said in `notes`.

    Cost: on `train` three forwards, one patched run per head and MLP of the circuit and two per role; on `test` two
    forwards and two patched runs per role.

    Source: detectors as `head_scores`; direct effects as in Wang et al. 2022 (arXiv 2211.00593); the limits and the
    order are ours.
    """
    limits = limits or RoleLimits()
    found = measure_evidence(model, circuit, train, batch_size, progress)
    roles = _candidates(found, limits, circuit.graph.answers or None)
    members: dict[str, list[str]] = {}
    for node, names in ((node, found.names[node]) for node in found.nodes if node in found.names):
        if found.effects and abs(found.effects[node]) < limits.matters * found.span:
            continue
        role = next((role for role in roles if role.fits(node) and role.places(names)), None)
        if role is not None:
            members.setdefault(role.key, []).append(node)
    roles = [role for role in roles if role.key in members]
    lines = [prediction for role in roles for prediction in _line(role, members[role.key])]
    first = check_predictions(model, lines, test, batch_size=batch_size)
    held = {entry.prediction.name for entry in first if entry.ok}
    described: dict[str, dict[str, Any]] = {}
    for role in roles:
        kept = [node for node in members[role.key] if role.name_of(node) in held]
        nodes = tuple(name for node in kept for name in role.places(found.names[node]))
        if nodes:
            described[role.key] = {"label": role.label, "description": role.description, "nodes": nodes}
    effects = _effects(model, described, found, train, metric, replacement, limits, batch_size)
    checked = (*first, *check_predictions(model, effects, test, batch_size=batch_size))
    role_of = {split_position(name)[0]: role["label"] for role in described.values() for name in role["nodes"]}
    return MeasuredRoles(
        described,
        tuple(entry for entry in checked if entry.ok),
        tuple(entry for entry in checked if not entry.ok),
        found.to_frame(role_of),
        tuple(found.notes),
    )


def _candidates(found: Evidence, limits: RoleLimits, answers: str | None) -> list[_Role]:
    """Every role that a node could have, in the order in which they are tried."""
    roles: list[_Role] = []
    mostly = {node: v for node, v in found.direct.items() if abs(v) >= abs(found.effects.get(node, 0.0)) / 2}
    for words, sign in (("toward", 1), ("against", -1)) if found.logit_diff > 0 else ():
        for kind, what in (("head", "heads"), ("mlp", "MLPs")):
            values = {node: mostly[node] for node in found.of_kind(kind) if node in mostly}
            others = {node: found.direct[node] for node in found.of_kind(kind) if node not in mostly}
            described = (
                f"Writes {words} the right answers itself: a direct effect of at least {limits.direct:.0%} of the "
                "logit difference, and on the train pairs at least half of what replacing the node costs."
            )
            label, limit = f"{what} that write {words} the answer", sign * limits.direct * found.logit_diff
            roles.append(_Role(f"{words}_{what.lower()}", label, described, _direct, values, limit, answers, others))
    for kind, values in found.detectors.items():
        name = kind.replace("_", " ")
        described = f"On random tokens said twice: {name} score of at least {limits.detector:g}."
        roles.append(
            _Role(
                kind,
                f"{name} heads",
                described,
                partial(_detector, kind, found.detector_length),
                values,
                limits.detector,
            )
        )
    strongest = {head: found.strongest(head) for head in found.heads}
    for (query, key), values in found.attention.items():
        described = f"Attends from {query} to {key} with at least {limits.attention:g} (mean over the clean prompts)."
        own = {head: v for head, v in values.items() if strongest[head] == (query, key)}
        others = {head: v for head, v in values.items() if head not in own and v < limits.attention}
        first, last = _quoted(query), _quoted(key)
        label, measure = f"heads from {first} to {last}", partial(_attention, query, key)
        roles.append(_Role(f"{first}_to_{last}", label, described, measure, own, limits.attention, query, others))
    return roles


def _quoted(position: str) -> str:
    """The name of a position, in quotes where " to " in it could be read as ours."""
    return repr(position) if " " in position or "_to_" in position else position


def _direct(node: str) -> Measure:
    return DirectEffect(node=node)


def _detector(kind: str, length: int, node: str) -> Measure:
    return Detector.model_validate({"head": node, "pattern": kind, "length": length, "seed": CONTROL_SEED})


def _attention(query: str, key: str, node: str) -> Measure:
    return Attention(head=node, query=query, key=key)


def _replaced(metric: str, replacement: str, parts: tuple[str, ...]) -> Measure:
    return PartsReplaced.model_validate({"parts": parts, "replacement": replacement, "metric": metric})


def _line(role: _Role, members: Sequence[str]) -> list[Prediction]:
    """Per member: it is beyond the line of the role, and the strongest node below the limit is not."""
    sign = 1 if role.limit > 0 else -1
    weakest = min(sign * role.values[node] for node in members)
    below = {n: sign * v for n, v in {**role.others, **role.values}.items() if not role.fits(n) and sign * v < weakest}
    control = max(below, key=lambda node: below[node], default=None)
    other = abs(role.limit) if control is None else max(0.0, below[control])
    controls = () if control is None else (Control(measure=role.measure(control)),)
    line = sign * max(abs(role.limit), (weakest + other) / 2)
    return [_predict(role.name_of(node), role.measure(node), line, controls) for node in members]


def _predict(name: str, measure: Measure, value: float, controls: tuple[Control, ...]) -> Prediction:
    relation = ">=" if value > 0 else "<="
    return Prediction(name=name, measure=measure, relation=relation, value=six_digits(value), controls=controls)


def _effects(
    model: HookManager,
    roles: Mapping[str, Mapping[str, Any]],
    found: Evidence,
    train: Pairs,
    metric: str,
    replacement: str,
    limits: RoleLimits,
    batch_size: int,
) -> list[Prediction]:
    """Per role that matters: replacing its nodes together costs more than halfway from the control to what it costs."""
    roles = {key: role for key, role in roles.items() if not any(name.endswith(f"@{REST}") for name in role["nodes"])}
    controls = {key: _unimportant(found, role["nodes"]) for key, role in roles.items()}
    parts = list(dict.fromkeys([*(role["nodes"] for role in roles.values()), *filter(None, controls.values())]))
    if not parts:
        return []
    kind = "pair" if replacement == "corrupt" else replacement
    grid = activation_patching(model, train, parts, metric=metric, replacement=kind, batch_size=batch_size)
    whole = abs(float(grid.about["clean_value"]) - float(grid.about["corrupt_value"]))
    effect_of = dict(zip(parts, grid.mean().values[:, 0].tolist(), strict=True))
    made: list[Prediction] = []
    for key, role in roles.items():
        effect, few = effect_of[role["nodes"]], controls[key]
        sign = 1 if effect > 0 else -1
        other = max(0.0, sign * effect_of[few]) if few else 0.0
        if not abs(effect) >= max(limits.effect * whole, other):  # NaN neither
            continue
        replaced = partial(_replaced, metric, replacement)
        measure, against = replaced(role["nodes"]), (Control(measure=replaced(few)),) if few else ()
        made.append(_predict(f"{role['label']}: effect", measure, sign * (abs(effect) + other) / 2, against))
    return made


def _unimportant(found: Evidence, role: Sequence[str]) -> tuple[str, ...]:
    """As many nodes of each kind as the role has, if there are: those outside the circuit of the least direct effect,
    then those in it of the least effect.
    """
    own = {split_position(name)[0] for name in role}
    chosen: list[str] = []
    for kind in ("head", "mlp"):
        count = sum(Node.parse(node).kind == kind for node in own)
        others = [node for node in found.of_kind(kind) if node not in own]
        others.sort(key=lambda node: (abs(found.effects.get(node, 0.0)), abs(found.direct.get(node, 0.0))))
        chosen += others[:count]
    return tuple(sorted(chosen))
