"""The terms of a logit: what every write, of a head, a neuron, a source position or a bias, adds through frozen norms.

The function to call is `direct_logit_attribution`; this module reads one batch for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechinterp.engines.logit_directions import Direction
from mechinterp.graphs.token_positions import take_positions
from mechinterp.models.components import PositionSets
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import NO_ENTRY
from mechinterp.tasks.pairs import Pairs

Block: TypeAlias = "tuple[list[str], Tensor]"
"""The labels of some parts and their values `[part, batch]`."""
Read: TypeAlias = "dict[str, Tensor]"
"""Values in float32 or better by site, at the read positions only, except `v` (at all positions)."""


@dataclass(frozen=True)
class Refined:
    """What is split further: the layers whose MLP is, the heads of each layer, and whether the input is."""

    mlps: frozenset[int]
    heads: Mapping[int, tuple[int, ...]]
    input: bool = False


@dataclass(frozen=True)
class LogitMap:
    """The linear map from a write at the read positions to its share of the logit, with the norms' scales frozen."""

    vector: Float[Tensor, "batch d_model"]
    weight: Float[Tensor, "batch n"]
    """Per read position: its share of the mean over positions, divided by the scales."""
    constants: Mapping[str, Float[Tensor, " batch"]]
    logit: Float[Tensor, " batch"]
    """The sum of all parts."""

    def of(self, write: Float[Tensor, "*axes d_model"]) -> Float[Tensor, " batch"]:
        """The share of a write `[batch, n, d_model]`, or of one that is the same at every position."""
        write = write.expand(*self.weight.shape, -1)
        return einsum(write, self.vector, self.weight, "batch n d, batch d, batch n -> batch")

    def through(self, post: Norm, before: Tensor | None) -> LogitMap:
        """The map from a write before a post-norm, whose whole input is `before`."""
        if post.identity:
            return self
        vector = post.project_transposed(self.vector)
        if post.kind == "none":
            return replace(self, vector=vector)
        assert before is not None
        return replace(self, vector=vector, weight=self.weight / post.scale(before)[..., 0])


def read_values(model: HookManager, pairs: Pairs, tokens: Tensor, at: Tensor, refined: Refined) -> Read:
    """The values of one forward, each reduced to the read positions when it is computed."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    found: Read = {}

    def keep(site: Site) -> Intervention:
        def note(value: Tensor) -> Tensor:
            if site.kind == "v":
                found[str(site)] = value.to(dtype)
                return value
            rows = value.transpose(1, 2) if site.kind == "pattern" else value
            rows = rows.expand(len(tokens), *rows.shape[1:])  # a position embedding may come with a batch of one
            found[str(site)] = take_positions(rows.flatten(2), at).unflatten(2, rows.shape[2:]).to(dtype)
            return value

        return Intervention(site, note)

    inputs = [Site("embed"), Site("pos_embed")] if refined.input else [Site("resid_pre", 0)]
    sites = [*inputs, Site("resid_final")]
    for layer in range(model.dims.n_layers):
        own = model.dims.layer(layer)
        kinds = ["z"] if own.n_heads else ["attn_raw"] * own.mixer
        kinds += ["mlp_out"] * (own.mlp and layer not in refined.mlps)
        kinds += ["v", "pattern"] if layer in refined.heads else []
        if layer in refined.mlps:
            kinds += ["mlp_post"] + ["mlp_raw"] * model.has(Site("mlp_raw", layer))
        sites += [Site(kind, layer) for kind in kinds]
    stop = Site("resid_final")
    model.run(tokens, pairs.mask, interventions=[keep(site) for site in sites], stop=stop)
    return found


def logit_map(model: HookManager, read: Read, direction: Direction, at: Tensor) -> LogitMap:
    """The map of one batch, from the run's own final residual stream."""
    layout, resid = model.layout, read["resid_final"]
    valid = at != NO_ENTRY
    share = valid.to(resid.dtype) / valid.sum(1, keepdim=True)
    vectors, unembed_bias = direction.unembedded(layout, resid.dtype)
    normed = einsum(layout.final_norm(resid), vectors, share, "batch n d, batch d, batch n -> batch")
    constants: dict[str, Tensor] = {}
    if layout.final_norm.bias is not None and bool(layout.final_norm.bias.any()):
        constants["final_norm.bias"] = vectors @ layout.final_norm.bias.to(resid.dtype)
    if layout.b_U is not None and bool(layout.b_U.any()):
        constants["unembed.bias"] = unembed_bias
    return LogitMap(
        vector=layout.final_norm.project_transposed(vectors),
        weight=share / layout.final_norm.scale(resid)[..., 0],
        constants=constants,
        logit=normed + unembed_bias,
    )


