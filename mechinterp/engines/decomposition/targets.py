"""The targets of a decomposition: directions of logits, all logits, or parts of any site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.engines.decomposition.subject import Decoder
from mechinterp.engines.decomposition.tape import HEAD, gathered
from mechinterp.engines.logit_directions import NAMED, Direction, DirectionLike, logit_direction
from mechinterp.models.components import Part, parse_part, position_index
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import NO_ENTRY
from mechinterp.tasks.pairs import Pairs

if TYPE_CHECKING:
    from mechinterp.engines.decomposition.encoder import Encoder

TargetLike: TypeAlias = DirectionLike
"""A direction (see `DirectionLike`), `logits`, or the text of a part or site."""


@dataclass(frozen=True, eq=False)
class Target:
    """One target: a value of the tape, and which part of it is read."""

    name: str
    value: str
    direction: Direction | None = None
    part: Part | None = None
    where: Int[Tensor, " batch"] | None = None
    """The position of the part, if it has one."""

    @property
    def at_answers(self) -> bool:
        """Whether it is read at the answer positions only."""
        return self.value in HEAD

    def rows(self, chosen: slice) -> Target:
        """The target for some of the examples."""
        direction = None if self.direction is None else self.direction.rows(chosen)
        return replace(self, direction=direction, where=None if self.where is None else self.where[chosen])

    def read_total(self, totals: Mapping[str, Tensor], at: Tensor, mask: Bool[Tensor, "batch pos"]) -> Tensor:
        """The value of the target in the whole run."""
        return self.read(totals[self.value][None], 1, totals, at, mask, 0)[0]

    def read(
        self,
        value: Float[Tensor, "source batch n_seen ..."] | None,
        n: int,
        totals: Mapping[str, Tensor],
        at: Int[Tensor, "batch n_at"],
        mask: Bool[Tensor, "batch pos"],
        first: int,
    ) -> Float[Tensor, "source batch ..."]:
        """The target's part of a relevant part that is stored from position `first` on; None is 0."""
        total = totals[self.value]
        if value is None:
            shape = total.shape if self.at_answers else total[:, first:].shape
            value = total.new_zeros(n, *shape)
        if self.direction is not None:
            valid = at != NO_ENTRY
            share = valid.to(value.dtype) / valid.sum(1, keepdim=True)
            weights = self.direction.weights.to(value.dtype)
            real = torch.where(valid[..., None], value, 0)
            return einsum(real, weights, share, "source batch n column, batch column, batch n -> source batch")
        if self.at_answers:
            return torch.where((at != NO_ENTRY)[..., None], value, torch.nan)
        assert self.part is not None
        if first:
            before = list(value.shape)
            before[2] = first
            value = torch.cat([value.new_zeros(before), value], 2)
        if self.part.unit is not None:
            value = value[:, :, :, self.part.unit]
        if self.where is not None:
            return gathered(value.flatten(0, 1), self.where[:, None].repeat(n, 1)).unflatten(0, (n, -1))[:, :, 0]
        return torch.where(mask.reshape(*mask.shape, *[1] * (value.ndim - 3)), value, torch.nan)


def target_list(model: HookManager | Encoder, pairs: Pairs, targets: TargetLike | list[TargetLike]) -> list[Target]:
    """The targets that the user means. Raises InputError for unknown targets, none, and duplicates."""
    given = list(targets) if isinstance(targets, list) else [targets]
    if not given:
        raise InputError("No target is given; use 'answers', 'logits', or a part such as 'a9.h9<q>'.")
    found = [_target(model, pairs, target) for target in given]
    names = [target.name for target in found]
    if len(set(names)) != len(names):
        raise InputError(f"The target {next(n for n in names if names.count(n) > 1)!r} is given twice.")
    if sum(target.at_answers for target in found) > 1:
        raise InputError("Give one direction at a time, or 'logits', of which every direction is a sum.")
    return found


def _target(model: HookManager | Encoder, pairs: Pairs, target: TargetLike) -> Target:
    if not isinstance(target, str) or target in NAMED:
        name = target if isinstance(target, str) else "direction"
        return Target(name, "logits", logit_direction(pairs, target, model.layout))
    if target == "logits":
        return Target(target, "logits")
    part = parse_part(model, target)
    subject = Decoder(model) if isinstance(model, HookManager) else model
    where = None if part.position is None else position_index(pairs, part.position)
    return Target(target, subject.name(part.site), None, part, where)


def read_columns(targets: Sequence[Target]) -> Int[Tensor, " n_columns"] | None:
    """The token ids whose logits are needed; None for all."""
    for target in targets:
        if target.direction is not None:
            return target.direction.columns
    return None if any(target.at_answers for target in targets) else torch.zeros(0, dtype=torch.long)
