"""Directions as nodes, bits and norms of tokens, and subset scans, in forwards of the bare GPT-2-small shape."""

from __future__ import annotations

from collections.abc import Callable

import torch

import mechinterp as mi
from benchmarks.engines import Row, measure, small_gpt2


def directions(device: torch.device, repeats: int) -> list[Row]:
    """F = a forward of the bare model; a forward and backward is about 3 F. The floor counts runs of the model."""
    bare, model, pairs = small_gpt2(device)
    direction = mi.find_direction(model, pairs, "resid_pre.8")
    generator = torch.Generator().manual_seed(0)
    reference, other = (torch.randn(100, 3072, generator=generator).to(device) for _ in range(2))

    def forward() -> object:
        with torch.no_grad():
            return bare(pairs.clean).logits

    readers = ["a9.h9<q>", "m9", "logits"]
    senders = [f"a7.h{head}" for head in range(4)]
    work: dict[str, Callable[[], object]] = {
        "forward": forward,
        "writers": lambda: mi.direction_writers(model, pairs, direction),
        "readers": lambda: mi.direction_readers(model, pairs, direction, readers, positions=-1),
        "paths": lambda: mi.direction_paths(model, pairs, direction, senders, readers),
        "tokens": lambda: mi.token_attribution(model, pairs),
        "bits": lambda: mi.information_bottleneck(model, pairs, "resid_pre.8", steps=5, samples=1),
        "scan": lambda: mi.scan_units(reference, other, exchanges=1, restarts=0),
    }
    seconds = measure(work, device, repeats)
    ratio = {name: value / seconds["forward"] for name, value in seconds.items()}
    return [
        Row("what 109 parts write along a direction at layer 8", ratio["writers"], "F", "0.5", "1"),
        Row("a direction into 3 readers", ratio["readers"], "F", "", "5"),
        Row("4 heads through a direction into 3 readers", ratio["paths"], "F", "", "18"),
        Row("norm-based token attribution, 12 layers", ratio["tokens"], "F", "1", "3"),
        Row("information bottleneck at layer 8, 5 steps of 1 draw", ratio["bits"], "F", "", ""),
        Row("subset scan, 200 examples x 3,072 units, per exchange", seconds["scan"] / 2, "s", "", ""),
    ]
