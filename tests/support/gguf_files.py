"""Small GGUF files, written with the gguf package from a Hugging Face model as llama.cpp's converter writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "gpt2": "gpt2", "gemma2": "gemma2"}


def write_gguf(
    path: Path,
    module: Any,
    *,
    words: Sequence[str] | None = None,
    type_name: str = "F32",
    settings: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
) -> Path:
    """A GGUF of the model's weights; matrices are stored as `type_name`, vectors as F32.

    Args:
        path: where to write it.
        module: a Hugging Face model of a known architecture.
        words: the vocabulary of its tokenizer (BPE of bytes); the only merge is that of A and B.
        type_name: the GGML type of the matrices.
        settings: settings to add or replace; None leaves one out.
        extra: tensors to add, by name.
        without: names of tensors to leave out.
    """
    config = module.config
    name = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(str(path), name)
    given = {**_settings(config, name), **(settings or {})}
    for key, value in given.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    if words is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(list(words))
        writer.add_token_types([1] * len(words))
        writer.add_token_merges(["A B"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
    kind = gguf.GGMLQuantizationType[type_name]
    for tensor_name, weight in {**_tensors(module, name), **(extra or {})}.items():
        if tensor_name in without:
            continue
        if weight.ndim > 1 and type_name != "F32":
            writer.add_tensor(tensor_name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor_name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _settings(config: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }
    if name == "gpt2":
        found["attention.layer_norm_epsilon"] = config.layer_norm_epsilon
    else:
        found |= {
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": config.rope_parameters["rope_theta"],
            "vocab_size": config.vocab_size,
        }
    if name == "llama":
        found["rope.dimension_count"] = config.head_dim
    if name == "gemma2":
        found |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "attention.sliding_window": config.sliding_window,
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
        }
    return {f"{name}.{key}": value for key, value in found.items()}


def _tensors(module: Any, name: str) -> dict[str, np.ndarray]:
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, module.config.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    for own, weight in module.named_parameters():
        stem, _, suffix = own.rpartition(".")
        target = names.get_name(stem)
        assert target is not None, own
        found[f"{target}.{suffix}"] = _as_gguf(f"{target}.{suffix}", weight.detach().float().numpy(), module, name)
    return found


def _as_gguf(target: str, weight: np.ndarray, module: Any, name: str) -> np.ndarray:
    """The weight in GGUF's layout: rotary halves interleaved (llama), matrices as [out, in], norms around 1."""
    config = module.config
    if name == "llama" and (match := re.search(r"attn_([qk])\.", target)):
        heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        weight = halves.swapaxes(1, 2).reshape(weight.shape)
    if name == "gpt2" and re.search(r"(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", target):
        weight = weight.T
    if name == "gemma2" and target.endswith("norm.weight"):
        weight = weight + 1
    return np.ascontiguousarray(weight)
