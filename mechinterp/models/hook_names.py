"""The name of TransformerLens's hook point for every site."""

from __future__ import annotations

HOOK_NAMES = {
    "embed": "hook_embed",
    "pos_embed": "hook_pos_embed",
    "resid_final": "ln_final.hook_in",
    "final_norm": "unembed.hook_in",
    "resid_pre": "blocks.{}.hook_resid_pre",
    "attn_in": "blocks.{}.attn.hook_in",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "scores": "blocks.{}.attn.hook_attn_scores",
    "pattern": "blocks.{}.attn.hook_pattern",
    "z": "blocks.{}.attn.hook_z",
    "attn_raw": "blocks.{}.ln1_post.hook_in",
    "attn_out": "blocks.{}.hook_attn_out",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "mlp_in": "blocks.{}.mlp.hook_in",
    "router_in": "blocks.{}.mlp.gate.hook_in",
    "mlp_pre": "blocks.{}.mlp.hook_pre",
    "mlp_up": "blocks.{}.mlp.hook_pre_linear",
    "mlp_post": "blocks.{}.mlp.hook_post",
    "mlp_raw": "blocks.{}.ln2_post.hook_in",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_post": "blocks.{}.hook_resid_post",
}

ROUTERS = ("gate", "router")
"""What the router of a mixture of experts is called inside its MLP; the second name is an alias here."""
