"""The logits of many vectors, a chunk of the vocabulary at a time: never `[.., d_vocab]` for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.models.layout import Layout

MEMORY = 2**27
"""Bytes that the logits of one chunk of the vocabulary may take."""


@dataclass(frozen=True)
class Reading:
    """Statistics of distributions over the vocabulary; the last row is the reference of `kl`."""

    top_tokens: Int[Tensor, "row k"]
    top_log_probs: Float[Tensor, "row k"]
    entropy: Float[Tensor, " row"]
    kl: Float[Tensor, " row"]
    target_log_probs: Float[Tensor, "row target"]
    target_ranks: Int[Tensor, "row target"]


def vocabulary_chunks(layout: Layout, n_rows: int, dtype: torch.dtype, chunk: int | None) -> Iterator[slice]:
    """Slices of the vocabulary, by default as wide as the memory budget allows for so many rows."""
    d_vocab = layout.W_U.shape[1]
    width = chunk or max(256, MEMORY // max(1, n_rows * dtype.itemsize))
    return (slice(first, min(first + width, d_vocab)) for first in range(0, d_vocab, width))


def logits_of(layout: Layout, normed: Float[Tensor, "*axes d_model"], columns: slice) -> Float[Tensor, "*axes column"]:
    """The logits of some tokens from the final norm's output, with bias and soft cap."""
    logits = normed @ layout.W_U[:, columns].to(normed.dtype)
    if layout.b_U is not None:
        logits = logits + layout.b_U[columns].to(normed.dtype)
    return layout.soft_cap * torch.tanh(logits / layout.soft_cap) if layout.soft_cap else logits


def read_vocabulary(
    layout: Layout,
    normed: Float[Tensor, "row item d_model"],
    targets: Int[Tensor, "item target"],
    top_k: int,
    chunk: int | None = None,
) -> list[Reading]:
    """Per row the distributions of its items, from the final norm's outputs; the last row is the reference.

    The log of the sum of exponentials, the moments and the best tokens are carried from chunk to chunk.

    Args:
        layout: The model's final norm, unembedding and soft cap.
        normed: The final norm's outputs.
        targets: Token ids whose ranks and log-probabilities to give; -1: no entry (NaN and -1 in the result).
        top_k: How many of the most probable tokens to keep.
        chunk: Tokens of the vocabulary at a time; None: as many as fit `MEMORY` bytes of logits.
    """
    n_rows, n_items, _ = normed.shape
    flat = (n_rows, n_items)
    largest = normed.new_full(flat, -torch.inf)
    total, moment, shared = (normed.new_zeros(flat) for _ in range(3))
    best = normed.new_full((*flat, top_k), -torch.inf)
    ids = torch.zeros(*flat, top_k, dtype=torch.long, device=normed.device)
    aims = torch.stack(
        [_own_logits(layout, row, targets) for row in normed]
    )  # before the loop, because a rank needs the target's logit
    ranks = torch.zeros(*flat, targets.shape[1], dtype=torch.long, device=normed.device)
    for columns in vocabulary_chunks(layout, n_rows * n_items, normed.dtype, chunk):
        logits = logits_of(layout, normed, columns)
        new = torch.maximum(largest, logits.amax(-1))
        fade, weights = (largest - new).exp(), (logits - new[..., None]).exp()
        moment = moment * fade + (weights * logits).sum(-1)
        total = total * fade + weights.sum(-1)
        # The reference's weights on this row's logits, rescaled by the reference's own largest.
        shared = shared * fade[-1] + (weights[-1] * logits).sum(-1)
        largest = new
        own, at = logits.topk(min(top_k, logits.shape[-1]), -1)
        best, order = torch.cat([best, own], -1).topk(top_k, -1)
        ids = torch.cat([ids, at + columns.start], -1).gather(-1, order)
        here = torch.arange(columns.start, columns.stop, device=normed.device)
        for i in range(targets.shape[1]):
            above = (logits > aims[..., i, None]) & (here != targets[:, i, None])
            ranks[..., i] += above.sum(-1)
    lse = largest + total.log()
    entropy = lse - moment / total
    kl = -entropy[-1] + lse - shared / total[-1]
    there = (targets >= 0).expand(n_rows, -1, -1)
    aims = torch.where(there, aims - lse[..., None], torch.nan)
    ranks = torch.where(there, ranks, -1)
    return [
        Reading(ids[r], best[r] - lse[r][:, None], entropy[r], kl[r].clamp(min=0), aims[r], ranks[r])
        for r in range(n_rows)
    ]


def _own_logits(
    layout: Layout, normed: Float[Tensor, "item d_model"], targets: Int[Tensor, "item target"]
) -> Float[Tensor, "item target"]:
    """Each item's logits of its own targets."""
    index = targets.clamp(min=0)
    logits = torch.einsum("id,dit->it", normed, layout.W_U[:, index].to(normed.dtype))
    if layout.b_U is not None:
        logits = logits + layout.b_U[index].to(normed.dtype)
    return layout.soft_cap * torch.tanh(logits / layout.soft_cap) if layout.soft_cap else logits


def extremes(
    layout: Layout, vectors: Float[Tensor, "item d_model"], top_k: int, chunk: int | None = None
) -> tuple[Int[Tensor, "item k"], Float[Tensor, "item k"], Int[Tensor, "item k"], Float[Tensor, "item k"]]:
    """(tokens most raised, by how much, tokens most lowered, by how much) by vectors after the final norm, in logits.

    Without bias and soft cap: what the vectors add.
    """
    signs = (1, -1)
    best = [vectors.new_full((len(vectors), top_k), -torch.inf) for _ in signs]
    ids = [torch.zeros(len(vectors), top_k, dtype=torch.long, device=vectors.device) for _ in signs]
    for columns in vocabulary_chunks(layout, len(vectors), vectors.dtype, chunk):
        logits = vectors @ layout.W_U[:, columns].to(vectors.dtype)
        for i, sign in enumerate(signs):
            own, at = logits.topk(min(top_k, logits.shape[-1]), -1, largest=sign > 0)
            best[i], order = torch.cat([best[i], sign * own], -1).topk(top_k, -1)
            ids[i] = torch.cat([ids[i], at + columns.start], -1).gather(-1, order)
    return ids[0], best[0], ids[1], -best[1]
