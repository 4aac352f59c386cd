"""The state of a long run in one file, written whole or not at all, so that a killed run can resume."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mechinterp.base.atomic_write import write_whole
from mechinterp.base.errors import InputError
from mechinterp.base.shards import current, from_first

EVERY_SECONDS = 30.0
MOST_BYTES = 2**31
_MAGIC = b"mechinterp-state 1"
_HINT = "delete it to start over, or give another file."
logger = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """Tensors by name in one file: a line with the run's key and the hash of the rest, then safetensors.

    Without a path nothing is saved. Where processes share the work, the first one writes and reads it for all.
    """

    path: Path | None = None
    key: str = ""
    """A digest of the run's arguments; a state of another run is refused."""
    last: float = field(default_factory=time.monotonic)
    failed: bool = False
    apart: bool = False
    """Whether the state is this process's own."""

    def of_process(self) -> Checkpoint:
        """The checkpoint of this process's share of the work; the same one if it is alone."""
        if self.path is None or current().count == 1:
            return self
        own = f"{current().index + 1}-of-{current().count}"
        return replace(self, path=self.path.with_name(f"{self.path.name}.{own}"), key=f"{self.key}-{own}", apart=True)

    def load(self, like: Mapping[str, Tensor], most: Mapping[str, int]) -> dict[str, Tensor] | None:
        """The state that was saved, or None; its tensors have the names, dtypes and shapes of `like`.

        Raises InputError, in one line, for a file that is damaged, is not a state, or is the state of another run.

        Args:
            like: Tensors with the names, dtypes and shapes of the state.
            most: The largest values that the counts among them can have.
        """
        found = self.read()
        if found is None:
            return None
        if _shapes(found) != _shapes(like):
            raise InputError(f"{self.path} is not a state of this method: it holds other tensors; {_HINT}")
        self.check_counts(found, most)
        return found

    def check_counts(self, found: Mapping[str, Tensor], most: Mapping[str, int]) -> None:
        """Return None if the counts of a state are possible. Raises InputError otherwise."""
        for name, largest in most.items():
            if not 0 <= int(found[name]) <= largest:
                raise InputError(f"{self.path} is not a state of this run: {name} is {int(found[name])}; {_HINT}")

    def read(self) -> dict[str, Tensor] | None:
        """The tensors that were saved, whatever they are, or None. Raises InputError as `load` does."""
        if self.path is None:
            return None
        return self._read() if self.apart else from_first(self._read)

    def _read(self) -> dict[str, Tensor] | None:
        if self.path is None or not os.path.lexists(self.path):
            return None
        key, found = read_state(self.path)
        if key != self.key:
            raise InputError(
                f"{self.path} is the state of another run (other model, data, settings or version); {_HINT}"
            )
        return found

    def save(self, state: Mapping[str, Tensor], *, now: bool = False) -> None:
        """Return None after writing the state, if the last one is half a minute old (or with `now`).

        If it cannot be written, the run continues, with a warning.
        """
        if self.path is None or (not now and time.monotonic() - self.last < EVERY_SECONDS) or self._others:
            return
        self.last = time.monotonic()
        try:
            write_state(self.path, self.key, state)
        except InputError as error:
            if not self.failed:
                logger.warning("The run continues without saving its state, so it cannot be resumed: %s", error)
            self.failed = True
        else:
            self.failed = False

    @property
    def due(self) -> bool:
        """Whether `save` would write now: for a state that takes time to put together."""
        return self.path is not None and time.monotonic() - self.last >= EVERY_SECONDS and not self._others

    def clear(self) -> None:
        """Return None after deleting the file: the run is done."""
        if self.path is None or self._others:
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s is no longer needed and cannot be deleted: %s.", self.path, error.strerror or error)

    @property
    def _others(self) -> bool:
        """Whether another process writes it."""
        return not self.apart and current().index > 0


UNSAVED = Checkpoint()
"""The state is not saved."""


def write_state(path: Path, key: str, state: Mapping[str, Tensor]) -> None:
    """Return None after writing a state, whole or not at all. Raises InputError if it cannot be written."""
    content = save({k: v.contiguous() for k, v in state.items()})
    first = b" ".join([_MAGIC, key.encode(), hashlib.sha256(content).hexdigest().encode()])
    write_whole(path, first + b"\n" + content)


def read_state(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The key and the tensors of a state. Raises InputError, in one line, for anything else; never unpickles."""
    first, _, content = _bytes(path).partition(b"\n")
    words = first.split(b" ")
    if len(words) != 4 or b" ".join(words[:2]) != _MAGIC:
        raise InputError(f"{path} is not the state of a run; {_HINT}")
    if hashlib.sha256(content).hexdigest().encode() != words[3]:
        raise InputError(f"{path} is damaged: it is not what was written; {_HINT}")
    try:
        found = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path} is not the state of a run ({error}); {_HINT}") from error
    for name, value in found.items():
        if value.is_floating_point() and bool(value.isnan().any()):
            raise InputError(f"{path} is not a state of this run: {name} holds NaN; {_HINT}")
    return words[2].decode("ascii", "replace"), found


def _bytes(path: Path) -> bytes:
    """The bytes of a plain file. Raises InputError for anything else; never waits for a pipe."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is not a plain file, so it is not the state of a run; give another file.")
        with path.open("rb") as file:
            found = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}; {_HINT}") from error
    if len(found) > MOST_BYTES:
        raise InputError(f"{path} is too large to be the state of a run; give another file.")
    return found


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[object, ...]]:
    return {name: (tensor.dtype, *tensor.shape) for name, tensor in tensors.items()}


def checkpoint_of(path: str | os.PathLike[str] | None, arguments: Sequence[object]) -> Checkpoint:
    """The checkpoint of one run; its key is a digest of the version and of all arguments that decide the result.

    Raises InputError if the folder of the file does not exist.
    """
    if path is None:
        return Checkpoint()
    if not Path(path).parent.is_dir():
        raise InputError(f"The folder {str(Path(path).parent)!r}, for the state of the run, does not exist.")
    content = json.dumps([metadata.version("mechinterp-circuits"), *arguments]).encode()
    return Checkpoint(Path(path), hashlib.sha256(content).hexdigest())
