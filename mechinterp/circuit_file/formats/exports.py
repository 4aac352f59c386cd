"""`export_circuit`: a circuit in any of the formats of `EXPORTS`."""

from __future__ import annotations

from pathlib import Path

from mechinterp.base.errors import InputError
from mechinterp.circuit_file.circuit_file import stated_dims
from mechinterp.circuit_file.formats.format import Written
from mechinterp.circuit_file.formats.names import EXPORTS
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.circuit_file.store import write_file
from mechinterp.graphs.circuit import Circuit


def export_circuit(circuit: Circuit, document: CircuitFile, format: str) -> Written:
    """The circuit in that format; the same circuit always gives the same bytes.

    Raises InputError for an unknown format, and when the document is about another circuit; UnsupportedError, which
    names the part, for a circuit that the format cannot hold.
    """
    chosen = EXPORTS.get(format)
    same = stated_dims(document) == circuit.graph.dims
    if not same or tuple(sorted(edge.name for edge in document.edges)) != circuit.edges:
        raise InputError("The circuit file is about another circuit; export the circuit that it describes.")
    return chosen.write(circuit, document)


def write_export(path: Path, written: Written) -> tuple[Path, ...]:
    """The files that were written: `path` itself, or the files of a folder below it.

    Each is written whole or not at all. Raises InputError when that is not possible.
    """
    files = {path: written} if isinstance(written, bytes) else {path / name: data for name, data in written.items()}
    for target, data in files.items():
        write_file(target, data)
    return tuple(files)
