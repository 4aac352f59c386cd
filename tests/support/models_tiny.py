"""Tiny random models of every shape that the package supports, and pairs to run them on."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import transformers
from transformer_lens.config.transformer_bridge_config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.models.hook_manager import HookManager, load_model
from mechinterp.models.source import hash_tensors
from mechinterp.tasks.pairs import Pairs

D_VOCAB, D_MODEL, N_LAYERS, N_HEADS, N_CTX = 50, 16, 3, 4, 32
SHAPES = ("gpt2", "neox", "llama", "gemma2", "qwen2")
"""The five shapes of the contract: sequential, parallel, grouped query, post-norm with soft caps, biased rotary."""
NATIVE = ("attention-only", "no-norm")
"""TransformerLens's own models: no MLP (layer norm), and no norm at all (with MLP)."""
EVERY = SHAPES + NATIVE
ALL_FLOAT64 = ("gpt2", "neox", "attention-only", "no-norm")
"""Shapes that compute in the dtype of their weights throughout. In the others Hugging Face's RMSNorm (and in all
rotary ones the cosines) run in float32 even when the weights are float64."""

MIXTURES = ("mixtral", "qwen3-moe", "gpt-oss")
"""Shapes whose MLPs are mixtures of experts."""

HYBRIDS = ("lfm2", "granite-hybrid", "jamba", "nemotron-h")
"""Shapes whose layers differ: in some a convolution or a state-space layer takes the place of heads;
Nemotron-H has MLPs in layers of their own."""

_ROTARY = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "intermediate_size": 32,
    "max_position_embeddings": N_CTX,
}
_GROUPED = {**_ROTARY, "num_key_value_heads": 2}
_MIXTURE = {**_GROUPED, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN3_MOE = {**_GROUPED, "num_hidden_layers": 2, "head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2}
_QWEN3_MOE |= {"moe_intermediate_size": 8, "decoder_sparse_step": 1}
_LFM2 = {**_GROUPED, "layer_types": ["conv", "full_attention", "conv"]}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 4}
_GRANITE_HYBRID = {**_GROUPED, **_MAMBA, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 0}
_GRANITE_HYBRID |= {"shared_intermediate_size": 32, "residual_multiplier": 0.5, "position_embedding_type": "nope"}
_JAMBA = {**_GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "use_mamba_kernels": False}
_JAMBA |= {"mamba_d_state": 4, "mamba_dt_rank": 4, "pad_token_id": 0}
_NEMOTRON_H = {**_GROUPED, "num_hidden_layers": 4, "layers_block_type": ["mamba", "mlp", "attention", "mlp"]}
_NEMOTRON_H |= {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 4, "chunk_size": 4}
_GPT2 = {"n_positions": N_CTX, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS}
_GEMMA2 = {**_GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}


def huggingface(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 0.3, **config: Any
) -> Any:
    """A Hugging Face model of the shape with random weights, biases and norm weights included, in eval mode."""
    classes = {
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, _GPT2),
        "neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM, _ROTARY),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, _GROUPED),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM, _GEMMA2),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, _GROUPED),
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM, _MIXTURE),
        "qwen3-moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, _QWEN3_MOE),
        "lfm2": (transformers.Lfm2Config, transformers.Lfm2ForCausalLM, _LFM2),
        "granite-hybrid": (
            transformers.GraniteMoeHybridConfig,
            transformers.GraniteMoeHybridForCausalLM,
            _GRANITE_HYBRID,
        ),
        "jamba": (transformers.JambaConfig, transformers.JambaForCausalLM, _JAMBA),
        "nemotron-h": (transformers.NemotronHConfig, transformers.NemotronHForCausalLM, _NEMOTRON_H),
        "gpt-oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM, {**_MIXTURE, "head_dim": 4}),
    }
    config_class, model_class, sizes = classes[name]
    return randomized(model_class(config_class(vocab_size=D_VOCAB, **_ENDS, **{**sizes, **config})), seed, dtype, scale)


_ENDS = {"bos_token_id": 0, "eos_token_id": 0}


def randomized(module: Any, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 0.3) -> Any:
    """The module with every parameter drawn from a normal distribution, so that no bias or norm weight is trivial."""
    generator = torch.Generator().manual_seed(seed)
    module.config._attn_implementation = "eager"
    module = module.to(dtype).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_norm = any(part in name for part in ("norm", "ln_", "layernorm")) and name.endswith("weight")
            # Gemma's norm weight is an offset from 1.
            around = 1.0 if is_norm and not type(module).__name__.startswith("Gemma") else 0.0
            parameter.copy_((noise + around).to(dtype))
    return module


