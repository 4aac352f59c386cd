"""`discover-circuit view`: the page of a circuit file, in the browser."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.base.errors import InputError
from mechinterp.circuit_file.direction_schema import is_direction_name
from mechinterp.circuit_file.store import open_circuit_file
from mechinterp.cli import options
from mechinterp.cli.help import VIEW_HELP
from mechinterp.cli.options import find_file
from mechinterp.cli.overwriting import check_text
from mechinterp.cli.terminal import Detail, Terminal, quiet_libraries, say

commands = typer.Typer()
Action = Callable[[], int]


@commands.command("view", help=VIEW_HELP, short_help="Write and open the page of a circuit file.")
@options.takes("file", "out", "model", "device", "force", "open_page", "detail")
def _view(
    file: options.File,
    out: Annotated[
        Path | None,
        typer.Option(help="The page to write.  [default: NAME.report.html beside the file; here for a stored circuit]"),
    ] = None,
    model: options.OtherModel = None,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
    force: options.Force = False,
    detail: Detail = Detail.NORMAL,
    **values: Any,
) -> Action:
    return partial(_do_view, file, out, model, values["device"], open_page, force, detail)


def _do_view(
    file: str, out: Path | None, model: str | None, device: str | None, open_page: bool, force: bool, detail: Detail
) -> int:
    from mechinterp.cli.progress_bars import stages

    path, console = find_file(file), Terminal(detail)
    if is_direction_name(path):
        raise InputError(f"{path} is a direction; `show` prints it; only circuits have a page.")
    if out is not None:  # the page beside the file is made from it
        check_text(out, open_circuit_file(path).document.integrity.circuit_sha256, force)
    with stages(detail) as progress:
        from mechinterp.views.report.write_page import write_page

        quiet_libraries()
        page = write_page(file, out, model=model, device=device, progress=progress)
    for note in page.notes:
        say(console, f"note: {note}")
    say(console, f"wrote {page.path}")
    if open_page:
        open_in_browser(page.path)
    return 0


def open_in_browser(page: Path) -> None:
    """Ask the desktop to open a page. If it cannot, nothing is lost: the path of the page was printed."""
    with suppress(webbrowser.Error, OSError):
        webbrowser.open(page.resolve().as_uri())
