"""Information flow routes on the GPT-2-small shape, in forwards F of the bare model.

Run as `python -m benchmarks information-flow`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import mechinterp as mi
from benchmarks.engines import Row, measure, small_gpt2
from mechinterp.discovery.information_flow import IMPORTANCES, edge_importances


def information_flow(device: torch.device, repeats: int) -> list[Row]:
    """All 32,491 edges, with each importance.

    The floor is the forward without its unembedding (0.69 F) and 2,041 distances of a write to a stream per token
    (0.02 F); `from-answer` also has the write of every value vector and its distance to each later write (0.08 F).
    """
    bare, model, pairs = small_gpt2(device)
    graph = mi.build_graph(model)

    def forward() -> object:
        with torch.no_grad():
            return bare(pairs.clean).logits

    work: dict[str, Callable[[], object]] = {"forward": forward}
    work |= {name: partial(edge_importances, model, graph, pairs, importance=name) for name in IMPORTANCES}
    seconds = measure(work, device, repeats)
    floors = {"per-reader": "0.7", "from-answer": "0.8"}
    return [
        Row(f"information flow routes, `{name}`", seconds[name] / seconds["forward"], "F", floors[name], "2")
        for name in IMPORTANCES
    ]
