"""Export, import, validate, cite and compare circuit files. No model is run."""

from __future__ import annotations

from pathlib import Path

from mechinterp.circuit_file.circuit_file import circuit_of, save_circuit
from mechinterp.circuit_file.diff import CircuitDiff, diff_opened
from mechinterp.circuit_file.formats.bibtex import citation_of
from mechinterp.circuit_file.formats.exports import export_circuit, write_export
from mechinterp.circuit_file.formats.imports import import_circuit
from mechinterp.circuit_file.formats.names import EXPORTS, IMPORTS
from mechinterp.circuit_file.named_files import comes_with_the_package, find_file
from mechinterp.circuit_file.schema import CircuitFile, Origin
from mechinterp.circuit_file.store import SUFFIX, open_circuit_file
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.hook_manager import load_model
from mechinterp.views.report.difference import write_difference


def opened(file: str | Path) -> tuple[Circuit, CircuitFile]:
    """The circuit and its document. Raises FormatError if the file is not a circuit file or was changed."""
    found = open_circuit_file(find_file(file))
    return circuit_of(found), found.document


def export_file(file: str | Path, format: str, out: str | Path | None = None) -> tuple[tuple[Path, ...], str]:
    """The paths that were written, and a sentence on what the format cannot hold.

    Args:
        file: the circuit file, or the name of a stored circuit.
        format: one of `EXPORTS`.
        out: where to write. None: named after the file, in the working directory.

    Raises:
        InputError: for an unknown format.
        UnsupportedError: if the format cannot represent the circuit.
    """
    chosen = EXPORTS.get(format)
    circuit, document = opened(file)
    target = exported_path(file, format) if out is None else Path(out)
    return write_export(target, export_circuit(circuit, document, format)), chosen.lost


def exported_path(file: str | Path, format: str) -> Path:
    """Where an export goes by default: named after the circuit file, in the working directory."""
    return Path(find_file(file).name.removesuffix(SUFFIX) + EXPORTS.get(format).suffix)


def import_file(path: str | Path, format: str, model: str, out: str | Path) -> CircuitFile:
    """The circuit file written for a circuit in another tool's file: its edges, without scores.

    Other tools' files do not state the sign of their scores, so scores are left out;
    `mechinterp.circuit_file.formats.imports` reads them if you say how they were made.

    Args:
        path: the other tool's file.
        format: one of `IMPORTS`.
        model: the model that the circuit is of; its dimensions must be those of the file.
        out: the `NAME.circuit.json` to write.

    Raises:
        InputError: for an unknown format.
        FormatError: if the file cannot be read in this format.
    """
    IMPORTS.get(format)
    manager = load_model(model)
    circuit = import_circuit(path, format, dims=manager.dims)
    origin = Origin(source=IMPORTS.about()[format], path=Path(path).name)
    return save_circuit(out, circuit, model=manager, status="imported", derived_from=(origin,))


def validate_file(file: str | Path) -> tuple[str, ...]:
    """A few lines on what a circuit file contains, after its schema, hashes, graph and edges were checked."""
    circuit, document = opened(file)
    graph = document.graph
    return (
        f"{document.kind} {document.id!r}, schema version {document.schema_version}, status {document.status}",
        f"{circuit.n_edges} of {graph.n_edges} edges, {len(circuit.nodes)} nodes, level {graph.granularity}",
        f"{len(document.evaluation)} evaluations, {len(document.pairs)} sets of pairs, {len(document.roles)} roles",
        f"circuit sha256 {document.integrity.circuit_sha256}",
    )


def diff_files(a: str | Path, b: str | Path, out: str | Path | None = None) -> CircuitDiff:
    """The differences between two circuit files (see `diff_circuits`); `out` (.html or .svg) draws them."""
    files = open_circuit_file(find_file(a)), open_circuit_file(find_file(b))
    circuits = circuit_of(files[0]), circuit_of(files[1])
    found = diff_opened(files, circuits)
    if out is not None:
        write_difference(Path(out), found, *circuits)
    return found


def cite_file(file: str | Path, *, author: str = "", year: str = "", url: str = "") -> tuple[str, tuple[str, ...]]:
    """(BibTeX for the paper, if the file names one, for the file with its hash, and for the software; what it lacks).

    Every text from the file is escaped: see `mechinterp.circuit_file.formats.bibtex`.

    Args:
        file: the circuit file, or the name of a stored circuit.
        author: who made the file: `A and B`.
        year: when; by default the year that the file states.
        url: where it can be downloaded.
    """
    path = find_file(file)
    document, packaged = opened(path)[1], comes_with_the_package(path)
    found = {"author": author or packaged, "year": year or document.created_utc, "url": url or packaged}
    text = citation_of(document, author=author, year=year, url=url, packaged=packaged)
    return text, tuple(name for name, value in found.items() if not value)