def native(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 0.3, **config: Any) -> Any:
    """A TransformerLens-native bridge: `attention-only` (with layer norm) or `no-norm` (with MLPs)."""
    settings: dict[str, Any] = {
        "attn_only": name == "attention-only",
        "normalization_type": "LN" if name == "attention-only" else None,
        "act_fn": "gelu",
        "d_mlp": 32,
        **config,
    }
    cfg = TransformerBridgeConfig(
        d_model=D_MODEL,
        d_head=D_MODEL // N_HEADS,
        n_layers=N_LAYERS,
        n_heads=N_HEADS,
        n_ctx=N_CTX,
        d_vocab=D_VOCAB,
        architecture="TransformerLensNative",
        **settings,
    )
    bridge = TransformerBridge.boot_native(cfg)
    generator = torch.Generator().manual_seed(seed)
    bridge = bridge.to(dtype).eval()
    with torch.no_grad():
        for key, parameter in bridge.named_parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_norm = "ln" in key and key.endswith("weight")
            parameter.copy_((noise + float(is_norm)).to(dtype))
    return bridge


def build(name: str, **settings: Any) -> HookManager:
    """A fresh HookManager of the shape."""
    return load_model(native(name, **settings) if name in NATIVE else huggingface(name, **settings))


@functools.cache
def tiny(name: str) -> HookManager:
    """The HookManager of the shape, one for the whole test session: tests leave it as they found it."""
    return build(name)


def tokens(n: int = 3, length: int = 7, *, seed: int = 0) -> torch.Tensor:
    """Random token ids `[n, length]`; 0 (the end token) is left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, D_VOCAB, (n, length), generator=generator)


def pairs(n: int = 3, length: int = 7, *, seed: int = 0, padded: bool = False, **extra: Any) -> Pairs:
    """Random pairs with one right and one wrong answer; `padded` rows have lengths length, length - 1, ..., 3, ..."""
    clean, corrupt = tokens(n, length, seed=seed), tokens(n, length, seed=seed + 1000)
    mask = None
    if padded:
        lengths = torch.tensor([max(3, length - row) for row in range(n)])
        mask = torch.arange(length)[None] < lengths[:, None]
    right, wrong = torch.arange(n) % 20 + 1, torch.arange(n) % 20 + 25
    last = length - 1 if mask is None else mask.sum(1) - 1
    clean[torch.arange(n), last] = 48  # never an answer
    return Pairs(clean=clean, corrupt=corrupt, right=right, wrong=wrong, mask=mask, **extra)


def small_cut(graph: Any, share: float = 0.3, seed: int = 0) -> torch.Tensor:
    """A random mask of cut edges."""
    generator = torch.Generator().manual_seed(seed)
    return graph.possible & (torch.rand(graph.possible.shape, generator=generator) < share)


def as_installed(function: Any) -> Any:
    """The function without the shape checks that only these tests put around it: users meet our own refusals."""
    return inspect.unwrap(function)


def snapshot(bridge: Any) -> dict[str, Any]:
    """All that a run must leave as it was: hooks, weights and buffers (bit by bit), modes, `forward`s, gradients.

    Of the bridge and of the model that it wraps, which is no submodule of it.
    """
    parts = {f"{root}.{name}": m for root in ("bridge", "model") for name, m in _modules(bridge, root)}
    weights = {f"{part}.{name}": p for part, m in parts.items() for name, p in m.named_parameters(recurse=False)}
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "fwd_hooks", "bwd_hooks")
    return {
        "weights": hash_tensors(dict(bridge.original_model.state_dict())),
        "versions": {name: weight._version for name, weight in weights.items()},
        "gradients": {name: (weight.grad, weight.requires_grad) for name, weight in weights.items()},
        "training": {name: part.training for name, part in parts.items()},
        "hooks": {(name, kind): list(getattr(part, kind, ())) for name, part in parts.items() for kind in kinds},
        "attributes": {name: sorted(vars(part)) for name, part in parts.items()},
        "classes": {name: type(part) for name, part in parts.items()},
    }


def _modules(bridge: Any, root: str) -> list[tuple[str, torch.nn.Module]]:
    return list((bridge if root == "bridge" else bridge.original_model).named_modules())
