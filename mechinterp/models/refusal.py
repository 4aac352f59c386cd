"""One-line errors for any exception of other libraries while a model is opened, bridged or checked."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mechinterp.base.errors import MechInterpError, UnsupportedError

LONGEST = 300
"""How many characters of another library's message are shown."""


@contextmanager
def refusing(what: str, config: Any = None, kind: type[MechInterpError] = UnsupportedError) -> Iterator[None]:
    """Turns an exception inside the block into `kind`: `what`, the reason, and the settings that may have caused it.

    Errors of this package are raised unchanged. The original exception is the cause, so tracebacks still show it.
    """
    try:
        yield
    except MechInterpError:
        raise
    except Exception as error:  # these libraries raise anything, from AssertionError to their own kinds
        raise kind(f"{what}: {reason(error)}.{_unlike_the_defaults(config)}") from error


def reason(error: BaseException) -> str:
    """The first line of the error's message, shortened; for unclear kinds of errors also the type and the place.

    >>> reason(ValueError("No such head.\\nTry another.")), reason(KeyError("pattern.0"))
    ('No such head', "KeyError 'pattern.0'")
    """
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "").rstrip(".:")
    text = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    if isinstance(error, (ValueError, OSError, NotImplementedError)) and text:
        return text
    frames = traceback.extract_tb(error.__traceback__)
    # The library's own code, not torch's: the innermost frame outside torch.
    own = [frame for frame in frames if "torch" not in Path(frame.filename).parts]
    place = f" in {own[-1].name} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}{' ' * bool(text)}{text}{place}"


def _unlike_the_defaults(config: Any) -> str:
    """The switches of the configuration that differ from its family's defaults, as a sentence; "" for none."""
    kinds = type(config)
    switches = [
        f"{name}={value}"
        for name, value in sorted(getattr(config, "__dict__", {}).items())
        if isinstance(value, bool) and isinstance(usual := getattr(kinds, name, None), bool) and usual is not value
    ]
    return (
        f" Unlike the family's defaults: {', '.join(switches)}; a checkpoint without these settings may load."
        if switches
        else ""
    )
