"""Tiny random models of every family of decoders that both transformers and TransformerLens know, for the table.

A family is a configuration class of transformers with two layers and four heads, and where its modules are: all that
`plain_hooks.py` needs to do edges and patching on the model itself, with neither TransformerLens nor our engines.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

D_VOCAB, D_MODEL, N_LAYERS, N_HEADS, N_CTX = 50, 16, 2, 4, 32


@dataclass(frozen=True)
class Modules:
    """Names of the modules that read and write the residual stream; those of a layer are relative to it."""

    layers: str = "model.layers"
    norm: str = "input_layernorm"
    """The norm before the attention; "" if there is none."""
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    fused: str = ""
    """The layout of q, k and v in one projection (then all three names are the same): `blocks` (all of q, all of k,
    all of v), or head by head in an order such as `qkv`."""
    mixer: str = ""
    """What is one node in the place of heads, in the layers that have a module of this name; the first of several."""
    mixer_layers: tuple[int, ...] | None = None
    """In which layers, if not in all that have it."""
    attention_post: str = ""
    mlp: str = "mlp"
    """The module of the MLP; "" if there is none."""
    mlp_out: str = ""
    """The module whose output is added to the residual stream, if it is not the MLP itself."""
    mlp_norm: str = "post_attention_layernorm"
    """The norm before the MLP; in a parallel layer it may be the attention's own."""
    mlp_post: str = ""
    parallel: bool = False
    final_norm: str = "model.norm"
    residual: str = ""
    """The attribute of the configuration that multiplies what a layer adds."""


@dataclass(frozen=True)
class Family:
    """One row of the table: how to make the model, and where its modules are."""

    label: str
    name: str
    """Of the classes in transformers: `Llama` for LlamaConfig and LlamaForCausalLM."""
    settings: dict[str, Any]
    modules: Modules = Modules()
    model_class: str = ""
    config_class: str = ""
    dtype: torch.dtype = torch.float64

    def config(self) -> Any:
        """The configuration."""
        import transformers

        return getattr(transformers, self.config_class or f"{self.name}Config")(**self.settings)

    def build(self, seed: int = 0) -> nn.Module:
        """A model with every weight drawn at random, biases and norms included, in evaluation mode."""
        import transformers

        config = self.config()
        config._attn_implementation = config._experts_implementation = "eager"  # some experts' kernels take no float64
        return randomized(
            getattr(transformers, self.model_class or f"{self.name}ForCausalLM")(config), seed, self.dtype
        )


def randomized(module: nn.Module, seed: int, dtype: torch.dtype) -> nn.Module:
    """The module with normal weights of size 0.3, those of norms around 1, so that every bias and norm matters."""
    generator = torch.Generator().manual_seed(seed)
    module = module.to(dtype).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_norm = any(part in name for part in ("norm", "ln_", "layernorm", "ln1", "ln2")) and name.endswith(
                "weight"
            )
            parameter.copy_((noise + float(is_norm)).to(dtype))
    return module


