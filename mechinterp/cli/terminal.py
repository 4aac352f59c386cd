"""What the command line prints on: a console, lines as they are, letters that the terminal knows."""

from __future__ import annotations

import sys

from rich.console import Console


class Terminal(Console):
    """Standard output. When the reader stops reading, `main` answers; rich would end with 1, our "claim failed"."""

    def on_broken_pipe(self) -> None:
        """Pass the error on."""
        raise BrokenPipeError


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no wrapping (paths are to be copied), nothing that steers the terminal."""
    from mechinterp.views.terminal_tables import plain

    indent = " " * (len(text) - len(text.lstrip(" ")))
    console.print(indent + plain(text), markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_what_the_terminal_can() -> None:
    """A letter that the terminal's encoding lacks becomes '?' instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def quiet_libraries() -> None:
    """Stop the libraries' own progress bars, which would run into ours."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
