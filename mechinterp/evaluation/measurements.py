"""`check_predictions`: measures what predictions state, many of them on the same pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pandas as pd
import torch

from mechinterp.analysis.activation_patching import activation_patching
from mechinterp.analysis.compensation import compensation
from mechinterp.analysis.head_detectors import attention_between, copying_scores, detector_scores
from mechinterp.analysis.path_patching import path_patching
from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.registry import unknown
from mechinterp.engines.grid import Grid
from mechinterp.evaluation.ablation import AblationSetup
from mechinterp.evaluation.direct_effects import direct_effects
from mechinterp.evaluation.masks import MASKS_AT_ONCE, mask_values
from mechinterp.evaluation.predictions import (
    ON_PAIRS,
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
from mechinterp.graphs.graph import build_graph
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Node
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True)
class Checked:
    """A prediction with the numbers measured for it and for its controls, and the pairs they were measured on."""

    prediction: Prediction
    value: float
    controls: tuple[float, ...]
    n_examples: int | None
    """How many examples the mean is over; None for measures that need no pairs."""
    model: HookManager = field(repr=False)
    pairs: Pairs | None = field(default=None, repr=False)

    @property
    def ok(self) -> bool:
        """Whether the prediction holds and every control is on the other side."""
        return self.prediction.holds(self.value) and all(map(self.prediction.refuted, self.controls))

    def __str__(self) -> str:
        shown = [
            f"{control.measure} {value:.4g}"
            for control, value in zip(self.prediction.controls, self.controls, strict=True)
        ]
        against = f"; controls: {', '.join(shown)}" if shown else "; no negative control"
        return f"{'holds' if self.ok else 'FAILS'}: {self.prediction!r}: {self.value:.4g}{against}"


def check_predictions(
    model: HookManager,
    predictions: Sequence[Prediction],
    pairs: Pairs | None = None,
    *,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> tuple[Checked, ...]:
    """Each prediction with its measured number and those of its controls; `predictions_frame` makes a table of them.

    The numbers are means over the examples. Cost: one forward up to the last attention pattern for all attention on
    clean prompts and one for all on corrupt ones, one forward for all direct effects, one patched forward for each set
    of cut edges, and what `activation_patching` and `compensation` cost for each set of replaced parts and
    `path_patching` for each set of receivers.

    Args:
        model: The model to measure.
        predictions: The predictions, with different names.
        pairs: The examples; needed unless all predictions are of `Detector` or `Copying`.
        batch_size: How many examples to run at a time.
        progress: Called with the number of measures done and their total, after every kind of measure.

    Raises:
        InputError: Two predictions have one name, the model or the pairs do not have a name in them, or pairs are
            needed and not given.
    """
    names = [prediction.name for prediction in predictions]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"Two predictions are named {twice!r}; give each a name of its own.")
    wanted = [entry for p in predictions for entry in (p.measure, *(control.measure for control in p.controls))]
    found = measure_all(model, wanted, pairs, batch_size=batch_size, progress=progress)
    return tuple(
        Checked(
            p,
            found[p.measure],
            tuple(found[control.measure] for control in p.controls),
            len(pairs) if pairs is not None and isinstance(p.measure, ON_PAIRS) else None,
            model,
            pairs if isinstance(p.measure, ON_PAIRS) else None,
        )
        for p in predictions
    )


def predictions_frame(checked: Sequence[Checked]) -> pd.DataFrame:
    """One row per prediction and per control: name, what, measure, expected, measured, holds.

    Args:
        checked: What `check_predictions` returned.
    """
    rows: list[dict[str, object]] = []
    for found in checked:
        p = found.prediction
        opposite = "<" if p.relation == ">=" else ">"
        rows.append(
            _row(p.name, "prediction", p.measure, f"{p.relation} {p.value:g}", found.value, p.holds(found.value))
        )
        for control, value in zip(p.controls, found.controls, strict=True):
            rows.append(_row(p.name, "control", control.measure, f"{opposite} {p.value:g}", value, p.refuted(value)))
    return pd.DataFrame(rows)


def _row(name: str, what: str, measure: Measure, expected: str, got: float, ok: bool) -> dict[str, object]:
    return {"name": name, "what": what, "measure": str(measure), "expected": expected, "measured": got, "holds": ok}


def measure_all(
    model: HookManager,
    measures: Sequence[Measure],
    pairs: Pairs | None = None,
    *,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> dict[Measure, float]:
    """The number of each measure; measures that can share a run do. Raises as `check_predictions`."""
    found: dict[Measure, float] = {}
    for kind, run in _RUNS.items():
        several = list(dict.fromkeys(measure for measure in measures if isinstance(measure, kind)))
        if several and kind in ON_PAIRS and pairs is None:
            raise InputError(f"A measure of kind {several[0].kind!r} needs pairs; give them.")
        if several:
            values = run(model, several, pairs, batch_size)
            found |= dict(zip(several, values, strict=True))
            progress(len(found), len(set(measures)))
    return found


def patching_kind(replacement: str) -> str:
    """The name that `activation_patching` has for a replacement of edges: its `pair` is our `corrupt`."""
    return "pair" if replacement == "corrupt" else replacement


def _replaced(model: HookManager, measures: Sequence[PartsReplaced], pairs: Pairs, batch_size: int) -> list[float]:
    values: dict[PartsReplaced, float] = {}
    for (metric, replacement), group in _by_metric_and_replacement(measures).items():
        effects = activation_patching(
            model,
            pairs,
            [measure.parts for measure in group],
            metric=metric,
            replacement=patching_kind(replacement),
            batch_size=batch_size,
        )
        values |= dict(zip(group, effects.mean().values[:, 0].tolist(), strict=True))
    return [values[measure] for measure in measures]


def _cut(model: HookManager, measures: Sequence[EdgesCut], pairs: Pairs, batch_size: int) -> list[float]:
    graph, values = build_graph(model), dict[EdgesCut, float]()
    for (metric, replacement), group in _by_metric_and_replacement(measures).items():
        setup = AblationSetup.of(model, graph, pairs, metric, replacement, None, batch_size, no_progress)
        for some in (group[i : i + MASKS_AT_ONCE] for i in range(0, len(group), MASKS_AT_ONCE)):
            masks = [torch.zeros_like(graph.possible), *(graph.mask_of(measure.edges) for measure in some)]
            full, *cut = mask_values(setup, masks).mean(0).tolist()
            values |= {measure: setup.metric.direction * (full - left) for measure, left in zip(some, cut, strict=True)}
    return [values[measure] for measure in measures]


T = TypeVar("T", PartsReplaced, EdgesCut)


def _by_metric_and_replacement(measures: Sequence[T]) -> dict[tuple[str, str], list[T]]:
    groups: dict[tuple[str, str], list[T]] = {}
    for measure in measures:
        groups.setdefault((measure.metric, measure.replacement), []).append(measure)
    return groups


def _attention(model: HookManager, measures: Sequence[Attention], pairs: Pairs, batch_size: int) -> list[float]:
    grids: dict[str, Grid] = {}
    for prompt in dict.fromkeys(m.prompt for m in measures):
        positions = dict.fromkeys(at for m in measures if m.prompt == prompt for at in (m.query, m.key))
        grids[prompt] = attention_between(model, pairs, list(positions), prompt=prompt, batch_size=batch_size).mean()
    return [_of_head(grids[m.prompt].at(query=m.query, key=m.key), m.head) for m in measures]


def _direct(model: HookManager, measures: Sequence[DirectEffect], pairs: Pairs, batch_size: int) -> list[float]:
    parts = direct_effects(model, pairs, batch_size).mean()
    return [float(parts.at(node=measure.node)) for measure in measures]


def _changed(model: HookManager, measures: Sequence[DirectEffectChange], pairs: Pairs, batch_size: int) -> list[float]:
    grids: dict[tuple[tuple[str, ...], str], Grid] = {}
    for m in measures:
        key = (m.replaced, m.replacement)
        if key not in grids:
            kind = patching_kind(m.replacement)
            grids[key] = compensation(model, pairs, m.replaced, replacement=kind, batch_size=batch_size).mean()
    return [float(grids[m.replaced, m.replacement].at(node=m.node)) for m in measures]


def _paths(model: HookManager, measures: Sequence[PathPatched], pairs: Pairs, batch_size: int) -> list[float]:
    groups: dict[tuple[str, tuple[str, ...]], list[PathPatched]] = {}
    for m in measures:
        groups.setdefault((m.metric, m.receivers), []).append(m)
    values: dict[PathPatched, float] = {}
    for (metric, receivers), group in groups.items():
        senders = [m.senders for m in group]
        effects = path_patching(model, pairs, senders, receivers, metric=metric, batch_size=batch_size)
        values |= dict(zip(group, effects.mean().values[:, 0].tolist(), strict=True))
    return [values[m] for m in measures]


def _detected(model: HookManager, measures: Sequence[Detector], pairs: Pairs | None, batch_size: int) -> list[float]:
    grids: dict[tuple[object, ...], Grid] = {}
    kinds: dict[tuple[int, int, int], list[str]] = {}
    for m in measures:
        several = kinds.setdefault((m.n, m.length, m.seed), [])
        several += [] if m.pattern in several else [m.pattern]
    for (n, length, seed), several in kinds.items():
        scores = detector_scores(model, several, n=n, length=length, seed=seed, batch_size=batch_size)
        grids |= {(kind, n, length, seed): grid.mean() for kind, grid in scores.items()}
    return [_of_head(grids[m.pattern, m.n, m.length, m.seed], m.head) for m in measures]


def _copied(model: HookManager, measures: Sequence[Copying], pairs: Pairs | None, batch_size: int) -> list[float]:
    grid = copying_scores(model)
    return [_of_head(grid, measure.head) for measure in measures]


def _of_head(grid: Grid, head: str) -> float:
    """The head's value. Raises InputError for a head that the model does not have."""
    node = Node.parse(head)
    if str(node.layer) not in grid.labels["layer"] or str(node.head) not in grid.labels["head"]:
        heads = [f"a{layer}.h{unit}" for layer in grid.labels["layer"] for unit in grid.labels["head"]]
        raise unknown("head", head, heads)
    return float(grid.at(layer=node.layer, head=node.head))


_RUNS: dict[type, Callable[..., list[float]]] = {
    PartsReplaced: _replaced,
    EdgesCut: _cut,
    Attention: _attention,
    DirectEffect: _direct,
    DirectEffectChange: _changed,
    PathPatched: _paths,
    Detector: _detected,
    Copying: _copied,
}
