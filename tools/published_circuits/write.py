"""`write_library`: every published circuit as a circuit file; the same bytes on every machine."""

from __future__ import annotations

from pathlib import Path

from mechinterp.circuit_file.circuit_file import edge_records, graph_record
from mechinterp.circuit_file.schema import SCHEMA_VERSION, CircuitFile, Provenance, SelectionRecord
from mechinterp.circuit_file.store import SUFFIX, seal, write_pair
from tools.published_circuits import docstring, greater_than, ioi, tracr
from tools.published_circuits.entry import Entry

COMMAND = "python -m tools.published_circuits"
NOBODY = "none"
"""The device of a file for which nothing was run."""


def library() -> tuple[Entry, ...]:
    """All published circuits, by name."""
    found = [*ioi.entries(), *greater_than.entries(), *docstring.entries(), *tracr.entries()]
    return tuple(sorted(found, key=lambda entry: entry.name))


def document_of(entry: Entry) -> CircuitFile:
    """The circuit file of an entry. It states no versions and no date: no number in it depends on any."""
    circuit = entry.circuit()
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": "circuit",
        "id": entry.name,
        "title": entry.title,
        "description": entry.description,
        "citation": entry.citation,
        "derived_from": entry.derived_from,
        "status": "published",
        "model": entry.model,
        "graph": graph_record(entry.graph),
        "positions": entry.positions,
        "roles": entry.roles,
        "role_edges": entry.role_edges,
        "nodes": circuit.nodes,
        "edges": edge_records(circuit),
        "selection": SelectionRecord(
            parameters=dict(circuit.selection), n_selected=circuit.n_selected, n_edges=circuit.n_edges
        ),
        "provenance": Provenance(versions={}, device=NOBODY, command=COMMAND),
    }
    return seal(content, None)


def write_library(folder: str | Path) -> tuple[Path, ...]:
    """Write every published circuit to `folder`; return the paths. Raises InputError when that is not possible."""
    written: list[Path] = []
    for entry in library():
        path = Path(folder) / f"{entry.name}{SUFFIX}"
        write_pair(path, document_of(entry), None)
        written.append(path)
    return tuple(written)
