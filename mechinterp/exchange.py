"""Circuit files and the rest of the world: exported, imported, validated, cited, compared. No model runs for it."""

from __future__ import annotations

from pathlib import Path

from mechinterp.circuit_file.circuit_file import load_circuit, save_circuit
from mechinterp.circuit_file.diff import CircuitDiff, diff_circuits
from mechinterp.circuit_file.formats.bibtex import citation_of
from mechinterp.circuit_file.formats.exports import export_circuit, write_export
from mechinterp.circuit_file.formats.imports import import_circuit
from mechinterp.circuit_file.formats.names import EXPORTS, IMPORTS
from mechinterp.circuit_file.schema import CircuitFile, Origin
from mechinterp.circuit_file.store import SUFFIX, check_hashes, open_circuit_file
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.hook_manager import load_model
from mechinterp.views.report.difference import write_difference


def opened(file: str | Path) -> tuple[Circuit, CircuitFile]:
    """The circuit and its document. Raises FormatError for a file that is none or was changed."""
    found = open_circuit_file(file)
    check_hashes(found)
    return load_circuit(file), found.document


def export_file(file: str | Path, format: str, out: str | Path | None = None) -> tuple[tuple[Path, ...], str]:
    """The paths written (by default named after the file, in the working directory), and what the format cannot hold.

    Raises InputError for an unknown format, UnsupportedError for a circuit that the format has no way to say.
    """
    chosen = EXPORTS.get(format)
    circuit, document = opened(file)
    target = Path(Path(file).name.removesuffix(SUFFIX) + chosen.suffix) if out is None else Path(out)
    return write_export(target, export_circuit(circuit, document, format)), chosen.lost


def import_file(path: str | Path, format: str, model: str, out: str | Path) -> CircuitFile:
    """The circuit file that was written for a circuit in another tool's file; its edges, without scores.

    No file says what sign its scores have, so they are left out; `mechinterp.circuit_file.formats.imports` reads them
    when told.
    """
    IMPORTS.get(format)
    manager = load_model(model)
    circuit = import_circuit(path, format, dims=manager.dims)
    origin = Origin(source=IMPORTS.about()[format], path=Path(path).name)
    return save_circuit(out, circuit, model=manager, status="imported", derived_from=(origin,))


def validate_file(file: str | Path) -> tuple[str, ...]:
    """What a circuit file says of itself, one line each, after schema, hashes, graph and edges were checked."""
    circuit, document = opened(file)
    graph = document.graph
    return (
        f"{document.kind} {document.id!r}, schema version {document.schema_version}, status {document.status}",
        f"{circuit.n_edges} of {graph.n_edges} edges, {len(circuit.nodes)} nodes, level {graph.granularity}",
        f"{len(document.evaluation)} evaluations, {len(document.pairs)} sets of pairs, {len(document.roles)} roles",
        f"circuit sha256 {document.integrity.circuit_sha256}",
    )


def diff_files(a: str | Path, b: str | Path, out: str | Path | None = None) -> CircuitDiff:
    """How the files differ, after `out` (.html or .svg) was drawn, if it is given. See `diff_circuits`."""
    found = diff_circuits(a, b)
    if out is not None:
        write_difference(Path(out), found, load_circuit(a), load_circuit(b))
    return found


def cite_file(file: str | Path) -> str:
    """BibTeX of the paper that the circuit is of, where it names one, of the file with its hash, and of the software.

    See `mechinterp.circuit_file.formats.bibtex`: nothing that the file holds is printed as it is.
    """
    return citation_of(opened(file)[1])
