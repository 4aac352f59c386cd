"""Direct logit attribution and weight readings on the GPT-2-small shape, in forwards of the bare model.

F = one forward of the bare Hugging Face model with logits at every position, same process. The floor of an
attribution is that forward without the unembedding (0.68 of the multiplications of F at 15 tokens: 85.1 of 123.7
million weights per token); reading the parts adds under 1 % of it, because they are read at one position.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import mechinterp as mi
from benchmarks.engines import BATCH, LENGTH, Row, measure
from mechinterp.analysis.composition import composition_scores
from mechinterp.analysis.direct_logit_attribution import direct_logit_attribution
from mechinterp.analysis.head_detectors import attention_to


def direct(device: torch.device, repeats: int) -> list[Row]:
    """All 171 parts; every neuron and every head's sources as well; attention between positions; composition."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config()
    config._attn_implementation = "eager"
    bare = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for name, parameter in bare.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.02)  # new weights have none, and a bias of 0 is not a part
    bare = bare.to(device)
    model = mi.load_model(bare)
    tokens = torch.randint(config.vocab_size, (2, BATCH, LENGTH))
    answers = torch.randint(config.vocab_size, (2, BATCH))
    pairs = mi.Pairs(clean=tokens[0], corrupt=tokens[1], right=answers[0], wrong=answers[1]).to(device)
    refine = [f"a{layer}.h{head}" for layer in range(12) for head in range(12)] + [f"m{layer}" for layer in range(12)]

    def forward() -> object:
        with torch.no_grad():
            return bare(pairs.clean).logits

    work: dict[str, Callable[[], object]] = {
        "forward": forward,
        "parts": lambda: direct_logit_attribution(model, pairs),
        "refined": lambda: direct_logit_attribution(model, pairs, refine=refine),
        "attention": lambda: attention_to(model, pairs, -1, 0),
        "composition": lambda: composition_scores(model, "k"),
    }
    seconds = measure(work, device, repeats)
    parts = direct_logit_attribution(model, pairs, refine=refine)
    unit = seconds["forward"]
    n_parts = len(direct_logit_attribution(model, pairs).labels["node"])
    n_fine = len(parts.labels["node"])
    return [
        Row(f"direct logit attribution, {n_parts} parts", seconds["parts"] / unit, "F", "0.69", "1"),
        Row(f"the same, {n_fine:,} neurons and source positions", seconds["refined"] / unit, "F", "0.70", "1.5"),
        Row("its sum against the logit, relative", parts.about["error"] * 1e7, "1e-7", "0.6", "100"),
        Row("attention between two positions, all heads", seconds["attention"] / unit, "F", "0.64", "1"),
        Row("K-composition of all pairs of heads", seconds["composition"] / unit, "F", "", ""),
    ]
