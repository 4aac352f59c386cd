"""Seconds, ratios to the bare model and peak memory of the main jobs, on the shapes of GPT-2 small and Llama-3.1-8B.

`python -m benchmarks.gpu small 8b` prints them. F is one forward of the bare Hugging Face model with logits at every
position, U two forwards and a backward. Each row is guarded: a job that needs more memory than there is says so.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import mechinterp as mi
from benchmarks.engines import extra_memory, measure, small_gpt2, token_pairs, work_of
from mechinterp.discovery.cut_loss import CutLoss
from mechinterp.engines.attribution_memory import attribution_bytes, measure_example

ACDC_EDGES = 8
TINY_GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 100}
LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
TINY_LLAMA: dict[str, Any] = {
    **LLAMA_8B,
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Job:
    """One row: what is run, the unit that it is compared with, how often, and the bytes counted from the shape."""

    name: str
    run: Callable[[], object]
    unit: str
    counted: int | None = None
    share: int = 1
    """The time is divided by this: the edges that are tried in one run, for example."""
    once: bool = False


@dataclass(frozen=True)
class Timing:
    """One measured row."""

    name: str
    seconds: float
    ratio: str
    extra: float
    """Peak bytes beyond what was allocated before."""
    counted: int | None
    error: str = ""

    def __str__(self) -> str:
        if self.error:
            return f"| {self.name} | {self.error} | | | |"
        counted = "" if self.counted is None else f"{self.counted / 2**30:.2f}"
        return f"| {self.name} | {self.seconds * 1e3:.2f} | {self.ratio} | {self.extra / 2**30:.2f} | {counted} |"


HEADER = "| job | ms | ratio | extra peak GiB | estimated GiB |\n|---|---|---|---|---|"


def counted_bytes(model: mi.HookManager, graph: mi.Graph, pairs: mi.Pairs) -> dict[str, int]:
    """The bytes of the parts of a run, counted from the shape. EAP's are estimated from one example instead.

    `table` is the differences of all writes, `autograd` about what the model's own backward keeps with eager attention,
    `patched` the table and the largest block of sums of an exact run, `mask` the two tables and all readers' sums.
    """
    d, own = model.dims, torch.empty(0, dtype=model.dtype).element_size()
    n_batch, n_pos = pairs.clean.shape
    tokens, readers = n_batch * n_pos, len(graph.readers)
    width, kv = d.n_heads * d.d_head, d.n_kv_heads * d.d_head
    d_mlp = getattr(model.bridge.original_model.config, "intermediate_size", 4 * d.d_model)
    saved = own * (4 * d_mlp + 2 * width + 2 * kv + d.d_model) + 8 * d.d_model
    table = 4 * len(graph.writers) * d.d_model * tokens
    return {
        "table": table,
        "autograd": d.n_layers * (saved * tokens + 6 * d.n_heads * n_batch * n_pos**2),
        "patched": table + 4 * min(readers, 64 + d.n_heads) * d.d_model * tokens,
        "mask": 2 * table + 4 * readers * d.d_model * tokens,
    }


def jobs(bare: Any, model: mi.HookManager, pairs: mi.Pairs, *, analyses: bool) -> Iterator[Job]:
    """The rows of one shape; F and U come first. `analyses` adds path patching, attribution and the lens."""
    work, graph = work_of(bare, model, pairs), mi.build_graph(model)
    bytes_of = counted_bytes(model, graph, pairs)
    one, n = measure_example(model, graph, pairs, "logit_diff"), len(pairs)
    eap, eap_ig = (attribution_bytes(model, graph, one, n, n_points)["total"] for n_points in (1, 5))
    yield Job("F, one forward of the bare model", work["forward"], "F")
    yield Job("forward and backward of the bare model", work["forward_backward"], "FB", bytes_of["autograd"])
    yield Job(f"EAP, all {graph.n_edges:,} edges", work["eap"], "U", eap)
    yield Job("EAP-IG (inputs), 5 steps", work["eap_ig"], "U", eap_ig)
    yield Job("evaluate one circuit", work["circuit"], "F", bytes_of["patched"])
    yield Job("one step of a learned mask", work["gates"], "F", bytes_of["mask"] + bytes_of["autograd"])
    for at_once in (1, ACDC_EDGES):
        name = f"ACDC, an edge of the middle layer, {at_once} at once"
        yield Job(name, acdc_step(model, graph, pairs, at_once), "F", share=at_once)
    n_heads = model.dims.n_layers * model.dims.n_heads
    yield Job(
        f"activation patching, {n_heads} heads", lambda: mi.activation_patching(model, pairs, "z"), "F", once=True
    )
    if analyses:
        direct = partial(mi.path_patching, model, pairs, meaning="direct")
        yield Job("path patching, heads -> logits, direct", direct, "F")
        yield Job("path patching, heads -> logits, MLPs recomputed", lambda: mi.path_patching(model, pairs), "F")
        yield Job("AtP, all nodes", lambda: mi.node_attribution(model, pairs), "U")
        yield Job("direct logit attribution", lambda: mi.direct_logit_attribution(model, pairs), "F")
        yield Job("logit lens, answer position", lambda: mi.logit_lens(model, pairs), "F")
        linear = partial(mi.contextual_decomposition, model, pairs, "nodes", replacement="mean")
        yield Job("CD `linear`, all nodes", linear, "F")


def acdc_step(model: mi.HookManager, graph: mi.Graph, pairs: mi.Pairs, at_once: int) -> Callable[[], object]:
    """The loss of masks that cut one edge, two, ... of the middle layer, one upon the other, as `acdc` does."""
    layer = model.dims.n_layers // 2
    readers = graph.channel_readers(layer, "q")
    edges = graph.possible[readers].nonzero()
    drawn = edges[torch.randperm(len(edges), generator=torch.Generator().manual_seed(0))[:at_once]]
    masks = torch.zeros(at_once, *graph.possible.shape)
    for i, (reader, writer) in enumerate(drawn.tolist()):
        masks[i:, readers.start + reader, writer] = 1
    made: list[CutLoss] = []

    def run() -> object:
        if not made:  # in the first run, which is not timed
            made.append(CutLoss.of(model, graph, pairs, mi.get_metric("kl_to_clean"), "corrupt", len(pairs)))
        return made[0].of_masks(masks, layer)

    return run


def timings(
    bare: Any, model: mi.HookManager, pairs: mi.Pairs, device: torch.device, repeats: int, end: float, *, analyses: bool
) -> Iterator[Timing]:
    """Every row of one shape; no row starts after the time `end` (of `time.monotonic`)."""
    units: dict[str, float] = {}
    rows = jobs(bare, model, pairs, analyses=analyses)
    while time.monotonic() < end:
        name = "the next job cannot be prepared"
        try:
            job = next(rows, None)
            if job is None:
                return
            name = job.name
            extra = extra_memory(job.run, device)  # the first run, so that it also warms up
            seconds = measure({name: job.run}, device, 1 if job.once else repeats, warm=False)[name] / job.share
        except Exception as error:  # the next row shall be measured
            yield Timing(name, 0, "", 0, None, f"{type(error).__name__}: {str(error)[:160]}".replace("\n", " "))
            gc.collect()
            continue
        if job.unit == "FB":
            units["U"] = units.get("F", float("nan")) + seconds
        units.setdefault(job.unit, seconds)
        ratio = "" if job.unit == "FB" else f"{seconds / units[job.unit]:.2f} {job.unit}"
        yield Timing(name, seconds, ratio, extra, job.counted)
    yield Timing("(the time is over)", 0, "", 0, None, "the rest was not measured")


Shape = tuple[str, Callable[[], tuple[Any, mi.HookManager, mi.Pairs]]]


def small_shapes(device: torch.device, tiny: bool) -> Iterator[Shape]:
    """GPT-2 small with few and with many tokens, float32."""
    sizes = TINY_GPT2 if tiny else {}
    for batch, length in ((2, 5), (3, 6)) if tiny else ((8, 20), (64, 64)):
        what = f"{'tiny' if tiny else 'GPT-2-small shape'}, float32, {batch} x {length} tokens"
        yield what, lambda batch=batch, length=length: small_gpt2(device, batch, length, **sizes)


def llama_shapes(device: torch.device, tiny: bool) -> Iterator[Shape]:
    """Llama-3.1-8B with short and with long prompts, random weights in bfloat16 that are made on the device."""
    made: list[tuple[Any, mi.HookManager]] = []

    def build(batch: int, length: int) -> tuple[Any, mi.HookManager, mi.Pairs]:
        if not made:
            start = time.monotonic()
            bare = random_llama(device, tiny)
            made.append((bare, mi.load_model(bare, share_weights=True)))
            print(f"model made and loaded in {time.monotonic() - start:.1f} s", flush=True)
        bare, model = made[0]
        return bare, model, token_pairs(model.dims.d_vocab, device, batch, length)

    for batch, length in ((2, 5), (2, 9)) if tiny else ((8, 20), (2, 200)):
        what = f"{'tiny' if tiny else 'Llama-3.1-8B shape'}, bfloat16, {batch} x {length} tokens"
        yield what, lambda batch=batch, length=length: build(batch, length)


def random_llama(device: torch.device, tiny: bool) -> Any:
    """The Hugging Face model, with weights drawn on the device in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rope: dict[str, Any] = {"rope_theta": 500_000.0, "rope_type": "default"}
    config: Any = LlamaConfig(**(TINY_LLAMA if tiny else LLAMA_8B), rope_parameters=rope)
    config._attn_implementation = "eager"
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with device:
            bare = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return bare.eval().requires_grad_(False)
