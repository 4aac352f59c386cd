"""Files that are written whole or not at all, and the removal of what killed processes left behind."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mechinterp.base.errors import InputError

STALE_SECONDS = 24 * 3600
"""After this time a temporary file of another machine, or without a process in its name, counts as left behind."""
_NAME = re.compile(r"\.(?:(?P<host>[0-9a-f]{8})-(?P<process>\d+)-)?[0-9a-f]{12}\.partial")


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Return None once the file holds `data`; its old content stays until then, even if the write is interrupted.

    Raises InputError when the file cannot be written.
    """
    target = Path(path)
    name = temporary_name(target)
    try:
        remove_leftovers(target.parent, [target.name])
        with name.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except OSError as error:
        raise InputError(f"Cannot write {str(target)!r}: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            name.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A new name beside `path` for what is to become it; it says which process on which machine is writing."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(6)}.partial")


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Delete the temporary files that killed processes left under these names; one that is being written stays.

    Raises OSError when the folder cannot be read.
    """
    names = tuple(names)
    for entry in list(folder.iterdir()):
        if not entry.name.endswith(".partial"):
            continue
        rests = [entry.name[len(name) + 1 :] for name in names if entry.name.startswith(f".{name}.")]
        if any((found := _NAME.fullmatch(rest)) and _is_over(entry, found) for rest in rests):
            with suppress(OSError):
                entry.unlink(missing_ok=True)


def _is_over(entry: Path, found: re.Match[str]) -> bool:
    if found["host"] == _host() and os.name == "posix":
        process = int(found["process"])
        try:
            os.kill(process, 0)  # asks whether there is such a process, and sends it nothing
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        return False
    try:
        return time.time() - entry.stat().st_mtime > STALE_SECONDS
    except OSError:
        return False


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
