"""How a long computation reports its progress; the bars that show it are in `cli/progress_bars.py`."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Called with the amount done and the total, in units of the caller's choice."""

    def __call__(self, done: int, total: int, /) -> None: ...


@runtime_checkable
class StageProgress(Protocol):
    """The same for a computation of several stages, each with its name."""

    def __call__(self, stage: str, done: int, total: int, /) -> None: ...


def no_progress(done: int, total: int, /) -> None:
    """Reports nothing."""


def part_of(progress: Progress, first: int, last: int) -> Progress:
    """The progress of a part of a computation, which goes from `first` to `last` percent of the whole."""

    def report(done: int, total: int, /) -> None:
        progress(first + (last - first) * done // max(1, total), 100)

    return report


def no_stages(stage: str, done: int, total: int, /) -> None:
    """Reports nothing."""
