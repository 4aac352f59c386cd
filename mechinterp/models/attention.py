"""Attention scores of one layer as a closed form of its queries and keys, checked against the running model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.errors import UnsupportedError
from mechinterp.models.modes import Gradients
from mechinterp.models.placement import on_device


@dataclass(frozen=True)
class AttentionScores:
    """`scale * <rotated q, rotated k>`, soft-capped where the model has a cap; before the mask."""

    scale: float
    cap: float | None = None
    cos: Float[Tensor, "pos rotated"] | None = None
    """The rotary tables, over the first `rotated` entries of a head (half-split pairs); None without rotation."""
    sin: Float[Tensor, "pos rotated"] | None = None

    def __call__(
        self,
        q: Float[Tensor, "*_axes query head d_head"],
        k: Float[Tensor, "*_axes key kv_head d_head"],
        at: Int[Tensor, "batch query"] | None = None,
    ) -> Float[Tensor, "*_axes head query key"]:
        """The scores; `at` are the positions of the queries (default: 0, 1, ...), the last axis before is the batch."""
        group = q.shape[-2] // k.shape[-2]
        rotated = self.rotated(k, None).repeat_interleave(group, -2).transpose(-3, -2)
        scores = self.rotated(q, at).transpose(-3, -2) @ rotated.transpose(-2, -1) * self.scale
        return scores if self.cap is None else self.cap * torch.tanh(scores / self.cap)

    def rotated(self, x: Tensor, at: Tensor | None) -> Tensor:
        """`[.., pos, head, d_head]` after the rotation of its positions `at` (default: 0, 1, ...); linear in x."""
        if self.cos is None or self.sin is None:
            return x
        where = torch.arange(x.shape[-3], device=x.device) if at is None else at
        cos, sin = (table.to(x.dtype)[where].unsqueeze(-2) for table in (self.cos, self.sin))
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = turned.chunk(2, -1)
        return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def attention_scores(bridge: Any, layer: int, n_pos: int) -> AttentionScores:
    """The closed form from the layer's weights and configuration; `check_pattern` checks whether it holds."""
    attn, main = bridge.blocks[layer].attn, bridge.W_U.device
    component = getattr(attn, "original_component", None) or attn
    scale = getattr(component, "scaling", None)
    usual = 1.0 if type(component).__name__ == "GPTNeoSelfAttention" else float(attn.W_Q.shape[-1]) ** -0.5
    scale = float(scale) if isinstance(scale, (int, float)) else usual
    cap = getattr(component, "attn_logit_softcapping", None)
    cos, sin = _rotary_tables(bridge, layer, n_pos)
    cos, sin = (table if table is None else on_device(table, main) for table in (cos, sin))
    return AttentionScores(scale, float(cap) if cap else None, cos, sin)


def _rotary_tables(bridge: Any, layer: int, n_pos: int) -> tuple[Tensor | None, Tensor | None]:
    for name, module in bridge.original_model.named_modules():
        if name.rpartition(".")[2] != "rotary_emb":
            continue
        like = next(p for p in bridge.original_model.parameters() if p.is_floating_point())
        rotary = getattr(module, "original_component", None) or module
        of_layer: dict[str, str] = {}  # separate tables for layers with a sliding window (Gemma 3, OLMo 3)
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            of_layer["layer_type"] = bridge.original_model.config.get_text_config().layer_types[layer]
        with Gradients(False) as off, off:
            cos, sin = rotary(like.new_zeros(1, n_pos, 1), torch.arange(n_pos, device=like.device)[None], **of_layer)
        return cos[0], sin[0]
    return None, None


def softmax_where(
    scores: Float[Tensor, "*axes query key"], visible: Bool[Tensor, "*_axes query key"]
) -> Float[Tensor, "*axes query key"]:
    """The softmax over the visible keys; 0 everywhere for a query that sees none."""
    return torch.nan_to_num(scores.masked_fill(~visible, -torch.inf).softmax(-1))


def check_pattern(
    label: str,
    scores: Float[Tensor, "batch head query key"],
    visible: Bool[Tensor, "batch 1 query key"],
    pattern: Float[Tensor, "batch head query key"],
    real: Bool[Tensor, "batch query"],
    tolerance: float,
) -> float:
    """The largest difference from the model's own pattern. Raises UnsupportedError when it is not rounding."""
    gap = (softmax_where(scores, visible) - pattern).abs().amax((1, 3))
    worst = float(torch.where(real, gap, 0).max())
    if not worst < tolerance:
        raise UnsupportedError(
            f"The attention of {label} is not softmax(scale * rotated q . rotated k) (off by {worst:.2g}), so patterns "
            "of parts of its queries and keys have no rule; use preset 'linear' or 'frozen-remove'."
        )
    return worst
