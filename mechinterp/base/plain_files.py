"""Reading untrusted files: plain files only, up to a size, with errors in one line."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mechinterp.base.errors import FormatError, clip


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The bytes of a plain file. Raises FormatError when it is missing, not a plain file, or larger than `max_bytes`.

    Pipes, devices and folders are not opened: reading them can block or have side effects.
    """
    with _plain_file(path) as (file, shown):
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise FormatError(f"{shown} is larger than {max_bytes} bytes, the most that is read.")
    return content


def read_beginning(path: Path, max_bytes: int) -> tuple[bytes, int]:
    """(the first `max_bytes` bytes of a plain file, or all, its size). Raises FormatError as `read_bounded` does."""
    with _plain_file(path) as (file, _):
        return file.read(max_bytes), os.fstat(file.fileno()).st_size


def file_sha256(path: Path) -> str:
    """sha256 (hex) of the bytes of a plain file, read a part at a time. Raises FormatError as `read_bounded` does."""
    digest = hashlib.sha256()
    with _plain_file(path) as (file, _):
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def bounded_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of every line of a plain file, of which one is in memory; numbers start at 1.

    Raises FormatError as `read_bounded` does, and for a line of more than `max_bytes`.
    """
    with _plain_file(path) as (file, shown):
        number = 0
        while line := file.readline(max_bytes + 1):
            number += 1
            if len(line) > max_bytes:
                raise FormatError(f"{shown}, line {number} has more than {max_bytes:,} bytes, the most that is read.")
            yield number, line


@contextmanager
def _plain_file(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """(the open file, its name for messages); a FormatError if it is not a plain file or cannot be read."""
    shown = clip(str(path), 200)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FormatError(f"{shown} is not a plain file.")
        with path.open("rb") as file:
            yield file, shown
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise FormatError(f"{shown} cannot be read: {reason}.") from error


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a plain file of that name exists; False for an impossible name (too long, say)."""
    return os.path.isfile(path)  # `Path.is_file` raises for impossible names


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder of that name exists; False for an impossible name."""
    return os.path.isdir(path)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether anything of that name exists; False for an impossible name."""
    return os.path.exists(path)
