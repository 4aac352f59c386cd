"""`discover-circuit`: arguments in, tables out. What it does is in pipeline.py; torch is imported when that starts.

Parsing and doing are two steps: a command returns what is to be done, and `main` does it. So one place turns errors
into one line and an exit code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mechinterp.base.errors import HubNotReached, InputError, MechInterpError, ModelNotAvailable, clip
from mechinterp.base.plain_files import is_file
from mechinterp.circuit_file.stored import about_file, find_file, stored_files
from mechinterp.cli import exchange as cli_exchange
from mechinterp.cli import hub as cli_hub
from mechinterp.cli import options
from mechinterp.cli import verify as cli_verify
from mechinterp.cli import view as cli_view
from mechinterp.cli.help import (
    COMPARE_HELP,
    EVAL_HELP,
    EXIT_CODES,
    HELP,
    RUN_HELP,
)
from mechinterp.cli.terminal import Terminal, print_what_the_terminal_can, quiet_libraries, say
from mechinterp.discovery.methods import METHODS
from mechinterp.tasks.metric_names import METRICS

OK, CLAIM_FAILED, BAD_INPUT, NO_MODEL, UNEXPECTED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 3, 70, 130, 141
TRACEBACK = "--traceback"
MOST_LETTERS = 1000  # of a message; a file can hold longer words

app = typer.Typer(
    name="discover-circuit", help=HELP, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False
)
Action = Callable[[], int]
# Click's base of every usage error, by way of typer, which brings its own click from some version on.
UsageProblem: Any = typer.BadParameter.__mro__[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 a claim failed, 2 bad input, 3 no model here, 70 an unexpected error, 130 interrupted.

    With `--traceback` anywhere among the arguments, an unexpected error is raised instead.
    """
    print_what_the_terminal_can()
    given = list(sys.argv[1:] if arguments is None else arguments)
    raised = TRACEBACK in given
    given = [word for word in given if word != TRACEBACK] or ["--help"]
    try:
        action: Action | int | None = app(given, prog_name="discover-circuit", standalone_mode=False)
        code = action() if callable(action) else action or OK
        sys.stdout.flush()
        return code
    except (ModelNotAvailable, HubNotReached) as error:
        return _complain(str(error), NO_MODEL)
    except MechInterpError as error:
        return _complain(str(error), BAD_INPUT)
    except UsageProblem as error:
        return _complain(error.format_message(), BAD_INPUT)
    except KeyboardInterrupt:
        return _complain("interrupted; no file was left half-written.", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return PIPE_CLOSED
    except Exception as error:
        if raised:
            raise
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = "This is a mistake in mechinterp; --traceback shows where, for a report."
        if isinstance(error, MemoryError):
            hint = "There is not enough memory for this; --traceback shows where."
        return _complain(f"unexpected error, {clip(said, MOST_LETTERS - 200)}. {hint}", UNEXPECTED)


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"discover-circuit {metadata.version('mechinterp-circuits')}")
        raise typer.Exit()
    return wanted


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option(TRACEBACK, help="Show where an unexpected error (exit code 70) comes from.")
    ] = False,
) -> None: ...


@app.command("run", help=RUN_HELP, short_help="Discover the circuit of a task and report on it.")
def _run(
    task: options.Task,
    model: options.Model = "bundled",
    revision: options.Revision = None,
    method: options.Method = "eap-ig",
    metric: options.Metric = None,
    steps: options.Steps = None,
    setting: options.Settings = None,
    level: options.Level = "edge",
    positions: options.Positions = None,
    neurons: options.Neurons = None,
    edges: options.Edges = None,
    nodes: options.Nodes = None,
    threshold: options.Threshold = None,
    by: options.By = "magnitude",
    rule: options.Rule = "top",
    ratio: options.Ratio = None,
    replacement: options.Replacement = "corrupt",
    examples: options.Examples = 200,
    test_examples: options.TestExamples = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = None,
    device: options.Device = None,
    batch_size: options.BatchSize = 32,
    out: options.Out = Path("out"),
    roles: options.Roles = True,
    restart: options.Restart = False,
    open_report: Annotated[bool, typer.Option("--open/--no-open", help="Open the report in a browser.")] = False,
) -> Action:
    asked = {name: value for name, value in locals().items() if name not in ("setting", "open_report")}
    options.check(asked)
    asked |= dict(settings=tuple(setting or ()), test_examples=test_examples or examples)
    return partial(_do_run, asked, open_report)


