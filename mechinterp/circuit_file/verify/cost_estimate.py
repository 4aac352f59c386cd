"""How much `verify` will run for a file, estimated before it starts: even a small file can require hours."""

from __future__ import annotations

from pathlib import Path

from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.circuit_file.store import open_circuit_file

OWN_RUNS = 3
"""Runs of an evaluation besides its random circuits: the model, the circuit, the empty circuit."""


def planned_runs(document: CircuitFile, rescore: bool = False) -> str:
    """One line: what will be run again, and about how many forward passes of one example that takes.

    Empty if there is nothing to run.
    """
    parts: list[str] = []
    runs = 0
    if document.evaluation:
        parts.append(_count(len(document.evaluation), "evaluation"))
        for entry in document.evaluation:
            runs += _n_of(document, entry.pairs) * (OWN_RUNS + len(entry.random_faithfulness))
    if document.curve is not None and document.integrity.sidecar is not None:
        parts.append(f"a curve of {_count(len(document.curve.points), 'size')}")
        runs += _n_of(document, document.curve.pairs) * (2 + len(document.curve.points))
    if document.predictions:
        parts.append(_count(len(document.predictions), "prediction"))
        runs += sum(_n_of(document, entry.pairs) * (2 + len(entry.controls)) for entry in document.predictions)
    again = ""
    stated = document.discovery
    if rescore and stated is not None:
        n = _n_of(document, stated.pairs)
        settings = ", ".join(f"{name}={value}" for name, value in stated.parameters.items())
        again = f"; and all scores again: {stated.method} on {n:,} examples ({settings or 'no parameters'})"
    if not parts:
        return f"to run: {again.removeprefix('; and ')}" if again else ""
    return f"to run: {', '.join(parts)}; about {runs:,} forward passes of one example{again}"


def plan_of_file(path: Path, rescore: bool) -> str:
    """As `planned_runs`, of the file at this path. Raises FormatError if it is not a circuit file."""
    return planned_runs(open_circuit_file(path).document, rescore)


def _n_of(document: CircuitFile, pairs: str | None) -> int:
    return 1 if pairs is None else document.pairs[pairs].n


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"
