"""Where the command line prints: a console, plain lines, only letters that the terminal can show, as much as asked."""

from __future__ import annotations

import os
import sys
from enum import Enum
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.table import Table

UNLIMITED = 100_000
"""Columns where the output is not a screen: lines in files and pipes are not wrapped."""


class Detail(Enum):
    """How much is printed: the result and warnings; also tables and hints; also settings and stages with times."""

    QUIET = "quiet"
    NORMAL = "normal"
    VERBOSE = "verbose"


class Terminal(Console):
    """Standard output. `main` handles a closed pipe; rich would exit with 1, which means "a claim failed" here.

    Where it is not a terminal, lines are as long as they are, unless COLUMNS says how wide they may be.
    """

    def __init__(self, detail: Detail = Detail.NORMAL) -> None:
        limited = sys.stdout.isatty() or "COLUMNS" in os.environ
        super().__init__(width=None if limited else UNLIMITED)
        self.quiet_words = detail is Detail.QUIET

    def on_broken_pipe(self) -> None:
        """Pass the error on."""
        raise BrokenPipeError

    def table(self, table: Table) -> None:
        """Print a table that belongs to the result; in files and pipes without blanks at the ends of lines."""
        if self.width != UNLIMITED:
            self.print(table)
            return
        with self.capture() as captured:
            self.print(table)
        for line in captured.get().splitlines():
            self.out(line.rstrip(), highlight=False)

    def more(self, table: Table) -> None:
        """Print a table and an empty line, unless only the result is wanted."""
        if not self.quiet_words:
            self.table(table)
            self.print()


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no wrapping (so that paths can be copied), no control codes."""
    from mechinterp.views.terminal_tables import plain

    indent = " " * (len(text) - len(text.lstrip(" ")))
    console.print(indent + plain(text), markup=False, emoji=False, highlight=False, soft_wrap=True)


def hint(console: Terminal, text: str) -> None:
    """The same for what is not the result: left out by --quiet."""
    if not console.quiet_words:
        say(console, text)


def print_what_the_terminal_can() -> None:
    """Print '?' for letters that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def quiet_libraries() -> None:
    """Turn off the libraries' own progress bars, which would mix with ours."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
