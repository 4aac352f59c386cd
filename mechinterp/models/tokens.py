"""Checks of the token ids and positions of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.models.layout import Dims
from mechinterp.models.past import Past


def check_tokens(tokens: Any, mask: Any, dims: Dims, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token ids `[batch, pos]` on `device` and their mask (None if no real token can attend to padding).

    A causal model's real tokens never attend to padding on the right, so no mask is needed there, and one would do
    harm: with a sliding window, padding that attends only to padding is NaN in some models, and the NaN spreads.

    Raises InputError for anything that the model cannot run on.
    """
    try:
        tokens = torch.as_tensor(tokens, device=device)
    except (TypeError, ValueError) as error:
        raise InputError(f"Tokens do not form a rectangle of token ids: {error}. Pad them and pass a mask.") from None
    if tokens.ndim != 2 or tokens.numel() == 0 or tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise InputError(f"Tokens must be whole numbers [batch, pos]; got {tokens.dtype} {list(tokens.shape)}.")
    mask = None if mask is None else torch.as_tensor(mask, device=device).bool()
    low, high, *of_mask = _looked_up(tokens, mask)
    if low < 0 or high >= dims.d_vocab:
        raise InputError(f"Token id {low if low < 0 else high} is not in the model's vocabulary of {dims.d_vocab}.")
    if tokens.shape[1] > dims.n_ctx:
        raise InputError(f"Prompts have {tokens.shape[1]} tokens; the model reads {dims.n_ctx} at most.")
    if mask is None:
        return tokens, None
    if mask.shape != tokens.shape:
        raise InputError(f"The mask is {list(mask.shape)}, the tokens are {list(tokens.shape)}; they must agree.")
    some_real, all_real, right_padded = of_mask
    if not some_real:
        raise InputError("A row of the mask has no real token.")
    return tokens, None if all_real or (dims.causal and right_padded) else mask


def _looked_up(tokens: Tensor, mask: Tensor | None) -> list[int]:
    """The lowest and the highest id, and whether each row has a real token, all are real, and padding is on the right.

    One transfer, since each makes the host wait for the device.
    """
    found = [tokens.min(), tokens.max()]
    if mask is not None and mask.shape == tokens.shape:
        falls = (mask[:, 1:] & ~mask[:, :-1]).any()
        found += [mask.any(-1).all(), mask.all(), ~falls & mask[:, 0].all()]
    return torch.stack([one.long() for one in found]).tolist()


def check_at(at: Any, tokens: Tensor) -> Tensor:
    """The positions `[batch, n]` (-1: no entry) on the device of the tokens. Raises InputError for invalid ones."""
    at = torch.as_tensor(at, device=tokens.device)
    if at.ndim != 2 or len(at) != len(tokens) or at.dtype.is_floating_point or at.dtype == torch.bool:
        raise InputError(
            f"`at` must hold whole numbers [batch, n] with batch = {len(tokens)}; got {at.dtype} {list(at.shape)}."
        )
    if not bool(((at >= -1) & (at < tokens.shape[1])).all()):
        raise InputError(f"`at` must hold positions from 0 to {tokens.shape[1] - 1}, or -1 for no entry.")
    return at


def check_past(past: Past, tokens: Tensor, mask: Tensor | None, dims: Dims, *, edited: bool) -> None:
    """Return None when a run of `tokens` can continue from `past`. Raises InputError otherwise."""
    if edited:
        raise InputError("A run inside `intervene` cannot continue from a past: the edits would move.")
    if mask is not None:
        raise InputError("A run that continues from a past cannot have padding on the left.")
    batch = past.layers[0][0].shape[0]
    if len(past.layers) != dims.n_layers or batch != len(tokens):
        raise InputError(
            f"The past holds {batch} prompts and {len(past.layers)} layers; the run has {len(tokens)} prompts and "
            f"{dims.n_layers} layers."
        )
    if past.n_pos + tokens.shape[1] > dims.n_ctx:
        raise InputError(f"Past and prompts have {past.n_pos + tokens.shape[1]} tokens; the model reads {dims.n_ctx}.")
