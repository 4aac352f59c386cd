"""The error kinds of the package, all under `MechInterpError`."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence


class MechInterpError(Exception):
    """The base of all errors of this package; the message says what to do next."""


class InputError(MechInterpError):
    """A user's input is wrong: an unknown name, a wrong shape, a value out of range."""


class ModelNotAvailable(InputError):
    """The model is not available: the hub cannot be reached and nothing is cached, or its name is unknown."""


class HubNotReached(InputError):
    """The Hugging Face hub cannot be reached: no network, offline mode, or the hub itself is down."""


class TaskNotDone(InputError):
    """The model does not do the task, so there is nothing to explain."""


class NoSmallCircuit(MechInterpError):
    """No circuit of at most half of the graph reaches the levels of faithfulness: an answer, not a wrong input."""


class FormatError(InputError):
    """A file (circuit, scores, task, pairs) does not follow its format."""


class Problems(FormatError):
    """All that is wrong with a file: `lines`, one for each problem, under a `first` one that counts them."""

    def __init__(self, where: str, problems: Sequence[str], most: int) -> None:
        left = len(problems) - most
        self.first = f"{where} has {len(problems):,} problems:"
        self.lines = (*problems[:most], *([f"and {left:,} more"] if left > 0 else []))
        super().__init__("\n  ".join([self.first, *self.lines]))


def wrong_file(where: str, problems: Sequence[str], most: int = 20) -> FormatError:
    """The error for a file with these problems: one line for one, `Problems` for more; at most `most` are listed.

    >>> print(wrong_file("a.yaml", ["no name"]), wrong_file("a.yaml", ["no name", "no title"]), sep="; ")
    a.yaml: no name; a.yaml has 2 problems:
      no name
      no title
    """
    if len(problems) == 1:
        return FormatError(f"{where}: {problems[0]}")
    return Problems(where, problems, most)


class UnsupportedError(MechInterpError):
    """The model has a part that this analysis cannot handle exactly; the part is named."""


class SiteNotReached(MechInterpError):
    """A requested site did not fire exactly once in the run."""


class BusyError(MechInterpError):
    """Another thread is running the model; two threads cannot use one model at the same time."""


class ProcessLost(BaseException):
    """Another process of the same run has ended, so this one ends, too. As with Ctrl-C nothing goes on after it."""


def clip(text: str, most: int) -> str:
    """The text for a message, with its middle left out if it is longer than `most` characters.

    >>> clip("abcdefghij", 7)
    'ab...ij'
    """
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[:half]}...{text[len(text) - half :]}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def clipped(value: object) -> str:
    """The value as Python writes it, on one line and at most 100 characters long, however long or deep it is."""
    shown = _SHORT.repr(value)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."
