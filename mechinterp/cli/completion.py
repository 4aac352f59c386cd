"""What the shell completes: stored circuits, tasks, methods, metrics and other names. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from mechinterp.circuit_file.direction_schema import SUFFIX
from mechinterp.circuit_file.named_files import stored_files

Completion = Callable[[str], Sequence[str]]


def completed(known: Callable[[], Iterable[str]]) -> Completion:
    """What typer takes: the names that begin with what is typed. Where none does, the shell completes files."""

    def names(incomplete: str) -> Sequence[str]:
        return sorted(name for name in known() if name.startswith(incomplete))

    return names


stored_names = completed(lambda: {*stored_files(), *stored_files(SUFFIX)})


def _task_names() -> Iterable[str]:
    from mechinterp.tasks.task import task_names

    return task_names()


tasks = completed(_task_names)


def listed(incomplete: str, known: Iterable[str]) -> Sequence[str]:
    """The lists of names, separated by commas, that continue what is typed.

    >>> listed("eap,ac", ["acdc", "eap"])
    ['eap,acdc']
    """
    before, comma, last = incomplete.rpartition(",")
    return sorted(before + comma + name for name in known if name.startswith(last))
