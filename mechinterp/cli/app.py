"""`discover-circuit`: arguments in, tables out. The work is done by pipeline.py; torch is imported when it starts.

Parsing and running are two steps: a command returns an action, and `main` runs it. So errors become one line and an
exit code in one place.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.base.errors import (
    HubNotReached,
    InputError,
    MechInterpError,
    ModelNotAvailable,
    NoSmallCircuit,
    Problems,
    ProcessLost,
    clip,
)
from mechinterp.circuit_file.direction_schema import SUFFIX, is_direction_name
from mechinterp.circuit_file.limits import MAX_EXAMPLES
from mechinterp.circuit_file.named_files import about_direction, about_file, stored_files
from mechinterp.cli import direct as cli_direct
from mechinterp.cli import exchange as cli_exchange
from mechinterp.cli import graph as cli_graph
from mechinterp.cli import hub as cli_hub
from mechinterp.cli import options, processes
from mechinterp.cli import verify as cli_verify
from mechinterp.cli import view as cli_view
from mechinterp.cli.as_json import AsJson, circuit_content, print_json, rows_of
from mechinterp.cli.completion import listed, tasks
from mechinterp.cli.config import UsageProblem
from mechinterp.cli.help import (
    COMPARE_COLUMNS,
    COMPARE_HELP,
    EVAL_HELP,
    EXIT_CODES,
    HELP,
    MERGE_HELP,
    RUN_HELP,
)
from mechinterp.cli.help_groups import Command, Commands
from mechinterp.cli.options import find_file
from mechinterp.cli.output_files import ComparisonFiles, RunFiles
from mechinterp.cli.terminal import Detail, Terminal, hint, print_what_the_terminal_can, quiet_libraries, say
from mechinterp.discovery.methods import METHODS
from mechinterp.run_spec import COMPARE, RunSpec, parsed_sizes, shown_order
from mechinterp.tasks.metric_names import METRICS

OK, CLAIM_FAILED, BAD_INPUT, NO_MODEL, NO_CIRCUIT, UNEXPECTED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 3, 4, 70, 130, 141
TRACEBACK = "--traceback"
MOST_LETTERS = 1000  # of a message; words in a file can be longer

app = typer.Typer(
    name="discover-circuit", cls=Commands, help=HELP, rich_markup_mode=None, pretty_exceptions_enable=False
)
Action = Callable[[], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 a claim failed, 2 bad input, 3 no model, 4 no small circuit, 70 an unexpected error, 130
    interrupted.

    With `--traceback` anywhere among the arguments, an unexpected error is raised instead.
    """
    print_what_the_terminal_can()
    words = list(sys.argv[1:] if arguments is None else arguments)
    raised = TRACEBACK in words
    words = [word for word in words if word != TRACEBACK] or ["--help"]
    try:
        if processes.nothing_to_share(words):
            return OK
        action: Action | int | None = app(words, prog_name="discover-circuit", standalone_mode=False)
        code = action() if callable(action) else action or OK
        sys.stdout.flush()
        return code
    except (ModelNotAvailable, HubNotReached) as error:
        return _complain(str(error), NO_MODEL)
    except NoSmallCircuit as error:
        return _complain(str(error), NO_CIRCUIT)
    except Problems as error:
        return _complain(error.first, BAD_INPUT, error.lines)
    except MechInterpError as error:
        return _complain(str(error), BAD_INPUT)
    except UsageProblem as error:
        return _complain(error.format_message(), BAD_INPUT)
    except KeyboardInterrupt:
        again = " The same command goes on from what was finished." if words[:1] == ["run"] else ""
        return _complain(f"interrupted; no file was left half-written.{again}", INTERRUPTED)
    except ProcessLost as error:
        return _complain(str(error), INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python prints an error at exit
        return PIPE_CLOSED
    except Exception as error:
        if raised:
            raise
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = "This is a bug in mechinterp; --traceback shows where, for a report."
        if isinstance(error, MemoryError):
            hint = "Not enough memory; --traceback shows where."
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
@options.takes(*shown_order(), "config", "dry_run", "force", "open_report", "as_json", "detail")
def _run(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what the run will take: runs of the model, memory, time.")
    ] = False,
    open_report: Annotated[bool, typer.Option("--open/--no-open", help="Open the report in a browser.")] = False,
    as_json: AsJson = False,
    force: options.Force = False,
    detail: Detail = Detail.NORMAL,
    **values: Any,
) -> Action:
    if dry_run:
        return partial(_do_dry_run, values, as_json, detail)
    return partial(_do_run, values, open_report, as_json, force=force, detail=detail)


