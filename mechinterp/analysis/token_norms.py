"""Norm-based token attribution: what each token's vector contributes to each other one's, by layer and rolled out.

What a layer's attention writes at token i is a sum over tokens j, of attention times value through the output matrix,
and the residual stream adds token i itself. The norm of each summand says more than the attention weight, which counts
a token whose value is small as much as any other. In a BERT the norms after the sums are linear at the run's scale, so
the summands go through them, too (GlobEnc).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.batches import batches
from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.engines.decomposition.encoder import Encoder
from mechinterp.engines.grid import Grid, numbered
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

KINDS = ("norms", "residual-norms", "attention")


@dataclass(frozen=True)
class Contributions:
    """What each token contributes to what a layer makes of each token.

    Args:
        parts: The contribution of token `source` to token `pos`, itself through the residual stream included.
        rest: What no token contributes: biases, and for the end of an encoder's layer what its MLP adds.
        whole: Their sum: the residual stream after the attention (decoders), or at the end of the layer (encoders).
    """

    parts: Float[Tensor, "batch pos source d_model"]
    rest: Float[Tensor, "batch pos d_model"]
    whole: Float[Tensor, "batch pos d_model"]


def token_attribution(
    model: HookManager | Encoder,
    pairs: Pairs,
    kind: Literal["norms", "residual-norms", "attention"] = "norms",
    *,
    rollout: bool = True,
    batch_size: int | None = None,
) -> Grid:
    """A Grid (layer, pos, source, example): how much of token `pos` after each layer comes from token `source`.

    Every row is a distribution over sources (NaN at padding). With `rollout` it is over the tokens of the input: the
    product of the layers' matrices up to that layer; without, over the tokens before the layer.

    - `norms`: norms of the contributions; in an encoder through both norms of the layer at the run's scale, which is
      GlobEnc (Modarressi et al. 2022). In a decoder the residual stream after the attention.
    - `residual-norms`: norms of attention and residual stream before the norms after them (the same in a decoder).
    - `attention`: half the mean attention of the heads, half the token itself: the baseline of Abnar and Zuidema 2020.

    MLPs mix no tokens; what they add is not attributed (as in GlobEnc).

    Args:
        model: A causal model, or a BERT (`load_encoder`).
        pairs: Their clean prompts.
        kind: See above.
        rollout: Whether layers are multiplied.
        batch_size: Examples at a time; by default all.

    Cost: one forward. Memory: patterns, values and the residual stream of all layers, and `batch * pos^2 * d_model` for
    one layer at a time.

    Raises InputError for an unknown kind.

    Source: Kobayashi et al. 2021 (arXiv 2109.07152) and Modarressi et al. 2022 (GlobEnc, arXiv 2205.03286).

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> grid = mi.token_attribution(model, mi.load_task("ioi").pairs(model, n=2))
    >>> grid.axes
    ('layer', 'pos', 'source', 'example')
    """
    if kind not in KINDS:
        raise unknown("kind of token attribution", kind, KINDS)
    pairs = pairs.to(model.device)
    found: list[Tensor] = []
    for _, batch in batches(pairs, batch_size):
        real = batch.mask[:, :, None] & batch.mask[:, None]
        layers: list[Tensor] = []
        sites = [site for layer in range(model.dims.n_layers) for site in _sites(model, layer)]
        values = model.run(batch.clean, batch.mask, record=sites).values
        for layer in range(model.dims.n_layers):
            weights = torch.where(real, _weights(model, values, layer, kind), 0)
            weights = torch.where(real, weights / weights.sum(-1, keepdim=True), 0)
            layers.append(weights @ layers[-1] if rollout and layers else weights)
        found.append(torch.where(real, torch.stack(layers), torch.nan))
    labels = numbered(pairs.clean.shape[1])
    axes = {"layer": numbered(model.dims.n_layers), "pos": labels, "source": labels, "example": numbered(len(pairs))}
    about = {"kind": kind, "rollout": rollout, "rows": "distributions over sources", "MLPs": "not attributed"}
    return Grid(torch.cat(found, 1).permute(0, 2, 3, 1), axes, "share", "", about, {"forwards": 1.0})


def token_contributions(
    model: HookManager | Encoder, pairs: Pairs, layer: int, *, through_norms: bool = True
) -> Contributions:
    """What each token's vector contributes to what a layer's attention makes of each token; with the rest it adds up.

    Args:
        model: A causal model, or a BERT.
        pairs: Their clean prompts.
        layer: The layer.
        through_norms: Whether an encoder's contributions go through its two norms, to the end of the layer.

    Cost: one forward. Raises InputError for a layer that the model does not have.
    """
    if not 0 <= layer < model.dims.n_layers:
        raise InputError(f"The model has layers 0 to {model.dims.n_layers - 1}; got {layer}.")
    values = model.run(pairs.clean, pairs.mask, record=_sites(model, layer)).values
    return _contributions(model, values, layer, through_norms=through_norms)


def _sites(model: HookManager | Encoder, layer: int) -> list[Site]:
    kinds = ("resid_pre", "pattern", "v", "z", *(["mlp_out"] if isinstance(model, Encoder) else []))
    return [Site(kind, layer) for kind in kinds]


def _contributions(
    model: HookManager | Encoder, values: Mapping[Any, Tensor], layer: int, *, through_norms: bool
) -> Contributions:
    resid, pattern, v, z = (_wide(values[site]) for site in _sites(model, layer)[:4])
    v = v.repeat_interleave(model.dims.n_heads // v.shape[2], 2)
    if isinstance(model, Encoder):
        own = model.module.bert.encoder.layer[layer]
        dense = own.attention.output.dense
        W_O = dense.weight.detach().T.to(resid).unflatten(0, z.shape[2:])
        parts, bias = _summed(pattern, v, W_O), dense.bias.detach().to(resid).expand_as(resid)
    else:
        maps = model.layout.attention[layer]
        parts = _summed(pattern, v, maps.W_O.to(resid))
        parts = maps.post.project(parts)
        if maps.post.kind != "none":
            parts = parts / maps.post.scale(model.layout.attention_total(layer, z))[:, :, None]
        bias = model.layout.attention_bias(layer, z)
        bias = torch.zeros_like(resid) if bias is None else bias
    itself = torch.eye(parts.shape[1], device=parts.device, dtype=parts.dtype)[None, :, :, None]
    parts = parts + itself * resid[:, :, None]
    whole = parts.sum(2) + bias
    if not isinstance(model, Encoder) or not through_norms:
        return Contributions(parts, bias, whole)
    own = model.module.bert.encoder.layer[layer]
    for module, added in ((own.attention.output.LayerNorm, None), (own.output.LayerNorm, Site("mlp_out", layer))):
        norm = Norm("layer", module.weight.detach().to(resid), module.bias.detach().to(resid), float(module.eps))
        if added is not None:
            bias, whole = bias + _wide(values[added]), whole + _wide(values[added])
        scale = norm.scale(whole)
        parts = norm.project(parts) / scale[:, :, None]
        bias = norm.project(bias) / scale + module.bias.detach().to(resid)
        whole = norm(whole)
    return Contributions(parts, bias, whole)


def _weights(
    model: HookManager | Encoder, values: Mapping[Any, Tensor], layer: int, kind: str
) -> Float[Tensor, "batch pos source"]:
    if kind == "attention":
        pattern = _wide(values[Site("pattern", layer)]).mean(1)
        return (pattern + torch.eye(pattern.shape[1], device=pattern.device, dtype=pattern.dtype)) / 2
    return _contributions(model, values, layer, through_norms=kind == "norms").parts.norm(dim=-1)


def _summed(pattern: Tensor, v: Tensor, W_O: Tensor) -> Float[Tensor, "batch pos source d_model"]:
    by_head = einsum(v, W_O, "batch source head d_head, head d_head d_model -> batch head source d_model")
    return einsum(pattern, by_head, "batch head pos source, batch head source d_model -> batch pos source d_model")


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
