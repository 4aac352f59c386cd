"""The name of TransformerLens's hook point for every site."""

from __future__ import annotations

from mechinterp.base.errors import InputError, clip
from mechinterp.base.registry import unknown
from mechinterp.models.sites import LAYER_SITES, Site

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

SHORT_NAMES = {"attn_scores": "scores", "attn": "pattern", "pre": "mlp_pre", "post": "mlp_post", "pre_linear": "mlp_up"}
"""Kinds of sites as TransformerLens's cache calls them, where its name is another one: `cache["post", 3]`."""
_LAYER_TYPES = {"a": "attn", "m": "mlp", "attention": "attn", "b": "", "block": "", "blocks": ""}


def site_of_tuple(name: tuple[object, ...], n_layers: int) -> Site | str:
    """The site, or hook name, of a tuple.

    Args:
        name: `("pattern", 5)`, with a kind of site or TransformerLens's short name of one; a negative layer counts from
            the end. With a third entry, `("scale", 5, "ln1")`, a hook name as TransformerLens makes it.
        n_layers: How many layers the model has.

    Raises InputError for anything else.

    >>> site_of_tuple(("post", -1), 12), site_of_tuple(("scale", 5, "ln1"), 12)
    (Site(kind='mlp_post', layer=11), 'blocks.5.ln1.hook_scale')
    """
    kind, layer, part = (*name, None, None, None)[:3]
    if not 2 <= len(name) <= 3 or not isinstance(kind, str) or isinstance(layer, bool) or not isinstance(layer, int):
        raise InputError(f"{clip(repr(name), 100)} is not a kind of site with its layer, such as ('pattern', 5).")
    if not -n_layers <= layer < n_layers:
        raise InputError(f"{name!r} does not exist: the model has layers 0 to {n_layers - 1}.")
    layer %= n_layers
    if len(name) == 3:
        inside = _LAYER_TYPES.get(str(part), str(part))
        return f"blocks.{layer}.{inside}{'.' * bool(inside)}hook_{kind}"
    if kind == "result":
        raise InputError(
            f"What each head writes is not recorded but computed: model.layout.head_writes({layer}, run['z', {layer}])"
            ", [head, batch, pos, d_model]; or mi.direct_logit_attribution."
        )
    kind = SHORT_NAMES.get(kind, kind)
    if kind not in LAYER_SITES:
        raise unknown("site of a layer", kind, (*LAYER_SITES, *SHORT_NAMES))
    return Site(kind, layer)