@app.command("merge", help=MERGE_HELP, short_help="Finish a run whose edges were scored in shards.")
@options.takes("files", "device", "out", "force", "open_report", "detail")
def _merge(
    files: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="The files of all shards of one run.")],
    open_report: Annotated[bool, typer.Option("--open/--no-open", help="Open the report in a browser.")] = False,
    force: options.Force = False,
    detail: Detail = Detail.NORMAL,
    **values: Any,
) -> Action:
    return partial(_do_merge, files, values, open_report, force=force, detail=detail)


@app.command("compare", help=COMPARE_HELP, short_help="Compare methods on one task.")
@options.takes(*COMPARE, "config", "force", "as_json", "detail")
def _compare(
    examples: Annotated[
        int,
        typer.Option(min=2, max=MAX_EXAMPLES, help="Train pairs, to score edges with, and as many held-out pairs."),
    ] = 100,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.NAME=VALUE", help="A parameter of one of the methods; repeatable."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help=f"Separated by commas.  [default: {options.COMPARED['edge']}]",
            autocompletion=lambda incomplete: listed(incomplete, METHODS),
        ),
    ] = None,
    sizes: Annotated[str, typer.Option(help="'mib', or shares of edges separated by commas, ending in 1.")] = "mib",
    as_json: AsJson = False,
    force: options.Force = False,
    detail: Detail = Detail.NORMAL,
    **values: Any,
) -> Action:
    methods = options.compared(values["level"], values["positions"]) if methods is None else methods
    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in names:
        options.check_name("method", name, METHODS)
    if not names or len(set(names)) < len(names):
        raise InputError(f"--methods are names separated by commas, each only once; got {methods!r}.")
    if sizes != "mib":
        parsed_sizes(sizes)
    values |= dict(examples=examples, test_examples=examples, settings=tuple(settings or ()))
    return partial(_do_compare, values, names, sizes, as_json, force=force, detail=detail)


@app.command("eval", help=EVAL_HELP, short_help="Evaluate a circuit file on a task.")
@options.takes(
    "file",
    "task",
    "model",
    "dictionaries",
    "direction",
    "metric",
    "replacement",
    "tests",
    "examples",
    "seed",
    "device",
    "batch_size",
    "config",
    "detail",
)
def _eval(
    file: options.File,
    task: Annotated[
        str | None,
        typer.Option(autocompletion=tasks, help="Another task, or a file of pairs.  [default: the file's own]"),
    ] = None,
    model: options.OtherModel = None,
    dictionaries: options.Dictionaries = None,
    direction: options.OtherDirection = None,
    replacement: Annotated[
        str | None, typer.Option(help="What a cut edge carries.  [default: as in the file's own evaluation]")
    ] = None,
    tests: Annotated[bool, typer.Option("--tests", help="Also completeness, minimality and hypothesis tests.")] = False,
    examples: Annotated[int, typer.Option(min=2, max=MAX_EXAMPLES, help="Held-out pairs.")] = 200,
    detail: Detail = Detail.NORMAL,
    **values: Any,
) -> Action:
    own: dict[str, Any] = dict(task=task, model=model, replacement=replacement, tests=tests, examples=examples)
    own |= dict(features=dictionaries or (), direction=direction)
    return partial(_do_eval, file, own | values, detail=detail)


@app.command("show", help=f"Show the heads and edges of a circuit file, with roles if they are known.\n\n{EXIT_CODES}")
def _show(
    file: options.File,
    top: Annotated[int, typer.Option(min=1, help="Rows of each table.")] = 20,
    as_json: AsJson = False,
) -> Action:
    return partial(_do_show, file, top, as_json)


@app.command("list", help="List tasks, methods, metrics, models, stored circuits.")
def _list(as_json: AsJson = False) -> Action:
    return partial(_do_list, as_json)


for others in (cli_direct, cli_verify, cli_exchange, cli_view, cli_graph, cli_hub):
    app.registered_commands += others.commands.registered_commands
for registered in app.registered_commands:
    registered.cls = Command


def _do_run(
    values: dict[str, Any], open_report: bool, as_json: bool, force: bool = False, detail: Detail = Detail.NORMAL
) -> int:
    options.check_task(values["task"], train=values["examples"], test=values["test_examples"])
    if values["shard"] is not None:
        return processes.score_shard(RunSpec(**values), force, detail)
    files = RunFiles.of(RunSpec(**values), force)

    def run(progress: Any) -> Any:
        from mechinterp.pipeline import discover

        return discover(processes.spec_here(values), progress)

    return processes.together(partial(_report_on, run, files, open_report, as_json=as_json, detail=detail))


