"""One generic registry: names to values, with did-you-mean on a miss."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Generic, TypeVar

from mechinterp.base.errors import InputError, clip

T = TypeVar("T")
MOST_LETTERS, MOST_SHOWN, MOST_COMPARED = 60, 30, 2000
"""Letters of a name in a message; names that are listed; names that the nearest one is looked for among."""


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """The error for a name that is not known, with the nearest known one and the whole list.

    >>> print(unknown("task", "ioy", ["ioi", "induction"]))
    Unknown task 'ioy'. Did you mean 'ioi'? Known: induction, ioi.
    """
    names = sorted(known)
    near = difflib.get_close_matches(clip(str(name), MOST_LETTERS), names[:MOST_COMPARED], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(clip(one, MOST_LETTERS) for one in names[:MOST_SHOWN]) or "none"
    more = f", ... ({len(names)} in all)" if len(names) > MOST_SHOWN else ""
    return InputError(
        f"Unknown {clip(kind, MOST_LETTERS)} {clip(str(name), MOST_LETTERS)!r}.{hint} Known: {shown}{more}."
    )


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
