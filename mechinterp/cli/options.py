"""The options of the commands, made from the fields of `RunSpec` and checked before torch is imported."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import MISSING
from functools import partial
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

import typer
from rich.console import Console
from typer.models import OptionInfo

from mechinterp.base.errors import InputError, clip, wrong_file
from mechinterp.base.plain_files import is_file, read_beginning
from mechinterp.base.registry import unknown
from mechinterp.circuit_file import named_files
from mechinterp.cli.completion import Completion, completed, stored_names, tasks
from mechinterp.cli.config import overridden, read_config, settings_of
from mechinterp.cli.terminal import Detail, say
from mechinterp.discovery.methods import METHODS
from mechinterp.run_spec import Declared, Option, declared
from mechinterp.tasks.metric_names import METRICS

SIZE = re.compile(r"[1-9][0-9]{0,8}|[0-9]{1,3}(\.[0-9]{1,9})? ?%")
COMPARED = {"edge": "eap,eap-ig,cd,cd-edges,random", "node": "eap,eap-ig,relp,cd-edges,random"}
REGISTERED = {"method": METHODS, "metric": METRICS}
FIELDS = declared()
File = Annotated[
    str, typer.Argument(help="A circuit file, or the name of a stored circuit.", autocompletion=stored_names)
]
Models = completed(lambda: ["bundled"])
OtherModel = Annotated[
    str | None, typer.Option(autocompletion=Models, help="Use this model.  [default: the one that the file names]")
]
Dictionaries = Annotated[
    list[str] | None,
    typer.Option(
        "--features", metavar="WHERE", help="A dictionary of feature nodes; repeatable.  [default: where the file says]"
    ),
]
OtherDirection = Annotated[
    str | None,
    typer.Option("--direction", metavar="FILE", help="The direction that is read.  [default: where the file says]"),
]
Action = Callable[[], int]
Force = Annotated[bool, typer.Option("--force", help="Replace files that another command has written.")]

MODEL, METHOD, CHOICE, EXAMPLES, OUTPUT = "Model", "Method", "What is chosen", "Examples", "Output"
"""The groups of options in `--help`."""
GROUPS = {
    MODEL: "model transcoders dictionaries revision dtype device device_map batch_size",
    METHOD: "method methods effort metric steps settings replacement site layers position classes control_position "
    "anyway targets max_features aggregate validated tests tolerance rescore strict",
    CHOICE: "level positions neurons features top edges nodes threshold rule by ratio sizes nodes_kept edges_kept",
    EXAMPLES: "file of_task n_prompts drawn texts examples validation_examples test_examples resamples seed bos "
    "shuffles",
    OUTPUT: "roles curve out config force restart shard open_report open_page as_json quiet verbose",
}
NAMED = (
    *("method", "effort", "metric", "level", "rule", "by", "replacement", "task", "format", "position", "classes"),
    "device_map",
)
"""Options whose value is a name."""
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}


def find_file(file: str) -> Path:
    """The path of a circuit or direction file, or of a stored one, that can be read; torch is not needed to say so.

    Raises InputError otherwise.
    """
    path = named_files.find_file(file)
    read_beginning(path, 1)
    return path


def takes(*names: str) -> Callable[[Callable[..., Action]], Callable[..., Action]]:
    """A decorator for a command with these options, shown in this order.

    A name is a parameter of the command itself, or a field of `RunSpec`. The command gets each by its name, with the
    type of the field, after `check`. `detail` stands for `--quiet` and `--verbose`; `config` for `--config`, a file of
    options, which those on the command line take the place of.
    """

    def decorate(command: Callable[..., Action]) -> Callable[..., Action]:
        own = inspect.signature(command, eval_str=True).parameters
        parameters = [one for name in names for one in _parameters(name, own)]
        required = [one for one in parameters if one.default is inspect.Parameter.empty] if "config" in names else []
        parameters = [one.replace(default=None) if one in required else one for one in parameters]
        paths = {one.name for one in parameters if Path in (hint := _hint(one), *get_args(hint))}

        def checked(given: Mapping[str, Any]) -> dict[str, Any]:
            """The values of what can be given here, as far as the names of `RunSpec` go."""
            return {name: value for name, value in given.items() if not (name in own and name in REGISTERED)}

        def parsed(**given: Any) -> Action:
            if "detail" in names:
                given["detail"] = _detail(given.pop("quiet"), given.pop("verbose"))
            if "config" in names:
                file, context = given.pop("config"), given.pop("context")
                if file is not None:
                    given |= _from_file(file, context, given, paths, checked)
                for one in required:
                    if one.name != "context" and given[one.name] is None:
                        shown = FIELDS[one.name].option.metavar if one.name in FIELDS else one.name.upper()
                        raise InputError(f"Missing argument {shown}; give it, or --config FILE with it. See --help.")
            values = {
                name: _value(FIELDS[name], given) if name in FIELDS and name not in own else value
                for name, value in given.items()
            }
            for name in [name for name in values if name in FIELDS and name not in own and "shard" not in values]:
                if FIELDS[name].option.word and values[name] == FIELDS[name].option.word:
                    raise InputError(f"{FIELDS[name].flag} {values[name]} goes with `run`; give a number.")
            check(checked(values))
            return _said(command(**values), values)

        shown = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        vars(parsed)["__signature__"] = inspect.Signature(shown)  # typer reads it, and then no annotations
        parsed.__annotations__ = {}
        parsed.__name__ = command.__name__
        return parsed

    return decorate


def check(values: Mapping[str, Any]) -> None:
    """Return None if the options make sense as far as is known without torch. Raises InputError otherwise."""
    for problem in problems(values):
        raise InputError(problem)


def problems(values: Mapping[str, Any]) -> Iterator[str]:
    """All that is wrong with the options as far as is known without torch."""
    given = [name for name in ("edges", "nodes", "threshold") if values.get(name) is not None]
    if len(given) > 1:
        yield f"Give --{given[0]} or --{given[1]}, not both."
    threshold, level = values.get("threshold"), values.get("level", "edge")
    if threshold is not None and not isfinite(threshold):
        yield "--threshold is not a finite number."
    for name, field in FIELDS.items():
        if field.option.kind and values.get(name) is not None and values[name] not in _known(field):
            yield str(unknown(field.option.kind, values[name], _known(field)))
    wrong, right = ("nodes", "edges") if level == "edge" else ("edges", "nodes")
    if values.get(wrong) is not None:
        yield f"--{wrong} does not go with --level {level}; give --{right}."
    for name in ("edges", "nodes"):
        size = values.get(name)
        if size is not None and not SIZE.fullmatch(size):
            yield f"--{name} is a whole number above 0, or a share such as 5%; got {size!r}."
    if values.get("refine_add") and values.get("refine") is None:
        yield "--refine-add goes with --refine: give both, such as --refine 0.001."
    if values.get("refine") is not None and not 0 < values["refine"] < float("inf"):
        yield "--refine is a KL divergence above 0, such as 0.001."
    if values.get("neurons") is not None and level != "neuron":
        yield "--neurons goes with --level neuron."
    if level == "feature" and not values.get("features"):
        yield "--level feature needs dictionaries: --features bundled:m1, or a folder, or a repository."
    if values.get("top") is not None and "features" in values and not values["features"]:
        yield "--top goes with --features."


def compared(level: str, positions: str | None) -> str:
    """The methods that `compare` compares by default."""
    return COMPARED["edge" if level == "edge" and positions is None else "node"]


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Return None if the name is known. Raises InputError, with the nearest known name, otherwise."""
    if name not in known:
        raise unknown(kind, name, known)


