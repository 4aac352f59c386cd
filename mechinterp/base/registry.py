"""`Registry`: named methods, metrics and formats, each imported when it is first used."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, Generic, TypeVar

from mechinterp.base.errors import InputError, clip

T = TypeVar("T")
MOST_LETTERS, MOST_SHOWN, MOST_COMPARED = 60, 30, 2000
"""Letters of a name in a message; names that are listed; names among which the nearest one is searched."""


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """The error for an unknown name, with the nearest known one and the whole list.

    >>> print(unknown("task", "ioy", ["ioi", "induction"]))
    Unknown task 'ioy'. Did you mean 'ioi'? Known: induction, ioi.
    """
    return InputError(f"Unknown {clip(kind, MOST_LETTERS)} {clip(str(name), MOST_LETTERS)!r}.{suggestion(name, known)}")


def suggestion(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one and the list of them all."""
    names = sorted(known)
    near = difflib.get_close_matches(clip(str(name), MOST_LETTERS), names[:MOST_COMPARED], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(clip(one, MOST_LETTERS) for one in names[:MOST_SHOWN]) or "none"
    more = f", ... ({len(names)} in all)" if len(names) > MOST_SHOWN else ""
    return f"{hint} Known: {shown}{more}."


@dataclass(frozen=True)
class Entry:
    """Where a value is, as `module:attribute`, and one line about it."""

    where: str
    about: str


class Registry(Generic[T]):
    """Named values of one kind. Iterating gives the names in the order in which they were added.

    Args:
        kind: What the values are, for messages: "method".
        entries: Values of this package by name, imported when they are first used.
        plugins: The group of entry points (`[project.entry-points."GROUP"]` in another package's pyproject.toml)
            whose names are registered, too.
        type: The class of the values, as `module:attribute`; a plug-in's value is checked against it.
    """

    def __init__(
        self, kind: str, entries: Mapping[str, Entry] | None = None, *, plugins: str | None = None, type: str = ""
    ) -> None:
        self.kind = kind
        self._values: dict[str, T] = {}
        self._entries: dict[str, Entry] = dict(entries or {})
        self._about: dict[str, str] = {name: entry.about for name, entry in self._entries.items()}
        self._plugins = plugins
        self._plugin_of: dict[str, str] = {}
        self._clashes: dict[str, str] = {}
        self._type = type

    def register(self, name: str, value: T, about: str = "") -> T:
        """Return `value` after storing it under `name`. Raises InputError if the name is taken.

        Args:
            name: The new name.
            value: What `get` returns for it.
            about: One line that lists show.
        """
        if name in self:
            raise InputError(f"A {self.kind} named {name!r} is registered already; choose another name.")
        self._values[name], self._about[name] = value, about
        return value

    def get(self, name: str) -> T:
        """The value stored under `name`, imported if it has not been yet.

        Raises InputError, with the nearest name, for an unknown one; also for a plug-in that cannot be imported or
        takes a name of this package or of another plug-in.
        """
        if name not in self:
            raise unknown(self.kind, name, self)
        if name in self._clashes:
            raise InputError(self._clashes[name])
        if name not in self._values:
            entry = self._entries[name]
            self._values[name] = self._plugin(name, entry) if name in self._plugin_of else _attribute(entry.where)
        return self._values[name]

    def names(self) -> tuple[str, ...]:
        """The registered names, sorted."""
        return tuple(sorted(self.about()))

    def importable(self) -> dict[str, T]:
        """Every value by name, without the plug-ins that cannot be imported."""
        found: dict[str, T] = {}
        for name in self:
            with contextlib.suppress(InputError):
                found[name] = self.get(name)
        return found

    def about(self) -> Mapping[str, str]:
        """One line about each name; no value is imported for it."""
        self._find_plugins()
        return self._about

    def __contains__(self, name: object) -> bool:
        return name in self.about()

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self.about()))

    def __len__(self) -> int:
        return len(self.about())

    def _find_plugins(self) -> None:
        if self._plugins is None:
            return
        group, self._plugins = self._plugins, None
        for point in metadata.entry_points(group=group):
            package = point.dist.name if point.dist is not None else point.value
            if point.name in self._about:
                other = self._plugin_of.get(point.name, "mechinterp")
                self._clashes[point.name] = (
                    f"The packages {other} and {package} both have a {self.kind} named {point.name!r}; uninstall one "
                    "of them, or rename its entry point."
                )
                continue
            self._plugin_of[point.name] = package
            self._entries[point.name] = Entry(point.value, f"from the package {package}")
            self._about[point.name] = _one_line(point, package)

    def _plugin(self, name: str, entry: Entry) -> T:
        what = f"The {self.kind} {clip(name, MOST_LETTERS)!r} ({entry.about})"
        try:
            value = _attribute(entry.where)
        except (Exception, SystemExit) as error:  # other people's code may raise anything
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{what} cannot be imported: {clip(said, 300)}") from error
        if self._type and not isinstance(value, wanted := _attribute(self._type)):
            place = f"{clip(entry.where, 100)} is of type {type(value).__name__}"
            raise InputError(f"{what} is not usable: {place}, not {wanted.__name__}.")
        if getattr(value, "name", name) != name:
            raise InputError(f"{what} calls itself {clip(str(value.name), MOST_LETTERS)!r}; both must be the same.")
        return value


def _one_line(point: metadata.EntryPoint, package: str) -> str:
    metadata_of = point.dist.metadata if point.dist is not None else {}
    words = " ".join((metadata_of["Summary"] or "").split()) if "Summary" in metadata_of else ""
    return f"{clip(words, 100)} (package {package})" if words else f"from the package {package}"


def _attribute(where: str) -> Any:
    module, _, path = where.partition(":")
    value: Any = import_module(module)
    for name in path.split("."):
        value = getattr(value, name)
    return value
