"""Local paths as a page shows them: a page may be sent to others, so it names no folder of this machine."""

from __future__ import annotations

import re
import shlex

from mechinterp.circuit_file.schema import CircuitFile

_ABSOLUTE = re.compile(r"(?<![\w.:/\\>])(?:~|[A-Za-z]:)?[/\\][^\s'\"/\\]+[/\\][^\s'\"]*[^\s'\".,;:()]")


def without_folders(text: str) -> str:
    """The text with the last part of every absolute path in it.

    >>> without_folders("ioi in /home/ann/my-model, from out/ioi and https://x.org/a/b")
    'ioi in my-model, from out/ioi and https://x.org/a/b'
    """
    return _ABSOLUTE.sub(lambda found: _last(found[0]), text)


def shown_command(command: str) -> str:
    """A command line whose absolute paths are their last parts.

    >>> shown_command("discover-circuit run ioi --model '/home/ann b/m' --out out/ioi")
    'discover-circuit run ioi --model m --out out/ioi'
    """
    try:
        words = shlex.split(command)
    except ValueError:  # an open quote
        return without_folders(command)
    return shlex.join(_last(word) if _is_absolute(word) else without_folders(word) for word in words)


def shown_document(document: CircuitFile) -> CircuitFile:
    """The document without folders of a machine in its title, model, task and command; hashes are not those of it."""
    model, provenance, command = document.model, document.provenance, document.provenance.command
    return document.model_copy(
        update={
            "title": without_folders(document.title),
            "model": model.model_copy(update={"name": _last(model.name) if _is_absolute(model.name) else model.name}),
            "provenance": provenance.model_copy(update={"command": command and shown_command(command)}),
        }
    )


def shown_path(path: str) -> str:
    """A path as it is, or the last part of an absolute one."""
    return _last(path) if _is_absolute(path) else path


def _is_absolute(path: str) -> bool:
    return re.match(r"(?:~|[A-Za-z]:)?[/\\]", path) is not None


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path