def logit_parts(
    model: HookManager,
    read: Read,
    to_logit: LogitMap,
    refined: Refined,
    sources: PositionSets | None,
) -> Iterator[Block]:
    """Every part, in the order in which the model computes them."""
    for name in ("embed", "pos_embed") if refined.input else ("input",):
        yield [name], to_logit.of(read["resid_pre.0" if name == "input" else name])[None]
    for layer in range(model.dims.n_layers):
        own = model.dims.layer(layer)
        if own.n_heads:
            yield from _attention_parts(model, layer, read, to_logit, refined.heads.get(layer, ()), sources)
        elif own.mixer:
            yield [f"a{layer}"], to_logit.of(model.layout.mixer(layer).post(read[f"attn_raw.{layer}"]))[None]
        if layer in refined.mlps:
            yield from _neuron_parts(model, layer, read, to_logit)
        elif own.mlp:
            yield [f"m{layer}"], to_logit.of(read[f"mlp_out.{layer}"])[None]
    for name, value in to_logit.constants.items():
        yield [name], value[None]


def _attention_parts(
    model: HookManager,
    layer: int,
    read: Read,
    to_logit: LogitMap,
    refined: tuple[int, ...],
    sources: PositionSets | None,
) -> Iterator[Block]:
    maps, z = model.layout.attention[layer], read[f"z.{layer}"]
    inner = to_logit.through(maps.post, model.layout.attention_total(layer, z))
    # The weight of each head's output; no write is expanded to d_model.
    reads = einsum(maps.W_O.to(z.dtype), inner.vector, "head d_head d, batch d -> batch head d_head")
    heads = einsum(z, reads, inner.weight, "batch n head d_head, batch head d_head, batch n -> head batch")
    n_heads = len(maps.W_O)
    group = n_heads // len(maps.W["v"])
    for head in range(n_heads):
        name = f"a{layer}.h{head}"
        if head not in refined or sources is None:
            yield [name], heads[head][None]
            continue
        attended = einsum(read[f"pattern.{layer}"][:, :, head], inner.weight, "batch n key, batch n -> batch key")
        carried = einsum(read[f"v.{layer}"][:, :, head // group], reads[:, head], "batch key d, batch d -> batch key")
        sums = (sources.masks.to(z.dtype) * attended * carried).sum(-1)
        labels = [f"{name}@{label}" for label in sources.labels]
        yield labels, torch.where(sources.present, sums, torch.nan)
    biases = [inner.of(maps.b_O.to(z.dtype))] if maps.b_O is not None and bool(maps.b_O.any()) else []
    if maps.post.bias is not None and bool(maps.post.bias.any()):
        biases.append(to_logit.of(maps.post.bias.to(z.dtype)))
    if biases:
        yield [f"a{layer}.bias"], torch.stack(biases).sum(0, keepdim=True)


def _neuron_parts(model: HookManager, layer: int, read: Read, to_logit: LogitMap) -> Iterator[Block]:
    maps, post = model.layout.neurons(layer), read[f"mlp_post.{layer}"]
    inner = to_logit.through(maps.post, read.get(f"mlp_raw.{layer}"))
    reads = inner.vector @ maps.W_out.to(post.dtype).T
    values = einsum(post, inner.weight, "batch n neuron, batch n -> batch neuron") * reads
    yield [f"m{layer}.n{i}" for i in range(values.shape[1])], values.T
    biases = [inner.of(maps.b_out.to(post.dtype))] if maps.b_out is not None and bool(maps.b_out.any()) else []
    if maps.post.bias is not None and bool(maps.post.bias.any()):
        biases.append(to_logit.of(maps.post.bias.to(post.dtype)))
    if biases:
        yield [f"m{layer}.bias"], torch.stack(biases).sum(0, keepdim=True)
