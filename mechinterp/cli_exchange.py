"""The commands that read and write files without running a model: export, import, validate, cite."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mechinterp import options
from mechinterp.listing import EXIT_CODES, EXPORT_FORMATS, EXPORT_HELP, IMPORT_FORMATS, IMPORT_HELP
from mechinterp.stored import find_file
from mechinterp.terminal import Terminal, quiet_libraries, say

commands = typer.Typer()
Action = Callable[[], int]


@commands.command("export", help=EXPORT_HELP, short_help="Write a circuit in another tool's format.")
def _export(
    file: options.File,
    format: Annotated[str, typer.Option(help=f"{', '.join(EXPORT_FORMATS)}.")],
    out: Annotated[Path | None, typer.Option(help="The file, or folder, to write.  [default: the file's name]")] = None,
) -> Action:
    options.check_name("format", format, EXPORT_FORMATS)
    return partial(_do_export, file, format, out)


@commands.command("import", help=IMPORT_HELP, short_help="Make a circuit file of another tool's file.")
def _import(
    path: Annotated[str, typer.Argument(help="The other tool's file, or folder.")],
    format: Annotated[str, typer.Option(help=f"{', '.join(IMPORT_FORMATS)}.")],
    out: Annotated[Path, typer.Option(help="The circuit file to write: NAME.circuit.json.")],
    model: options.Model = "bundled",
) -> Action:
    options.check_name("format", format, IMPORT_FORMATS)
    return partial(_do_import, path, format, model, out)


@commands.command("validate", help=f"Check form and hashes of a circuit file; no model is needed.\n\n{EXIT_CODES}")
def _validate(file: options.File) -> Action:
    return partial(_do_validate, file)


@commands.command("cite", help=f"Print BibTeX for a circuit file, with its content hash.\n\n{EXIT_CODES}")
def _cite(file: options.File) -> Action:
    return partial(_do_cite, file)


def _do_export(file: str, format: str, out: Path | None) -> int:
    from mechinterp.exchange import export_file

    paths, lost = export_file(find_file(file), format, out)
    for path in paths:
        say(Terminal(), f"wrote {path}")
    say(Terminal(), lost)
    return 0


def _do_import(path: str, format: str, model: str, out: Path) -> int:
    from mechinterp.exchange import import_file

    quiet_libraries()
    document = import_file(path, format, model, out)
    say(Terminal(), f"wrote {out}: {len(document.edges)} of {document.graph.n_edges} edges, without scores")
    return 0


def _do_validate(file: str) -> int:
    from mechinterp.exchange import validate_file

    for line in validate_file(path := find_file(file)):
        say(Terminal(), line)
    say(Terminal(), f"valid: {path}")
    return 0


def _do_cite(file: str) -> int:
    from mechinterp.exchange import cite_file

    for line in cite_file(find_file(file)).splitlines():
        say(Terminal(), line)
    return 0
