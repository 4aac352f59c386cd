"""A forward pass as a list of operations on named values, and the walk that carries relevant parts through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mechinterp.base.errors import UnsupportedError
from mechinterp.engines.decomposition.operations import Attention, Operation
from mechinterp.engines.decomposition.rules import Preset, settled

Totals = Mapping[str, Tensor]
"""Every named value of one run, `[batch, pos, ...]` in float32 or better; `pattern.L` is `[batch, head, query, key]`.
Those in `HEAD` are known at the answer positions only."""
HEAD = ("final_norm", "head_pre", "head_post", "uncapped", "logits")


@dataclass(frozen=True)
class Source:
    """One source: the values at which its relevant part is set, and the positions where.

    `entries` are (value, unit or None, positions, replacement): the relevant part becomes total - replacement.
    """

    label: str
    entries: tuple[tuple[str, int | None, Bool[Tensor, "batch pos"], Tensor | None], ...]


@dataclass(frozen=True)
class Tape:
    """Operations in the order of the forward. A name is the output of one operation at most."""

    operations: tuple[Operation, ...]
    visible: Mapping[str, str]
    """Output of an attention -> name of its pattern among the totals."""

    def order(self, name: str) -> int:
        """The step after which the value is known; -1 for an input of the tape."""
        return next((i for i, op in enumerate(self.operations) if op.output == name), -1)

    def check(self, totals: Totals, real: Bool[Tensor, "batch pos"], tolerance: float) -> float:
        """The error of completeness: every rule gives r' + i' = the operation at r + i, which must be the run's value.

        It is the largest difference of any operation, as a share of its output's largest entry. Raises
        UnsupportedError, naming the operation, when it is not rounding: the model computes another operation.
        """
        worst = 0.0
        for op in self.operations:
            if op.output in HEAD:
                continue  # the layout's unembedding was checked at load
            pattern = self.visible.get(op.output)
            names = op.inputs if pattern is None else (pattern, op.inputs[-1])
            got, expected = op.apply([totals[name] for name in names]), totals[op.output]
            chosen = real.reshape(*real.shape, *[1] * (got.ndim - 2))
            size = float(torch.where(chosen, expected, 0).abs().max()) + 1e-30
            gap = float(torch.where(chosen, got - expected, 0).abs().max()) / size
            if not gap < tolerance:
                raise UnsupportedError(
                    f"'{op.output}' is not the {op.kind} of {', '.join(op.inputs)} that the weights give (off by "
                    f"{gap:.2g} of its size): an intervention edits it, or contextual decomposition has no rule for "
                    "what this model does there."
                )
            worst = max(worst, gap)
        return worst

    def needed(self, preset: Preset, targets: Sequence[str]) -> frozenset[str]:
        """The values on whose relevant parts the targets depend."""
        found = set(targets)
        for op in reversed(self.operations):
            if op.output in found:
                frozen = isinstance(op, Attention) and preset.attention == "frozen"
                found.update(op.inputs[-1:] if frozen else op.inputs)
        return frozenset(found)


@dataclass(frozen=True)
class Window:
    """The positions that a walk computes: from `first` on, and for values in `narrow` only those at `at`."""

    first: int
    at: Int[Tensor, "batch n_at"]
    """-1: no entry; the values there are meaningless."""
    narrow: frozenset[str]

    def total(self, value: Tensor, narrow: bool) -> Tensor:
        """A total `[batch, pos, ...]` at the positions."""
        return gathered(value, self.at) if narrow else value[:, self.first :]

    def part(self, value: Tensor, name: str, narrow: bool) -> Tensor:
        """A stored relevant part, at the positions that an operation needs."""
        if narrow and name not in self.narrow:
            return gathered(value.flatten(0, 1), (self.at - self.first).repeat(len(value), 1)).unflatten(
                0, (len(value), -1)
            )
        return value


def gathered(value: Shaped[Tensor, "batch pos ..."], at: Int[Tensor, "batch n_at"]) -> Tensor:
    """The entries at the positions (entry 0 where a position is -1, no entry)."""
    index = at.clamp(min=0).reshape(*at.shape, *[1] * (value.ndim - 2))
    return value.gather(1, index.expand(-1, -1, *value.shape[2:]))


def narrow_values(tape: Tape, preset: Preset, targets: Sequence[str], wide: Sequence[str]) -> frozenset[str]:
    """The values needed at the answer positions only: all of `targets`, none of `wide`."""
    needed = tape.needed(preset, targets)
    everywhere = set(wide)
    for op in reversed(tape.operations):
        if op.output not in needed:
            continue
        if isinstance(op, Attention):
            everywhere.update(op.inputs if op.output in everywhere else op.inputs[1:])
        elif op.output in everywhere:
            everywhere.update(op.inputs)
    return needed - everywhere


def walk(
    tape: Tape,
    preset: Preset,
    totals: Totals,
    sources: Sequence[Source],
    targets: Sequence[str],
    window: Window,
    visible: Mapping[str, Bool[Tensor, "batch 1 query key"]],
) -> dict[str, Float[Tensor, "source batch pos ..."]]:
    """The relevant part of every target for every source, at the window's positions.

    A source overwrites the relevant part that reaches it by total - replacement. A target that a source does not reach
    is exactly 0. Cost: for each source, every operation after it once.
    """
    needed = tape.needed(preset, targets)
    last_use = {name: i for i, op in enumerate(tape.operations) for name in op.inputs}
    parts: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        _inject(parts, name, totals, sources, window)
        if name in targets and name in parts:
            found[name] = parts[name]

    for name in {entry[0] for source in sources for entry in source.entries}:
        if tape.order(name) < 0:
            keep(name)
    for i, op in enumerate(tape.operations):
        if op.output in needed:
            out = _step(tape, preset, op, parts, totals, window, visible)
            if out is not None:
                parts[op.output] = out
            keep(op.output)
        for name in op.inputs:
            if last_use[name] == i:
                parts.pop(name, None)
    return found


def _step(
    tape: Tape,
    preset: Preset,
    op: Operation,
    parts: Mapping[str, Tensor],
    totals: Totals,
    window: Window,
    visible: Mapping[str, Tensor],
) -> Tensor | None:
    narrow = op.output in window.narrow
    out_total = _total(totals, op.output, window, narrow)
    if isinstance(op, Attention):
        out = _attention_step(tape, preset, op, parts, totals, window, visible, out_total)
    else:
        given = [None if name not in parts else window.part(parts[name], name, narrow) for name in op.inputs]
        if all(part is None for part in given):
            return None
        out = op.relevant(preset, given, [_total(totals, name, window, narrow) for name in op.inputs], out_total)
    return settled(out, out_total) if out is not None and op.kind in preset.settle else out


def _total(totals: Totals, name: str, window: Window, narrow: bool) -> Tensor:
    return totals[name] if name in HEAD else window.total(totals[name], narrow)


def _attention_step(
    tape: Tape,
    preset: Preset,
    op: Attention,
    parts: Mapping[str, Tensor],
    totals: Totals,
    window: Window,
    visible: Mapping[str, Tensor],
    out_total: Tensor,
) -> Tensor | None:
    narrow = op.output in window.narrow
    q, k, v = (parts.get(name) for name in op.inputs)
    query = None if q is None else window.part(q, op.inputs[0], narrow)
    if v is None and (preset.attention != "remove" or (q is None and k is None)):
        return None
    if preset.attention == "frozen" or (preset.attention == "remove" and q is None and k is None):
        pattern = totals[tape.visible[op.output]].transpose(1, 2)
        block = window.total(pattern, narrow)[..., window.first :].transpose(1, 2)
        return op.relevant(preset, [v], [block], out_total)
    pad = [None if part is None else _from_start(part, window.first) for part in (k, v)]
    n_pos = totals[op.inputs[1]].shape[1]
    everywhere = torch.arange(n_pos, device=out_total.device).expand(len(out_total), -1)
    at = window.total(everywhere, narrow).clamp(min=0)
    seen = window.total(visible[op.output].transpose(1, 2), narrow).transpose(1, 2)
    of = [window.total(totals[op.inputs[0]], narrow), totals[op.inputs[1]], totals[op.inputs[2]]]
    return op.with_scores(preset, [query, *pad], of, seen, at)


def _from_start(part: Tensor, first: int) -> Tensor:
    """A relevant part at all positions: 0 before `first`."""
    shape = list(part.shape)
    shape[2] = first
    return torch.cat([part.new_zeros(shape), part], 2) if first else part


def _inject(parts: dict[str, Tensor], name: str, totals: Totals, sources: Sequence[Source], window: Window) -> None:
    """Sets the relevant parts of the sources at this value."""
    if not any(value == name for source in sources for value, *_ in source.entries):
        return
    total = totals[name][:, window.first :]
    # A copy, since a sum of one part is that part itself.
    parts[name] = parts[name].clone() if name in parts else total.new_zeros(len(sources), *total.shape)
    for i, source in enumerate(sources):
        for value, unit, mask, replacement in source.entries:
            if value != name:
                continue
            relevant = total
            if replacement is not None:
                given = replacement if replacement.shape[1] == 1 else replacement[:, window.first :]
                relevant = total - given.to(total.dtype)
            where = mask[:, window.first :].reshape(*total.shape[:2], *[1] * (total.ndim - 2))
            own, new = parts[name][i], relevant
            if unit is not None:
                own, new = own[:, :, unit : unit + 1], new[:, :, unit : unit + 1]
            own.copy_(torch.where(where, new, own))
