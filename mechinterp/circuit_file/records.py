"""Conversion between objects (tasks, pairs, scores, results) and the records of a circuit file, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mechinterp.analysis.directions import read_pairs
from mechinterp.base.canonical_json import six_digits
from mechinterp.base.errors import FormatError, InputError
from mechinterp.base.registry import suggestion
from mechinterp.circuit_file.direction_file import position_of
from mechinterp.circuit_file.limits import MAX_TOKEN_IDS
from mechinterp.circuit_file.schema import (
    DiscoveryRecord,
    EvaluationRecord,
    FileTaskRecord,
    MetricRecord,
    PairsRecord,
    TaskContent,
    TaskPairs,
    TaskRecord,
    TokenPairs,
    TokensTaskRecord,
    Tolerance,
)
from mechinterp.discovery.method import METHODS
from mechinterp.evaluation.faithfulness import Evaluation
from mechinterp.graphs.scores import Scores
from mechinterp.tasks.check import check_task
from mechinterp.tasks.metric_names import METRICS
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.schema import checked
from mechinterp.tasks.source import TaskSource
from mechinterp.tasks.spec import TaskSpec
from mechinterp.tasks.task import Task, load_task, task_names

AnyTaskRecord = TaskRecord | FileTaskRecord | TokensTaskRecord

# Sums of a few hundred float32 terms agree to about 1e-6 in any order; ratios of differences lose a digit or two.
# Half precision has 8 (bfloat16) or 11 significant bits.
TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        "float64": Tolerance(relative=1e-4, absolute=1e-5),
        "float32": Tolerance(relative=1e-4, absolute=1e-5),
        "float16": Tolerance(relative=1e-2, absolute=1e-2),
        "bfloat16": Tolerance(relative=5e-2, absolute=5e-2),
    }
)


def tolerance_for(dtype: str) -> Tolerance:
    """How closely a repeated evaluation must agree, for a model of this dtype."""
    if dtype not in TOLERANCES:
        raise InputError(f"No tolerance is known for dtype {dtype!r}. Known: {', '.join(sorted(TOLERANCES))}.")
    return TOLERANCES[dtype]


def metric_record(name: str) -> MetricRecord:
    """The metric by name, with its direction and unit. Raises InputError if it is not registered."""
    if name not in METRICS:
        raise InputError(
            f"Metric {name!r} is not registered, so a circuit file cannot state it: `verify` could not compute it. "
            "Call mi.register_metric; to share the file, put the metric into a package with an entry point."
            f"{suggestion(name, METRICS)}"
        )
    metric = get_metric(name)
    direction = "higher is better" if metric.direction > 0 else "lower is better"
    return MetricRecord(name=name, direction=direction, unit=metric.unit)


def task_record(task: Task, path: str | None = None) -> TaskRecord:
    """The record of a task: its name if it is one of the package, otherwise its whole content."""
    bundled = task.name in task_names() and load_task(task.name).digest() == task.digest()
    content = None
    if not bundled:
        spec = task.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        content = TaskContent(spec=spec, lists={name: tuple(words) for name, words in task.lists.items()})
    return TaskRecord(
        name=task.name,
        version=task.version,
        sha256=task.digest(),
        title=task.title,
        source=task.source,
        bundled=bundled,
        path=None if bundled else path,
        content=content,
    )


def task_of(record: TaskRecord) -> Task:
    """The task that a file states: one of the package, or the one whose content is in the file.

    Raises FormatError if the content is not a valid task, InputError if the package has no task of that name.
    """
    if record.content is None:
        return load_task(record.name)
    where = f"task {record.name!r} in the circuit file"
    spec = checked(TaskSpec, record.content.spec, where)
    lists = dict(record.content.lists)
    check_task(spec, lists, where)
    return Task(spec, MappingProxyType(lists))


def pairs_record(pairs: Pairs, task: AnyTaskRecord | None) -> PairsRecord:
    """The record of a set of pairs: how the task makes them, or their token ids.

    Raises InputError if another task made them, or if they are too many to be kept in a file.
    """
    source = pairs.source
    if isinstance(source, TaskSource) and isinstance(task, TaskRecord):
        if source.digest != task.sha256:
            raise InputError(
                f"The pairs were made by another task ({source.task}, version {source.version}), not by the one to be "
                f"saved ({task.name}, version {task.version})."
            )
        made_from = TaskPairs(
            split=source.split,
            seed=source.seed,
            prepend_bos=source.prepend_bos,
            skip=source.skip or None,
            read_at=source.read_at,
            positive=source.positive,
        )
    else:
        made_from = _token_pairs(pairs)
    record = PairsRecord(n=len(pairs), sha256=pairs.digest(), made_from=made_from)
    if isinstance(made_from, TokenPairs) and pairs_of(record, None, None).digest() != record.sha256:
        raise InputError("These pairs cannot be saved: their token ids alone do not give the same pairs again.")
    return record


def pairs_of(record: PairsRecord, task: Task | None, tokenizer: Any) -> Pairs:
    """The pairs that a file describes, made again. Raises InputError if that is not possible."""
    made = record.made_from
    if isinstance(made, TaskPairs):
        if task is None:
            raise InputError("These pairs are made by a task, and the task cannot be loaded.")
        how: dict[str, Any] = {"split": made.split, "seed": made.seed, "prepend_bos": made.prepend_bos}
        pairs = task.pairs(tokenizer, n=record.n, skip=made.skip or 0, **how)
        return pairs if made.read_at is None else read_pairs(pairs, position_of(made.read_at), made.positive)
    rows = made.model_dump(mode="json", exclude={"kind"})
    if not all(rows["clean"]) or not all(rows["corrupt"]):
        raise FormatError("The file's pairs hold a prompt without tokens.")
    return Pairs(**rows)


def _token_pairs(pairs: Pairs) -> TokenPairs:
    n_ids = 2 * int(pairs.mask.sum())
    if n_ids > MAX_TOKEN_IDS:
        raise InputError(
            f"These pairs have {n_ids} token ids, and a circuit file can hold at most {MAX_TOKEN_IDS}. Use fewer "
            "examples, or write a task file that makes them."
        )

    def entries(table: Tensor | None) -> tuple[tuple[int, ...], ...] | None:
        return None if table is None else tuple(tuple(v for v in row if v != -1) for row in table.tolist())

    def prompts(table: Tensor) -> tuple[tuple[int, ...], ...]:
        lengths = pairs.lengths.tolist()
        return tuple(tuple(row[:length]) for row, length in zip(table.tolist(), lengths, strict=True))

    return TokenPairs(
        clean=prompts(pairs.clean),
        corrupt=prompts(pairs.corrupt),
        right=entries(pairs.right),
        wrong=entries(pairs.wrong),
        answer_pos=entries(pairs.answer_pos) or (),
        positions={name: tuple(at.tolist()) for name, at in pairs.positions.items()},
    )


def discovery_record(scores: Scores, pairs: str | None) -> DiscoveryRecord:
    """The record of how scores were made; `pairs` is the name of the examples in the file.

    Raises InputError for a method or metric that is not registered, since `verify` would reject the file.
    """
    METHODS.get(scores.method)
    return DiscoveryRecord(
        method=scores.method,
        parameters=dict(scores.parameters),
        replacement=scores.replacement,
        metric=metric_record(scores.metric),
        pairs=pairs,
        n_examples=scores.count,
        cost=dict(scores.cost),
    )


EVALUATION_NUMBERS = (
    "circuit_value",
    "full_value",
    "empty_value",
    "faithfulness",
    "faithfulness_ci",
    "example_quartiles",
    "kl",
    "accuracy",
    "accuracy_full",
    "random_faithfulness",
)
"""The measured numbers of an evaluation, which a repeated run must give within the tolerance."""

EVALUATION_COUNTS = ("n_examples", "n_edges", "n_edges_graph", "n_ratio", "ci_level", "seed")
"""The numbers that a repeated run must give exactly."""


def evaluation_record(result: Evaluation, pairs: str, reference: str | None, dtype: str) -> EvaluationRecord:
    """The record of an evaluation: its numbers at 6 significant digits, and the tolerance for a repeated run."""
    return checked(
        EvaluationRecord,
        {
            "pairs": pairs,
            "reference": reference,
            "metric": metric_record(result.metric),
            "ablation": asdict(result.ablation),
            "tolerance": tolerance_for(dtype),
            **{name: getattr(result, name) for name in EVALUATION_COUNTS},
            **{name: _rounded(getattr(result, name)) for name in EVALUATION_NUMBERS},
        },
        "The evaluation",
    )


def _rounded(value: float | tuple[float, ...] | None) -> float | tuple[float, ...] | None:
    if value is None:
        return None
    return tuple(map(six_digits, value)) if isinstance(value, tuple) else six_digits(value)


def score_table(scores: Scores) -> Tensor:
    """The mean score of every edge on the CPU, 0 where the graph has no edge: the content of the sidecar."""
    return torch.where(scores.graph.possible, scores.values.cpu(), 0).contiguous()
