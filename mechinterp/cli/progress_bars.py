"""Progress: bars on a terminal, one per stage, with the time that is left; elsewhere, as in logs, lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mechinterp.cli.terminal import Detail
from mechinterp.views.terminal_tables import plain

STAGES = {
    "model": "load the model",
    "task": "check the task",
    "scores": "score the edges",
    "curve": "faithfulness by size",
    "curve, at most": "faithfulness by size, at most",
    "sizes near": "sizes near the one that passes",
    "refine": "refine by exact runs",
    "evaluation": "evaluate on held-out pairs",
    "roles": "measure roles",
    "predictions": "measure predictions",
    "saving": "write the files",
    "file": "read the file",
    "rescore": "score the edges again",
    "sizes": "count the active features",
    "edges": "trace the edges",
    "details": "measure what nodes do on a few prompts",
    "report": "draw the report",
}

EVERY_SECONDS = 30.0


@contextmanager
def stages(detail: Detail = Detail.NORMAL, first: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A callback (stage, done, total) that shows each stage as a bar if standard error is a terminal.

    The bars disappear at the end. Elsewhere a line is printed every half minute. The package's warnings are printed
    above the bars, one line each.

    Args:
        detail: If quiet, warnings only; if verbose, also each stage with its time, and what the package logs.
        first: Whether this is the process that prints.
    """
    console = Console(stderr=True, quiet=not first)
    quiet, verbose = detail is Detail.QUIET, detail is Detail.VERBOSE
    times = _StageTimes(console if verbose else None)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
    started: dict[str, TaskID] = {}

    lines = _LogLines(console)

    def show(stage: str, done: int, total: int) -> None:
        times.enter(STAGES.get(stage, stage))
        if quiet:
            return
        if not console.is_terminal:
            lines.show(STAGES.get(stage, stage), done, total)
            return
        if stage not in started:
            _finish(bars)
            started[stage] = bars.add_task(STAGES.get(stage, stage), total=None, count="")
        # A stage with one step has no progress to show: its bar pulses until it is done or the next stage begins.
        if done >= total:
            bars.update(started[stage], completed=total, total=total, count=f"{done:,}/{total:,}" if total > 1 else "")
        elif total > 1:
            bars.update(started[stage], completed=done, total=total, count=f"{done:,}/{total:,}")

    logger, handler = logging.getLogger("mechinterp"), _Lines(console, logging.INFO if verbose else logging.WARNING)
    logger.addHandler(handler)
    level = logger.level
    if verbose:
        logger.setLevel(logging.INFO)
    try:
        with bars:
            bars.add_task("import torch", total=None, count="")
            yield show
            times.end()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _StageTimes:
    """A line for each stage when it is over, and for all of them, if there is a console."""

    def __init__(self, console: Console | None, now: Callable[[], float] = time.monotonic) -> None:
        self.console, self.now = console, now
        self.stage, self.began = "import torch", now()
        self.start = self.began

    def enter(self, stage: str) -> None:
        """Say how long the last stage took, if this is another one."""
        if stage != self.stage:
            self._say(f"{self.stage}: {self.now() - self.began:.1f} s")
            self.stage, self.began = stage, self.now()

    def end(self) -> None:
        """Say how long the last stage took, and all of them."""
        self.enter("all stages")
        self._say(f"all stages: {self.now() - self.start:.1f} s")

    def _say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _LogLines:
    """A line about the present stage when `EVERY_SECONDS` have passed since the last one, with the time that is left.

    What is left is estimated from the stage's own speed.
    """

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self.console, self.now = console, now
        self.stage, self.began, self.first = "", now(), 0
        self.last = now()

    def show(self, stage: str, done: int, total: int) -> None:
        """Print a line if it is time for one."""
        if stage != self.stage:
            self.stage, self.began, self.first = stage, self.now(), done
        if self.now() - self.last < EVERY_SECONDS:
            return
        self.last = self.now()
        spent, left = self.last - self.began, ""
        if done > self.first:
            left = f", about {_clock(spent * (total - done) / (done - self.first))} left"
        text = f"{stage}: {done:,} of {total:,} ({done / max(total, 1):.0%}), {_clock(spent)} so far{left}"
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    """Minutes and seconds.

    >>> _clock(75.4)
    '1:15'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _finish(bars: Progress) -> None:
    for task in bars.tasks:
        if not task.finished:
            bars.update(task.id, total=1, completed=1)


class _Lines(logging.Handler):
    """Prints what is logged at this level and above, one line each."""

    def __init__(self, console: Console, level: int) -> None:
        super().__init__(level)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        text = plain(f"{record.levelname.lower()}: {record.getMessage()}")
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