def _do_dry_run(values: dict[str, Any], as_json: bool, detail: Detail = Detail.NORMAL) -> int:
    from mechinterp.cli.progress_bars import stages

    options.check_task(values["task"], train=values["examples"], test=values["test_examples"])
    if values["shard"] is not None:
        raise InputError("--dry-run is of a whole run; leave --shard out.")
    with stages(detail) as progress:
        from mechinterp.run_costs import dry_run

        quiet_libraries()
        found = dry_run(RunSpec(**values), progress)
    if as_json:
        print_json("dry_run", found.content())
        return OK
    for line in found.lines():
        say(Terminal(), line)
    return OK


def _do_merge(
    paths: list[Path],
    values: dict[str, Any],
    open_report: bool,
    force: bool = False,
    detail: Detail = Detail.NORMAL,
) -> int:
    from mechinterp.shard_files import merge, read_shards

    shards = read_shards(paths)
    hint(Terminal(detail), f"{len(shards)} shards of: {clip(shards[0].command, MOST_LETTERS // 2)}")
    action: Any = app(processes.words_of_run(shards[0]), standalone_mode=False)
    spec = RunSpec(**{**action.args[0], **values})
    options.check_task(spec.task, train=spec.examples, test=spec.test_examples)
    files = RunFiles.of(spec, force)
    return _report_on(lambda progress: merge(spec, shards, progress), files, open_report, detail=detail)


def _report_on(
    run: Callable[[Any], Any],
    files: RunFiles,
    open_report: bool,
    first: bool = True,
    as_json: bool = False,
    detail: Detail = Detail.NORMAL,
) -> int:
    """Writes the report of the run and prints its result, in the first of several processes."""
    from mechinterp.circuit_file.summary import verify_command
    from mechinterp.cli.progress_bars import stages

    console = Terminal(detail)
    with stages(detail, first) as progress:
        from mechinterp.views.report.node_details import node_details
        from mechinterp.views.report.page import write_report

        quiet_libraries()
        discovery = run(progress)
        if not first:
            return OK
        progress("details", 0, 1)
        details = node_details(
            discovery.model,
            discovery.circuit,
            discovery.test,
            discovery.document.evaluation[0].pairs,
            progress=partial(progress, "details"),
        )
        progress("report", 0, 1)
        write_report(files.report, discovery.circuit, discovery.document, str(discovery.path), details)
        files.write_config()
    sidecar, notes = discovery.document.integrity.sidecar, (*discovery.notes, *details.notes)
    written = [discovery.path, *([discovery.path.with_name(sidecar.file)] if sidecar else [])]
    written += [files.report, files.config]
    if as_json:
        print_json(
            "run",
            {
                **circuit_content(discovery.document, discovery.path),
                "written": [str(path) for path in written],
                "notes": notes,
            },
        )
        return OK
    _print_result(console, discovery.document)
    if discovery.roles is not None:
        _print_roles(console, discovery.roles, discovery.document.roles)
    for note in notes:
        say(console, f"note: {note}")
    if files.replaced:
        hint(console, "replaced the files that the same command had written")
    for path in written:
        (say if path == discovery.path else hint)(console, f"wrote {path}")
    hint(console, f"next: {verify_command(str(discovery.path))}")
    if open_report:
        cli_view.open_in_browser(files.report)
    return OK


def _do_compare(
    values: dict[str, Any],
    methods: list[str],
    sizes: str,
    as_json: bool,
    force: bool = False,
    detail: Detail = Detail.NORMAL,
) -> int:
    from mechinterp.cli.progress_bars import stages

    options.check_task(values["task"], train=values["examples"], test=values["test_examples"])
    spec, console = RunSpec(**values), Terminal(detail)
    given = {name: value for name, value in values.items() if name != "test_examples"}
    files = ComparisonFiles.of(spec, methods, sizes, given, force)
    with stages(detail) as progress:
        from mechinterp.compare import compare
        from mechinterp.views.terminal_tables import frame_table

        quiet_libraries()
        comparison, page = compare(spec, methods, sizes, progress)
        files.write_config()
    if as_json:
        print_json("comparison", {"methods": rows_of(comparison.to_frame()), "page": str(page)})
        return OK
    short = {"log area": "log", "forwards": "fwd", "backwards": "bwd", "seconds": "s"}
    console.table(frame_table(comparison.to_frame().rename(columns=short)))
    for line in COMPARE_COLUMNS:
        hint(console, line)
    for path in (page, files.config):
        hint(console, f"wrote {path}")
    return OK


