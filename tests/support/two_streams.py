"""The published decomposition written out by hand with both streams, for a GPT-2 without grouping or rotation.

Slow and plain, and it shares no code with the package: the rules of Hsu et al. 2024 as their public code has them, with
the norm's own epsilon and bias shares that sum to 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Two = tuple[Tensor, Tensor]


def linear(two: Two, weight: Tensor, bias: Tensor) -> Two:
    r, i = two[0] @ weight, two[1] @ weight
    both = r.abs() + i.abs()
    share = torch.where(both > 0, r.abs() / both.clamp(min=1e-300), 0.0)
    return r + share * bias, i + (1 - share) * bias


def layer_norm(two: Two, weight: Tensor, bias: Tensor, eps: float) -> Two:
    scale = (two[0] + two[1]).var(-1, unbiased=False, keepdim=True).add(eps).sqrt()
    r, i = ((part - part.mean(-1, keepdim=True)) / scale * weight for part in two)
    share = torch.where(r.abs() + i.abs() > 0, r.abs() / (r.abs() + i.abs()).clamp(min=1e-300), 0.0)
    return r + share * bias, i + (1 - share) * bias


def settle(two: Two) -> Two:
    r, i = two
    opposite = r * i < 0
    r_wins = opposite & (r.abs() >= i.abs())
    i_wins = opposite & (r.abs() < i.abs())
    total = r + i
    return (
        torch.where(r_wins, total, torch.where(i_wins, 0.0, r)),
        torch.where(i_wins, total, torch.where(r_wins, 0.0, i)),
    )


def attention(q: Two, k: Two, v: Two) -> Two:
    """`[batch, pos, head, d]` each; the relevant pattern is that of the relevant queries and keys."""

    def pattern(queries: Tensor, keys: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / queries.shape[-1] ** 0.5
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return scores.masked_fill(~visible, -torch.inf).softmax(-1)

    whole = torch.einsum("bhqk,bkhd->bqhd", pattern(q[0] + q[1], k[0] + k[1]), v[0] + v[1])
    r = torch.einsum("bhqk,bkhd->bqhd", pattern(q[0], k[0]), v[0])
    return r, whole - r


def gelu_new(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gpt2(module: Any, tokens: Tensor, layer: int, head: int, at: int | None, mean: Tensor | None) -> dict[str, Two]:
    """Both streams at every value, for one head of one layer as the source (its z less `mean`), by `authors-gpt`."""
    body, found = module.transformer, dict[str, Two]()
    n_heads = module.config.n_head
    positions = torch.arange(tokens.shape[1])
    resid: Two = (torch.zeros(()), body.wte(tokens) + body.wpe(positions))
    resid = (torch.zeros_like(resid[1]), resid[1])
    for number, block in enumerate(body.h):
        found[f"resid_pre.{number}"] = resid
        normed = layer_norm(resid, block.ln_1.weight, block.ln_1.bias, block.ln_1.eps)
        weights, biases = block.attn.c_attn.weight.chunk(3, 1), block.attn.c_attn.bias.chunk(3)
        q, k, v = (
            tuple(part.unflatten(-1, (n_heads, -1)) for part in linear(normed, w, b))
            for w, b in zip(weights, biases, strict=True)
        )
        z = attention(q, k, v)  # type: ignore[arg-type]
        if number == layer:
            whole = z[0] + z[1]
            r = torch.zeros_like(whole)
            where = slice(None) if at is None else slice(at, at + 1)
            r[:, where, head] = whole[:, where, head] - (0 if mean is None else mean)
            z = (r, whole - r)
        found[f"q.{number}"], found[f"z.{number}"] = q, z  # type: ignore[assignment]
        flat: Two = (z[0].flatten(2), z[1].flatten(2))
        out = linear(flat, block.attn.c_proj.weight, block.attn.c_proj.bias)
        resid = (resid[0] + out[0], resid[1] + out[1])
        found[f"resid_mid.{number}"] = resid
        inside = layer_norm(resid, block.ln_2.weight, block.ln_2.bias, block.ln_2.eps)
        pre = settle(linear(inside, block.mlp.c_fc.weight, block.mlp.c_fc.bias))
        i = gelu_new(pre[1])
        post = (gelu_new(pre[0] + pre[1]) - i, i)
        found[f"mlp_post.{number}"] = post
        written = settle(linear(post, block.mlp.c_proj.weight, block.mlp.c_proj.bias))
        resid = settle((resid[0] + written[0], resid[1] + written[1]))
    found["resid_final"] = resid
    normed = layer_norm(resid, body.ln_f.weight, body.ln_f.bias, body.ln_f.eps)
    found["logits"] = linear(normed, module.lm_head.weight.T, torch.zeros(module.lm_head.weight.shape[0]))
    return found
