"""A circuit file and its sidecar on disk: bounded reading, hashes, and writing both files or neither.

`NAME.circuit.json` is checked against the schema; `NAME.scores.safetensors` holds every score. Both are written under
temporary names and renamed once they are complete, the sidecar first. Between the two renames the old sidecar is kept
as `.NAME.scores.safetensors.previous`, which reading falls back to. So an interrupted write leaves either the old pair
or the new one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechinterp.base.atomic_write import remove_leftovers, temporary_name
from mechinterp.base.canonical_json import canonical_sha256, check_size, render_json
from mechinterp.base.errors import FormatError, InputError, clip
from mechinterp.base.plain_files import is_file, read_bounded
from mechinterp.circuit_file.read_document import MAX_JSON_BYTES, read_document
from mechinterp.circuit_file.schema import SCHEMA_VERSION, WITH_FEATURES, CircuitFile, Sidecar, circuit_sha256
from mechinterp.tasks.schema import checked

SUFFIX = ".circuit.json"
SIDECAR_SUFFIX = ".scores.safetensors"
MAX_STEM = 180
"""Bytes of a NAME: file systems allow 255 for a whole file name, and the names of temporary files are longer."""
_NO_HASH = "0" * 64
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedFile:
    """A circuit file that follows the schema. `content` is the JSON as read, which the file's hash is over."""

    path: Path
    document: CircuitFile
    content: Mapping[str, Any]

    @property
    def file_sha256(self) -> str:
        """The hash of the file as it is now; the hash that it states is in `document.integrity`."""
        return file_sha256(self.content)


def file_sha256(content: Mapping[str, Any]) -> str:
    """sha256 over the content of a circuit file except this hash itself; white space does not count."""
    integrity = {name: value for name, value in content["integrity"].items() if name != "file_sha256"}
    return canonical_sha256({**content, "integrity": integrity})


def open_circuit_file(path: str | Path) -> OpenedFile:
    """The circuit file, checked against the schema but not against its hashes (`check_hashes` does that).

    Raises FormatError, in one line, for anything that is not a circuit file of a known version.
    """
    path = Path(path)
    return parse_circuit_file(read_bounded(path, MAX_JSON_BYTES), path)


def parse_circuit_file(text: bytes, path: Path) -> OpenedFile:
    """The circuit file with this text, which is (or will be) at `path`. Raises as `open_circuit_file` does."""
    document, content = read_document(CircuitFile, text, path, "circuit", (SCHEMA_VERSION, WITH_FEATURES))
    return OpenedFile(path, document, content)


def check_hashes(opened: OpenedFile) -> None:
    """Return None if the file is unchanged since it was written. Raises FormatError with both hashes otherwise."""
    stated = opened.document.integrity
    for name, got, expected in (
        ("circuit", circuit_sha256(opened.document), stated.circuit_sha256),
        ("content", opened.file_sha256, stated.file_sha256),
    ):
        if got != expected:
            raise FormatError(
                f"{opened.path} was changed after it was written: its {name} has sha256 {got[:12]}..., the file "
                f"states {expected[:12]}.... Take the original, or see `discover-circuit verify` for what still holds."
            )


def seal(content: Mapping[str, Any], sidecar: Sidecar | None) -> CircuitFile:
    """The circuit file with this content (everything but `integrity`) and its hashes."""
    stated: dict[str, Any] = {"circuit_sha256": _NO_HASH, "file_sha256": _NO_HASH}
    if sidecar is not None:
        stated["sidecar"] = sidecar.model_dump(mode="json")
    unsealed = checked(CircuitFile, {**content, "integrity": stated}, "The circuit file")
    stated["circuit_sha256"] = circuit_sha256(unsealed)
    plain = plain_content(unsealed)
    plain["integrity"] = stated
    stated["file_sha256"] = file_sha256(plain)
    return checked(CircuitFile, plain, "The circuit file")


def plain_content(document: CircuitFile) -> dict[str, Any]:
    """The document as JSON values, without absent fields; `extensions` are unchanged."""
    plain = document.model_dump(mode="json", exclude_none=True, exclude={"extensions"})
    return {**plain, "extensions": document.extensions}


def sidecar_name(path: Path) -> str:
    """The file name of the sidecar of a circuit file. Raises InputError unless the path ends in `.circuit.json`."""
    stem = path.name.removesuffix(SUFFIX)
    if not stem or stem == path.name or stem[0] in ".-" or not set(stem).isdisjoint("\\:"):
        hint = ", and NAME does not begin with '.' or '-'" if stem[:1] in (".", "-") else ""
        raise InputError(f"A circuit file is named NAME{SUFFIX}{hint}; got {clip(path.name, 200)!r}.")
    if len(os.fsencode(stem)) > MAX_STEM:
        raise InputError(f"The name {clip(path.name, 100)!r} is too long for a circuit file and its file of scores.")
    return stem + SIDECAR_SUFFIX


