"""The bundled model inside a larger one: the same answers, but other layers, heads and widths, and so other names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from mechinterp.models.load import BUNDLED

EXTRA_LAYERS = 1
NOISE = 0.01


def save_other_model(folder: Path) -> Path:
    """The folder of a GPT-2 with twice the bundled model's width and heads and a layer more in front.

    The residual stream is the bundled one twice side by side, which no layer norm notices. New heads, neurons and the
    new layer write a little noise, so that nothing is exactly 0.
    """
    old = GPT2LMHeadModel.from_pretrained(BUNDLED)
    before = old.config
    made = GPT2LMHeadModel(
        GPT2Config(
            **{**before.to_dict(), "n_embd": 2 * before.n_embd, "n_head": 2 * before.n_head, "n_inner": None}
            | {"n_layer": before.n_layer + EXTRA_LAYERS}
        )
    )
    torch.manual_seed(0)
    source = old.state_dict()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(
                torch.ones_like(parameter) if _is_norm_weight(name) else NOISE * torch.randn(parameter.shape)
            )
        for name, parameter in made.named_parameters():
            parts = name.split(".")
            if parts[1] == "h":
                layer = int(parts[2]) - EXTRA_LAYERS
                if layer < 0:
                    continue
                parts[2] = str(layer)
            _fill(name, parameter, source[".".join(parts)])
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    return folder


def _is_norm_weight(name: str) -> bool:
    return "ln_" in name and name.endswith("weight")


def _fill(name: str, new: Tensor, old: Tensor) -> None:
    """Put the bundled parameter into the larger one."""
    twice = torch.cat([old, old], -1)
    if "wte" in name or "wpe" in name or "ln_" in name:
        # The logits are a product over the doubled stream: half of it each time.
        new.copy_(twice / 2 if "ln_f" in name else twice)
    elif "c_attn" in name:
        for mine, theirs in zip(new.chunk(3, -1), old.chunk(3, -1), strict=True):
            _read(mine, theirs)
    elif "c_fc" in name:
        _read(new, old)
    elif name.endswith("bias"):
        new.copy_(twice)
    else:  # c_proj writes to both halves
        new[: len(old)] = twice


def _read(new: Tensor, old: Tensor) -> None:
    """Weights that read the stream, from its first half only; the further units keep their noise."""
    width = old.shape[-1]
    if old.ndim == 1:
        new[:width] = old
        return
    new[: len(old), :width] = old
    new[len(old) :, :width] = 0
