"""ACDC on models of 4 layers with 4 heads (479 edges), in forwards F of the bare model for each edge.

Run as `python -m benchmarks acdc`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import mechinterp as mi
from benchmarks.engines import Row, measure


def acdc(device: torch.device, repeats: int) -> list[Row]:
    """The bundled model on 50 IOI prompts, and random weights with GPT-2's vocabulary (d_model 256, batch 10 x 15).

    The floor is half of the layers for each edge (its reader's layer and the later ones), logits at the answer only.
    """
    bundled = mi.load_model("bundled", device=device)
    pairs = mi.load_task("ioi").pairs(bundled, n=50, split="train", seed=0).to(device)
    rows = _rows("bundled model", bundled, pairs, "0.4")
    return rows + _rows("d_model 256, vocabulary 50,257", *_random_model(device), "0.12")


def _rows(name: str, model: mi.HookManager, pairs: mi.Pairs, floor: str) -> list[Row]:
    graph, bare = mi.build_graph(model), model.bridge.original_model

    def forward() -> object:
        with torch.no_grad():
            return bare(pairs.clean, attention_mask=pairs.mask.long())

    def search(at_once: int, kept: list[int]) -> None:
        scores = mi.score_edges(
            model,
            graph,
            pairs,
            method="acdc",
            metric="kl_to_clean",
            tau=0.01,
            at_once=at_once,
            batch_size=len(pairs),
        )
        kept.append(int((scores.values != 0).sum()))

    unit = measure({"forward": forward}, model.device, 9)["forward"]
    found: list[Row] = []
    for at_once in (1, 8, 32):
        kept: list[int] = []
        seconds = measure({"acdc": partial(search, at_once, kept)}, model.device, 1, warm=False)
        per_edge = seconds["acdc"] / unit / graph.n_edges
        found.append(Row(f"ACDC, {name}, {at_once} at once", per_edge, "F an edge", floor, "0.6", f"(keeps {kept[0]})"))
    return found


def _random_model(device: torch.device) -> tuple[Any, mi.Pairs]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_head=4, n_embd=256)
    config._attn_implementation = "eager"
    bare = GPT2LMHeadModel(config).eval().requires_grad_(False).to(device)
    tokens = torch.randint(config.vocab_size, (2, 10, 15))
    answers = torch.randint(config.vocab_size, (2, 10))
    pairs = mi.Pairs(clean=tokens[0], corrupt=tokens[1], right=answers[0], wrong=answers[1]).to(device)
    return mi.load_model(bare), pairs
