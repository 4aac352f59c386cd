"""Activation patching of every head of the GPT-2-small shape, in forwards of the bare Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable

import torch

import mechinterp as mi
from benchmarks.engines import Row, measure, small_gpt2


def patching(device: torch.device, repeats: int) -> list[Row]:
    """144 heads at all positions, and at each of 15 positions by itself. F has logits at every position."""
    bare, model, pairs = small_gpt2(device)

    def forward() -> object:
        with torch.no_grad():
            return bare(pairs.clean).logits

    work: dict[str, Callable[[], object]] = {
        "forward": forward,
        "heads": lambda: mi.activation_patching(model, pairs, "z"),
    }
    seconds = measure(work, device, repeats)
    work["by position"] = lambda: mi.activation_patching(model, pairs, "z", positions="each")
    once = measure({name: work[name] for name in ("forward", "by position")}, device, 1, warm=False)
    return [
        Row("activation patching, 144 heads", seconds["heads"] / seconds["forward"], "F", "51", "60"),
        Row("activation patching, 144 heads x 15 positions", once["by position"] / once["forward"], "F", "440", "600"),
    ]
