"""`Pairs`: clean and corrupt prompts with their answers, checked once when they are made."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.tasks.input_checks import NO_ENTRY, Ids, Mask, entries, prompts, whole_numbers
from mechinterp.tasks.source import FileSource, Report, TaskSource

logger = logging.getLogger(__name__)

SHIFTED = 0.9
"""If at least this share of the prompts contain their own answer, they are refused: the answers were not removed."""


@dataclass(frozen=True, init=False, eq=False)
class Pairs:
    """Clean and corrupt token ids of equal length, with answers and positions; one row per example.

    They are stored in one form: right-padded, id 0 under padding, -1 for no entry. Left-padded input is moved to
    the left, together with its positions.

    >>> pairs = Pairs(clean=[[5, 6, 7], [5, 8]], corrupt=[[5, 9, 7], [5, 9]], right=[6, 8], wrong=[9, 9],
    ...     answer_pos=[2, 0])
    >>> pairs.mask.int().tolist(), pairs.answer_pos.tolist()
    ([[1, 1, 1], [1, 1, 0]], [[2], [0]])
    """

    clean: Int[Tensor, "batch pos"]
    corrupt: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    """True at real tokens."""
    right: Int[Tensor, "batch n_right"] | None
    """Token ids of the right answers, -1 where a row has fewer."""
    wrong: Int[Tensor, "batch n_wrong"] | None
    positions: Mapping[str, Int[Tensor, " batch"]]
    """Named positions, the same in clean and corrupt."""
    answer_pos: Int[Tensor, "batch n_answer"]
    """Where the metric reads the logits, -1 where a row has fewer; by default the last real token."""
    clean_text: tuple[str, ...] | None
    corrupt_text: tuple[str, ...] | None
    source: TaskSource | FileSource | None
    report: Report

    def __init__(
        self,
        *,
        clean: Ids,
        corrupt: Ids,
        right: Ids | None = None,
        wrong: Ids | None = None,
        mask: Mask | None = None,
        positions: Mapping[str, Ids] | None = None,
        answer_pos: Ids | None = None,
        clean_text: Sequence[str] | None = None,
        corrupt_text: Sequence[str] | None = None,
        source: TaskSource | FileSource | None = None,
        report: Report | None = None,
    ) -> None:
        """Check everything that can be checked without a model.

        Ids can be tensors, arrays or lists; every tensor is moved to the device of `clean`.

        Args:
            clean: Token ids of the clean prompts `[batch, pos]`; lists may have rows of different lengths.
            corrupt: Token ids of the corrupt prompts, each as long as its clean prompt.
            right: Token ids of the right answers, `[batch]` or `[batch, n_right]` with -1 for no entry.
            wrong: Token ids of the wrong answers, in the same form; they need `right`.
            mask: True at real tokens, for both prompts of a pair; by default all tokens of a row are real.
            positions: Named positions, `[batch]` columns of `clean` each.
            answer_pos: Where the metric reads the logits, `[batch]` or `[batch, n_answer]` with -1 for no entry; by
                default the last real token.
            clean_text: The clean prompts as text, for display.
            corrupt_text: The corrupt prompts as text, for display.
            source: The task or file that the pairs come from, for circuit files.
            report: What was left out when the pairs were made.

        Raises InputError, with the row, for anything that does not fit together.
        """
        clean_ids, corrupt_ids, valid, shift = prompts(clean, corrupt, mask)
        n_rows, device = len(clean_ids), clean_ids.device
        if answer_pos is None:
            answers_at = shift.lengths[:, None] - 1
        else:
            answers_at = shift.moved("answer_pos", entries("answer_pos", answer_pos, n_rows, device))
        right_ids = None if right is None else entries("right", right, n_rows, device)
        wrong_ids = None if wrong is None else entries("wrong", wrong, n_rows, device)
        _check_answers(right_ids, wrong_ids, clean_ids, answers_at)
        named = {name: _named(name, at, n_rows, device) for name, at in (positions or {}).items()}
        self._fill(
            clean=clean_ids,
            corrupt=corrupt_ids,
            mask=valid,
            right=right_ids,
            wrong=wrong_ids,
            positions={name: shift.moved(f"positions[{name!r}]", at)[:, 0] for name, at in named.items()},
            answer_pos=answers_at,
            clean_text=_texts("clean_text", clean_text, n_rows),
            corrupt_text=_texts("corrupt_text", corrupt_text, n_rows),
            source=source,
            report=report or Report(),
        )

    def _fill(self, *, positions: Mapping[str, Tensor], **values: Any) -> None:
        object.__setattr__(self, "positions", MappingProxyType(dict(positions)))
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _with(self, **changes: Any) -> Pairs:
        """A copy with some parts replaced, which must be in the stored form; without checks."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)} | changes
        made = object.__new__(Pairs)
        made._fill(**values)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle and copy, which cannot handle a read-only view of a mapping."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"positions": dict(self.positions)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._fill(**state)

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        right, wrong = (0 if ids is None else ids.shape[1] for ids in (self.right, self.wrong))
        names = ", ".join(self.positions) or "none"
        return (
            f"Pairs({len(self)} examples x {self.clean.shape[1]} tokens, {right} right, {wrong} wrong, "
            f"positions: {names})"
        )

    @property
    def device(self) -> torch.device:
        """The device of every tensor of the pairs."""
        return self.clean.device

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """How many real tokens each example has."""
        return self.mask.sum(1)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Pairs:
        """The chosen examples as Pairs of the same padded width; one example is enough here.

        Their `source` is None unless every row is chosen in order, since a part of a source is not that source.

        Args:
            rows: A slice, a list or tensor of row numbers, or a boolean mask with one value per example.

        Raises InputError for a choice of none and for rows that do not exist.
        """
        every = torch.arange(len(self), device=self.device)
        if isinstance(rows, slice):
            rows = list(range(len(self))[rows])  # tensors do not support negative steps, ranges do
        chosen = _rows(rows, every)
        if not len(chosen):
            raise InputError(f"{rows!r} selects none of the {len(self)} examples.")
        numbers = chosen.tolist()
        whole = numbers == list(range(len(self)))
        return self._with(
            **{name: None if ids is None else ids[chosen] for name, ids in self._tables().items()},
            positions={name: at[chosen] for name, at in self.positions.items()},
            clean_text=self.clean_text and tuple(self.clean_text[row] for row in numbers),
            corrupt_text=self.corrupt_text and tuple(self.corrupt_text[row] for row in numbers),
            source=self.source if whole else None,
        )

    def to(self, device: torch.device | str) -> Pairs:
        """The same pairs with every tensor on a device.

        Args:
            device: A torch device or its name, such as `cuda`.
        """
        return self._with(
            **{name: None if ids is None else ids.to(device) for name, ids in self._tables().items()},
            positions={name: at.to(device) for name, at in self.positions.items()},
        )

    def read_at(self, answer_pos: Ids) -> Pairs:
        """The same prompts without answers, with the metric read elsewhere: for metrics that need no answers.

        Args:
            answer_pos: Where the metric reads, `[batch]` or `[batch, n_answer]` with -1 for no entry.

        Raises InputError for positions that are not in the prompts.
        """
        at = entries("answer_pos", answer_pos, len(self), self.device)
        if bool((at >= self.lengths[:, None]).any()):
            row = int((at >= self.lengths[:, None]).any(1).nonzero()[0])
            raise InputError(
                f"answer_pos is {at[row].tolist()} in row {row}, which has {int(self.lengths[row])} tokens."
            )
        return self._with(right=None, wrong=None, answer_pos=at, source=None)

    def from_source(self, source: TaskSource | FileSource | None) -> Pairs:
        """The same pairs, recorded as made from `source`."""
        return self._with(source=source)

    def exchanged(self, rows: Bool[Tensor, " batch"]) -> Pairs:
        """The pairs with clean and corrupt prompts, and right and wrong answers, exchanged in some rows.

        That is a pair of the same task only where the wrong answer is the right one of the corrupt prompt.

        Args:
            rows: True where they are exchanged.

        Raises InputError for a different number of right and wrong answers, and other rows.
        """
        if rows.shape != (len(self),) or rows.dtype != torch.bool:
            raise InputError(
                f"`rows` must be a boolean per example ({len(self)}); got {rows.dtype} {list(rows.shape)}."
            )
        right, wrong = self.right, self.wrong
        if right is None or wrong is None or right.shape != wrong.shape:
            raise InputError("Only pairs with as many wrong answers as right ones can be exchanged.")
        at, which = rows.to(self.device)[:, None], rows.tolist()

        def texts(first: tuple[str, ...] | None, second: tuple[str, ...] | None) -> tuple[str, ...] | None:
            if first is None or second is None:
                return None
            return tuple(b if swap else a for a, b, swap in zip(first, second, which, strict=True))

        return self._with(
            clean=torch.where(at, self.corrupt, self.clean),
            corrupt=torch.where(at, self.clean, self.corrupt),
            right=torch.where(at, wrong, right),
            wrong=torch.where(at, right, wrong),
            clean_text=texts(self.clean_text, self.corrupt_text),
            corrupt_text=texts(self.corrupt_text, self.clean_text),
            source=None if bool(rows.any()) else self.source,
        )

    def chunks(self, batch_size: int) -> Iterator[Pairs]:
        """The pairs in order, in parts.

        Args:
            batch_size: Examples per part; the last part may be smaller.

        Raises InputError for a size below 1.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1; got {batch_size}.")
        return (self[start : start + batch_size] for start in range(0, len(self), batch_size))

    def _tables(self) -> dict[str, Tensor | None]:
        return {
            "clean": self.clean,
            "corrupt": self.corrupt,
            "mask": self.mask,
            "right": self.right,
            "wrong": self.wrong,
            "answer_pos": self.answer_pos,
        }

    def digest(self) -> str:
        """SHA-256 (hex) over lengths, real token ids, answers and positions; padding is not included."""
        made = hashlib.sha256(b"mechinterp.pairs.1\n")
        parts: dict[str, Tensor | None] = {
            "lengths": self.lengths,
            "clean": self.clean[self.mask],
            "corrupt": self.corrupt[self.mask],
        }
        for name, table in (("right", self.right), ("wrong", self.wrong), ("answer_pos", self.answer_pos)):
            valid = None if table is None else table != NO_ENTRY
            parts[f"{name}.counts"] = None if valid is None else valid.sum(1)
            parts[name] = None if table is None else table[valid]
        parts |= {f"positions.{name}": self.positions[name] for name in sorted(self.positions)}
        for name, values in parts.items():
            numbers = None if values is None else values.cpu().numpy().astype("<i8")
            made.update(f"{len(name)}:{name} {'none' if numbers is None else numbers.size}\n".encode())
            made.update(b"" if numbers is None else np.ascontiguousarray(numbers).tobytes())
        return made.hexdigest()

    def check_vocabulary(self, d_vocab: int, d_vocab_out: int | None = None) -> None:
        """Return None when every token id is in the vocabulary.

        Args:
            d_vocab: The number of token ids that the model reads.
            d_vocab_out: The number of its logits, which limits the answers; by default `d_vocab`.

        Raises InputError with the first row that has another id.
        """
        answers = d_vocab if d_vocab_out is None else d_vocab_out
        for name, size in {"clean": d_vocab, "corrupt": d_vocab, "right": answers, "wrong": answers}.items():
            ids = getattr(self, name)
            if ids is not None and int(ids.max()) >= size:
                row = int((ids >= size).any(1).nonzero()[0])
                raise InputError(
                    f"{name} holds token id {int(ids[row].max())} in row {row}, but the vocabulary has "
                    f"{size} ids (0..{size - 1}). Were the pairs made with another tokenizer?"
                )

    def check_bos(self, bos_token_id: int) -> None:
        """Return None when no prompt begins with BOS twice.

        Args:
            bos_token_id: The tokenizer's BOS token.

        Raises InputError with the first row that does.
        """
        if self.clean.shape[1] < 2:
            return
        for name in ("clean", "corrupt"):
            doubled = ((getattr(self, name)[:, :2] == bos_token_id) & self.mask[:, :2]).all(1)
            if bool(doubled.any()):
                row = int(doubled.nonzero()[0])
                raise InputError(
                    f"{name} begins with the BOS token {bos_token_id} twice in row {row}: the text "
                    "holds BOS already and the tokenizer adds it too. Keep one of them."
                )


def _check_answers(
    right: Tensor | None, wrong: Tensor | None, clean: Tensor, answer_pos: Int[Tensor, "batch n_answer"]
) -> None:
    if wrong is not None and right is None:
        raise InputError("wrong answers are given without right ones; give right, too.")
    if right is not None and wrong is not None:
        shared = _have_a_common_entry(right, wrong)
        if bool(shared.any()):
            row = int(shared.nonzero()[0])
            raise InputError(
                f"right and wrong must differ; row {row} has {right[row].tolist()} and {wrong[row].tolist()}."
            )
    if right is not None:
        read = torch.where(answer_pos == NO_ENTRY, NO_ENTRY, clean.gather(1, answer_pos.clamp(min=0)))
        _check_shift(_have_a_common_entry(right, read))


def _check_shift(held: Bool[Tensor, " batch"]) -> None:
    """Raises InputError when (almost) all clean prompts have their right answer at the answer position.

    Then the metric would read one position late. In a few rows the same token may occur there legitimately.
    """
    rows = held.nonzero()[:, 0].tolist()
    if len(rows) >= SHIFTED * len(held):
        raise InputError(
            f"{len(rows)} of {len(held)} clean prompts hold their right answer at the answer position (the first in "
            f"row {rows[0]}), so the metric would read one position late. Remove the answers from the prompts."
        )
    if rows:
        logger.warning(
            "%d of %d clean prompts hold their right answer at the answer position (the first in row %d); if the "
            "answer is not meant to be there, remove it.",
            *(len(rows), len(held), rows[0]),
        )


def _have_a_common_entry(left: Int[Tensor, "batch n"], right: Int[Tensor, "batch k"]) -> Bool[Tensor, " batch"]:
    same = (left[:, :, None] == right[:, None, :]) & (left != NO_ENTRY)[:, :, None]
    return same.flatten(1).any(1)


def _named(name: str, at: Ids, n_rows: int, device: torch.device) -> Int[Tensor, "batch 1"]:
    if not name:
        raise InputError("A position's name must not be empty.")
    column = whole_numbers(f"positions[{name!r}]", at).to(device)
    if column.shape != (n_rows,):
        raise InputError(f"positions[{name!r}] must be [batch] with batch = {n_rows}; got shape {tuple(column.shape)}.")
    if int(column.min()) < 0:
        raise InputError(
            f"positions[{name!r}] is {int(column.min())} in row {int(column.argmin())}; positions are "
            "counted from the first column, and every example needs one."
        )
    return column[:, None]


def _texts(name: str, texts: Sequence[str] | None, n_rows: int) -> tuple[str, ...] | None:
    if texts is None:
        return None
    if isinstance(texts, str) or len(texts) != n_rows:
        raise InputError(f"{name} must be {n_rows} strings, one per example.")
    return tuple(texts)


def _rows(rows: Tensor | Sequence[int], every: Int[Tensor, " batch"]) -> Int[Tensor, " chosen"]:
    if isinstance(rows, (int, np.integer)) or not hasattr(rows, "__len__"):
        raise InputError(f"Pairs are indexed with a slice or a list of rows; got {rows!r}. Write pairs[i:i + 1].")
    index = torch.as_tensor(rows, device=every.device)
    if index.ndim != 1 or index.dtype.is_floating_point or index.dtype.is_complex:
        raise InputError(f"Pairs are indexed with whole row numbers or a boolean mask; got {rows!r}.")
    if index.dtype == torch.bool:
        if len(index) != len(every):
            raise InputError(f"A boolean index needs one value per example ({len(every)}); got {len(index)}.")
        return every[index]
    if len(index) and not bool(((index >= -len(every)) & (index < len(every))).all()):
        raise InputError(f"Row numbers must be in 0..{len(every) - 1}; got {rows!r}.")
    return every[index.long()]
