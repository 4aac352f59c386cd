"""Prompts as a user gives them: pairs, or token ids alone."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from mechinterp.errors import InputError
from mechinterp.tasks.pairs import Pairs


def as_pairs(prompts: object, mask: Bool[Tensor, "batch pos"] | None = None) -> Pairs:
    """Pairs as they are, or made of token ids `[batch, pos]` and their mask. Raises InputError for anything else."""
    if isinstance(prompts, Pairs):
        return prompts
    if not isinstance(prompts, Tensor) or prompts.ndim != 2 or not len(prompts):
        got = f"shape {list(prompts.shape)}" if isinstance(prompts, Tensor) else type(prompts).__name__
        raise InputError(f"Give Pairs, or token ids as a tensor [batch, pos]; got {got}.")
    twice = torch.cat([prompts, prompts])  # Pairs want two rows; one prompt is enough here
    real = None if mask is None else torch.cat([mask, mask])
    return Pairs(clean=twice, corrupt=twice, mask=real)[: len(prompts)]
