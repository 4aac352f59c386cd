"""The checks of the input of `Pairs`, which becomes integer tensors in one canonical form.

Canonical means right-padded (every row's real tokens start at column 0), no column of padding only,
id 0 under padding, and -1 where a row of answers or answer positions has no entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.base.errors import InputError

Ids: TypeAlias = Tensor | np.ndarray | Sequence[Any]
"""Whole numbers as a tensor, a NumPy array, a list, or a list of (possibly ragged) lists."""

Mask: TypeAlias = Tensor | np.ndarray | Sequence[Any]
"""True (or 1) at real tokens."""

LARGEST_ID = 2**31 - 1
MAX_PADDED = 2**24
"""Rows x longest row of one table of ids; 128 MB once they are padded."""
NO_ENTRY = -1


@dataclass(frozen=True)
class Shift:
    """How rows were moved to the left: column `starts[row]` of what was given is column 0 now."""

    starts: Int[Tensor, " batch"]
    lengths: Int[Tensor, " batch"]

    def moved(self, name: str, columns: Int[Tensor, "batch n"]) -> Int[Tensor, "batch n"]:
        """The same columns after the move; -1 (no entry) stays.

        Raises InputError when an entry is not one of its row's real tokens.
        """
        starts, stops = self.starts[:, None], (self.starts + self.lengths)[:, None]
        outside = (columns != NO_ENTRY) & ((columns < starts) | (columns >= stops))
        if bool(outside.any()):
            row, entry = outside.nonzero()[0].tolist()
            raise InputError(
                f"{name} of row {row} is {int(columns[row, entry])}, outside the row's real tokens "
                f"{int(starts[row])}..{int(stops[row]) - 1}."
            )
        return torch.where(columns == NO_ENTRY, columns, columns - starts)


def whole_numbers(name: str, given: Ids) -> Int[Tensor, "*shape"]:
    """`given` as an int64 tensor of its own shape; ragged lists are filled with -1 on the right.

    Raises InputError for floats (NaN among them), booleans, strings, numbers beyond 32 bits, no rows.
    """
    if isinstance(given, (str, bytes)) or not hasattr(given, "__len__"):
        raise InputError(f"{name} must be a tensor or a list of token ids; got {type(given).__name__}.")
    ids = _from_list(name, given) if isinstance(given, Sequence) else torch.as_tensor(given)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise InputError(
            f"{name} must hold whole numbers (an integer dtype); got {ids.dtype}. Convert token ids with .long()."
        )
    if ids.numel() == 0:
        raise InputError(f"{name} is empty (shape {tuple(ids.shape)}); give at least two examples.")
    ids = ids.detach().to(torch.int64)
    if int(ids.max()) > LARGEST_ID:
        raise InputError(f"{name} holds {int(ids.max())}, which is not a token id or position.")
    return ids


def _from_list(name: str, given: Sequence[Any]) -> Tensor:
    rows = list(given)
    nested = [isinstance(row, Sequence) and not isinstance(row, (str, bytes)) for row in rows]
    if any(isinstance(row, Tensor) for row in rows):
        raise InputError(f"{name} is a list of tensors; stack them into one tensor or give lists of ids.")
    if any(nested) and not all(nested):
        raise InputError(f"{name} mixes single ids and lists of ids; give one kind.")
    leaves = [leaf for row in rows for leaf in row] if any(nested) else rows
    for leaf in leaves:
        if not isinstance(leaf, int) or isinstance(leaf, bool):
            raise InputError(f"{name} must hold whole numbers; got {leaf!r} ({type(leaf).__name__}).")
        if abs(leaf) > LARGEST_ID:
            raise InputError(f"{name} holds {leaf}, which is not a token id or position.")
    if not any(nested):
        return torch.tensor(rows, dtype=torch.int64)
    width = max(len(row) for row in rows)
    if len(rows) * width > MAX_PADDED:
        raise InputError(
            f"{name} has {len(rows)} rows, the longest of {width} ids: padded, that is more than {MAX_PADDED} ids, "
            "the most that is accepted. Leave out the longest rows, or give fewer rows."
        )
    lengths = torch.tensor([len(row) for row in rows])
    filled = torch.full((len(rows), width), NO_ENTRY, dtype=torch.int64)
    filled[torch.arange(width) < lengths[:, None]] = torch.tensor(leaves, dtype=torch.int64)
    return filled


def prompts(
    clean: Ids, corrupt: Ids, mask: Mask | None
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"], Shift]:
    """Clean ids, corrupt ids and mask in canonical form, and how far each row was moved.

    Without a mask, every id of a tensor and of each list is a real token.
    """
    clean_ids, corrupt_ids = whole_numbers("clean", clean), whole_numbers("corrupt", corrupt)
    for name, ids in (("clean", clean_ids), ("corrupt", corrupt_ids)):
        if ids.ndim != 2:
            raise InputError(f"{name} must be [batch, pos]; got shape {tuple(ids.shape)}.")
    if clean_ids.shape != corrupt_ids.shape:
        raise InputError(
            "clean and corrupt must have equal shapes, so that every position has its counterpart; got "
            f"{tuple(clean_ids.shape)} and {tuple(corrupt_ids.shape)}."
        )
    if len(clean_ids) < 2:
        raise InputError("Pairs needs at least two examples (one example shows a quirk, not a task); got 1.")
    valid = _mask(mask, clean, corrupt, clean_ids, corrupt_ids)
    for name, ids in (("clean", clean_ids), ("corrupt", corrupt_ids)):
        negative = ((ids < 0) & valid).nonzero()
        if len(negative):
            row, pos = negative[0].tolist()
            raise InputError(f"{name} holds the negative token id {int(ids[row, pos])} (row {row}, pos {pos}).")
    shift = _shift(valid)
    width = int(shift.lengths.max())
    offsets = torch.arange(width, device=valid.device)
    kept = offsets < shift.lengths[:, None]
    columns = (offsets + shift.starts[:, None]).clamp(max=valid.shape[1] - 1)
    clean_ids, corrupt_ids = (
        torch.where(kept, ids.to(valid.device).gather(1, columns), 0) for ids in (clean_ids, corrupt_ids)
    )
    return clean_ids, corrupt_ids, kept, shift


def _mask(
    mask: Mask | None, clean: Ids, corrupt: Ids, clean_ids: Tensor, corrupt_ids: Tensor
) -> Bool[Tensor, "batch pos"]:
    if mask is None:
        # Only lists can be ragged; only there -1 was filled in by `whole_numbers`.
        valid = torch.ones_like(clean_ids, dtype=torch.bool)
        clean_valid = clean_ids != NO_ENTRY if isinstance(clean, Sequence) else valid
        corrupt_valid = corrupt_ids != NO_ENTRY if isinstance(corrupt, Sequence) else valid
        _refuse_explicit_no_entry("clean", clean)
        _refuse_explicit_no_entry("corrupt", corrupt)
        differ = (clean_valid != corrupt_valid.to(clean_valid.device)).any(1).nonzero()
        if len(differ):
            row = int(differ[0])
            raise InputError(
                f"clean and corrupt differ in length at row {row}: {int(clean_valid[row].sum())} and "
                f"{int(corrupt_valid[row].sum())} tokens; every position needs its counterpart."
            )
        valid = clean_valid
    else:
        valid = torch.as_tensor(mask)
        if valid.dtype.is_floating_point or not bool(((valid == 0) | (valid == 1)).all()):
            raise InputError("mask must be boolean (or 0 and 1), True at real tokens.")
        valid = valid.to(device=clean_ids.device, dtype=torch.bool)
        if valid.shape != clean_ids.shape:
            raise InputError(f"mask must have the shape of clean, {tuple(clean_ids.shape)}; got {tuple(valid.shape)}.")
    bare = (~valid.any(1)).nonzero()
    if len(bare):
        raise InputError(f"Row {int(bare[0])} has no real token.")
    return valid


def _refuse_explicit_no_entry(name: str, given: Ids) -> None:
    if not isinstance(given, Sequence):
        return
    for row, ids in enumerate(given):
        if isinstance(ids, Sequence) and NO_ENTRY in ids:
            raise InputError(f"{name} holds the negative token id -1 (row {row}); pass a mask for padding.")


def _shift(valid: Bool[Tensor, "batch pos"]) -> Shift:
    starts = valid.to(torch.int64).argmax(1)
    lengths = valid.sum(1)
    last = valid.shape[1] - 1 - valid.flip(1).to(torch.int64).argmax(1)
    holes = (last - starts + 1 != lengths).nonzero()
    if len(holes):
        raise InputError(
            f"mask has a hole in row {int(holes[0])}: real tokens must be one unbroken run, with padding "
            "before or after it only."
        )
    return Shift(starts=starts, lengths=lengths)


def entries(name: str, given: Ids, n_rows: int, device: torch.device) -> Int[Tensor, "batch n"]:
    """Sets of ids or positions as [batch, n] with -1 for no entry; [batch] becomes [batch, 1].

    Raises InputError for a wrong number of rows, a row without entry, a duplicate, or a number below -1.
    """
    table = whole_numbers(name, given).to(device)
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2 or len(table) != n_rows:
        raise InputError(f"{name} must be [batch] or [batch, n] with batch = {n_rows}; got shape {tuple(table.shape)}.")
    if int(table.min()) < NO_ENTRY:
        raise InputError(f"{name} holds {int(table.min())}; only -1 (no entry) may be negative.")
    empty = (table == NO_ENTRY).all(1).nonzero()
    if len(empty):
        raise InputError(f"{name} has no entry in row {int(empty[0])} (-1 means no entry).")
    ordered = table.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_ENTRY)
    if bool(twice.any()):
        raise InputError(f"{name} holds the same number twice in row {int(twice.any(1).nonzero()[0])}.")
    return table
