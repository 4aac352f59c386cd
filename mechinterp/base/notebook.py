"""A progress bar in a notebook for what a user calls: drawn after two seconds, gone at the end."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

DELAY = 2.0
"""Seconds before a bar is drawn."""


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    if "ipykernel" not in sys.modules or "IPython" not in sys.modules:
        return False
    return sys.modules["IPython"].get_ipython() is not None


def with_bar(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a bar as its `progress`, if it takes one and none is given.

    What the function itself calls draws no bars: those are other functions, not the ones that a user gets.
    """
    known = inspect.signature(function).parameters.get("progress")
    if known is None:
        return function
    staged = "Stage" in str(known.annotation)

    @functools.wraps(function)
    def drawn(*args: Any, **how: Any) -> Any:
        if "progress" in inspect.signature(function).bind_partial(*args, **how).arguments:
            return function(*args, **how)
        bar = Bar(function.__name__)
        try:
            return function(*args, progress=bar.stage if staged else bar, **how)
        finally:
            bar.close()

    return drawn


class Bar:
    """A tqdm bar for one computation, or for its present stage."""

    def __init__(self, name: str) -> None:
        self.name, self.bar = name, None

    def __call__(self, done: int, total: int, /) -> None:
        """Show how much is done."""
        self.stage(self.name, done, total)

    def stage(self, stage: str, done: int, total: int, /) -> None:
        """Show how much of a stage is done; a new stage, or another total, is a new bar."""
        from tqdm import tqdm

        if self.bar is None or (self.bar.desc, self.bar.total) != (f"{stage}: ", total) or done < self.bar.n:
            self.close()
            self.bar = tqdm(desc=f"{stage}: ", total=total, delay=DELAY, leave=False, file=sys.stdout)
            self.bar.desc = f"{stage}: "
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