@app.command("compare", help=COMPARE_HELP, short_help="Compare methods on one task.")
def _compare(
    task: options.Task,
    methods: Annotated[
        str | None, typer.Option(help=f"With commas between.  [default: {options.COMPARED['edge']}]")
    ] = None,
    model: options.Model = "bundled",
    revision: options.Revision = None,
    metric: options.Metric = None,
    setting: options.MethodSettings = None,
    level: options.Level = "edge",
    positions: options.Positions = None,
    neurons: options.Neurons = None,
    replacement: options.Replacement = "corrupt",
    sizes: Annotated[str, typer.Option(help="'mib', or shares of edges with commas between, ending in 1.")] = "mib",
    examples: Annotated[int, typer.Option(min=2, help="Pairs to score with, and as many held-out ones.")] = 100,
    seed: options.Seed = 0,
    dtype: options.Dtype = None,
    device: options.Device = None,
    batch_size: options.BatchSize = 32,
    out: options.Out = Path("out"),
) -> Action:
    names = [name.strip() for name in (methods or options.compared(level, positions)).split(",") if name.strip()]
    for name in names:
        options.check_name("method", name, METHODS)
    asked = {
        name: value for name, value in locals().items() if name not in ("methods", "names", "name", "sizes", "setting")
    }
    options.check(asked)
    asked |= dict(settings=tuple(setting or ()), test_examples=examples)
    return partial(_do_compare, asked, names, sizes)


@app.command("eval", help=EVAL_HELP, short_help="Evaluate a circuit file on a task.")
def _eval(
    file: options.File,
    task: Annotated[
        str | None, typer.Option(help="Another task, or a file of pairs.  [default: the file's own]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Use this model.  [default: the one that the file names]")] = None,
    metric: options.Metric = None,
    replacement: Annotated[
        str | None, typer.Option(help="What a cut edge carries.  [default: as in the file's own evaluation]")
    ] = None,
    tests: Annotated[bool, typer.Option("--tests", help="Completeness, minimality and hypothesis tests, too.")] = False,
    examples: Annotated[int, typer.Option(min=2, help="Held-out pairs.")] = 200,
    seed: options.Seed = 0,
    device: options.Device = None,
    batch_size: options.BatchSize = 32,
) -> Action:
    asked = dict(locals())
    options.check(asked)
    return partial(_do_eval, asked)


@app.command(
    "show", help=f"Show the heads and edges of a circuit file, with roles where they are known.\n\n{EXIT_CODES}"
)
def _show(
    file: options.File,
    top: Annotated[int, typer.Option(min=1, help="Rows of each table.")] = 20,
) -> Action:
    return partial(_do_show, file, top)


@app.command("list", help="List tasks, methods, metrics, models, stored circuits.")
def _list() -> Action:
    return _do_list


for others in (cli_verify, cli_exchange, cli_view, cli_hub):
    app.registered_commands += others.commands.registered_commands


def _do_run(asked: dict[str, Any], open_report: bool) -> int:
    from mechinterp.circuit_file.summary import verify_command
    from mechinterp.cli.progress_bars import stages

    _check_task(asked["task"])
    console = Terminal()
    with stages(Console(stderr=True)) as progress:
        from mechinterp.pipeline import RunSpec, discover
        from mechinterp.views.report.node_details import node_details
        from mechinterp.views.report.page import write_report

        quiet_libraries()
        found = discover(RunSpec(**asked), progress)
        progress("report", 0, 1)
        report = found.path.with_name(found.path.name.replace(".circuit.json", ".report.html"))
        details = node_details(found.model, found.circuit, found.test, found.document.evaluation[0].pairs)
        write_report(report, found.circuit, found.document, str(found.path), details)
    _print_result(console, found.document)
    if found.roles is not None:
        _print_roles(console, found.roles)
    for note in (*found.notes, *details.notes):
        say(console, f"note: {note}")
    sidecar = found.document.integrity.sidecar
    for path in [found.path, *([found.path.with_name(sidecar.file)] if sidecar else []), report]:
        say(console, f"wrote {path}")
    say(console, f"next: {verify_command(str(found.path))}")
    if open_report:
        cli_view.open_in_browser(report)
    return OK


