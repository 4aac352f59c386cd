"""Contextual decomposition of the GPT-2-small shape, in forwards F of the bare model.

Run as `python -m benchmarks decomposition`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import mechinterp as mi
from benchmarks.engines import Row, measure, small_gpt2

N_SOURCES = 144


def decomposition(device: torch.device, repeats: int) -> list[Row]:
    """All heads and MLPs by preset `linear` at once; and the forward walk of each preset from every head, per source.

    The floor of `linear` is the run of the means, a forward, its check and a backward, all without the unembedding
    (0.69 F each). That of a walk is the products after its source, averaged over the heads: 0.057 F a layer, a sixth
    less where patterns are frozen, the last layer at the answer position only. Larger products run faster than those
    of F, so a walk can come out below its floor.
    """
    bare, model, pairs = small_gpt2(device)

    def forward() -> object:
        with torch.no_grad():
            return bare(pairs.clean).logits

    def walk(preset: str) -> object:
        return mi.contextual_decomposition(model, pairs, "z", preset=preset, replacement="mean", forward=True)

    nodes = partial(mi.contextual_decomposition, model, pairs, "nodes", replacement="mean")
    work: dict[str, Callable[[], object]] = {"forward": forward, "nodes": nodes}
    seconds = measure(work, device, repeats)
    slow = {preset: partial(walk, preset) for preset in ("linear", "frozen-remove", "authors-gpt", "patch")}
    once = measure(dict(slow), device, 1, warm=False)
    unit = seconds["forward"]
    rows = [
        Row("CD `linear`, input, 144 heads and 12 MLPs, all positions", seconds["nodes"] / unit, "F", "2.8", "4"),
    ]
    floors = {"linear": "0.26", "frozen-remove": "0.26", "authors-gpt": "0.31", "patch": "0.31"}
    return rows + [
        Row(f"CD `{name}`, forward walk, per head", once[name] / unit / N_SOURCES, "F", floor, "0.8")
        for name, floor in floors.items()
    ]
