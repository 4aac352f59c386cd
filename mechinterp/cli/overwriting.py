"""Output files are never replaced silently: only those of the very same command, or with `--force`."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from mechinterp.base.errors import InputError, MechInterpError, clip
from mechinterp.base.plain_files import exists, is_file, read_beginning

INSTEAD = "Add --force to replace it, or give another --out."
MOST_BYTES = 2**24


def check_new(path: Path, force: bool) -> None:
    """Return None if nothing has this name, or it may be replaced. Raises InputError otherwise."""
    if exists(path) and not force:
        raise InputError(f"{clip(str(path), 200)} is there already. {INSTEAD}")


def check_replaced(path: Path, command: str, force: bool) -> bool:
    """Whether a circuit or direction file of this name is there, and may be replaced.

    One that the same command of the same version has made may, as long as it is what it was.

    Raises InputError for any other one, before anything slow begins.
    """
    if not exists(path) or force:
        return exists(path)
    shown = clip(str(path), 200)
    try:
        made, version = _made(path)
    except MechInterpError:
        raise InputError(f"{shown} is there already, and is not as it was written. {INSTEAD}") from None
    if made == command and version == metadata.version("mechinterp-circuits"):
        return True
    by = f"made by: {clip(made, 400)}" if made != command else f"made by version {clip(version, 40)} of mechinterp"
    raise InputError(f"{shown} is there already, {by}. {INSTEAD}")


def _made(path: Path) -> tuple[str, str]:
    """(The command that a file states, the version of mechinterp). Raises FormatError if the file was changed."""
    from mechinterp.base.errors import FormatError
    from mechinterp.circuit_file.direction_schema import is_direction_name, open_direction_file
    from mechinterp.circuit_file.store import check_hashes, open_circuit_file

    if is_direction_name(path):
        direction = open_direction_file(path)
        if direction.file_sha256 != direction.document.file_sha256:
            raise FormatError("changed")
        provenance = direction.document.provenance
    else:
        opened = open_circuit_file(path)
        check_hashes(opened)
        provenance = opened.document.provenance
    return provenance.command or "a call in Python", provenance.versions.get("mechinterp", "an unknown version")


def check_text(path: Path, words: str, force: bool) -> None:
    """Return None if a text file of this name is not there, or has these words in it. Raises InputError otherwise."""
    if is_file(path) and not force and words in read_beginning(path, MOST_BYTES)[0].decode("utf-8", "replace"):
        return
    check_new(path, force)


def make_folder(folder: Path) -> None:
    """Return None once the folder is there. Raises InputError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot write to {clip(str(folder), 200)}: {error.strerror or error}.") from error
