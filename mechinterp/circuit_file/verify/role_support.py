"""Support for roles: the predictions about their nodes that could be refuted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mechinterp.circuit_file.schema import CircuitFile, Role
from mechinterp.evaluation.predictions import (
    Attention,
    Copying,
    Detector,
    DirectEffect,
    DirectEffectChange,
    EdgesCut,
    Measure,
    PartsReplaced,
    PathPatched,
    Prediction,
)
from mechinterp.models.sites import Edge


@dataclass(frozen=True)
class RoleSupport:
    """A role in a file, the predictions that support it, and those of its nodes without any."""

    role: Role
    predictions: tuple[Prediction, ...]
    without: tuple[str, ...]


def support_of_roles(document: CircuitFile) -> tuple[RoleSupport, ...]:
    """For each role, the predictions that support it and its nodes without one.

    A prediction supports a role if it measures only nodes of that role, has a negative control, and is not vacuous. The
    name and description of a role are not compared with anything.
    """
    about: dict[str, list[tuple[frozenset[str], Prediction]]] = {}
    for prediction in document.predictions or ():
        nodes = _measured_nodes(prediction.measure)
        if prediction.controls and not vacuous(prediction):
            about.setdefault(min(nodes), []).append((nodes, prediction))
    known: dict[frozenset[str], tuple[tuple[Prediction, ...], frozenset[str]]] = {}  # many roles may share their nodes
    found: list[RoleSupport] = []
    for role in document.roles.values():
        own = frozenset(map(_node, role.nodes))
        if own not in known:
            some = [entry for node in sorted(own) for entry in about.get(node, ()) if entry[0] <= own]
            known[own] = tuple(prediction for _, prediction in some), frozenset[str]().union(*(n for n, _ in some))
        predictions, covered = known[own]
        found.append(RoleSupport(role, predictions, tuple(n for n in role.nodes if _node(n) not in covered)))
    return tuple(found)


def vacuous(prediction: Prediction) -> bool:
    """Whether no measurement could refute the prediction.

    Attention and detectors range from 0 to 1, copying from -1 to 1: a prediction is vacuous if the whole range
    satisfies it. Effects have no range: a prediction is vacuous if it has no control and an effect of 0 satisfies it.
    """
    lowest, highest = _range(prediction.measure)
    if lowest is None or highest is None:
        return not prediction.controls and prediction.holds(0.0)
    return prediction.holds(lowest) and prediction.holds(highest)


def _range(measure: Measure) -> tuple[float | None, float | None]:
    if isinstance(measure, Copying):
        return -1.0, 1.0
    return (0.0, 1.0) if isinstance(measure, (Attention, Detector)) else (None, None)


def _measured_nodes(measure: Measure) -> frozenset[str]:
    """The heads, MLPs and neurons that a measurement is about; for edges, the nodes that they leave."""
    names: Iterable[str]
    if isinstance(measure, PartsReplaced):
        names = measure.parts
    elif isinstance(measure, EdgesCut):
        names = (str(Edge.parse(name).writer) for name in measure.edges)
    elif isinstance(measure, PathPatched):
        names = measure.senders
    elif isinstance(measure, (DirectEffect, DirectEffectChange)):
        names = (measure.node,)
    else:
        names = (measure.head,)
    return frozenset(map(_node, names))


def _node(name: str) -> str:
    """The node of a name such as `a9.h9<q>@S2`: without its channel and position."""
    return name.partition("@")[0].partition("<")[0]
