"""The examples of a run: of a task in three splits, or of a file of pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mechinterp.analysis.directions import read_direction
from mechinterp.base.errors import InputError
from mechinterp.circuit_file.direction_file import load_direction
from mechinterp.circuit_file.direction_schema import is_direction_name, open_direction_file
from mechinterp.circuit_file.limits import FEW
from mechinterp.circuit_file.named_files import find_file
from mechinterp.circuit_file.readouts import prompts_of
from mechinterp.circuit_file.records import task_record
from mechinterp.circuit_file.schema import FileTaskRecord, TaskRecord
from mechinterp.models.hook_manager import HookManager
from mechinterp.run_spec import RunSpec
from mechinterp.run_spec import stem as stem
from mechinterp.tasks.pair_files import load_pairs
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.source import FileSource
from mechinterp.tasks.task import Task, load_task

CROSS_FITTED = "The size was chosen by cross-fitting on the train pairs, since"


@dataclass(frozen=True)
class Examples:
    """The examples of a run, with the record of the task that they are of.

    `validation` is None where there are too few pairs to hold some out for the size: it is then chosen by
    cross-fitting on the train pairs. `templates` are those of the train pairs.
    """

    task: TaskRecord | FileTaskRecord
    train: Pairs
    validation: Pairs | None
    test: Pairs
    metric: str
    templates: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def examples_of(spec: RunSpec, model: HookManager) -> Examples:
    """The task's record, its examples and its metric."""
    if Path(spec.task).suffix.lower() in (".jsonl", ".csv"):
        return _file_examples(spec, model)
    task: Task = load_task(spec.task)
    make = partial(task.pairs, model, seed=spec.seed, prepend_bos=spec.bos)
    test = make(n=spec.test_examples, split="test")
    record, n = task_record(task, path=spec.task), spec.examples
    train = make(n=n, split="train")
    try:
        validation, notes = make(n=spec.validation_examples, split="train", skip=n), ()
    except InputError:  # too few different examples for both
        validation = None
        notes = (f"{CROSS_FITTED} the task makes no {n + spec.validation_examples} different train pairs.",)
    templates = task.row_templates("train", spec.seed, len(train))
    return Examples(record, train, validation, test, task.metric, templates, notes)


def _file_examples(spec: RunSpec, model: HookManager) -> Examples:
    """Train, validation and test pairs of a file in thirds; with few pairs, the size is chosen by cross-fitting."""
    pairs = load_pairs(spec.task, model, prepend_bos=spec.bos)
    source = pairs.source
    assert isinstance(source, FileSource)
    if len(pairs) < 4:
        raise InputError(f"{spec.task} has {len(pairs)} usable pairs; at least 4 are needed, half of them held out.")
    record = FileTaskRecord(name=stem(spec.task), path=spec.task, sha256=source.sha256)
    metric = "logit_diff" if pairs.right is not None and pairs.wrong is not None else "kl_to_clean"
    n_parts = 3 if len(pairs) >= 3 * FEW else 2
    n_train = min(spec.examples, len(pairs) // n_parts)
    n_validation = min(spec.validation_examples, len(pairs) // n_parts) if n_parts == 3 else 0
    n_test = min(spec.test_examples, len(pairs) - n_train - n_validation)
    got, asked = (n_train, n_validation, n_test), (spec.examples, spec.validation_examples, spec.test_examples)
    train, rest = pairs[:n_train], pairs[n_train:]
    validation = rest[:n_validation] if n_validation else None
    notes = () if n_validation else (f"{CROSS_FITTED} {len(pairs)} pairs are too few for three parts of {FEW}.",)
    if any(have < want for have, want in zip(got, asked, strict=True)):
        few, many = (f"{a} train, {b} validation and {c} test" for a, b, c in (got, asked))
        notes = (*notes, f"{spec.task} has {len(pairs)} usable pairs: {few} pairs were taken, {many} were asked for.")
    return Examples(record, train, validation, rest[n_validation : n_validation + n_test], metric, None, notes)


def explaining(direction: str, model: HookManager, examples: Examples) -> tuple[HookManager, Examples]:
    """(the model with the direction of a file in place of its logits, the examples as the direction is read on them).

    Raises InputError if the direction is of another model, or its classes are not those of the examples.
    """
    path = find_file(direction)
    if not is_direction_name(path):
        raise InputError(f"--direction takes NAME.direction.json or the name of a stored direction; got {direction!r}.")
    found, of = load_direction(path), open_direction_file(path).document.model
    if of.weights_sha256 != model.info.weights_sha256():
        raise InputError(
            f"The direction in {path} is of {of.name}, whose weights are not those of {model.info.name}. Find one of "
            "this model: discover-circuit direct."
        )
    sets = {name: getattr(examples, name) for name in ("train", "validation", "test")}
    read = {name: None if pairs is None else prompts_of(found, pairs) for name, pairs in sets.items()}
    return read_direction(model, found), replace(examples, metric="direction", **read)