def _do_compare(asked: dict[str, Any], methods: list[str], sizes: str) -> int:
    from mechinterp.cli.progress_bars import stages

    _check_task(asked["task"])
    console = Terminal()
    with stages(Console(stderr=True)) as progress:
        from mechinterp.compare import compare
        from mechinterp.pipeline import RunSpec
        from mechinterp.views.terminal_tables import frame_table

        quiet_libraries()
        found, page = compare(RunSpec(**asked), methods, sizes, progress)
    short = {"log area": "log", "forwards": "fwd", "backwards": "bwd", "seconds": "s"}
    console.print(frame_table(found.to_frame().rename(columns=short)))
    say(console, f"wrote {page}")
    return OK


def _do_eval(asked: dict[str, Any]) -> int:
    from mechinterp.cli.progress_bars import stages

    if asked["task"] is not None:
        _check_task(asked["task"])
    path, console = find_file(asked.pop("file")), Terminal()
    with stages(Console(stderr=True)) as progress:
        from mechinterp.circuit_file.reevaluate import reevaluate
        from mechinterp.views.terminal_tables import frame_table

        quiet_libraries()
        found = reevaluate(path, progress=progress, **asked)
    say(console, f"{path}: {found.circuit.n_edges} edges on {found.on}")
    for note in found.notes:
        say(console, f"note: {note}")
    for frame in (found.to_frame(), found.tests, found.nodes):
        if frame is not None:
            console.print(frame_table(frame))
    return OK


def _do_show(file: str, top: int) -> int:
    from mechinterp.circuit_file.store import check_hashes, open_circuit_file
    from mechinterp.views.terminal_tables import edges_table, nodes_table, predictions_table

    opened = open_circuit_file(find_file(file))
    check_hashes(opened)
    console = Terminal()
    _print_result(console, opened.document)
    n_nodes, n_edges = len(opened.document.nodes), len(opened.document.edges)
    predictions = opened.document.predictions or ()
    for table in (nodes_table(opened.document, top), edges_table(opened.document, top)):
        console.print(table)
        console.print()
    if predictions:
        console.print(predictions_table(opened.document, top))
        console.print()
    if top < (most := max(n_nodes, n_edges, len(predictions))):
        counts = f"{n_nodes} nodes, {n_edges} edges and {len(predictions)} predictions"
        say(console, f"the first {top} of {counts}; --top {most} shows all")
    say(console, f"circuit sha256 {opened.document.integrity.circuit_sha256}")
    return OK


def _do_list() -> int:
    from mechinterp.tasks.task import load_task, task_names
    from mechinterp.views.terminal_tables import names_table

    console = Terminal()
    models = {
        "bundled": "a small GPT-2 that comes with the package; no network needed",
        "./directory": "a folder made by save_pretrained",
        "org/name@revision": "a model of the Hugging Face hub, such as gpt2",
    }
    for kind, about in (
        ("task", {name: load_task(name).title for name in task_names()}),
        ("method", METHODS.about()),
        ("metric", METRICS.about()),
        ("model", models),
        ("stored circuit", {str(name): about_file(path) for name, path in stored_files().items()}),
    ):
        console.print(names_table(kind, about))
        console.print()
    return OK


def _check_task(task: str) -> None:
    """Refuse a wrong task before torch is imported."""
    if Path(task).suffix.lower() in (".jsonl", ".csv"):
        if not is_file(task):
            raise InputError(f"There is no file {clip(task, 200)!r}.")
        return
    from mechinterp.tasks.task import load_task

    load_task(task)


def _print_result(console: Console, document: Any) -> None:
    from mechinterp.circuit_file.summary import finding
    from mechinterp.views.terminal_tables import result_table

    say(console, finding(document))
    console.print()
    console.print(result_table(document))
    console.print()


def _print_roles(console: Console, found: Any) -> None:
    from mechinterp.views.terminal_tables import names_table

    if found.roles:
        console.print(names_table("role", {role["label"]: ", ".join(role["nodes"]) for role in found.roles.values()}))
    say(console, f"{len(found.predictions)} predictions hold on held-out pairs")
    for entry in found.failed:
        say(console, f"left out, for it does not hold there: {entry.prediction!r} (got {entry.value:.4g})")
    for note in found.notes:
        say(console, f"note: {note}")
    console.print()


def _complain(message: str, code: int) -> int:
    from mechinterp.views.terminal_tables import plain

    print(f"discover-circuit: {clip(plain(message), MOST_LETTERS)}", file=sys.stderr)
    return code
