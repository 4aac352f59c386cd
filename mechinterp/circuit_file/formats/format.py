"""`Export` and `Import`: a format that circuits are written in, and one that they are read from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mechinterp.circuit_file.formats.score_origin import Made
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.layout import Dims

Written = bytes | dict[str, bytes]
"""One file, or the files of a folder by relative path."""


@dataclass(frozen=True)
class Export:
    """A format that circuits are written in.

    Args:
        suffix: How its files are named; "" for a folder.
        write: The content of the file or files.
        lost: What of a circuit file the format cannot hold.
    """

    suffix: str
    write: Callable[[Circuit, CircuitFile], Written]
    lost: str


@dataclass(frozen=True)
class Import:
    """A format that circuits are read from.

    Args:
        has_scores: Whether its files can hold scores.
        has_sizes: Whether its files say of what sizes their model is.
        read: The circuit of a path, on the graph of the dimensions if they are given; with scores if it is said how
            they were made.
    """

    has_scores: bool
    has_sizes: bool
    read: Callable[[Path, Dims | None, Made | None], Circuit]
