"""`IMPORTS`: all that can be read as a circuit, and `import_circuit`, which does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mechinterp.base.errors import InputError
from mechinterp.base.plain_files import read_bounded
from mechinterp.base.registry import unknown
from mechinterp.circuit_file.formats.acdc import from_acdc
from mechinterp.circuit_file.formats.eap_ig_json import from_eap_ig_json
from mechinterp.circuit_file.formats.eap_ig_pt import from_eap_ig_pt
from mechinterp.circuit_file.formats.edge_pruning import from_edge_pruning
from mechinterp.circuit_file.formats.foreign import MAX_BYTES
from mechinterp.circuit_file.formats.mib import from_mib
from mechinterp.circuit_file.formats.score_origin import Made
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.layout import Dims


@dataclass(frozen=True)
class Import:
    """A format: what it is, whether its files can hold scores and say of what sizes their model is, what reads it."""

    title: str
    has_scores: bool
    has_sizes: bool
    read: Callable[[Path, Dims | None, Made | None], Circuit]


def _content(path: Path) -> bytes:
    return read_bounded(path, MAX_BYTES)


def _needed(dims: Dims | None) -> Dims:
    if dims is None:
        raise InputError("This format does not say of what model it is; give dims=, such as model.dims.")
    return dims


IMPORTS: Mapping[str, Import] = MappingProxyType(
    {
        "eap-ig-json": Import(
            "EAP-IG's graph as JSON",
            True,
            True,
            lambda path, dims, made: from_eap_ig_json(_content(path), dims, made, str(path)),
        ),
        "eap-ig-pt": Import(
            "EAP-IG's graph as .pt",
            True,
            True,
            lambda path, dims, made: from_eap_ig_pt(_content(path), dims, made, str(path)),
        ),
        "mib": Import("one task's folder of a MIB submission", True, True, from_mib),
        "acdc": Import(
            "ACDC's save_subgraph (.pth)",
            False,
            False,
            lambda path, dims, made: from_acdc(_content(path), _needed(dims), str(path)),
        ),
        "edge-pruning": Import(
            "Edge-Pruning's edges.json",
            False,
            False,
            lambda path, dims, made: from_edge_pruning(_content(path), _needed(dims), str(path)),
        ),
    }
)


def import_circuit(path: str | Path, format: str, *, dims: Dims | None = None, made: Made | None = None) -> Circuit:
    """The circuit in another tool's file, on the graph of `dims`.

    `made` says how the file's scores were made and what sign they have, which no file does. Without it only the edges
    are read; where a file has no scores it does nothing.

    Raises InputError for an unknown format or missing dims; FormatError, in one line, for what is no such file;
    UnsupportedError, which names the part, for a model that the format has no way to say.
    """
    if format not in IMPORTS:
        raise unknown("format", format, IMPORTS)
    return IMPORTS[format].read(Path(path), dims, made)
