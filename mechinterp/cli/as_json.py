"""What commands print with `--json`: one object on standard output; progress and errors stay on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from mechinterp.circuit_file.diff import CircuitDiff
    from mechinterp.circuit_file.schema import CircuitFile
    from mechinterp.circuit_file.verify.claims import Verification

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead (docs: JSON output).")]


def print_json(kind: str, content: Mapping[str, Any]) -> None:
    """Print the object; numbers that are not finite are null, and letters beyond ASCII are escaped."""
    sys.stdout.write(json.dumps({"kind": kind, **_plain(content)}, allow_nan=False) + "\n")


def circuit_content(document: CircuitFile, path: Path) -> dict[str, Any]:
    """What `show` and `run` print: the finding, the doubts, and every node and edge."""
    from mechinterp.circuit_file.summary import finding, ranked_nodes, steadiness
    from mechinterp.circuit_file.verify.doubts import doubts

    return {
        "file": str(path),
        "circuit_sha256": document.integrity.circuit_sha256,
        "finding": finding(document),
        "stability": list(steadiness(document)),
        "doubts": [{"name": doubt.name, "text": doubt.text} for doubt in doubts(document)],
        "model": document.model.name,
        "n_edges_graph": document.graph.n_edges,
        "evaluation": [entry.model_dump(mode="json") for entry in document.evaluation],
        "nodes": [asdict(node) for node in ranked_nodes(document)],
        "edges": [{"name": edge.name, "score": edge.score, "frequency": edge.frequency} for edge in document.edges],
        "roles": {role.label: list(role.nodes) for role in document.roles.values()},
    }


def verification_content(result: Verification, path: Path, passed: bool, model_available: bool) -> dict[str, Any]:
    """What `verify` prints: every claim with what was found, warnings and notes."""
    return {
        "file": str(path),
        "passed": passed,
        "model_available": model_available,
        "claims": [asdict(claim) for claim in result.claims],
        "warnings": [{"name": warning.name, "text": warning.text} for warning in result.warnings],
        "notes": list(result.notes),
    }


def difference_content(found: CircuitDiff) -> dict[str, Any]:
    """What `diff` prints: all that the tables have, and every edge and node."""
    return {
        "files": [str(found.a), str(found.b)],
        "circuit_sha256": list(found.circuit_sha256),
        "same_circuit": found.same_circuit,
        "differs": found.differs,
        "notes": list(found.notes),
        "overlaps": [asdict(entry) for entry in found.overlaps()],
        "scores": [asdict(entry) for entry in found.scores],
        "scored_alike": found.scored_alike,
        "edges": [asdict(entry) for entry in found.edges],
        "nodes": [asdict(entry) for entry in found.nodes],
        "roles": [asdict(entry) for entry in found.roles],
        "fields": [asdict(entry) for entry in found.fields],
    }


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table by column."""
    rows: Any = frame.to_dict("records")
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _plain(value.item()) if hasattr(value, "item") else str(value)
