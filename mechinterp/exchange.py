"""Circuit files and the rest of the world: exported, imported, validated, cited, compared. No model runs for it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from mechinterp.circuit import Circuit
from mechinterp.errors import InputError
from mechinterp.files.circuit_file import load_circuit, save_circuit
from mechinterp.files.compare_files import diff_circuits
from mechinterp.files.difference import CircuitDiff
from mechinterp.files.schema import CircuitFile
from mechinterp.files.schema_parts import Origin
from mechinterp.files.store import SUFFIX, check_hashes, open_circuit_file
from mechinterp.formats.exports import EXPORTS, export_circuit, write_export
from mechinterp.formats.imports import IMPORTS, import_circuit
from mechinterp.hooks import load_model
from mechinterp.registry import unknown
from mechinterp.report.difference import write_difference

DISTRIBUTION = "mechinterp-circuits"


def opened(file: str | Path) -> tuple[Circuit, CircuitFile]:
    """The circuit and its document. Raises FormatError for a file that is none or was changed."""
    found = open_circuit_file(file)
    check_hashes(found)
    return load_circuit(file), found.document


def export_file(file: str | Path, format: str, out: str | Path | None = None) -> tuple[tuple[Path, ...], str]:
    """The paths written (by default named after the file, in the working directory), and what the format cannot hold.

    Raises InputError for an unknown format, UnsupportedError for a circuit that the format has no way to say.
    """
    if format not in EXPORTS:
        raise unknown("format", format, EXPORTS)
    circuit, document = opened(file)
    target = Path(Path(file).name.removesuffix(SUFFIX) + EXPORTS[format].suffix) if out is None else Path(out)
    return write_export(target, export_circuit(circuit, document, format)), EXPORTS[format].lost


def import_file(path: str | Path, format: str, model: str, out: str | Path) -> CircuitFile:
    """The circuit file that was written for a circuit in another tool's file; its edges, without scores.

    No file says what sign its scores have, so they are left out; `mechinterp.formats.imports` reads them when told.
    """
    if format not in IMPORTS:
        raise unknown("format", format, IMPORTS)
    manager = load_model(model)
    circuit = import_circuit(path, format, dims=manager.dims)
    origin = Origin(source=IMPORTS[format].title, path=Path(path).name)
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

    The software's version is the one that made the file, or this one where it states none.
    """
    _, document = opened(file)
    citation, made = document.citation, document.provenance.versions.get("mechinterp")
    entries: list[str] = []
    if citation is not None and citation.bibtex is not None:
        entries.append(citation.bibtex.strip())
    elif citation is not None and citation.title is not None:
        fields = {"title": citation.title, "author": " and ".join(citation.authors), "doi": citation.doi}
        fields |= {"eprint": citation.arxiv, "url": citation.url}
        entries.append(_entry("article", f"{document.id}-paper", fields))
    fields = {
        "title": f"{{{document.title}}}",
        "howpublished": f"circuit file, {document.kind} {document.id}",
        "note": f"circuit sha256 {document.integrity.circuit_sha256}, status {document.status}",
    }
    software = {
        "title": "{mechinterp: find the circuit of a task in a transformer, write it to a file, and check it again}",
        "author": "{mechinterp contributors}",
        "version": made or metadata.version(DISTRIBUTION),
        "howpublished": f"Python package {DISTRIBUTION}",
    }
    return "\n\n".join([*entries, _entry("misc", document.id, fields), _entry("misc", DISTRIBUTION, software)])


def _entry(kind: str, key: str, fields: Mapping[str, str | None]) -> str:
    lines = [f"  {name} = {{{_tex(value)}}}," for name, value in fields.items() if value]
    safe = "".join(letter if letter.isalnum() or letter in "-_.:" else "-" for letter in key)
    return "\n".join([f"@{kind}{{{safe},", *lines, "}"])


def _tex(text: str) -> str:
    """Text of a stranger as it may stand between the braces of a BibTeX field."""
    outer = text.startswith("{") and text.endswith("}")
    plain = text[1:-1] if outer else text
    if any(not letter.isprintable() for letter in plain):
        raise InputError("The file's citation holds letters that cannot be printed.")
    escaped = plain.replace("\\", "/").replace("{", "(").replace("}", ")")
    for sign in "&%$#_":
        escaped = escaped.replace(sign, f"\\{sign}")
    return f"{{{escaped}}}" if outer else escaped
