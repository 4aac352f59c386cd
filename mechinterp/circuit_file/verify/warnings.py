"""The warnings of `verify`: what a file leaves out, or states where it cannot be checked, although all claims hold.

Each function gives the warnings of one kind; none of them runs a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from mechinterp.base.errors import clip
from mechinterp.circuit_file.limits import FEW
from mechinterp.circuit_file.schema import CircuitFile, TaskRecord
from mechinterp.circuit_file.verify.claims import FileWarning
from mechinterp.circuit_file.verify.coverage import applies_again, evaluation_name, refined
from mechinterp.circuit_file.verify.doubts import doubts
from mechinterp.circuit_file.verify.known_models import name_misleads
from mechinterp.circuit_file.verify.role_support import support_of_roles, vacuous
from mechinterp.tasks.task import task_names

_SHOWN, _LETTERS = 5, 80
_PERCENT = re.compile(r"\d\s*(%|percent|per cent)")


def stated_warnings(
    document: CircuitFile, distinct: Mapping[str, int] | None = None, *, rescored: bool = False
) -> tuple[FileWarning, ...]:
    """All warnings that follow from the file alone, before anything is run.

    `distinct` is the number of different prompts in each set of pairs that was made. For other sets it is counted if
    the file lists their token ids; otherwise it is the number of examples that the file states.
    """
    counts = {**_distinct(document), **(distinct or {})}
    return (
        *doubts(document),
        *_of_scores(document, rescored),
        *_of_results(document, counts),
        *_of_pairs(document),
        *_of_task(document),
        *_of_model(document),
        *_of_words(document),
        *_of_predictions(document),
    )


def _of_scores(document: CircuitFile, rescored: bool) -> Iterable[FileWarning]:
    discovery, selection = document.discovery, document.selection
    if discovery is None:
        yield FileWarning("no scores", "nothing in the file shows why it has these edges and not others")
        if any(edge.score is not None for edge in document.edges):
            yield FileWarning("scores without a source", "edges have scores, but the file of all scores is left out")
    else:
        if not rescored:
            text = "use --rescore; until then only a hash covers them, and forged ones look the same"
            yield FileWarning("scores not recomputed", text)
        if discovery.pairs is None:
            yield FileWarning("scores without pairs", "the pairs that the edges were scored on are left out")
        if not applies_again(document):
            text = "the selection states no rule that can be applied to the scores again"
            if refined(document):
                text = "the circuit was refined by exact runs after its selection, and verify does not repeat these"
            yield FileWarning("selection not applied", text)
    if selection.size is not None and document.curve is None:
        text = "the size is stated to be the smallest that reaches a target, but the curve that shows it is left out"
        yield FileWarning("size without a curve", text)


def _of_results(document: CircuitFile, counts: Mapping[str, int]) -> Iterable[FileWarning]:
    if not document.evaluation:
        yield FileWarning("no evaluation", "the file does not state what the circuit does")
    if document.evaluation and not document.provenance.versions:
        yield FileWarning("no versions", "the versions that the numbers were made with are left out")
    uses = {"scores": document.discovery and document.discovery.pairs, "curve": document.curve and document.curve.pairs}
    for number, entry in enumerate(document.evaluation):
        name = evaluation_name(document, number)
        uses[name] = entry.pairs
        if not entry.random_faithfulness:
            yield FileWarning("no random circuits", f"{name}: no circuits of the same size to compare with")
        elif max(entry.random_faithfulness) >= entry.faithfulness:
            text = f"{name}: a random circuit of this size does as well ({max(entry.random_faithfulness):.3g})"
            yield FileWarning("no better than random", text)
    uses |= _of_predicted(document)
    few = {use: name for use, name in uses.items() if name and counts[name] < FEW}
    if few:
        sizes = _some([f"{use} on {counts[name]}" for use, name in few.items()])
        yield FileWarning("few examples", f"fewer than {FEW} different examples say little about others: {sizes}")
    if any(use.startswith("evaluation") for use in few):
        text = "with so few, the seed or the examples may have been chosen to flatter the circuit"
        yield FileWarning("chosen examples", f"{text}; try others: discover-circuit eval FILE --seed 1")


def _of_pairs(document: CircuitFile) -> Iterable[FileWarning]:
    """Evaluations on the pairs of the discovery; `shared_examples.py` compares different sets by token ids."""
    discovery = document.discovery
    if discovery is None or discovery.pairs is None:
        return
    scored_on = document.pairs[discovery.pairs].sha256
    uses = {evaluation_name(document, number): entry.pairs for number, entry in enumerate(document.evaluation)}
    uses |= _of_predicted(document)
    for use, name in uses.items():
        if document.pairs[name].sha256 == scored_on:
            yield on_discovery_pairs(f"{use} on the same pairs that the edges were scored on, not on held-out ones")


def _of_predicted(document: CircuitFile) -> dict[str, str]:
    names = sorted({entry.pairs for entry in document.predictions or () if entry.pairs is not None})
    return {"predictions" if len(names) == 1 else f"predictions on {name!r}": name for name in names}


def on_discovery_pairs(text: str) -> FileWarning:
    """The warning that a result is not held out."""
    return FileWarning("evaluation on discovery pairs", text)


def _of_task(document: CircuitFile) -> Iterable[FileWarning]:
    task = document.task
    if task is None or (isinstance(task, TaskRecord) and task.bundled):
        return
    name = clip(task.name, _LETTERS)
    what = {"task": "its own task", "file": "a file by the author", "tokens": "token ids by the author"}[task.kind]
    yield FileWarning("own task", f"the pairs come from {what} ({name!r}): read what it asks before the numbers")
    if task.name in task_names():
        text = f"{task.name!r} is a task of this package, and the pairs of the file are not made by it"
        yield FileWarning("task under a known name", text)


def _of_model(document: CircuitFile) -> Iterable[FileWarning]:
    misleads = name_misleads(document.model)
    if misleads:
        yield FileWarning("model under a known name", misleads)
    if document.model.weights_sha256 is None:
        yield FileWarning("weights not stated", "so the model cannot be compared with the one that the file is about")
    made = any(entry.made_from.kind == "task" for entry in document.pairs.values())
    if document.tokenizer is None and made:
        yield FileWarning("tokenizer not stated", "the tokenizer that the task's pairs were made with is left out")


def _of_words(document: CircuitFile) -> Iterable[FileWarning]:
    if document.status in ("published", "ground-truth"):
        text = f"status {document.status!r} is the author's own statement"
        yield FileWarning("self-declared status", text)
    if document.citation is not None or document.derived_from:
        text = "citation and source are the author's own statements; compare the circuit with what is cited"
        yield FileWarning("self-declared citation", text)
    said = [name for name in ("title", "description") if _PERCENT.search(getattr(document, name))]
    if said:
        yield FileWarning("numbers in words", f"{' and '.join(said)}: free text with a percentage that is not checked")


def _of_predictions(document: CircuitFile) -> Iterable[FileWarning]:
    predictions = document.predictions or ()
    names = [prediction.name for prediction in predictions if vacuous(prediction)]
    if names:
        text = "any value, or a node without any effect, satisfies them"
        yield FileWarning("vacuous predictions", f"{text}: {_some(names)}")
    names = [prediction.name for prediction in predictions if not prediction.controls]
    if names:
        yield FileWarning(
            "predictions without controls", f"without a negative control nothing could refute them: {_some(names)}"
        )
    without = [f"{name} ({entry.role.label})" for entry in support_of_roles(document) for name in entry.without]
    if without:
        text = "no prediction with a control supports the role of"
        yield FileWarning("roles without predictions", f"{text}: {_some(without)}")


def _distinct(document: CircuitFile) -> dict[str, int]:
    """The number of different prompts in each set of pairs, as far as the file shows it."""
    return {
        name: len(set(record.made_from.clean)) if record.made_from.kind == "tokens" else record.n
        for name, record in document.pairs.items()
    }


def _some(names: list[str]) -> str:
    return ", ".join(clip(name, _LETTERS) for name in names[:_SHOWN]) + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )
