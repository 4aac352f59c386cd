"""Tiny random models with odd settings: mixtures of experts, and what TransformerLens or Hugging Face trip over."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.support.models_tiny import _ENDS, _GPT2, _GROUPED, _ROTARY, D_VOCAB, randomized

_E = {"vocab_size": D_VOCAB, "pad_token_id": 0, **_ENDS}
_R, _G = {**_ROTARY, "num_hidden_layers": 2, **_E}, {**_GROUPED, "num_hidden_layers": 2, **_E}
_S = {**_GPT2, "n_layer": 2, **_E}
_FALCON = {key: value for key, value in _R.items() if key != "intermediate_size"}
_OPT = {"hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 32, "num_attention_heads": 4, **_E}
_GEMMA = {**_G, "head_dim": 8, "sliding_window": 4}
_GEMMA4 = {**_GEMMA, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": D_VOCAB}
_FULL = ["full_attention"] * 2
_LOCAL = {**_G, "num_local_experts": 4, "num_experts_per_tok": 2}
_SMALL = {**_G, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_SHARED = {**_SMALL, "shared_expert_intermediate_size": 8}
_ROUTED = {**_G, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
_LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

_MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, **_E}

Built = tuple[str, dict[str, Any]]

EXPERTS: dict[str, Built] = {
    "Mixtral": ("MixtralForCausalLM", _LOCAL),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", _SHARED),
    "Qwen2-MoE, dense first": ("Qwen2MoeForCausalLM", {**_SHARED, "decoder_sparse_step": 2}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {**_SMALL, "head_dim": 4}),
    "GPT-OSS": ("GptOssForCausalLM", {**_LOCAL, "head_dim": 4, "sliding_window": 4}),
    "Llama 4": (
        "Llama4ForCausalLM",
        {**_LOCAL, "head_dim": 4, "intermediate_size_mlp": 32, "num_experts_per_tok": 1, "attention_chunk_size": 16},
    ),
    "OLMoE": ("OlmoeForCausalLM", {**_G, "num_experts": 4, "num_experts_per_tok": 2}),
    "FlexOLMo (norm after)": ("FlexOlmoForCausalLM", {**_G, "num_experts": 4, "num_experts_per_tok": 2}),
    "GLM-4-MoE, dense first": (
        "Glm4MoeForCausalLM",
        {**_ROUTED, "head_dim": 4, "first_k_dense_replace": 1, "topk_group": 1},
    ),
    "GraniteMoE": ("GraniteMoeForCausalLM", _LOCAL),
    "MiniMax-M2": ("MiniMaxM2ForCausalLM", {**_LOCAL, "head_dim": 4}),
}

LOADS: dict[str, Built] = {
    "Falcon, sequential": ("FalconForCausalLM", {**_FALCON, "parallel_attn": False}),
    "GPT-NeoX without biases": ("GPTNeoXForCausalLM", {**_R, "attention_bias": False}),
    "NanoChat (its final norm is used twice)": ("NanoChatForCausalLM", _G),
    "Gemma 4, one head size": ("Gemma4ForCausalLM", {**_GEMMA4, "global_head_dim": 8}),
    "OPT": ("OPTForCausalLM", {**_OPT, "word_embed_proj_dim": 16}),
    "OPT without biases": ("OPTForCausalLM", {**_OPT, "word_embed_proj_dim": 16, "enable_bias": False}),
    "Llama with biases": ("LlamaForCausalLM", {**_G, "attention_bias": True, "mlp_bias": True}),
    "Llama, other head size": ("LlamaForCausalLM", {**_G, "head_dim": 6}),
    "Llama, tied": ("LlamaForCausalLM", {**_G, "tie_word_embeddings": True, "hidden_act": "relu"}),
    "Gemma-2 without caps": (
        "Gemma2ForCausalLM",
        {**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "GPT-2, no activation": ("GPT2LMHeadModel", {**_S, "activation_function": "linear"}),
    "GPT-2, one token": ("GPT2LMHeadModel", {**_S, "n_positions": 1}),
    "OLMo 3": ("Olmo3ForCausalLM", {**_G, "sliding_window": 4}),
    "Nemotron": ("NemotronForCausalLM", _G),
    "Apertus": ("ApertusForCausalLM", _G),
    "BitNet (norms inside)": ("BitNetForCausalLM", _G),
}

REFUSED: dict[str, Built] = {
    "Falcon, new decoder": ("FalconForCausalLM", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon, new decoder, one norm": (
        "FalconForCausalLM",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "GPT-BigCode, all keys": ("GPTBigCodeForCausalLM", {**_S, "multi_query": False}),
    "Phi with q and k norms": ("PhiForCausalLM", {**_R, "qk_layernorm": True}),
    "Gemma 4, layer inputs": ("Gemma4ForCausalLM", {**_GEMMA4, "global_head_dim": 8, "hidden_size_per_layer_input": 4}),
    "OPT with projections": ("OPTForCausalLM", {**_OPT, "word_embed_proj_dim": 8}),
    "OPT, norm after": ("OPTForCausalLM", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "GPT-2, cross-attention": ("GPT2LMHeadModel", {**_S, "add_cross_attention": True}),
    "GPT-2, unscaled": ("GPT2LMHeadModel", {**_S, "scale_attn_weights": False}),
    "ModernBERT decoder": ("ModernBertDecoderForCausalLM", {**_R, "local_attention": 4}),
    "DiffLlama": ("DiffLlamaForCausalLM", _G),
    "RWKV": (
        "RwkvForCausalLM",
        {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "context_length": 32, **_E},
    ),
    "BERT": ("BertLMHeadModel", _R),
}

WHOLE: dict[str, Built] = {
    "Gemma 4, two head sizes": (
        "Gemma4ForCausalLM",
        {**_GEMMA4, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Mamba 2": (
        "Mamba2ForCausalLM",
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 1,
            **_E,
        },
    ),
    "JetMoE": ("JetMoeForCausalLM", {**_LOCAL, "kv_channels": 4}),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", {**_ROUTED, **_LATENT, "num_key_value_heads": 4, "topk_group": 1}),
    "Gemma 4, keys as values in some layers": (
        "Gemma4ForCausalLM",
        {
            **_GEMMA4,
            "global_head_dim": 8,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "Qwen3.5, full attention": ("Qwen3_5ForCausalLM", {**_G, **_LINEAR, "layer_types": _FULL}),
    "Qwen3-Next, full attention": ("Qwen3NextForCausalLM", {**_SHARED, **_LINEAR, "layer_types": _FULL}),
    "Qwen3.5-MoE, full attention": ("Qwen3_5MoeForCausalLM", {**_SHARED, **_LINEAR, "layer_types": _FULL}),
    "Qwen3.5, linear attention": (
        "Qwen3_5ForCausalLM",
        {**_G, **_LINEAR, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "AFMoE": ("AfmoeForCausalLM", {**_LOCAL, "head_dim": 4, "num_dense_layers": 1}),
}
"""Models with layers whose attention (or what takes its place) is read as a whole."""

OTHERS: dict[str, Built] = {
    "Gemma-3": ("Gemma3ForCausalLM", {**_GEMMA, "query_pre_attn_scalar": 8}),
    "Gemma-3, both ways": (
        "Gemma3ForCausalLM",
        {**_GEMMA, "query_pre_attn_scalar": 8, "use_bidirectional_attention": True},
    ),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            **_E,
        },
    ),
}


def odd(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The Hugging Face model of that name with random weights, in evaluation mode."""
    architecture, settings = {**EXPERTS, **LOADS, **REFUSED, **WHOLE, **OTHERS}[name]
    kind = getattr(transformers, architecture)
    config = kind.config_class(**settings)
    config = config if getattr(config, "is_encoder_decoder", False) else config.get_text_config()
    torch.manual_seed(0)  # for what `randomized` does not draw: buffers
    return randomized(kind(config), dtype=dtype)