def read_sidecar(path: Path, sidecar: Sidecar, max_bytes: int) -> bytes:
    """The bytes of the sidecar of the circuit file at `path`, after their sha256 was compared with the stated one.

    Raises FormatError if it is missing, too large, a link to another folder, or not the stated file.
    """
    target = path.parent / sidecar.file
    found = inside(path, target)
    content = read_bounded(found, max_bytes)
    got = hashlib.sha256(content).hexdigest()
    if got == sidecar.sha256:
        return content
    previous = _previous(target)
    if is_file(previous) and not previous.is_symlink():
        content = read_bounded(previous, max_bytes)
        if hashlib.sha256(content).hexdigest() == sidecar.sha256:
            return content
    raise FormatError(
        f"{target} is not the file of scores that {path.name} states: its sha256 is {got[:12]}..., the file states "
        f"{sidecar.sha256[:12]}.... Take both files from one place."
    )


def write_pair(path: Path, document: CircuitFile, sidecar: bytes | None) -> None:
    """Write the circuit file and its sidecar, or change nothing. Raises InputError if they cannot be written."""
    target = path.parent / sidecar_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _recover(path, target)
        remove_leftovers(path.parent, (path.name, target.name))
        text = render_json(plain_content(document)).encode("utf-8")
        _check_readable(text, path)
        if sidecar is None:
            _with_temporaries({path: text}, lambda names: _replace(names[path], path))
            _discard(target)
        else:
            _with_temporaries({target: sidecar, path: text}, lambda names: _swap(path, target, names))
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}. Nothing was changed.") from error


def _check_readable(text: bytes, path: Path) -> None:
    """Return None if a file with this text could be read again. Raises InputError, before anything is written."""
    try:
        check_size(text, str(path))
        fits = len(text) <= MAX_JSON_BYTES
    except FormatError:
        fits = False
    if not fits:
        raise InputError(f"{path} would be larger than a circuit file may be; choose fewer edges or fewer examples.")


def place_pair(path: Path, content: bytes, sidecar: tuple[str, bytes] | None) -> None:
    """Write a circuit file and its sidecar (name, bytes) byte for byte, or change nothing.

    Other files are left alone. Raises InputError if the files cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if sidecar is None:
            remove_leftovers(path.parent, (path.name,))
            _with_temporaries({path: content}, lambda names: _replace(names[path], path))
        else:
            target = path.parent / sidecar[0]
            _recover(path, target)
            remove_leftovers(path.parent, (path.name, target.name))
            _with_temporaries({target: sidecar[1], path: content}, lambda names: _swap(path, target, names))
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}. Nothing was changed.") from error


def write_file(path: Path, content: bytes) -> None:
    """Write one file completely or not at all. Raises InputError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, (path.name,))
        _with_temporaries({path: content}, lambda names: _replace(names[path], path))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}.") from error


def _swap(path: Path, target: Path, names: Mapping[Path, Path]) -> None:
    """Rename both; if the second rename fails, restore the old sidecar."""
    previous = _previous(target)
    if target.exists():
        _link(target, previous)
    try:
        _replace(names[target], target)
        _replace(names[path], path)
    except BaseException:
        if names[path].exists():  # otherwise the new pair is already complete
            if previous.exists():
                os.replace(previous, target)
                previous.unlink(missing_ok=True)  # renaming a hard link to its own file does nothing
            else:
                target.unlink(missing_ok=True)
        raise
    _discard(previous)


def _discard(path: Path) -> None:
    """Delete a file that is no longer needed. The new files are already written, so a failure is only logged."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s is no longer needed and cannot be deleted: %s.", path, error.strerror or error)


def _recover(path: Path, target: Path) -> None:
    """Clean up after an interrupted write: restore the old sidecar if the circuit file still states it."""
    previous = _previous(target)
    if not previous.exists():
        return
    try:
        stated = open_circuit_file(path).document.integrity.sidecar
    except FormatError:
        stated = None
    wanted = None if stated is None else stated.sha256
    if _sha256_of(previous) == wanted and (not target.exists() or _sha256_of(target) != wanted):
        os.replace(previous, target)
    else:
        previous.unlink()


def _with_temporaries(contents: Mapping[Path, bytes], rename: Callable[[Mapping[Path, Path]], None]) -> None:
    """Write each content to a temporary file, pass these files to `rename`, then delete those that are left."""
    names = {path: temporary_name(path) for path in contents}
    try:
        for path, content in contents.items():
            with names[path].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        rename(names)
    finally:
        for name in names.values():
            with suppress(OSError):
                name.unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    os.replace(source, target)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _sync_folder(folder: Path) -> None:
    """Flush the renames to disk, where the file system supports it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def inside(path: Path, target: Path) -> Path:
    """`target` with all links resolved. Raises FormatError if it then lies outside the folder of `path`."""
    try:
        found, folder = target.resolve(), path.parent.resolve()
    except (OSError, RuntimeError) as error:
        raise FormatError(f"{target} cannot be read: {error}.") from error
    if found.parent != folder:
        raise FormatError(f"{target} is a link out of the folder of {path.name}; put the file itself there.")
    return found
