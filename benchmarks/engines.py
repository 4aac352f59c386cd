"""The two engines on the shapes of GPT-2 small and SmolLM2-135M, in units of the bare model, same process.

U = 2 forwards + 1 backward of the bare model with frozen parameters, F = one forward of it; both with logits at every
position. A floor counts the multiplications that cannot be avoided (logits at the answer position only), as a share
of those of U or F.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import mechinterp as mi
from mechinterp.engines.edge_attribution import edge_gradients
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.mask_gradients import mask_gradients
from mechinterp.engines.replacement import corrupt_replacement
from mechinterp.tasks.metrics import get_metric

BATCH, LENGTH = 10, 15


@dataclass(frozen=True)
class Row:
    """One measured quantity: a ratio, the floor and the target beside it."""

    name: str
    value: float
    unit: str
    floor: str
    target: str
    note: str = ""


def measure(
    work: dict[str, Callable[[], object]], device: torch.device, repeats: int, *, warm: bool = True
) -> dict[str, float]:
    """Median seconds of each piece of work, in turns, so that drift affects all equally (CPU time on the CPU)."""
    for function in work.values() if warm else ():
        function()
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, function in work.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                start = time.perf_counter()
                function()
                torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
            else:
                start = time.process_time()
                function()
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def small_gpt2(
    device: torch.device, batch: int = BATCH, length: int = LENGTH, **sizes: int
) -> tuple[Any, mi.HookManager, mi.Pairs]:
    """(the bare Hugging Face model with random weights, the same model wrapped, random pairs of 10 x 15 tokens).

    `sizes` are other sizes than those of GPT-2 small, by their names in GPT2Config.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**sizes)
    config._attn_implementation = "eager"
    bare = GPT2LMHeadModel(config).eval().requires_grad_(False).to(device)
    return bare, mi.load_model(bare), token_pairs(config.vocab_size, device, batch, length)


def token_pairs(d_vocab: int, device: torch.device, batch: int, length: int) -> mi.Pairs:
    """Pairs of random tokens and answers."""
    tokens, answers = torch.randint(d_vocab, (2, batch, length)), torch.randint(d_vocab, (2, batch))
    return mi.Pairs(clean=tokens[0], corrupt=tokens[1], right=answers[0], wrong=answers[1]).to(device)


