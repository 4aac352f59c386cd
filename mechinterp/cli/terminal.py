"""Where the command line prints: a console, plain lines, and only letters that the terminal can show."""

from __future__ import annotations

import sys

from rich.console import Console


class Terminal(Console):
    """Standard output. `main` handles a closed pipe; rich would exit with 1, which means "a claim failed" here."""

    def on_broken_pipe(self) -> None:
        """Pass the error on."""
        raise BrokenPipeError


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no wrapping (so that paths can be copied), no control codes."""
    from mechinterp.views.terminal_tables import plain

    indent = " " * (len(text) - len(text.lstrip(" ")))
    console.print(indent + plain(text), markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_what_the_terminal_can() -> None:
    """Print '?' for letters that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def quiet_libraries() -> None:
    """Turn off the libraries' own progress bars, which would mix with ours."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