def _do_eval(file: str, values: dict[str, Any], detail: Detail = Detail.NORMAL) -> int:
    from mechinterp.cli.progress_bars import stages

    if values["task"] is not None:
        options.check_task(values["task"], test=values["examples"])
    path, console = find_file(file), Terminal(detail)
    with stages(detail) as progress:
        from mechinterp.circuit_file.reevaluate import reevaluate
        from mechinterp.views.terminal_tables import frame_table

        quiet_libraries()
        result = reevaluate(path, progress=progress, **values)
    say(console, f"{path}: {result.circuit.n_edges} edges on {result.on}")
    for note in result.notes:
        say(console, f"note: {note}")
    for frame in (result.to_frame(), result.tests, result.nodes):
        if frame is not None:
            console.table(frame_table(frame))
    return OK


def _do_show(file: str, top: int, as_json: bool) -> int:
    from mechinterp.circuit_file.store import check_hashes, open_circuit_file
    from mechinterp.views.terminal_tables import edges_table, nodes_table, predictions_table

    console, path = Terminal(), find_file(file)
    if is_direction_name(path):
        if as_json:
            raise InputError("A direction file is JSON already; --json is for circuit files.")
        cli_direct.show_direction(path, console)
        return OK
    opened = open_circuit_file(path)
    check_hashes(opened)
    if as_json:
        print_json("circuit", circuit_content(opened.document, path))
        return OK
    _print_result(console, opened.document)
    n_nodes, n_edges = len(opened.document.nodes), len(opened.document.edges)
    predictions = opened.document.predictions or ()
    _print_role_table(console, opened.document.roles)
    for table in (nodes_table(opened.document, top), edges_table(opened.document, top)):
        console.more(table)
    if predictions:
        console.more(predictions_table(opened.document, top))
    if top < (most := max(n_nodes, n_edges, len(predictions))):
        counts = f"{n_nodes} nodes, {n_edges} edges and {len(predictions)} predictions"
        say(console, f"the first {top} of {counts}; --top {most} shows all")
    say(console, f"circuit sha256 {opened.document.integrity.circuit_sha256}")
    return OK


def _do_list(as_json: bool) -> int:
    from mechinterp.tasks.task import load_task, task_names
    from mechinterp.views.terminal_tables import names_table

    console = Terminal()
    models = {
        "bundled": "a small GPT-2 that comes with the package; no network needed",
        "./directory": "a folder written by save_pretrained",
        "./model.gguf": "a GGUF file, such as a quantised model of llama.cpp",
        "org/name@revision": "a model of the Hugging Face hub, such as gpt2",
    }
    listed = (
        ("task", {name: load_task(name).title for name in task_names()}),
        ("method", METHODS.about()),
        ("metric", METRICS.about()),
        ("model", models),
        ("stored circuit", {str(name): about_file(path) for name, path in stored_files().items()}),
        ("stored direction", {name: about_direction(path) for name, path in stored_files(SUFFIX).items()}),
    )
    if as_json:
        print_json("list", {f"{kind}s".replace(" ", "_"): about for kind, about in listed})
        return OK
    for kind, about in listed:
        console.more(names_table(kind, about))
    return OK


def _print_result(console: Terminal, document: Any) -> None:
    from mechinterp.circuit_file.summary import finding, steadiness
    from mechinterp.circuit_file.verify.doubts import doubts
    from mechinterp.views.terminal_tables import result_table

    say(console, finding(document))
    for line in steadiness(document):
        hint(console, line)
    for doubt in doubts(document):
        say(console, f"doubt: {doubt.text}")
    hint(console, "")
    console.more(result_table(document))


def _print_roles(console: Terminal, measured: Any, roles: Mapping[str, Any]) -> None:
    _print_role_table(console, roles)
    hint(console, f"{len(measured.predictions)} predictions hold on held-out pairs")
    for entry in measured.failed:
        hint(console, f"left out, because it does not hold there: {entry.prediction!r} (got {entry.value:.4g})")
    for note in measured.notes:
        say(console, f"note: {note}")
    hint(console, "")


def _print_role_table(console: Terminal, roles: Mapping[str, Any]) -> None:
    """Every role with its nodes, in plain words."""
    from mechinterp.evaluation.role_names import plain_role
    from mechinterp.views.terminal_tables import names_table

    if roles:
        console.more(names_table("role", {plain_role(role.label): ", ".join(role.nodes) for role in roles.values()}))


def _complain(message: str, code: int, more: Sequence[str] = ()) -> int:
    """The exit code, after one line on standard error, and an indented one for each of several problems."""
    from mechinterp.views.terminal_tables import plain

    if not processes.first_to_say(message):
        return code
    print(f"discover-circuit: {clip(plain(message), MOST_LETTERS)}", file=sys.stderr)
    for line in more:
        print(f"  {clip(plain(line), MOST_LETTERS)}", file=sys.stderr)
    return code
