"""`--config FILE.yaml`: the options of a command in a file; and the file that repeats a run, which every run writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import typer

from mechinterp.base.errors import InputError
from mechinterp.base.plain_files import read_bounded
from mechinterp.base.registry import unknown
from mechinterp.run_spec import EFFORTS
from mechinterp.tasks.schema import MAX_BYTES, parse_yaml

NOT_IN_FILES = (
    *("config", "help", "context", "quiet", "verbose", "as_json", "open_report", "open_page"),
    *("force", "restart", "shard"),
)
"""Options that are about one call only."""
SIZES = frozenset({"edges", "nodes", "threshold"})
"""One of them on the command line takes the place of any of them in the file."""
OF_METHOD = frozenset({"settings", "steps"})
"""What a file says of its method only."""
UsageProblem: Any = typer.BadParameter.__mro__[2]


def read_config(path: Path, context: Any) -> tuple[dict[str, Any], list[str]]:
    """(the values in a file by the names of a command's parameters, all that is wrong with it, a line each).

    Keys are the options without their dashes, or the names of the parameters in Python. Lists may be lists, or a
    mapping of names to values.

    Raises FormatError for a file that is missing, too large or not a mapping in YAML.
    """
    given = parse_yaml(read_bounded(path, MAX_BYTES), str(path))
    known = {parameter.name: parameter for parameter in context.command.params if parameter.name not in NOT_IN_FILES}
    flags = {_key(flag): name for name, parameter in known.items() for flag in parameter.opts}
    named = {**flags, **{name: name for name in known}}
    values, problems = dict[str, Any](), list[str]()
    for key, value in given.items():
        name = named.get(_key(key))
        if name is None:
            problems.append(str(unknown("key", key, known)))
        elif name in values:
            problems.append(f"{key}: the option {name!r} is given twice")
        else:
            try:
                values[name] = _converted(known[name], value, context)
            except InputError as error:
                problems.append(f"{key}: {error}")
            except UsageProblem as error:
                problems.append(f"{key}: {error.message}")
    return values, problems


def _key(text: str) -> str:
    return text.lstrip("-").replace("-", "_")


def _converted(parameter: Any, value: Any, context: Any) -> Any:
    """The value as the command line would have it."""
    if parameter.multiple:
        value = _several(value)
    elif isinstance(value, list):
        value = ",".join(_several(cast(list[Any], value)))
    if not isinstance(value, str) and not (parameter.multiple and value):
        raise InputError("a single value is expected here.")
    if not value:
        raise InputError("the value is missing; leave the key out.")
    return parameter.process_value(context, value)


def _several(value: Any) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        pairs = cast(Mapping[str, Any], value).items()
        value = [f"{name}={entry}" if isinstance(entry, str) else entry for name, entry in pairs]
    entries = cast(list[Any], value) if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) and entry for entry in entries):
        raise InputError("a list of single values, or a mapping of names to them, is expected here.")
    return tuple(entries)


def overridden(given: Mapping[str, Any], file: Mapping[str, Any]) -> frozenset[str]:
    """The options of a file that those on the command line take the place of.

    The settings of a file are of its method: another method has its own.

    Args:
        given: The options on the command line.
        file: Those of the file.
    """
    names = frozenset(given)
    same = SIZES if names & SIZES else frozenset[str]()
    of_effort = {"method", "settings"} if "effort" in names and "method" not in names else ()
    of_method = OF_METHOD if "method" in names and given["method"] != _method_of(file) else ()
    return names.union(same, of_effort, of_method)


def _method_of(file: Mapping[str, Any]) -> str | None:
    """The method of a file: the one it names, or that of its effort."""
    method, _ = EFFORTS.get(file.get("effort", "standard"), (None, ()))
    return file.get("method", method)


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of these values: all that is set."""
    kept = {name: value for name, value in values.items() if name not in NOT_IN_FILES}
    plain_values = {name: _plain(value) for name, value in kept.items()}
    return {name: value for name, value in plain_values.items() if value is not None and value != []}


def _plain(value: Any) -> Any:
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    return [str(entry) for entry in cast(Sequence[Any], value)] if isinstance(value, (tuple, list)) else str(value)


def config_text(command: str, file: Path, values: Mapping[str, Any], words: str) -> str:
    """The text of the file that repeats a run: a comment with the command and the version, and all options.

    Args:
        command: `run` or `compare`.
        file: Where the text goes.
        values: The options by name.
        words: The command line that repeats the run.
    """
    import yaml

    from mechinterp.views.terminal_tables import plain

    head = (
        f"discover-circuit {command} --config {file}",
        f"mechinterp {metadata.version('mechinterp-circuits')}: {words}",
    )
    body = yaml.safe_dump(settings_of(values), sort_keys=False, allow_unicode=True, width=10**6)
    return "".join(f"# {plain(line)}\n" for line in head) + body
