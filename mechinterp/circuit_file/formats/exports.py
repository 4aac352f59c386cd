"""`EXPORTS`: all that a circuit can be written as, and `export_circuit`, which does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.circuit_file.formats.cytoscape import to_cytoscape
from mechinterp.circuit_file.formats.dot import to_dot
from mechinterp.circuit_file.formats.eap_ig_json import to_eap_ig_json
from mechinterp.circuit_file.formats.eap_ig_pt import to_eap_ig_pt
from mechinterp.circuit_file.formats.edge_csv import to_csv
from mechinterp.circuit_file.formats.graphml import to_graphml
from mechinterp.circuit_file.formats.latex import to_latex
from mechinterp.circuit_file.formats.mib import to_mib
from mechinterp.circuit_file.formats.neuronpedia import to_neuronpedia
from mechinterp.circuit_file.formats.tikz import to_tikz
from mechinterp.circuit_file.provenance import dims_of
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.circuit_file.store import write_file
from mechinterp.graphs.circuit import Circuit

Written = bytes | dict[str, bytes]
"""One file, or the files of a folder by relative path."""


@dataclass(frozen=True)
class Export:
    """A format: how its files are named ("": a folder), what writes it, and what of a circuit file it cannot hold."""

    suffix: str
    write: Callable[[Circuit, CircuitFile], Written]
    lost: str


_ALL_BUT_GRAPH = "the model, task, metric, ablation, how the scores were made, roles, results"

EXPORTS: Mapping[str, Export] = MappingProxyType(
    {
        "eap-ig-json": Export(".json", to_eap_ig_json, f"Lost: {_ALL_BUT_GRAPH}."),
        "eap-ig-pt": Export(".pt", to_eap_ig_pt, f"Lost: {_ALL_BUT_GRAPH}."),
        "mib": Export(
            "", to_mib, "Lost: which edges are in the circuit counts for nothing there, only their scores do."
        ),
        "dot": Export(".dot", to_dot, "Lost: results, provenance; scores have 4 digits and are tooltips and widths."),
        "graphml": Export(".graphml", to_graphml, "Lost: task, results, provenance; edges out of the circuit."),
        "cytoscape": Export(".cyjs", to_cytoscape, "Lost: task, results, provenance; edges out of the circuit."),
        "neuronpedia": Export(
            ".json",
            to_neuronpedia,
            "Lost: q, k and v (one link); heads and MLPs stand for features, positions for tokens; results.",
        ),
        "csv": Export(".csv", to_csv, "Lost: everything but the edges and their scores."),
        "latex": Export(".tex", to_latex, "Lost: all but the 40 strongest edges; scores have 4 digits."),
        "tikz": Export(".tex", to_tikz, "Lost: all but the 400 strongest edges; scores are widths of lines."),
    }
)


def export_circuit(circuit: Circuit, document: CircuitFile, format: str) -> Written:
    """The circuit in that format; the same circuit always gives the same bytes.

    Raises InputError for an unknown format, and when the document is about another circuit; UnsupportedError, which
    names the part, for a circuit that the format cannot hold.
    """
    if format not in EXPORTS:
        raise unknown("format", format, EXPORTS)
    same = dims_of(document.model.dims) == circuit.graph.dims
    if not same or tuple(sorted(edge.name for edge in document.edges)) != circuit.edges:
        raise InputError("The circuit file is about another circuit; export the circuit that it describes.")
    return EXPORTS[format].write(circuit, document)


def write_export(path: Path, written: Written) -> tuple[Path, ...]:
    """The files that were written: `path` itself, or the files of a folder below it.

    Each is written whole or not at all. Raises InputError when that is not possible.
    """
    files = {path: written} if isinstance(written, bytes) else {path / name: data for name, data in written.items()}
    for target, data in files.items():
        write_file(target, data)
    return tuple(files)
