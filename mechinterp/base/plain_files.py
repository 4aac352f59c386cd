"""Reading untrusted files: plain files only, up to a size, with errors in one line."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mechinterp.base.errors import FormatError, clip


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The bytes of a plain file. Raises FormatError when it is missing, not a plain file, or larger than `max_bytes`.

    Pipes, devices and folders are not opened: reading them can block or have side effects.
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
        raise FormatError(f"{shown} is larger than {max_bytes} bytes, the most that is read.")
    return content


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a plain file of that name exists; False for an impossible name (too long, say)."""
    return os.path.isfile(path)  # `Path.is_file` raises for impossible names


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder of that name exists; False for an impossible name."""
    return os.path.isdir(path)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether anything of that name exists; False for an impossible name."""
    return os.path.exists(path)
