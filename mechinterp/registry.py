"""One generic registry: names to values, with did-you-mean on a miss."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Generic, TypeVar

from mechinterp.errors import InputError

T = TypeVar("T")


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not known, with the nearest known one and the whole list.

    >>> print(unknown("task", "ioy", ["ioi", "induction"]))
    Unknown task 'ioy'. Did you mean 'ioi'? Known: induction, ioi.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InputError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")


class Registry(Generic[T]):
    """Named values of one kind; a duplicate name is an error."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._values: dict[str, T] = {}

    def register(self, name: str, value: T) -> T:
        """Return `value` after storing it under `name`. Raises InputError when the name is taken."""
        if name in self._values:
            raise InputError(f"A {self.kind} named {name!r} is registered already; choose another name.")
        self._values[name] = value
        return value

    def get(self, name: str) -> T:
        """The value stored under `name`. Raises InputError, with the nearest name, when there is none."""
        if name not in self._values:
            raise unknown(self.kind, name, self._values)
        return self._values[name]

    def names(self) -> tuple[str, ...]:
        """The registered names, sorted."""
        return tuple(sorted(self._values))
