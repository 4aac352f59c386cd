"""`discover-circuit verify`: which claims of a circuit file hold, how much was checked, and what could mislead."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechinterp.circuit_file.direction_schema import is_direction_name
from mechinterp.cli import direct as cli_direct
from mechinterp.cli import options
from mechinterp.cli.as_json import AsJson, print_json, verification_content
from mechinterp.cli.help import VERIFY_HELP
from mechinterp.cli.options import find_file
from mechinterp.cli.terminal import Detail, Terminal, hint, quiet_libraries, say

if TYPE_CHECKING:
    from mechinterp.circuit_file.verify.claims import UnverifiedModel, Verification

commands = typer.Typer()
Action = Callable[[], int]


@commands.command("verify", help=VERIFY_HELP, short_help="Check every claim of a circuit file again.")
@options.takes(
    "file", "model", "dictionaries", "tolerance", "rescore", "strict", "as_json", "device", "batch_size", "detail"
)
def _verify(
    file: options.File,
    model: options.OtherModel = None,
    dictionaries: options.Dictionaries = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, max=1, help="Relative tolerance.  [default: the file's own]")
    ] = None,
    rescore: Annotated[bool, typer.Option("--rescore", help="Also score all edges again.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Also fail on any warning (exit code 1).")] = False,
    as_json: AsJson = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs per forward.")] = 32,
    detail: Detail = Detail.NORMAL,
    **values: Any,
) -> Action:
    own = dict(model=model, features=dictionaries or (), tolerance=tolerance, rescore=rescore, batch_size=batch_size)
    return partial(_do_verify, file, strict, as_json, own | values, detail=detail)


def _do_verify(file: str, strict: bool, as_json: bool, values: dict[str, Any], detail: Detail = Detail.NORMAL) -> int:
    from mechinterp.cli.progress_bars import stages

    path, console = find_file(file), Terminal(detail)
    absent: UnverifiedModel | None = None
    if is_direction_name(path):
        with stages(detail) as progress:
            quiet_libraries()
            found = cli_direct.verify_direction_file(path, values | {"progress": progress})
        return _judged(console, path, found, strict, as_json)
    with stages(detail) as progress:
        from mechinterp.circuit_file.verify.claims import UnverifiedModel
        from mechinterp.circuit_file.verify.cost_estimate import plan_of_file
        from mechinterp.pipeline import verify

        quiet_libraries()
        if (plan := plan_of_file(path, values["rescore"])) and not as_json:
            hint(console, plan)
        try:
            result = verify(path, progress=progress, **values)
        except UnverifiedModel as error:
            result, absent = error.verification, error
    code = _judged(console, path, result, strict, as_json, absent is not None)
    if absent is not None and code == 0:
        raise absent
    return code


def _judged(
    console: Terminal, path: Path, result: Verification, strict: bool, as_json: bool, absent: bool = False
) -> int:
    """Print the result; 1 if a claim failed (or, when strict, for a warning)."""
    passed = result.ok and not (strict and result.warnings)
    if as_json:
        print_json("verification", verification_content(result, path, passed, not absent))
        return int(not passed)
    _print_found(console, result)
    n, some = len(result.claims), f"{len(result.warnings)} warning{'' if len(result.warnings) == 1 else 's'}"
    if not result.ok:
        say(console, f"NOT verified: {len(result.failed)} of {n} claims of {path} failed, {some}")
    elif not passed:
        say(console, f"NOT verified: {some} about {path} (--strict); the {n} claims that were checked hold")
    elif not absent:
        say(console, f"verified: all {n} claims of {path} hold, {some}")
    return int(not passed)


def _print_found(console: Terminal, result: Verification) -> None:
    from mechinterp.views.terminal_tables import extent_table, failed_table, warnings_table

    for note in result.notes:
        hint(console, f"note: {note}")
    console.more(extent_table(result))
    for some, table in ((result.warnings, warnings_table), (result.failed, failed_table)):
        if some:
            console.table(table(result))
            console.print()
