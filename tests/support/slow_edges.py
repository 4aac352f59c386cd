"""The exact engine again, slowly, from the weights of Hugging Face's modules: an oracle that shares no code with it.

Every head and every edge is a Python loop; nothing is batched over heads, masks or candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

Cut = Mapping[str, float]
"""Edge name to the share of it that is cut; edges that are not named are kept."""


class SlowGPT2:
    """GPT-2: fused and biased q, k, v; LayerNorm; learned positions."""

    def __init__(self, module: Any) -> None:
        self.module, config = module, module.config
        self.n_layers, self.n_heads, self.n_kv = config.n_layer, config.n_head, config.n_head
        self.d_model, self.d_head = config.n_embd, config.n_embd // config.n_head

    def embed(self, tokens: Tensor) -> Tensor:
        return self.module.transformer.wte(tokens) + self.module.transformer.wpe(torch.arange(tokens.shape[1]))

    def project(self, layer: int, channel: str, head: int, resid: Tensor) -> Tensor:
        block = self.module.transformer.h[layer]
        first = "qkv".index(channel) * self.d_model + head * self.d_head
        columns = slice(first, first + self.d_head)
        return block.ln_1(resid) @ block.attn.c_attn.weight[:, columns] + block.attn.c_attn.bias[columns]

    def rotate(self, value: Tensor) -> Tensor:
        return value

    def write(self, layer: int, head: int, z: Tensor) -> Tensor:
        rows = slice(head * self.d_head, (head + 1) * self.d_head)
        return z @ self.module.transformer.h[layer].attn.c_proj.weight[rows]

    def constant(self, layer: int) -> Tensor:
        return self.module.transformer.h[layer].attn.c_proj.bias

    def mlp(self, layer: int, resid: Tensor) -> Tensor:
        block = self.module.transformer.h[layer]
        return block.mlp(block.ln_2(resid))

    def unembed(self, resid: Tensor) -> Tensor:
        return self.module.lm_head(self.module.transformer.ln_f(resid))


class SlowLlama:
    """Llama and Qwen2: grouped queries, rotation, RMSNorm."""

    def __init__(self, module: Any) -> None:
        self.module, config = module, module.config
        self.n_layers, self.n_heads = config.num_hidden_layers, config.num_attention_heads
        self.n_kv, self.d_model = config.num_key_value_heads, config.hidden_size
        self.d_head = config.hidden_size // config.num_attention_heads

    def embed(self, tokens: Tensor) -> Tensor:
        return self.module.model.embed_tokens(tokens)

    def project(self, layer: int, channel: str, head: int, resid: Tensor) -> Tensor:
        block = self.module.model.layers[layer]
        linear = getattr(block.self_attn, f"{channel}_proj")
        rows = slice(head * self.d_head, (head + 1) * self.d_head)
        out = block.input_layernorm(resid) @ linear.weight[rows].T
        return out if linear.bias is None else out + linear.bias[rows]

    def rotate(self, value: Tensor) -> Tensor:
        positions = torch.arange(value.shape[1])[None]
        cos, sin = self.module.model.rotary_emb(value, positions)
        return value * cos + rotate_half(value) * sin

    def write(self, layer: int, head: int, z: Tensor) -> Tensor:
        columns = slice(head * self.d_head, (head + 1) * self.d_head)
        return z @ self.module.model.layers[layer].self_attn.o_proj.weight[:, columns].T

    def constant(self, layer: int) -> Tensor:
        return torch.zeros(self.d_model, dtype=self.module.dtype)

    def mlp(self, layer: int, resid: Tensor) -> Tensor:
        block = self.module.model.layers[layer]
        return block.mlp(block.post_attention_layernorm(resid))

    def unembed(self, resid: Tensor) -> Tensor:
        return self.module.lm_head(self.module.model.norm(resid))


class SlowNeoX:
    """GPT-NeoX: q, k, v fused head by head, partial rotation, and an MLP that reads what the attention reads."""

    def __init__(self, module: Any) -> None:
        self.module, config = module, module.config
        self.n_layers, self.n_heads = config.num_hidden_layers, config.num_attention_heads
        self.n_kv, self.d_model = self.n_heads, config.hidden_size
        self.d_head = config.hidden_size // config.num_attention_heads

    def embed(self, tokens: Tensor) -> Tensor:
        return self.module.gpt_neox.embed_in(tokens)

    def project(self, layer: int, channel: str, head: int, resid: Tensor) -> Tensor:
        block = self.module.gpt_neox.layers[layer]
        first = (3 * head + "qkv".index(channel)) * self.d_head
        fused, rows = block.attention.query_key_value, slice(first, first + self.d_head)
        return block.input_layernorm(resid) @ fused.weight[rows].T + fused.bias[rows]

    def rotate(self, value: Tensor) -> Tensor:
        cos, sin = self.module.gpt_neox.rotary_emb(value, torch.arange(value.shape[1])[None])
        turned, rest = value[..., : cos.shape[-1]], value[..., cos.shape[-1] :]
        return torch.cat([turned * cos + rotate_half(turned) * sin, rest], -1)

    def write(self, layer: int, head: int, z: Tensor) -> Tensor:
        columns = slice(head * self.d_head, (head + 1) * self.d_head)
        return z @ self.module.gpt_neox.layers[layer].attention.dense.weight[:, columns].T

    def constant(self, layer: int) -> Tensor:
        return self.module.gpt_neox.layers[layer].attention.dense.bias

    def mlp(self, layer: int, resid: Tensor) -> Tensor:
        block = self.module.gpt_neox.layers[layer]
        return block.mlp(block.post_attention_layernorm(resid))

    def unembed(self, resid: Tensor) -> Tensor:
        return self.module.get_output_embeddings()(self.module.gpt_neox.final_layer_norm(resid))


SLOW: dict[str, Any] = {"gpt2": SlowGPT2, "llama": SlowLlama, "qwen2": SlowLlama, "neox": SlowNeoX}
"""The slow model of each shape that has one."""


@torch.no_grad()
def slow_run(
    model: SlowGPT2 | SlowLlama | SlowNeoX, tokens: Tensor, mask: Tensor, cut: Cut, replacement: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits at every position, and what every node writes, with the edges of `cut` replaced."""
    writes: dict[str, Tensor] = {"input": model.embed(tokens)}
    constant = torch.zeros(model.d_model, dtype=model.module.dtype)
    n_pos = tokens.shape[1]
    seen = torch.ones(n_pos, n_pos, dtype=torch.bool).tril()[None] & mask[:, None, :]
    group = model.n_heads // model.n_kv
    shared = "kv" if group > 1 else "h"

    def resid_at(reader: str, before: list[str]) -> Tensor:
        total = constant.expand(*tokens.shape, -1)
        for writer in before:
            share = cut.get(f"{writer}->{reader}", 0.0)
            total = total + (1 - share) * writes[writer]
            if share:
                total = total + share * replacement[writer]
        return total

    for layer in range(model.n_layers):
        before = list(writes)
        new: dict[str, Tensor] = {}
        for head in range(model.n_heads):
            owner = head // group
            names = {"q": f"a{layer}.h{head}<q>"} | {c: f"a{layer}.{shared}{owner}<{c}>" for c in "kv"}
            q = model.rotate(model.project(layer, "q", head, resid_at(names["q"], before)))
            k = model.rotate(model.project(layer, "k", owner, resid_at(names["k"], before)))
            v = model.project(layer, "v", owner, resid_at(names["v"], before))
            scores = (q @ k.transpose(1, 2) / math.sqrt(model.d_head)).masked_fill(~seen, -torch.inf)
            new[f"a{layer}.h{head}"] = model.write(layer, head, scores.softmax(-1) @ v)
        # A parallel MLP reads the layer's input: neither its heads nor their bias.
        parallel_input = resid_at(f"m{layer}", before)
        writes |= new
        constant = constant + model.constant(layer)
        parallel = isinstance(model, SlowNeoX)
        writes[f"m{layer}"] = model.mlp(layer, parallel_input if parallel else resid_at(f"m{layer}", list(writes)))
    return model.unembed(resid_at("logits", list(writes))), writes
