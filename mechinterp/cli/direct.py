"""`discover-circuit direct`: find the direction of a task and write its file; `show` and `verify` of such files."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.circuit_file.direction_schema import direction_finding, open_direction_file
from mechinterp.circuit_file.limits import MAX_EXAMPLES
from mechinterp.cli import options
from mechinterp.cli.completion import completed
from mechinterp.cli.help import DIRECT_HELP
from mechinterp.cli.overwriting import check_replaced
from mechinterp.cli.terminal import Detail, Terminal, hint, quiet_libraries, say
from mechinterp.features.fit_settings import FIT_SETTINGS, fit_parameters

commands = typer.Typer()
Action = Callable[[], int]


@commands.command("direct", help=DIRECT_HELP, short_help="Find the direction of a task in the residual stream.")
@options.takes(
    *("task", "model", "revision", "method", "settings", "site", "layers", "position", "classes"),
    *("control_position", "examples", "validation_examples", "test_examples", "seed", "dtype", "device", "out"),
    *("config", "force", "detail"),
)
def _direct(
    method: Annotated[
        str,
        typer.Option(help=f"{', '.join(FIT_SETTINGS)}.", autocompletion=completed(lambda: FIT_SETTINGS)),
    ] = "mean-difference",
    site: Annotated[
        str, typer.Option(help="A kind of site, such as resid_pre, or one site: resid_pre.3.")
    ] = "resid_pre",
    layers: Annotated[str, typer.Option(help="For a kind: all, or numbers separated by commas.")] = "all",
    position: Annotated[
        str, typer.Option(help="A named position of the task, or a number (-1: the last token).")
    ] = "-1",
    classes: Annotated[
        str,
        typer.Option(help="clean: clean against corrupt prompts; answer: one right answer against the other; auto."),
    ] = "auto",
    control_position: Annotated[
        str | None, typer.Option(help="Whose tokens the control task labels.  [default: the position]")
    ] = None,
    examples: Annotated[int, typer.Option(min=2, max=MAX_EXAMPLES, help="Train pairs.")] = 100,
    validation_examples: Annotated[
        int, typer.Option(min=2, max=MAX_EXAMPLES, help="Pairs on which the site is chosen.")
    ] = 100,
    test_examples: Annotated[int, typer.Option(min=2, max=MAX_EXAMPLES, help="Held-out pairs.")] = 100,
    force: options.Force = False,
    detail: Detail = Detail.NORMAL,
    **values: Any,
) -> Action:
    options.check_name("method of finding a direction", method, FIT_SETTINGS)
    fit_parameters(method, values["settings"])
    options.check_name("kind of classes", classes, ("auto", "answer", "clean"))
    own: dict[str, Any] = dict(
        classes=classes, method=method, site=site, layers=layers, position=position, control_position=control_position
    )
    own |= dict(examples=examples, validation_examples=validation_examples, test_examples=test_examples)
    return partial(_do_direct, own | values, force, detail)


def _do_direct(values: dict[str, Any], force: bool, detail: Detail) -> int:
    from mechinterp.cli.progress_bars import stages

    n_train = values["examples"] + values["validation_examples"]
    options.check_task(values["task"], train=n_train, test=values["test_examples"])
    console = Terminal(detail)
    with stages(detail) as progress:
        from mechinterp.direct import DirectSpec, command_of, direction_path, discover_direction

        quiet_libraries()
        spec = DirectSpec(**values)
        replaced = check_replaced(direction_path(spec), command_of(spec), force)
        found = discover_direction(spec, progress)
    show_direction(found.path, console)
    if replaced:
        hint(console, "replaced the files that the same command had written")
    say(console, f"wrote {found.path}")
    hint(console, f"wrote {found.path.with_name(found.document.tensors)}")
    hint(console, f"next: discover-circuit verify {shlex.quote(str(found.path))}")
    return 0


def show_direction(path: Path, console: Terminal) -> None:
    """Print what a direction file states, after checking its hash."""
    from pandas import DataFrame

    from mechinterp.base.errors import FormatError
    from mechinterp.views.terminal_tables import frame_table

    opened = open_direction_file(path)
    document = opened.document
    if opened.file_sha256 != document.file_sha256:
        raise FormatError(f"{path} was changed after it was written. Take the original.")
    say(console, direction_finding(document))
    columns = ("accuracy", "shuffled", "control", "embeddings", "train", "auroc", "gap")
    rows = [
        {"site": row.site, "on": on, "n": row.n}
        | {name: "-" if (value := getattr(row, name)) is None else f"{value:.3f}" for name in columns}
        for on, row in (*(("valid.", row) for row in document.scan), ("test", document.test))
    ]
    console.more(frame_table(DataFrame(rows)))
    for site in document.without_direction:
        hint(console, f"{site}: the prompts have the same mean there, so there is no direction")
    hint(console, f"direction sha256 {document.direction_sha256}")


def verify_direction_file(path: Path, values: dict[str, Any]) -> Any:
    """The Verification of a direction file. Raises InputError for options that it does not have."""
    from mechinterp.base.errors import InputError
    from mechinterp.circuit_file.direction_claims import verify_direction

    if values["rescore"]:
        raise InputError("--rescore is for circuit files; a direction is always fitted again.")
    given = {name: values[name] for name in ("model", "tolerance", "device", "progress")}
    return verify_direction(path, **given)
