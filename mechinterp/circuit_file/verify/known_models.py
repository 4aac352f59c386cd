"""Well-known models by name: whether a model under such a name can be that model."""

from __future__ import annotations

import re

from mechinterp.base.errors import clip
from mechinterp.circuit_file.schema import ModelRecord

SIZES: dict[str, tuple[int, int, int]] = {
    **{"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)},
    **{"gpt2-small": (12, 12, 768), "distilgpt2": (6, 12, 768), "gpt-neo-125m": (12, 12, 768)},
    **{"gpt-neo-1.3b": (24, 16, 2048), "gpt-neo-2.7b": (32, 20, 2560), "gpt-j-6b": (28, 16, 4096)},
    **{"pythia-14m": (6, 4, 128), "pythia-70m": (6, 8, 512), "pythia-160m": (12, 12, 768)},
    **{"pythia-410m": (24, 16, 1024), "pythia-1b": (16, 8, 2048), "pythia-1.4b": (24, 16, 2048)},
    **{"pythia-2.8b": (32, 32, 2560), "pythia-6.9b": (32, 32, 4096), "pythia-12b": (36, 40, 5120)},
    **{"opt-125m": (12, 12, 768), "opt-1.3b": (24, 32, 2048), "opt-6.7b": (32, 32, 4096)},
    **{"gemma-2b": (18, 8, 2048), "gemma-7b": (28, 16, 3072), "gemma-2-2b": (26, 8, 2304)},
    **{"gemma-2-9b": (42, 16, 3584), "gemma-2-27b": (46, 32, 4608), "gemma-3-270m": (18, 4, 640)},
    **{"gemma-3-1b-pt": (26, 4, 1152), "gemma-3-1b-it": (26, 4, 1152), "smollm2-135m": (30, 9, 576)},
    **{"llama-2-7b-hf": (32, 32, 4096), "meta-llama-3-8b": (32, 32, 4096), "llama-3.1-8b": (32, 32, 4096)},
    **{"llama-3.2-1b": (16, 32, 2048), "llama-3.2-3b": (28, 24, 3072), "mistral-7b-v0.1": (32, 32, 4096)},
    **{"qwen2.5-0.5b": (24, 14, 896), "qwen2.5-1.5b": (28, 12, 1536), "qwen2.5-7b": (28, 28, 3584)},
    **{"qwen3-0.6b": (28, 16, 1024), "phi-1": (24, 32, 2048), "phi-1_5": (24, 32, 2048), "phi-2": (32, 32, 2560)},
    **{"tinyllama-1.1b-chat-v1.0": (22, 32, 2048), "tinystories-33m": (4, 16, 768), "gelu-4l": (4, 8, 512)},
    **{"attn_only_4l512w_c4_code": (4, 8, 512), "bundled": (4, 4, 64)},
}
"""Layers, query heads and width (d_model) of models that circuits are found in, by the last part of their name."""
WHERE = {"directory": "a folder", "file": "a file", "memory": "a model in memory", "hub": "a model of the hub"}
_SUFFIX = re.compile(r"(-deduped|-instruct|-it|-hf|-v\d+)$")


def known_model(name: str) -> str | None:
    """The known model (a key of `SIZES`) whose name a path or label ends with; None for any other name."""
    last = re.split(r"[/\\]", name.partition("@")[0].rstrip("/\\").lower())[-1]
    if last.endswith(".gguf"):  # smollm2-135m-instruct.q4_1.gguf, or with "-" before the type
        last = re.sub(r"[.-](i?q\d\w*|[bf]?f\d+)$", "", last.removesuffix(".gguf"))
    return next((each for each in (last, _SUFFIX.sub("", last)) if each in SIZES), None)


def name_misleads(model: ModelRecord) -> str | None:
    """Why the name of a model may be misleading; None if nothing indicates that."""
    if model.origin == "bundled":
        return None
    known, dims = known_model(model.name), model.dims
    got = (dims.n_layers, dims.n_heads, dims.d_model)
    name = clip(model.name, 80)
    where = WHERE[model.origin]
    if known is not None and got != SIZES[known]:
        words = [f"{layers} layers, {heads} heads and width {width}" for layers, heads, width in (got, SIZES[known])]
        return f"{name!r} is {where} with {words[0]}; the model known as {known!r} has {words[1]}"
    if model.origin == "hub" or (known is None and not (model.origin == "memory" and "/" in model.name)):
        return None
    return f"{name!r} is {where} with a well-known name; it is not compared with the model of that name"