def smollm2(device: torch.device) -> tuple[Any, mi.HookManager, mi.Pairs]:
    """The same for the shape of SmolLM2-135M, with 12 x 15 tokens; its own weights would cost the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "eager"
    bare = LlamaForCausalLM(config).eval().requires_grad_(False).to(device)
    tokens, answers = torch.randint(config.vocab_size, (2, 12, LENGTH)), torch.randint(config.vocab_size, (2, 12))
    pairs = mi.Pairs(clean=tokens[0], corrupt=tokens[1], right=answers[0], wrong=answers[1]).to(device)
    return bare, mi.load_model(bare), pairs


def work_of(bare: Any, model: mi.HookManager, pairs: mi.Pairs) -> dict[str, Callable[[], object]]:
    """What is measured on every shape: the two units, and what the engines do."""
    graph, device = mi.build_graph(model), pairs.device
    metric = get_metric("logit_diff")
    clean, rows = pairs.clean, torch.arange(len(pairs), device=device)

    def forward() -> object:
        with torch.no_grad():
            return bare(clean).logits

    def forward_backward() -> object:
        embedded = bare.get_input_embeddings()(clean).requires_grad_()
        logits = bare(inputs_embeds=embedded).logits[:, -1]
        difference = logits[rows, pairs.right[:, 0]] - logits[rows, pairs.wrong[:, 0]]
        return torch.autograd.grad(difference.sum(), embedded)

    generator = torch.Generator().manual_seed(0)
    kept = (torch.rand(graph.possible.shape, generator=generator) < 0.01) & graph.possible
    masks = (graph.possible & ~kept)[None].float().to(device)
    gates = torch.rand(graph.possible.shape, generator=generator)[None] * graph.possible
    values = corrupt_replacement(model, graph).on(pairs)
    steps = tuple((k + 1) / 5 for k in range(5))
    return {
        "forward": forward,
        "forward_backward": forward_backward,
        "eap": lambda: edge_gradients(model, graph, pairs, metric),
        "eap_ig": lambda: edge_gradients(model, graph, pairs, metric, alphas=steps),
        "circuit": lambda: run_edges(model, graph, pairs, masks, metric=metric),
        "gates": lambda: mask_gradients(
            model, graph, pairs, gates, values, lambda logits: metric(logits[0], pairs)[None]
        ),
    }


def engines(device: torch.device, repeats: int) -> list[Row]:
    """EAP, EAP-IG with 5 steps and one circuit's evaluation, as ratios; and the extra peak memory of EAP."""
    work = work_of(*small_gpt2(device))
    seconds = measure(work, device, repeats)
    one_forward = seconds["forward"]
    unit = one_forward + seconds["forward_backward"]
    memory = extra_memory(work["eap"], device)
    clock = "CPU time" if device.type == "cpu" else "time"
    return [
        Row("F, one forward of the bare model", one_forward * 1e3, "ms", "", "", clock),
        Row("U, two forwards and a backward", unit * 1e3, "ms", "", "", clock),
        Row("EAP, all 32,491 edges", seconds["eap"] / unit, "U", "0.78", "1.3"),
        Row("EAP-IG (inputs), 5 steps", seconds["eap_ig"] / unit, "U", "2.9", "4.5"),
        Row("evaluate one circuit", seconds["circuit"] / one_forward, "F", "1.6", "3"),
        Row("one step of a learned mask, all 32,491 gates", seconds["gates"] / one_forward, "F", "2.4", "6"),
        Row("EAP, extra peak memory", memory / 2**30, "GiB", "", "0.65 (0.7 GB)"),
    ]


def engines_smollm2(device: torch.device, repeats: int) -> list[Row]:
    """The same on SmolLM2-135M's shape, with every node replaced alone, and the choice of 39 sizes."""
    bare, model, pairs = smollm2(device)
    work = work_of(bare, model, pairs)
    seconds = measure(work, device, repeats)
    one_forward = seconds["forward"]
    unit = one_forward + seconds["forward_backward"]
    nodes, graph = mi.build_graph(model, level="node"), mi.build_graph(model)
    scores = mi.score_edges(model, graph, pairs, method="random")
    sizes = [round(graph.n_edges * (i + 1) / 39) for i in range(39)]
    once = measure(
        {
            "exact": lambda: mi.score_edges(model, nodes, pairs, method="exact"),
            "sizes": lambda: [mi.select(graph, scores, edges=size, by="magnitude") for size in sizes],
        },
        device,
        1,
        warm=False,
    )
    shape = "SmolLM2's shape"
    return [
        Row(f"{shape}, F", one_forward * 1e3, "ms", "", ""),
        Row(f"{shape}, EAP, all 70,651 edges", seconds["eap"] / unit, "U", "", "1.1"),
        Row(f"{shape}, EAP-IG (inputs), 5 steps", seconds["eap_ig"] / unit, "U", "", "3.4"),
        Row(f"{shape}, evaluate one circuit", seconds["circuit"] / one_forward, "F", "", "2.3"),
        Row(f"{shape}, one step of a learned mask", seconds["gates"] / one_forward, "F", "", "4"),
        Row(f"{shape}, `exact`, 301 nodes", once["exact"] / one_forward, "F", "", ""),
        Row(f"{shape}, `select` for 39 sizes", once["sizes"], "s", "", "1"),
    ]


def extra_memory(work: Callable[[], object], device: torch.device) -> float:
    """Bytes that the work allocates beyond what was allocated before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return float(torch.cuda.max_memory_allocated() - before)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    held = peak = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return float(peak)
