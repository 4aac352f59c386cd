"""Whether sets of examples overlap, compared by token ids, whatever they are called in the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from mechinterp.base.errors import clip
from mechinterp.circuit_file.schema import CircuitFile, TaskRecord
from mechinterp.circuit_file.verify.claims import FileWarning
from mechinterp.circuit_file.verify.coverage import OF_THE_TASK, evaluation_name
from mechinterp.circuit_file.verify.warnings import on_discovery_pairs
from mechinterp.tasks.input_checks import NO_ENTRY
from mechinterp.tasks.pairs import Pairs

Prompt = tuple[int, ...]


def distinct_prompts(pairs: Mapping[str, Pairs]) -> dict[str, int]:
    """The number of different clean prompts in each set of examples."""
    return {name: len(set(clean_prompts(some))) for name, some in pairs.items()}


def clean_prompts(pairs: Pairs) -> list[Prompt]:
    """The token ids of every clean prompt, without padding."""
    lengths = pairs.lengths.tolist()
    return [tuple(row[:length]) for row, length in zip(pairs.clean.tolist(), lengths, strict=True)]


def compare_with_discovery(
    document: CircuitFile, pairs: Mapping[str, Pairs]
) -> tuple[tuple[str, ...], tuple[FileWarning, ...]]:
    """For every set that results are measured on: a note that none of its prompts were scored on, or a warning.

    Only clean prompts are compared: another corrupt prompt does not make an example a new one.
    """
    own = document.discovery and document.discovery.pairs
    if own is None or own not in pairs:
        return (), ()
    scored, notes, warnings = set(clean_prompts(pairs[own])), list[str](), list[FileWarning]()
    for name, use in _uses(document).items():
        if name == own or name not in pairs:
            continue
        prompts = clean_prompts(pairs[name])
        shared = sum(prompt in scored for prompt in prompts)
        n = f"{len(prompts)} prompts of {clip(name, 80)!r}"
        if shared:
            text = f"{use}: {shared} of the {n} are also among those of {clip(own, 80)!r}"
            warnings.append(on_discovery_pairs(text))
        else:
            notes.append(f"{use}: none of the {n} is among the {len(pairs[own])} of {clip(own, 80)!r}.")
    return tuple(notes), tuple(warnings)


def _uses(document: CircuitFile) -> dict[str, str]:
    """What is measured on each set of pairs, by the name of the set."""
    found = {entry.pairs: evaluation_name(document, i) for i, entry in enumerate(document.evaluation)}
    for prediction in document.predictions or ():
        if prediction.pairs is not None:
            found.setdefault(prediction.pairs, "predictions")
    return found


def compare_with_task(document: CircuitFile, pairs: Mapping[str, Pairs]) -> tuple[set[str], tuple[FileWarning, ...]]:
    """The claims for those sets of token ids that the task makes too, and a warning for every other such set.

    Rows of token ids are looked up among the sets that the file states as made by the task; no others are made.
    """
    if not isinstance(document.task, TaskRecord):
        return set(), ()
    given = {name for name in pairs if document.pairs[name].made_from.kind == "tokens"}
    made = {row for name in pairs if name not in given for row in _rows(pairs[name])}
    of_task = {name for name in given if made.issuperset(_rows(pairs[name]))}
    text = f"given as token ids, which are not among the pairs that task {clip(document.task.name, 80)!r} makes here"
    foreign = sorted(given - of_task)
    return {f"pairs.{name} {OF_THE_TASK}" for name in of_task}, tuple(
        FileWarning("pairs not of the task", f"pairs {clip(name, 80)!r} are {text}") for name in foreign
    )


def _rows(pairs: Pairs) -> Iterable[tuple[object, ...]]:
    """The full content of every example."""
    lengths = pairs.lengths.tolist()
    tables = [_entries(table, len(pairs)) for table in (pairs.right, pairs.wrong, pairs.answer_pos)]
    names = tuple(sorted(pairs.positions))
    positions = [pairs.positions[name].tolist() for name in names]
    for i, (clean, corrupt) in enumerate(zip(pairs.clean.tolist(), pairs.corrupt.tolist(), strict=True)):
        length = lengths[i]
        ids = (tuple(clean[:length]), tuple(corrupt[:length]), *(table[i] for table in tables))
        yield (*ids, names, *(at[i] for at in positions))


def _entries(table: Tensor | None, n_rows: int) -> list[Prompt]:
    if table is None:
        return [()] * n_rows
    return [tuple(entry for entry in row if entry != NO_ENTRY) for row in table.tolist()]
