"""The error kinds of the package, all under `MechInterpError`."""

from __future__ import annotations


class MechInterpError(Exception):
    """Anything this package refuses; the message says what to do next."""


class InputError(MechInterpError):
    """A user's input is wrong: an unknown name, a wrong shape, a value out of range."""


class ModelNotAvailable(InputError):
    """The model cannot be had here: the hub is out of reach and nothing is cached, or no name opens it."""


class HubNotReached(InputError):
    """The Hugging Face hub cannot be asked: no network, offline mode, or the hub itself is down."""


class FormatError(InputError):
    """A file (circuit, scores, task, pairs) is not what it must be."""


class UnsupportedError(MechInterpError):
    """The model has a part that this analysis cannot handle exactly; the part is named."""


class SiteNotReached(MechInterpError):
    """A site that was asked for did not fire exactly once in the run."""


class BusyError(MechInterpError):
    """The model is being run by another thread; one model is never used by two threads at once."""


def clip(text: str, most: int) -> str:
    """The text as a message shows it, its middle left out where it is longer than `most` letters.

    >>> clip("abcdefghij", 7)
    'ab...ij'
    """
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[:half]}...{text[len(text) - half :]}"
