"""The options of the commands, made from the fields of `RunSpec` and checked before torch is imported."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

import typer

from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.discovery.methods import METHODS
from mechinterp.run_spec import Declared, declared
from mechinterp.tasks.metric_names import METRICS

SIZE = re.compile(r"[1-9][0-9]{0,8}|[0-9]{1,3}(\.[0-9]{1,9})? ?%")
COMPARED = {"edge": "eap,eap-ig,cd,cd-edges,random", "node": "eap,eap-ig,relp,cd-edges,random"}
REGISTERED = {"method": METHODS, "metric": METRICS}
FIELDS = declared()
File = Annotated[str, typer.Argument(help="A circuit file, or the name of a stored circuit.")]
OtherModel = Annotated[str | None, typer.Option(help="Use this model.  [default: the one that the file names]")]
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


def takes(*names: str) -> Callable[[Callable[..., Action]], Callable[..., Action]]:
    """A decorator for a command with these options, shown in this order.

    A name is a parameter of the command itself, or a field of `RunSpec`. The command gets each by its name, with the
    type of the field, after `check`.
    """

    def decorate(command: Callable[..., Action]) -> Callable[..., Action]:
        own = inspect.signature(command, eval_str=True).parameters
        parameters = [own[name] if name in own else _parameter(FIELDS[name]) for name in names]

        def parsed(**given: Any) -> Action:
            values = {name: value if name in own else _value(FIELDS[name], given) for name, value in given.items()}
            check({name: value for name, value in values.items() if not (name in own and name in REGISTERED)})
            return command(**values)

        shown = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        vars(parsed)["__signature__"] = inspect.Signature(shown)  # typer reads it, and then no annotations
        parsed.__annotations__ = {}
        parsed.__name__ = command.__name__
        return parsed

    return decorate


def check(values: Mapping[str, Any]) -> None:
    """Return None if the options make sense as far as is known without torch. Raises InputError otherwise."""
    given = [name for name in ("edges", "nodes", "threshold") if values.get(name) is not None]
    if len(given) > 1:
        raise InputError(f"Give --{given[0]} or --{given[1]}, not both.")
    threshold, level = values.get("threshold"), values.get("level", "edge")
    if threshold is not None and threshold != threshold:
        raise InputError("--threshold is not a number.")
    for name, field in FIELDS.items():
        if field.option.kind and values.get(name) is not None:
            check_name(field.option.kind, values[name], _known(field))
    wrong, right = ("nodes", "edges") if level == "edge" else ("edges", "nodes")
    if values.get(wrong) is not None:
        raise InputError(f"--{wrong} does not go with --level {level}; give --{right}.")
    for name in ("edges", "nodes"):
        size = values.get(name)
        if size is not None and not SIZE.fullmatch(size):
            raise InputError(f"--{name} is a whole number above 0, or a share such as 5%; got {size!r}.")
    if values.get("neurons") is not None and level != "neuron":
        raise InputError("--neurons goes with --level neuron.")
    if level == "feature" and not values.get("features"):
        raise InputError("--level feature needs dictionaries: --features bundled:m1, or a folder, or a repository.")
    if values.get("top") is not None and "features" in values and not values["features"]:
        raise InputError("--top goes with --features.")


def compared(level: str, positions: str | None) -> str:
    """The methods that `compare` compares by default."""
    return COMPARED["edge" if level == "edge" and positions is None else "node"]


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Return None if the name is known. Raises InputError, with the nearest known name, otherwise."""
    if name not in known:
        raise unknown(kind, name, known)


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
    common: dict[str, Any] = {"help": help, "metavar": option.metavar}
    if default is MISSING:
        annotation = Annotated[hint, typer.Argument(**common)]
        return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
    switch = hint == bool | None or (hint is bool and default)
    flag = f"{field.flag}/--no-{field.name}" if switch else field.flag
    if hint is Path:
        common |= {"file_okay": False, "writable": True}
    annotation = Annotated[hint, typer.Option(flag, min=option.least, max=option.most, **common)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _value(field: Declared, given: Mapping[str, Any]) -> Any:
    """What was given for a field, as `RunSpec` takes it."""
    value = given[field.name]
    if field.option.default_of and value is None:
        return given[field.option.default_of]
    return tuple(value or ()) if get_origin(field.hint) is tuple else value


def _known(field: Declared) -> Iterable[str]:
    return field.option.names or REGISTERED.get(field.option.kind, ())
