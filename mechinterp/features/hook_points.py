"""The sites that other tools' hook points mean: TransformerLens's names, modules of Hugging Face, circuit-tracer's."""

from __future__ import annotations

import re

from mechinterp.base.errors import FormatError, clip
from mechinterp.models.hook_names import HOOK_NAMES
from mechinterp.models.sites import LAYER_SITES, Site

_OF_HOOK = {name: kind for kind, name in HOOK_NAMES.items()} | {
    "blocks.{}.ln1.hook_normalized": "attn_in",
    "blocks.{}.ln2.hook_normalized": "mlp_in",
    "blocks.{}.mlp.hook_out": "mlp_out",
    "blocks.{}.attn.hook_out": "attn_out",
    "blocks.{}.hook_mlp_in": "resid_mid",
    "ln_final.hook_normalized": "final_norm",
}
_LAYER = r"(?:model\.|transformer\.|gpt_neox\.)?(?:layers|h|blocks)\.(\d{1,4})"
_MODULES = {
    "": "resid_post",
    ".output": "resid_post",
    ".input": "resid_pre",
    ".mlp": "mlp_out",
    ".mlp.output": "mlp_out",
    ".mlp.input": "mlp_in",
    ".attn": "attn_out",
    ".attention": "attn_out",
    ".self_attn": "attn_out",
    ".self_attn.output": "attn_out",
    ".self_attn.o_proj.input": "z",
    ".pre_feedforward_layernorm.output": "mlp_in",
    ".post_feedforward_layernorm.output": "mlp_out",
}
"""What comes after the name of a layer in Hugging Face's modules. `post_attention_layernorm` is not here: it is a
post-norm in Gemma and the MLP's norm in Llama."""
_EMBEDDINGS = ("embed_tokens", "model.embed_tokens", "gpt_neox.embed_in", "embed_in", "transformer.wte", "wte")


def site_of_hook(name: str, where: str) -> Site:
    """The site of a hook point: `blocks.3.hook_resid_post`, `model.layers.3.output`, `layers.3.mlp`, or our `z.3`.

    Raises FormatError, which says to give the site, for a name that is not known.
    """
    kind, _, layer = name.partition(".")
    if kind in LAYER_SITES and layer.isdecimal() and len(layer) < 5:
        return Site(kind, int(layer))
    if name in ("embed", "resid_final", "final_norm", "pos_embed"):
        return Site(name)
    if name in _EMBEDDINGS:
        return Site("embed")
    if name in _OF_HOOK:
        return Site(_OF_HOOK[name])
    found = re.fullmatch(r"blocks\.(\d{1,4})(\..+)", name)
    if found and (pattern := f"blocks.{{}}{found[2]}") in _OF_HOOK:
        return Site(_OF_HOOK[pattern], int(found[1]))
    found = re.fullmatch(_LAYER + r"(.*)", name)
    if found and found[2] in _MODULES:
        return Site(_MODULES[found[2]], int(found[1]))
    raise FormatError(
        f"{where} names the unknown hook point {clip(name, 80)!r}; give the site, as in site='resid_post.5'."
    )


def site_of_layer_hook(name: str, layer: int, where: str) -> Site:
    """The site of circuit-tracer's hook name within a layer: `hook_resid_mid`, `mlp.hook_in`, `hook_mlp_out`."""
    return site_of_hook(f"blocks.{layer}.{name}", where)
