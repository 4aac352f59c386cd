"""Composition scores: how much of what one head writes is in the subspace another head reads, from weights alone."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.analysis.weights import FOLDED, reading, writing
from mechinterp.base.registry import unknown
from mechinterp.engines.grid import Grid, numbered
from mechinterp.models.hook_manager import HookManager

CHANNELS = ("q", "k", "v")


def composition_scores(model: HookManager, kind: str) -> Grid:
    """A Grid (sender_layer, sender_head, receiver_layer, receiver_head): ||A B||_F / (||A||_F ||B||_F), 0 to 1.

    A = W_V W_O of the sender, B is the receiver's matrix. NaN where the sender is not before the receiver. Norm
    weights are folded in; the scale of a norm does not matter, since the score does not depend on the sizes of A and
    B. The weights are used as the model has them: published scores are mostly of processed weights (compatibility
    mode), whose W_O are centred.

    Args:
        model: The model.
        kind: The receiver's input: `q` (B = W_Q W_K'), `k` (B = W_K W_Q') or `v` (B = W_V W_O).

    With random orientations the mean square of the score is 1 / d_model whatever the singular values are, so
    `about["baseline"]` = 1 / sqrt(d_model) is the value to compare with (or to subtract). Elhage et al. subtract the
    score of random matrices.

    Under grouped-query attention the key and value weights are those of the head's KV head. With rotary positions W_Q
    W_K' is that of relative position 0.

    Cost: no forward; per receiver layer one product of `[n_layers * d_model, d_model] x [d_model, d_model]`, all
    norms from d_head x d_head factors. Source: Elhage et al. 2021, "Virtual attention heads".

    >>> import mechinterp as mi
    >>> scores = composition_scores(mi.load_model("bundled"), "k")
    >>> scores.axes
    ('sender_layer', 'sender_head', 'receiver_layer', 'receiver_head')
    """
    if kind not in CHANNELS:
        raise unknown("composition", kind, CHANNELS)
    dims = model.dims
    n_layers, n_heads = dims.n_layers, dims.n_heads
    senders = [_from_left(reading(model, layer, "v"), writing(model, layer)) for layer in range(n_layers)]
    shape = (n_layers, n_heads, n_layers, n_heads)
    scores = torch.full(shape, torch.nan, dtype=senders[0].dtype, device=model.device)
    sizes = [torch.linalg.matrix_norm(sender) for sender in senders]
    for layer in range(1, n_layers):
        entry = _to_right(model, layer, kind)
        size = torch.linalg.matrix_norm(entry)
        columns = entry.transpose(0, 1).flatten(1)
        for before in range(layer):
            product = (senders[before].flatten(0, 1) @ columns).unflatten(0, (n_heads, -1)).unflatten(-1, (n_heads, -1))
            norms = product.pow(2).sum((1, 3)).sqrt()
            scores[before, :, layer] = norms / (sizes[before][:, None] * size)
    labels = {
        "sender_layer": numbered(n_layers),
        "sender_head": numbered(n_heads),
        "receiver_layer": numbered(n_layers),
        "receiver_head": numbered(n_heads),
    }
    about = {
        "kind": f"{kind}-composition",
        "baseline": dims.d_model**-0.5,
        "weights": model.info.processing,
        "folded": FOLDED,
    }
    return Grid(scores, labels, "composition", "", about)


def _from_left(
    left: Float[Tensor, "head d_model d_head"], right: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "head d_head d_model"]:
    """A matrix [d_head, d_model] with the norms of `left @ right`, and of its products with anything on the right."""
    return torch.linalg.qr(left, mode="r").R @ right


def _to_right(model: HookManager, layer: int, kind: str) -> Float[Tensor, "head d_model d_head"]:
    """A matrix [d_model, d_head] with the norms of what the receiver reads with, and of anything times it."""
    if kind == "v":
        first, second = reading(model, layer, "v"), writing(model, layer).transpose(1, 2)
    else:
        first, second = reading(model, layer, kind), reading(model, layer, "k" if kind == "q" else "q")
    # first @ second' has the norms of first @ R' where second = Q R
    return first @ torch.linalg.qr(second, mode="r").R.transpose(1, 2)
