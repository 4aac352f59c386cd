"""The direction that a circuit explains instead of the logits: which one a circuit file states, and where it is."""

from __future__ import annotations

from pathlib import Path

from mechinterp.analysis.directions import Direction, read_direction, read_pairs
from mechinterp.base.errors import FormatError, InputError, clip
from mechinterp.base.plain_files import exists
from mechinterp.circuit_file.bases import is_inside
from mechinterp.circuit_file.direction_file import load_direction
from mechinterp.circuit_file.direction_schema import SUFFIX
from mechinterp.circuit_file.named_files import stored_files
from mechinterp.circuit_file.schema import CircuitFile, ReadoutRecord
from mechinterp.models.direction_readout import DirectionReadout
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.pairs import Pairs

GivenDirection = Direction | str | Path | None
"""A direction, its file, or None: where the circuit file says."""


def readout_record(model: HookManager) -> ReadoutRecord | None:
    """What a circuit file says of a model that reads a direction from a file; None for every other model."""
    if not isinstance(model, DirectionReadout) or model.file is None:
        return None
    where = model.file if is_inside(model.file) else Path(model.file).name
    return ReadoutRecord(where=where, direction_sha256=model.direction_sha256, site=str(model.site))


def stated_model_of(model: HookManager) -> HookManager:
    """The model that a circuit file names: of one that reads a direction from a file, the whole model."""
    return model.whole if isinstance(model, DirectionReadout) and model.file is not None else model


def named_model(document: CircuitFile, model: HookManager) -> HookManager:
    """The model that a file names: the whole model where the file states which direction it reads."""
    return model.whole if isinstance(model, DirectionReadout) and document.readout is not None else model


def prompts_of(direction: Direction, pairs: Pairs) -> Pairs:
    """The prompts that a direction of a file is read on: its positive class clean, without answers, at its position.

    Raises InputError where the classes are those of two answers, and the pairs do not have these.
    """
    return read_pairs(pairs, direction.position, direction.about.get("positive"))


def stated_direction_of(record: ReadoutRecord, path: Path, given: GivenDirection = None) -> Direction:
    """The direction that a record names: the given one, or that of the file; in both cases with the stated sha256.

    The file is looked for where the record says, then beside the circuit file, then among the stored ones.

    Raises FormatError for another direction or a place outside the working folder, InputError if there is none.
    """
    if isinstance(given, Direction):
        found, origin = given, "that was given"
    else:
        place = _place(record, path) if given is None else Path(given)
        found, origin = load_direction(place), f"in {clip(str(place), 200)}"
    if found.sha256 != record.direction_sha256 or str(found.site) != record.site:
        raise FormatError(
            f"The direction {origin} is not the one of the circuit: it has sha256 {found.sha256[:12]}... at "
            f"{found.site}, the file states {record.direction_sha256[:12]}... at {record.site}. Take the original."
        )
    return found


def _place(record: ReadoutRecord, path: Path) -> Path:
    where = record.where
    if not is_inside(where):  # an untrusted file must not choose which files are opened
        raise FormatError(
            f"{path}: its direction is said to be in {clip(where, 200)!r}, outside the working folder. If you trust "
            "it, give it: --direction FILE."
        )
    name = Path(where).name
    stored = stored_files(SUFFIX)
    for place in (path.parent / name, Path(where), stored.get(name.removesuffix(SUFFIX))):
        if place is not None and exists(str(place)):
            return place
    raise InputError(
        f"The direction {clip(where, 200)!r}, which the circuit of {path.name} explains, is neither here, nor beside "
        "the circuit file, nor stored. Give it: --direction FILE."
    )


def as_stated(document: CircuitFile, path: Path, model: HookManager, given: GivenDirection = None) -> HookManager:
    """The model as the circuit sees it: with the direction that the file names in place of the logits, if any.

    Args:
        document: The circuit file.
        path: Where it is.
        model: The whole model, or one that reads the direction already.
        given: The direction or its file, instead of the one that is looked up.

    Raises InputError for a direction where the file names none; otherwise as `stated_direction_of`.
    """
    record = document.readout
    if record is None:
        if given is not None:
            raise InputError(f"{path}: its circuit explains the logits, not a direction; leave the direction out.")
        return model
    return read_direction(named_model(document, model), stated_direction_of(record, path, given))