_ENDS = {"vocab_size": D_VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_R: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "intermediate_size": 32,
    "max_position_embeddings": N_CTX,
    **_ENDS,
}
_G = {**_R, "num_key_value_heads": 2}
_GH = {**_G, "head_dim": 8}
_S = {"n_positions": N_CTX, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, **_ENDS}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
_STABLE = {**_G, "partial_rotary_factor": 0.5}
_GEMMA2 = {**_GH, "sliding_window": 4, "query_pre_attn_scalar": 8}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_OPT = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "ffn_dim": 32,
    "num_attention_heads": N_HEADS,
    "word_embed_proj_dim": D_MODEL,
    "max_position_embeddings": N_CTX,
    **_ENDS,
}
_FALCON = {k: v for k, v in _R.items() if k != "intermediate_size"}
_NEO = {
    "hidden_size": D_MODEL,
    "num_layers": N_LAYERS,
    "num_heads": N_HEADS,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
    "max_position_embeddings": N_CTX,
    **_ENDS,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MLA = {
    "num_key_value_heads": N_HEADS,
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def _modules(layers: str, final_norm: str, norms: tuple[str, str], attention: str, o: str, **more: Any) -> Modules:
    """Modules of a family with a fused projection, or (`attention` with a star) three of them."""
    q, k, v = (attention.replace("*", channel) for channel in "qkv")
    return Modules(layers, norms[0], q, k, v, o, mlp_norm=norms[1], final_norm=final_norm, **more)


_LLAMA = Modules()
_SHARED = Modules(mlp_norm="input_layernorm", parallel=True)
_GPT2 = _modules("transformer.h", "transformer.ln_f", ("ln_1", "ln_2"), "attn.c_attn", "attn.c_proj", fused="blocks")
_GPT_NEO = _modules(
    "transformer.h", "transformer.ln_f", ("ln_1", "ln_2"), "attn.attention.*_proj", "attn.attention.out_proj"
)
_GPT_J = _modules("transformer.h", "transformer.ln_f", ("ln_1", "ln_1"), "attn.*_proj", "attn.out_proj", parallel=True)
# CodeGen: four blocks of q, v, k, which with four heads are the heads.
_CODEGEN = _modules(
    "transformer.h", "transformer.ln_f", ("ln_1", "ln_1"), "attn.qkv_proj", "attn.out_proj", fused="qvk", parallel=True
)
_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_NEOX_SEQUENTIAL = _modules(
    "gpt_neox.layers",
    "gpt_neox.final_layer_norm",
    _TWO_NORMS,
    "attention.query_key_value",
    "attention.dense",
    fused="qkv",
)
_NEOX = replace(_NEOX_SEQUENTIAL, parallel=True)
_OPT_MODULES = _modules(
    "model.decoder.layers",
    "model.decoder.final_layer_norm",
    ("self_attn_layer_norm", "final_layer_norm"),
    "self_attn.*_proj",
    "self_attn.out_proj",
    mlp="fc1",
    mlp_out="fc2",
)
_BLOOM = _modules(
    "transformer.h",
    "transformer.ln_f",
    _TWO_NORMS,
    "self_attention.query_key_value",
    "self_attention.dense",
    fused="qkv",
    mlp_out="mlp.dense_4h_to_h",
)
_MPT = _modules(
    "transformer.blocks",
    "transformer.norm_f",
    ("norm_1", "norm_2"),
    "attn.Wqkv",
    "attn.out_proj",
    fused="blocks",
    mlp="ffn",
    mlp_out="ffn.down_proj",
)
_FALCON_SEQUENTIAL = replace(_BLOOM, mlp_out="")
_FALCON_HEADS = replace(_FALCON_SEQUENTIAL, mlp_norm="input_layernorm", parallel=True)
_FALCON_7B = replace(_FALCON_HEADS, fused="blocks")
_PHI = replace(_SHARED, o="self_attn.dense", final_norm="model.final_layernorm")
_PHI3 = replace(_LLAMA, q="self_attn.qkv_proj", k="self_attn.qkv_proj", v="self_attn.qkv_proj", fused="blocks")
_GEMMA = replace(
    _LLAMA,
    attention_post="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post="post_feedforward_layernorm",
)
_AFTER = replace(
    _LLAMA, norm="", mlp_norm="", attention_post="post_attention_layernorm", mlp_post="post_feedforward_layernorm"
)
_GLM4 = replace(_LLAMA, attention_post="post_self_attn_layernorm", mlp_post="post_mlp_layernorm")
_AFMOE = replace(
    _LLAMA, attention_post="post_attention_layernorm", mlp_norm="pre_mlp_layernorm", mlp_post="post_mlp_layernorm"
)

FAMILIES: tuple[Family, ...] = (
    Family("GPT-2", "GPT2", _S, _GPT2, model_class="GPT2LMHeadModel"),
    Family("GPT-Neo (local attention)", "GPTNeo", _NEO, _GPT_NEO),
    Family("GPT-J", "GPTJ", {**_S, "rotary_dim": 2}, _GPT_J),
    Family("GPT-NeoX, Pythia", "GPTNeoX", _R, _NEOX),
    Family("GPT-NeoX, sequential", "GPTNeoX", {**_R, "use_parallel_residual": False}, _NEOX_SEQUENTIAL),
    Family("GPT-NeoX, no attention bias", "GPTNeoX", {**_R, "attention_bias": False}, _NEOX),
    Family("GPT-BigCode", "GPTBigCode", _S, _GPT2),
    Family("GPT-BigCode, multi-head", "GPTBigCode", {**_S, "multi_query": False}, replace(_GPT2, fused="qkv")),
    Family("CodeGen", "CodeGen", {**_S, "rotary_dim": 2}, _CODEGEN),
    Family(
        "OpenAI GPT", "OpenAIGPT", {k: v for k, v in _S.items() if "id" not in k}, model_class="OpenAIGPTLMHeadModel"
    ),
    Family("OPT", "OPT", _OPT, _OPT_MODULES),
    Family("OPT, norm after", "OPT", {**_OPT, "do_layer_norm_before": False}),
    Family("OPT, projected embedding", "OPT", {**_OPT, "word_embed_proj_dim": 8}, _OPT_MODULES),
    Family("Bloom", "Bloom", {"hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, **_ENDS}, _BLOOM),
    Family(
        "MPT",
        "Mpt",
        {"d_model": D_MODEL, "n_heads": N_HEADS, "n_layers": N_LAYERS, "max_seq_len": N_CTX, **_ENDS},
        _MPT,
    ),
    Family("Falcon 7B", "Falcon", _FALCON, _FALCON_7B),
    Family("Falcon, one key-value head a query head", "Falcon", {**_FALCON, "multi_query": False}, _FALCON_HEADS),
    Family(
        "Falcon, sequential, ALiBi",
        "Falcon",
        {**_FALCON, "parallel_attn": False, "alibi": True, "multi_query": False},
        _FALCON_SEQUENTIAL,
    ),
    Family("Falcon 40B", "Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    Family(
        "XGLM",
        "XGLM",
        {
            "d_model": D_MODEL,
            "num_layers": N_LAYERS,
            "attention_heads": N_HEADS,
            "ffn_dim": 32,
            "max_position_embeddings": N_CTX,
            **_ENDS,
        },
        replace(_OPT_MODULES, layers="model.layers", final_norm="model.layer_norm"),
        dtype=torch.float32,  # its padding mask is out of range in float64
    ),
    Family("Llama", "Llama", _G),
    Family("Llama 3.1 (scaled rotation)", "Llama", {**_G, "rope_parameters": _LLAMA3}),
    Family("Llama, biases", "Llama", {**_G, "attention_bias": True, "mlp_bias": True}),
    Family("Mistral (sliding window)", "Mistral", {**_G, "sliding_window": 4}),
    Family("Ministral 3", "Ministral3", _GH),
    Family("Mixtral", "Mixtral", {**_G, **_EXPERTS}),
    Family(
        "Llama 4",
        "Llama4",
        {**_GH, **_EXPERTS, "intermediate_size_mlp": 32, "no_rope_layers": [1, 0], "interleave_moe_layer_step": 1},
        replace(_LLAMA, mlp="feed_forward"),
        config_class="Llama4TextConfig",
    ),
    Family("Qwen2", "Qwen2", _G),
    Family("Qwen2-MoE", "Qwen2Moe", {**_G, **_MOE, "shared_expert_intermediate_size": 16}),
    Family("Qwen3", "Qwen3", _GH),
    Family("Qwen3-MoE", "Qwen3Moe", {**_GH, **_MOE}),
    Family(
        "Qwen3-Next, full attention",
        "Qwen3Next",
        {**_GH, **_MOE, "layer_types": ["full_attention"] * 2, "shared_expert_intermediate_size": 16},
        Modules(mixer="self_attn"),
    ),
    Family(
        "Qwen3-Next, linear and full attention",
        "Qwen3Next",
        {**_GH, **_MOE, **_LINEAR, "shared_expert_intermediate_size": 16},
        Modules(mixer="linear_attn self_attn"),
    ),
    Family(
        "Qwen3.5, full attention",
        "Qwen3_5",
        {**_GH, "layer_types": ["full_attention"] * 2},
        Modules(mixer="self_attn"),
        config_class="Qwen3_5TextConfig",
    ),
    Family(
        "Qwen3.5, linear and full attention",
        "Qwen3_5",
        {**_GH, **_LINEAR},
        Modules(mixer="linear_attn self_attn"),
        config_class="Qwen3_5TextConfig",
    ),
    Family("Gemma", "Gemma", _GH),
    Family("Gemma 2", "Gemma2", _GEMMA2, _GEMMA),
    Family("Gemma 3", "Gemma3", _GEMMA2, _GEMMA, config_class="Gemma3TextConfig"),
    Family(
        "Gemma 4",
        "Gemma4",
        {**_GEMMA2, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "global_head_dim": 8},
        _GEMMA,
        config_class="Gemma4TextConfig",
    ),
    Family(
        "Gemma 4, inputs per layer",
        "Gemma4",
        {**_GEMMA2, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": D_VOCAB, "global_head_dim": 8},
        config_class="Gemma4TextConfig",
    ),
    Family(
        "Gemma 4, another size of global heads",
        "Gemma4",
        {**_GEMMA2, "hidden_size_per_layer_input": 0, "global_head_dim": 16},
        replace(_GEMMA, mixer="self_attn", mixer_layers=(1,)),
        config_class="Gemma4TextConfig",
    ),
    Family("VaultGemma", "VaultGemma", _GEMMA2, replace(_LLAMA, mlp_norm="pre_feedforward_layernorm")),
    Family("Phi-1, Phi-2", "Phi", _R, _PHI),
    Family("Phi, q and k norm", "Phi", {**_R, "qk_layernorm": True}, _PHI),
    Family("Phi-3, Phi-4", "Phi3", _G, _PHI3),
    Family("Phi-3.5-MoE", "Phimoe", {**_G, **_EXPERTS}),
    Family("StableLM", "StableLm", _STABLE),
    Family("StableLM, parallel", "StableLm", {**_STABLE, "use_parallel_residual": True}, _SHARED),
    Family("StableLM, q and k norm", "StableLm", {**_STABLE, "qk_layernorm": True}),
    Family("Cohere (Command R)", "Cohere", _G, _SHARED),
    Family("Cohere, q and k norm", "Cohere", {**_G, "use_qk_norm": True}, _SHARED),
    Family("Cohere 2 (Command R7B)", "Cohere2", {**_G, "sliding_window": 4}, _SHARED),
    Family("OLMo", "Olmo", _G),
    Family("OLMo, clipped", "Olmo", {**_G, "clip_qkv": 0.5}),
    Family("OLMo 2", "Olmo2", _G, _AFTER),
    Family("OLMo 3", "Olmo3", {**_G, "sliding_window": 4}, _AFTER),
    Family("OLMoE", "Olmoe", {**_G, **_MOE}),
    Family("FlexOlmo", "FlexOlmo", {**_G, **_MOE}, _AFTER),
    Family(
        "Granite",
        "Granite",
        {
            **_G,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.5,
            "logits_scaling": 3.0,
        },
        replace(_LLAMA, residual="residual_multiplier"),
    ),
    Family(
        "GraniteMoE",
        "GraniteMoe",
        {
            **_G,
            **_EXPERTS,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.5,
            "logits_scaling": 3.0,
        },
        replace(_LLAMA, mlp="block_sparse_moe", residual="residual_multiplier"),
    ),
    Family("GLM", "Glm", _GH),
    Family("GLM-4", "Glm4", _GH, _GLM4),
    Family(
        "GLM-4-MoE",
        "Glm4Moe",
        {**_GH, **_MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    Family("GPT-OSS", "GptOss", {**_GH, **_EXPERTS, "sliding_window": 4}),
    Family("DeepSeek-V2", "DeepseekV2", {**_R, **_MLA}, Modules(mixer="self_attn")),
    Family("DeepSeek-V3", "DeepseekV3", {**_R, **_MLA}, Modules(mixer="self_attn")),
    Family("StarCoder 2", "Starcoder2", _G),
    Family("Nemotron", "Nemotron", _GH),
    Family("SmolLM3", "SmolLM3", _G),
    Family("Seed-OSS", "SeedOss", _GH),
    Family("ERNIE 4.5", "Ernie4_5", _GH),
    Family(
        "ERNIE 4.5 MoE",
        "Ernie4_5_Moe",
        {
            **_G,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": 1,
        },
    ),
    Family("EXAONE 4", "Exaone4", {**_GH, "sliding_window": 4}, _AFTER),
    Family("HunYuan dense", "HunYuanDenseV1", _GH),
    Family("Apertus", "Apertus", _GH, replace(_LLAMA, norm="attention_layernorm", mlp_norm="feedforward_layernorm")),
    Family("Arcee", "Arcee", _GH),
    Family("BitNet", "BitNet", _G),
    Family("MiniMax-M2", "MiniMaxM2", {**_GH, **_EXPERTS, "rotary_dim": 4}),
    Family("NanoChat", "NanoChat", _G),
    Family(
        "JetMoe",
        "JetMoe",
        {**_R, "num_key_value_heads": 2, "kv_channels": 8, **_EXPERTS},
        Modules(mixer="self_attention"),
    ),
    Family("ModernBERT decoder", "ModernBertDecoder", {**_R, "cls_token_id": 0, "sep_token_id": 0}),
    Family("AFMoE", "Afmoe", {**_GH, **_MOE, "num_dense_layers": 1}, replace(_AFMOE, mixer="self_attn")),
    Family("Jais 2", "Jais2", _GH),
    Family(
        "Youtu",
        "Youtu",
        {**_R, **{k: v for k, v in _MLA.items() if "lora" in k or "head" in k}},
        Modules(mixer="self_attn"),
    ),
    Family(
        "LFM2",
        "Lfm2",
        {**_G, "layer_types": ["conv", "full_attention"]},
        Modules(
            norm="operator_norm",
            o="self_attn.out_proj",
            mixer="conv",
            mlp="feed_forward",
            mlp_norm="ffn_norm",
            final_norm="model.embedding_norm",
        ),
    ),
    Family(
        "Granite 4 hybrid",
        "GraniteMoeHybrid",
        {
            **_G,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 4,
            "mamba_chunk_size": 4,
            "num_local_experts": 0,
            "shared_intermediate_size": 32,
            "residual_multiplier": 0.5,
            "position_embedding_type": "nope",
        },
        replace(_LLAMA, mixer="mamba", mlp="shared_mlp", residual="residual_multiplier"),
    ),
    Family("Jamba, no attention", "Jamba", {**_G, "num_experts": 2, "use_mamba_kernels": False}),
    Family(
        "Jamba",
        "Jamba",
        {**_G, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
        Modules(mixer="mamba", mlp="feed_forward", mlp_norm="pre_ff_layernorm", final_norm="model.final_layernorm"),
    ),
    Family(
        "Mamba",
        "Mamba",
        {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "state_size": 4, **_ENDS},
        Modules(layers="backbone.layers", norm="norm", mixer="mixer", mlp="", final_norm="backbone.norm_f"),
    ),
    Family(
        "RWKV",
        "Rwkv",
        {
            "hidden_size": D_MODEL,
            "num_hidden_layers": N_LAYERS,
            "attention_hidden_size": D_MODEL,
            "context_length": N_CTX,
            **_ENDS,
        },
    ),
    Family("RecurrentGemma", "RecurrentGemma", {**_G, "lru_width": D_MODEL, "attention_window_size": 8}),
    Family("CTRL", "CTRL", {**_S, "dff": 32}, model_class="CTRLLMHeadModel"),
    Family("BERT, as a decoder", "Bert", {**_R, "is_decoder": True}, model_class="BertLMHeadModel"),
    Family(
        "T5",
        "T5",
        {
            "d_model": D_MODEL,
            "d_kv": 4,
            "num_layers": N_LAYERS,
            "num_heads": N_HEADS,
            "d_ff": 32,
            "vocab_size": D_VOCAB,
        },
        model_class="T5ForConditionalGeneration",
    ),
)
