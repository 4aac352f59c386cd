"""The logit lens at every residual stream of the GPT-2-small shape, in forwards of the bare Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable

import torch

import mechinterp as mi
from benchmarks.engines import Row, measure, small_gpt2


def lens(device: torch.device, repeats: int) -> list[Row]:
    """25 sites at the answer position, and at each of 15 positions.

    The floor counts the forward (1) and one unembedding per site and position read, which is 0.31 of a forward for
    all positions of a site.
    """
    bare, model, pairs = small_gpt2(device)

    def forward() -> object:
        with torch.no_grad():
            return bare(pairs.clean).logits

    work: dict[str, Callable[[], object]] = {
        "forward": forward,
        "answer": lambda: mi.logit_lens(model, pairs),
        "each": lambda: mi.logit_lens(model, pairs, positions="each"),
    }
    seconds = measure(work, device, repeats)
    unit = seconds["forward"]
    return [
        Row("logit lens, 25 sites, answer position", seconds["answer"] / unit, "F", "1.2", ""),
        Row("logit lens, 25 sites x 15 positions", seconds["each"] / unit, "F", "8.9", ""),
    ]
