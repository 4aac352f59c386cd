"""Path patching from every head of the GPT-2-small shape to the logits, in forwards of the bare model."""

from __future__ import annotations

from collections.abc import Callable

import torch

import mechinterp as mi
from benchmarks.engines import Row, measure, small_gpt2


def paths(device: torch.device, repeats: int) -> list[Row]:
    """144 heads -> logits, direct and with MLPs recomputed, and one round to a head's query.

    The two forwards of the clean and the corrupt prompts are needed by any method; the effects of the heads come on
    top, and are what the floor and the target count.
    """
    bare, model, pairs = small_gpt2(device)

    def forward() -> object:
        with torch.no_grad():
            return bare(pairs.clean).logits

    work: dict[str, Callable[[], object]] = {
        "forward": forward,
        "ends": lambda: mi.path_patching(model, pairs, ["a11.h11"], meaning="direct"),
        "direct": lambda: mi.path_patching(model, pairs, "heads", meaning="direct"),
        "mlps": lambda: mi.path_patching(model, pairs, "heads"),
        "query": lambda: mi.path_patching(model, pairs, "heads", "a9.h9<q>", meaning="direct"),
    }
    seconds = measure(work, device, repeats)
    unit = seconds["forward"]
    both = f"(with the two forwards: {seconds['direct'] / unit:.2f})"
    all_of_it = f"(with the two forwards: {seconds['mlps'] / unit:.2f})"
    direct, recomputed = ((seconds[name] - seconds["ends"]) / unit for name in ("direct", "mlps"))
    return [
        Row("path patching, 144 heads -> logits, direct", direct, "F", "0.06", "1", both),
        Row("the same, MLPs recomputed", recomputed, "F", "2.4", "6", all_of_it),
        Row("144 heads -> the query of a9.h9, direct", seconds["query"] / unit, "F", "", ""),
    ]
