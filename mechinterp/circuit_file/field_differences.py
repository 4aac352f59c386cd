"""The fields in which two circuit files differ, under the names that the file uses. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mechinterp.base.canonical_json import canonical_sha256
from mechinterp.circuit_file.schema import CircuitFile, EvaluationRecord
from mechinterp.circuit_file.store import plain_content

FIRST = (
    *("model", "tokenizer", "graph", "positions", "task", "pairs", "discovery", "selection", "evaluation", "curve"),
    *("provenance", "status", "license", "citation", "derived_from"),
)
"""The order in which the parts of the file are listed; all other parts follow."""
NOT_FIELDS = ("nodes", "edges", "roles", "evaluation", "schema_version", "kind", "integrity")
"""Parts that are not compared field by field."""
OF_A_HASH = ("clean", "corrupt", "right", "wrong", "answer_pos", "content")
"""Long entries whose sha256 is a separate field."""
MOST_ENTRIES = 6
MOST_LETTERS = 160


@dataclass(frozen=True)
class FieldDifference:
    """One field that differs between two files; None if a file does not state it."""

    field: str
    a: str | None
    b: str | None


def different_fields(a: CircuitFile, b: CircuitFile) -> tuple[FieldDifference, ...]:
    """All fields that differ, except nodes, edges, roles and hashes: first those in `FIRST`, then in the file's order.

    Evaluations are matched by metric and replacement; one that only one of the files has takes one row. Long lists and
    texts are shown by their sha256. The hash of the sidecar shows whether all scores are equal.
    """
    results = (_evaluations(a), _evaluations(b))
    stated = (_fields(a, *results), _fields(b, *results[::-1]))
    names = sorted(dict.fromkeys([*stated[0], *stated[1]]), key=_place)
    rows = (FieldDifference(name, stated[0].get(name), stated[1].get(name)) for name in names)
    return tuple(row for row in rows if row.a != row.b)


def _fields(
    document: CircuitFile, results: Mapping[str, EvaluationRecord], others: Mapping[str, EvaluationRecord]
) -> dict[str, str]:
    """Every field with its value as text; an evaluation is listed in full only if the other file has it, too."""
    found: dict[str, str] = {}
    for name, value in plain_content(document).items():
        if name == "extensions":
            found |= {name: _text(value)} if value else {}
        elif name not in NOT_FIELDS:
            found.update(_flat(name, value))
    for label, entry in results.items():
        name = f"evaluation[{label}]"
        if label in others:
            found.update(_flat(name, entry.model_dump(mode="json", exclude_none=True)))
        else:
            found[name] = f"faithfulness {entry.faithfulness:g} with {entry.n_edges} edges"
    if document.integrity.sidecar is not None:
        found["integrity.sidecar.sha256"] = document.integrity.sidecar.sha256
    return found


def _evaluations(document: CircuitFile) -> dict[str, EvaluationRecord]:
    """The evaluations by metric and replacement, numbered if these are the same."""
    found: dict[str, EvaluationRecord] = {}
    for entry in document.evaluation:
        name = label = f"{entry.metric.name}, {entry.ablation.value}"
        while label in found:
            label = f"{name} #{1 + sum(key.startswith(name) for key in found)}"
        found[label] = entry
    return found


def _flat(name: str, value: Any) -> Iterable[tuple[str, str]]:
    if not isinstance(value, Mapping):
        yield name, _text(value)
        return
    for key, entry in value.items():
        if key not in OF_A_HASH:
            yield from _flat(f"{name}.{key}", entry)


def _text(value: Any) -> str:
    """The value on one line; a long value as its size and sha256, so that different values look different."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and (
        len(value) > MOST_ENTRIES or any(isinstance(entry, (list, dict)) for entry in value)
    ):
        return f"{len(value)} entries, sha256 {canonical_sha256(value)[:12]}"
    if len(text) > MOST_LETTERS:
        return f"{text[:MOST_LETTERS]}... ({len(text)} letters, sha256 {canonical_sha256(value)[:12]})"
    return text


def _place(name: str) -> int:
    part = name.partition(".")[0].partition("[")[0]
    return FIRST.index(part) if part in FIRST else len(FIRST)
