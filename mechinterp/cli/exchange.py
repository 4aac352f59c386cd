"""The commands that read and write files without running a model: export, import, validate, cite, diff."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mechinterp.base.errors import FormatError, InputError, clip
from mechinterp.base.plain_files import exists, is_folder
from mechinterp.circuit_file.formats.names import EXPORTS, IMPORTS
from mechinterp.circuit_file.store import sidecar_name
from mechinterp.cli import options
from mechinterp.cli.as_json import AsJson, difference_content, print_json
from mechinterp.cli.completion import completed, stored_names
from mechinterp.cli.help import (
    CITE_HELP,
    DIFF_HELP,
    EXPORT_HELP,
    IMPORT_HELP,
    VALIDATE_HELP,
)
from mechinterp.cli.options import find_file
from mechinterp.cli.overwriting import check_new
from mechinterp.cli.terminal import Terminal, quiet_libraries, say

commands = typer.Typer()
Action = Callable[[], int]


@commands.command("export", help=EXPORT_HELP, short_help="Write a circuit in another tool's format.")
def _export(
    file: options.File,
    format: Annotated[str, typer.Option(help=f"{', '.join(EXPORTS)}.", autocompletion=completed(lambda: EXPORTS))],
    out: Annotated[Path | None, typer.Option(help="The file, or folder, to write.  [default: the file's name]")] = None,
    force: options.Force = False,
) -> Action:
    options.check_name(EXPORTS.kind, format, EXPORTS)
    return partial(_do_export, file, format, out, force)


@commands.command("import", help=IMPORT_HELP, short_help="Make a circuit file from another tool's file.")
@options.takes("path", "format", "out", "model", "force")
def _import(
    path: Annotated[str, typer.Argument(help="The other tool's file, or folder.")],
    format: Annotated[str, typer.Option(help=f"{', '.join(IMPORTS)}.", autocompletion=completed(lambda: IMPORTS))],
    out: Annotated[Path, typer.Option(help="The circuit file to write: NAME.circuit.json.")],
    force: options.Force = False,
    **values: Any,
) -> Action:
    options.check_name(IMPORTS.kind, format, IMPORTS)
    return partial(_do_import, path, format, values["model"], out, force)


@commands.command(
    "validate", help=VALIDATE_HELP, short_help="Check form and hashes of a circuit file; no model is needed."
)
def _validate(file: options.File) -> Action:
    return partial(_do_validate, file)


@commands.command("cite", help=CITE_HELP, short_help="Print BibTeX for a circuit file.")
def _cite(
    file: options.File,
    author: Annotated[str, typer.Option(help="Who made the file: 'A and B'.")] = "",
    year: Annotated[int | None, typer.Option(min=1900, max=9999, help="When.  [default: as the file states]")] = None,
    url: Annotated[str, typer.Option(help="Where it can be downloaded.")] = "",
) -> Action:
    return partial(_do_cite, file, dict(author=author, year="" if year is None else str(year), url=url))


@commands.command("diff", help=DIFF_HELP, short_help="Compare two circuit files.")
def _diff(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", autocompletion=stored_names, help="A circuit file, or the name of a stored circuit."
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", autocompletion=stored_names, help="Another circuit file or name.")],
    top: Annotated[int, typer.Option(min=1, help="Rows of each table of edges and nodes.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Draw the difference as a page (.html) or picture (.svg).")] = None,
    as_json: AsJson = False,
    force: options.Force = False,
) -> Action:
    return partial(_do_diff, a, b, top, out, as_json, force)


def _do_export(file: str, format: str, out: Path | None, force: bool) -> int:
    path = find_file(file)
    if out is not None:
        check_new(out, force)
    from mechinterp.exchange import export_file, exported_path

    check_new(out or exported_path(path, format), force)
    paths, lost = export_file(path, format, out)
    for path in paths:
        say(Terminal(), f"wrote {path}")
    say(Terminal(), lost)
    return 0


def _do_import(path: str, format: str, model: str, out: Path, force: bool) -> int:
    sidecar_name(out)
    if not exists(path):
        raise InputError(f"{clip(path, 200)} does not exist.")
    check_new(out, force)
    from mechinterp.exchange import import_file

    quiet_libraries()
    document = import_file(path, format, model, out)
    say(Terminal(), f"wrote {out}: {len(document.edges)} of {document.graph.n_edges} edges, without scores")
    return 0


def _do_validate(file: str) -> int:
    from mechinterp.exchange import validate_file

    if is_folder(file):
        return _validate_submission(Path(file))
    for line in validate_file(path := find_file(file)):
        say(Terminal(), line)
    say(Terminal(), f"valid: {path}")
    return 0


def _validate_submission(folder: Path) -> int:
    from mechinterp.circuit_file.formats.mib import mib_problems

    problems = mib_problems(folder)
    for line in problems:
        say(Terminal(), line)
    if problems:
        raise FormatError(f"{folder} is not a submission that MIB accepts: {len(problems)} problems.")
    say(Terminal(), f"valid: {folder}, as a submission to MIB's circuit track")
    return 0


def _do_cite(file: str, given: dict[str, str]) -> int:
    path = find_file(file)
    from mechinterp.exchange import cite_file

    text, missing = cite_file(path, **given)
    for line in text.splitlines():
        say(Terminal(), line)
    if missing:
        flags = " ".join(f"--{name} ..." for name in missing)
        say(Console(stderr=True), f"warning: the entry of the file has no {', '.join(missing)}; add: {flags}")
    return 0


def _do_diff(a: str, b: str, top: int, out: Path | None, as_json: bool, force: bool) -> int:
    console, paths = Terminal(), (find_file(a), find_file(b))
    if out is not None:
        check_new(out, force)
    from mechinterp.exchange import diff_files
    from mechinterp.views.terminal_tables import difference_tables

    found = diff_files(*paths, out)
    if as_json:
        print_json("difference", difference_content(found))
        return int(found.differs)
    for letter, path, sha in zip("AB", paths, found.circuit_sha256, strict=True):
        say(console, f"{letter}: {path}, circuit sha256 {sha}")
    for note in found.notes:
        say(console, f"note: {note}")
    for heading, table in difference_tables(found, top):
        console.print()
        if heading:
            say(console, heading)
        console.table(table)
    console.print()
    if out is not None:
        say(console, f"wrote {out}")
    nodes_and_edges = "nodes and edges differ" if found.differs else "the same nodes and edges"
    say(console, "the same circuit" if found.same_circuit else f"{nodes_and_edges}; the circuit hashes differ")
    return int(found.differs)
