"""Texts of a corpus as prompts: read one after the other, in padded batches, so that a corpus may be of any size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.analysis.phrases import prompt_ids
from mechinterp.base.errors import InputError
from mechinterp.models.components import as_pairs
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.pairs import Pairs

Texts = Iterable[str | Tensor] | Pairs | Tensor
"""Texts or token ids `[pos]`, one by one; or prompts as pairs (the clean ones) or token ids `[text, pos]`."""


def text_ids(model: HookManager, texts: Texts, skip: int = 0) -> Iterator[Int[Tensor, " pos"]]:
    """The token ids of every text, longer ones cut to what the model reads. Raises InputError for an empty text."""
    if isinstance(texts, str):
        raise InputError("`texts` are several texts; put one text in a list.")
    if isinstance(texts, (Pairs, Tensor)):
        pairs = as_pairs(texts)
        rows = (row[real] for row, real in zip(pairs.clean, pairs.mask, strict=True))
    else:
        rows = iter(texts)
    for text in islice(rows, skip, None):
        yield prompt_ids(model, text)[: model.dims.n_ctx]


def batches_of_texts(
    model: HookManager, texts: Texts, batch_size: int, skip: int = 0
) -> Iterator[tuple[Int[Tensor, "batch pos"], Tensor]]:
    """(token ids, mask) of so many texts at a time, padded on the right, on the model's device."""
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}.")
    rows = text_ids(model, texts, skip)
    while batch := list(islice(rows, batch_size)):
        yield padded(batch, model.device)


def padded(rows: list[Tensor], device: torch.device) -> tuple[Int[Tensor, "batch pos"], Tensor]:
    """(token ids, mask) of rows of any length, padded on the right with 0."""
    width = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long, device=device)
    mask = torch.zeros(len(rows), width, dtype=torch.bool, device=device)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row.to(device), True
    return tokens, mask
