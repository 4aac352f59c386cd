"""Direction files on disk: `NAME.direction.json` with its numbers in `NAME.direction.safetensors`; read and written.

Both are untrusted when read: bounded, checked against the schema and their hashes, never unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from mechinterp.analysis.directions import Direction
from mechinterp.base.atomic_write import write_whole
from mechinterp.base.canonical_json import render_json
from mechinterp.base.errors import FormatError, InputError, clip
from mechinterp.base.plain_files import read_bounded
from mechinterp.circuit_file.direction_schema import (
    DIRECTION_VERSION,
    SUFFIX,
    DirectionFile,
    OpenedDirection,
    content_sha256,
    is_direction_name,
    open_direction_file,
)
from mechinterp.circuit_file.named_files import find_file
from mechinterp.circuit_file.store import inside
from mechinterp.features.activations import Identity
from mechinterp.features.dictionary import Dictionary
from mechinterp.models.components import Position, as_number
from mechinterp.models.feature_basis import BasisSource
from mechinterp.models.sites import Site
from mechinterp.tasks.schema import checked

TENSORS_SUFFIX = ".direction.safetensors"
MAX_TENSOR_BYTES = 16 * 2**20
TENSORS = ("W_dec", "W_enc", "b_dec", "b_enc")


def load_direction(path: str | Path) -> Direction:
    """The direction of a file, after its hashes were checked.

    Args:
        path: `NAME.direction.json`, or the name of a stored direction; its numbers are read from the same folder.

    Raises FormatError for a file that is not a direction file, was changed, or whose numbers are missing.
    """
    opened = open_direction_file(find_file(path))
    stated = opened.document
    if opened.file_sha256 != stated.file_sha256:
        raise FormatError(
            f"{opened.path} was changed after it was written: it has sha256 {opened.file_sha256[:12]}..., it states "
            f"{stated.file_sha256[:12]}.... Take the original."
        )
    direction = stated_direction(opened)
    if direction.sha256 != stated.direction_sha256:
        raise FormatError(
            f"{opened.path} states the direction {stated.direction_sha256[:12]}..., its numbers are "
            f"{direction.sha256[:12]}.... Take both files from one place."
        )
    return direction


def stated_direction(opened: OpenedDirection) -> Direction:
    """The direction of the numbers beside a file, whose own hash is checked. Raises FormatError otherwise."""
    stated = opened.document
    target = inside(opened.path, opened.path.parent / stated.tensors)
    data = read_bounded(target, MAX_TENSOR_BYTES)
    got = hashlib.sha256(data).hexdigest()
    if got != stated.tensors_sha256:
        raise FormatError(
            f"{target} is not the file of numbers that {opened.path.name} states: its sha256 is {got[:12]}..., the "
            f"file states {stated.tensors_sha256[:12]}.... Take both files from one place."
        )
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        site = Site.parse(stated.site)
    except (safetensors.SafetensorError, ValueError, InputError) as error:
        raise FormatError(f"{target} cannot be read: {clip(str(error), 200)}") from error
    if tuple(sorted(tensors)) != TENSORS:
        raise FormatError(f"{target} must hold {', '.join(TENSORS)}; it has {clip(', '.join(sorted(tensors)), 100)}.")
    matrices = [tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
    try:
        source = BasisSource(format=clip(stated.fit.method, 60), about={"file": stated.id[:200]})
        basis = Dictionary((site,), (site,), *matrices, activation=Identity(), subtract_b_dec=True, source=source)
    except InputError as error:
        raise FormatError(f"{target}: {error}") from error
    if basis.n_features != 1:
        raise FormatError(f"{target} holds {basis.n_features} directions; a direction file holds one.")
    about = {"file": str(opened.path), "task": stated.task.name, "classes": stated.fit.classes}
    about |= {} if stated.fit.positive is None else {"positive": stated.fit.positive}
    return Direction(basis, position_of(stated.fit.position), stated.fit.method, about)


def position_of(text: str) -> Position:
    """A position as it is stored: a name, or a number."""
    number = as_number(text)
    return text if number is None else number


def write_direction(path: str | Path, content: Mapping[str, Any], direction: Direction) -> DirectionFile:
    """Write a direction file with this content (all but the hashes and the numbers) and its numbers; return it.

    The numbers are written first, under their name; so an interrupted write leaves a file whose hash does not fit,
    which is refused, never other numbers.

    Raises InputError for another file name, and when the files cannot be written.
    """
    path = Path(path)
    stem = path.name.removesuffix(SUFFIX)
    if not is_direction_name(path) or not stem or stem[0] in ".-" or not set(stem).isdisjoint("\\:"):
        raise InputError(f"A direction file is named NAME{SUFFIX}; got {clip(path.name, 200)!r}.")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in direction.basis.tensors().items()}
    data = safetensors.torch.save(tensors)
    sealed: dict[str, Any] = {
        **content,
        "schema_version": DIRECTION_VERSION,
        "kind": "direction",
        "n_numbers": sum(tensor.numel() for tensor in tensors.values()),
        "direction_sha256": direction.sha256,
        "tensors": stem + TENSORS_SUFFIX,
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        "file_sha256": "0" * 64,
    }
    plain = checked(DirectionFile, sealed, "The direction file").model_dump(mode="json", exclude_none=True)
    plain["file_sha256"] = content_sha256(plain)
    document = checked(DirectionFile, plain, "The direction file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot make the folder {str(path.parent)!r}: {error.strerror or error}.") from error
    write_whole(path.parent / document.tensors, data)
    write_whole(path, render_json(plain).encode("utf-8"))
    return document