def check_task(task: str, *, train: int = 0, test: int = 0) -> None:
    """Return None if the task can be loaded and may have so many examples, before torch is imported.

    Raises InputError otherwise.
    """
    if Path(task).suffix.lower() in (".jsonl", ".csv"):
        if not is_file(task):
            raise InputError(f"File {clip(task, 200)!r} does not exist.")
        return
    from mechinterp.tasks.task import load_task

    loaded = load_task(task)
    loaded.check_number(train, "train")
    loaded.check_number(test, "test")


def _detail(quiet: bool, verbose: bool) -> Detail:
    if quiet and verbose:
        raise InputError("Give --quiet or --verbose, not both.")
    return Detail.QUIET if quiet else Detail.VERBOSE if verbose else Detail.NORMAL


def _from_file(
    file: Path, context: Any, given: Mapping[str, Any], paths: Iterable[str], checked: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """The values of the file that the command line does not give. Raises FormatError with all that is wrong with it."""
    found, wrong = read_config(file, context)
    found |= {name: Path(found[name]) for name in paths if name in found}
    sources = {name: context.get_parameter_source(name) for name in given}
    typed = {name: given[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    # What is wrong with the command line alone is not the file's mistake, and is said later.
    replaced = overridden(typed, found)
    kept = {name: value for name, value in found.items() if name not in replaced}
    own = set(problems(checked(given)))
    wrong += [problem for problem in problems(checked({**given, **kept})) if problem not in own]
    if isinstance(task := found.get("task"), str):
        try:
            check_task(task)
        except InputError as error:
            wrong.append(f"task: {error}")
    if wrong:
        raise wrong_file(str(file), wrong)
    return kept


def _said(action: Action, values: Mapping[str, Any]) -> Action:
    """The action; with --verbose it first prints the settings."""
    if values.get("detail") is not Detail.VERBOSE:
        return action

    def run() -> int:
        console = Console(stderr=True)
        for name, value in settings_of(values).items():
            if name != "detail":
                say(console, f"{name}: {', '.join(value) if isinstance(value, list) else value}")
        return action()

    return run


def _parameters(name: str, own: Mapping[str, inspect.Parameter]) -> list[inspect.Parameter]:
    """What typer reads for a name."""
    if name == "detail":
        return [
            _switch("quiet", "-q", "Print only the result and warnings."),
            _switch("verbose", "-v", "Also print the settings, and every stage with its time."),
        ]
    if name == "config":
        how = Annotated[
            Path | None,
            typer.Option(
                metavar="FILE.yaml",
                help="Take options from this file; others given here take their place.",
                rich_help_panel=OUTPUT,
            ),
        ]
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        return [inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=how), context]
    return [_grouped(own[name]) if name in own else _parameter(FIELDS[name])]


def _switch(name: str, letter: str, help: str) -> inspect.Parameter:
    how = Annotated[bool, typer.Option(f"--{name}", letter, help=help, rich_help_panel=OUTPUT)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=how)


def _grouped(parameter: inspect.Parameter) -> inspect.Parameter:
    """A command's own parameter, in its group of `--help`."""
    hint, *more = get_args(parameter.annotation)
    for one in more:
        if isinstance(one, OptionInfo):
            one = copy(one)
            one.rich_help_panel = GROUP_OF.get(parameter.name)
            one.metavar = one.metavar or _metavar(parameter.name, hint)
            return parameter.replace(annotation=Annotated[hint, one])
    return parameter


def _metavar(name: str, hint: Any) -> str | None:
    """What `--help` calls the value of an option: N and X are whole and other numbers; a switch has none."""
    kinds = {hint, *get_args(hint)}
    if bool in kinds:
        return None
    if name in ("out", "model", "features", "dictionaries"):
        return {"out": "PATH", "model": "MODEL"}.get(name, "WHERE")
    if float in kinds or int in kinds:
        return "X" if float in kinds else "N"
    return "NAME" if name in NAMED else "TEXT"


def _hint(parameter: inspect.Parameter) -> Any:
    found = get_args(parameter.annotation)
    return found[0] if found else parameter.annotation


def _parameter(field: Declared) -> inspect.Parameter:
    """The parameter of a command that typer reads: its type, default, flag, bounds and help."""
    option, hint, default = field.option, field.hint, field.default
    help = option.help.replace("{names}", ", ".join(_known(field)))
    if option.default_of:
        hint, default, help = hint | None, None, f"{help}  [default: as many as {FIELDS[option.default_of].flag}]"
    if isinstance(hint, UnionType) and str in get_args(hint):
        hint = str | None
    if get_origin(hint) is tuple:
        hint, default = list[str] | None, None
    common: dict[str, Any] = {"help": help, "metavar": option.metavar or _metavar(field.name, hint)}
    common["autocompletion"] = _completion(field)
    if default is MISSING:
        annotation = Annotated[hint, typer.Argument(**common)]
        return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
    switch = hint == bool | None or (hint is bool and default)
    flag = f"{field.flag}/--no-{field.name}" if switch else field.flag
    if hint is Path:
        common |= {"file_okay": False, "writable": True}
    common["rich_help_panel"] = GROUP_OF.get(field.name)
    if option.word:
        annotation = Annotated[Any, typer.Option(flag, parser=partial(_number_or_word, option), **common)]
    else:
        annotation = Annotated[hint, typer.Option(flag, min=option.least, max=option.most, **common)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _completion(field: Declared) -> Completion | None:
    """How the shell completes a field: a task, a model, or one of the known names."""
    own = {"task": tasks, "model": Models}
    return own.get(field.name) or (completed(lambda: _known(field)) if field.option.kind else None)


def _value(field: Declared, given: Mapping[str, Any]) -> Any:
    """What was given for a field, as `RunSpec` takes it."""
    value = given[field.name]
    if field.option.default_of and value is None:
        return given[field.option.default_of]
    return tuple(value or ()) if get_origin(field.hint) is tuple else value


def _number_or_word(option: Option, text: object) -> int | str:
    """What typer reads for an option that is a number or its word."""
    least, text = option.least or 0, str(text)
    if text == option.word:
        return text
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise typer.BadParameter(f"{text!r} is not a whole number from {least}, or {option.word!r}.")
    return int(text)


def _known(field: Declared) -> Iterable[str]:
    return field.option.names or REGISTERED.get(field.option.kind, ())
