"""Reading files that others name or made: plain files only, up to a size, and never a traceback."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mechinterp.base.errors import FormatError, clip


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The bytes of a plain file. Raises FormatError when it is missing, something else, or larger than `max_bytes`.

    What is no plain file (a pipe, a device, a folder) is not opened: reading one can block, or have effects.
    """
    shown = clip(str(path), 200)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FormatError(f"{shown} is not a plain file.")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise FormatError(f"{shown} cannot be read: {reason}.") from error
    if len(content) > max_bytes:
        raise FormatError(f"{shown} is larger than the {max_bytes} bytes that it can have.")
    return content


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a plain file of that name; False for a name that can be none (too long, say)."""
    return os.path.isfile(path)  # `Path.is_file` raises for such names


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether there is a folder of that name; False for a name that can be none."""
    return os.path.isdir(path)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is anything of that name; False for a name that can be none."""
    return os.path.exists(path)
