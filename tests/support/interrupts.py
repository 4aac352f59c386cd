"""Ctrl-C at every line: runs a function again and again, each time with KeyboardInterrupt raised somewhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

Place = tuple[str, int, str]
TWICE = ("models/exclusive_runs.py", "models/modes.py")


class _Trace:
    """Notes every line and call in files with one of the beginnings; raises at the one with a number."""

    def __init__(self, files: tuple[str, ...], raise_at: int | None = None) -> None:
        self.files, self.raise_at = files, raise_at
        self.places: list[Place] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        if event in ("call", "line"):
            self.places.append((frame.f_code.co_filename, frame.f_lineno, event))
            if len(self.places) - 1 == self.raise_at:
                raise KeyboardInterrupt
        return self


def traced(function: Callable[[], Any], files: tuple[str, ...], raise_at: int | None = None) -> list[Place]:
    """The lines and calls that the function passed in these files, up to the interrupt where there was one."""
    trace, before = _Trace(files, raise_at), sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return trace.places


def interrupted(
    function: Callable[[], Any], files: tuple[str, ...], every: int = 1, done: set[Place] | None = None
) -> Iterator[Place]:
    """Runs the function with an interrupt at each line and call of the files, the first time that it comes there.

    In the files where a run's changes are made and taken back, at the last time too. `every`: at each so
    manieth of them only. Places in `done` are left out, and all others are added to it. Yields where, after each.
    """
    function()  # so that what is computed once only is there
    passed, done = traced(function, files), set[Place]() if done is None else done
    first = {place: i for i, place in reversed(list(enumerate(passed))) if place not in done}
    last = {place: i for i, place in enumerate(passed) if place not in done and place[0].endswith(TWICE)}
    done.update(first)
    for i in sorted({*first.values(), *last.values()})[::every]:
        traced(function, files, i)
        yield passed[i]
