"""Positions as a user names them: absolute, from the end, by the task's names, or sets of these."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.errors import InputError
from mechinterp.registry import unknown
from mechinterp.tasks.pairs import Pairs

Position: TypeAlias = "str | int"
"""A named position of the task (`S2`, `end`), or a number: 0 is the first token, -1 the last real one."""
Positions: TypeAlias = "str | int | Sequence[Position | Sequence[Position]] | None"
"""None: all positions at once. `each`: every position by itself. Otherwise one position, or a list of positions and
of sets of positions (`["S2", ("IO", "S1")]`)."""


def as_number(text: str) -> int | None:
    """The number of a token that a text is (`4`, `-1`), or None."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else None


@dataclass(frozen=True)
class PositionSets:
    """Sets of positions with their labels; `masks[i]` is True at the positions of set i.

    A row without any True has no such position (a shorter prompt, with `each`): nothing is measured there.
    """

    labels: tuple[str, ...]
    masks: Bool[Tensor, "set batch pos"]

    @property
    def present(self) -> Bool[Tensor, "set batch"]:
        """Whether the example has the position."""
        return self.masks.any(-1)

    def first(self, index: int) -> int:
        """The earliest position of a set in any example."""
        return int(self.masks[index].any(0).nonzero()[0])


def position_sets(pairs: Pairs, positions: Positions) -> PositionSets:
    """The sets of positions that the user named.

    Raises InputError for a name that the pairs do not have, a number outside a prompt, and an empty or doubled choice.
    """
    if positions is None:
        return PositionSets(("all",), pairs.mask[None])
    if isinstance(positions, str) and positions == "each" and "each" not in pairs.positions:
        width = pairs.clean.shape[1]
        every = torch.eye(width, dtype=torch.bool, device=pairs.device)[:, None] & pairs.mask
        return PositionSets(tuple(str(i) for i in range(width)), every)
    if isinstance(positions, (str, int)):
        positions = [positions]
    if not len(positions):
        raise InputError("No position is given; name some, or leave `positions` out to take all.")
    labels: list[str] = []
    masks: list[Tensor] = []
    for wanted in positions:
        members = [wanted] if isinstance(wanted, (str, int)) else list(wanted)
        if not members:
            raise InputError("A set of positions is empty; name at least one position in it.")
        label = ",".join(str(member) for member in members)
        if label in labels:
            raise InputError(f"The position {label!r} is given twice.")
        labels.append(label)
        masks.append(_mask_of(pairs, members))
    return PositionSets(tuple(labels), torch.stack(masks))


def position_index(pairs: Pairs, position: Position) -> Int[Tensor, " batch"]:
    """Where one position is in each example. Raises InputError as `position_sets` does."""
    if isinstance(position, str):
        if position in pairs.positions:
            return pairs.positions[position]
        number = as_number(position)
        if number is None:
            raise unknown("position", position, pairs.positions)
        position = number
    if abs(position) >= 10**9:
        raise InputError(f"Position {str(position)[:20]} is outside every prompt.")
    index = pairs.lengths + position if position < 0 else torch.full_like(pairs.lengths, position)
    outside = (index < 0) | (index >= pairs.lengths)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise InputError(
            f"Position {position} is outside the prompt of row {row}, which has {int(pairs.lengths[row])} tokens."
        )
    return index


def _mask_of(pairs: Pairs, members: Sequence[Position]) -> Bool[Tensor, "batch pos"]:
    columns = torch.arange(pairs.clean.shape[1], device=pairs.device)
    found = torch.zeros_like(pairs.mask)
    for member in members:
        found |= columns[None] == position_index(pairs, member)[:, None]
    return found
