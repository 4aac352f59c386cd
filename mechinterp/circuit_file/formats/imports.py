"""`import_circuit`: a circuit from a file in any of the formats of `IMPORTS`."""

from __future__ import annotations

from pathlib import Path

from mechinterp.circuit_file.formats.names import IMPORTS
from mechinterp.circuit_file.formats.score_origin import Made
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.layout import Dims


def import_circuit(path: str | Path, format: str, *, dims: Dims | None = None, made: Made | None = None) -> Circuit:
    """The circuit in another tool's file, on the graph of `dims`.

    `made` says how the file's scores were made and what sign they have, which no file does. Without it only the edges
    are read; where a file has no scores it does nothing.

    Raises InputError for an unknown format or missing dims; FormatError, in one line, for a file that is not of the
    format; UnsupportedError, which names the part, for a model that the format has no way to say.
    """
    return IMPORTS.get(format).read(Path(path), dims, made)
