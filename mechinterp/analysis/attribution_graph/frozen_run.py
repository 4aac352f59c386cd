"""One prompt's run with attention patterns and norm scales frozen: an affine map, and its transpose in closed form.

With the patterns, the scales of all norms and the activations of the features frozen, the residual stream is an affine
function of what is written to it: tokens, constants, features, and what the transcoders miss. `FrozenRun.backward` goes
through this map from the readers to the writers, many readers side by side, and holds one `[reader, pos, d_model]`
tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.features.activations import Gated
from mechinterp.features.basis import Basis
from mechinterp.features.dictionary import Dictionary
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Site

READ = ("mlp_in", "resid_mid", "resid_pre")
WRITTEN = ("mlp_out", "mlp_raw")


@dataclass(frozen=True)
class Seed:
    """A direction that is read at one place of one position: the reader in row `row` of a batch.

    Args:
        row: The row of the batch.
        layer: The layer; the number of layers for the logits.
        kind: `mlp_in`, `resid_mid` or `resid_pre`; `resid_final` for the logits.
        position: The position.
        direction: What is read.
    """

    row: int
    layer: int
    kind: str
    position: int
    direction: Float[Tensor, " d_model"]


@dataclass(frozen=True, eq=False)
class FrozenRun:
    """The recorded values of a run of one prompt, and the affine map that they make of the model.

    Args:
        model: The model.
        transcoders: One per layer or part of a cross-layer transcoder, by the layer that it reads.
        tokens: The prompt.
        values: The recorded sites, without the batch axis, in float32 or better.
    """

    model: HookManager
    transcoders: Mapping[int, Dictionary]
    tokens: Int[Tensor, " pos"]
    values: Mapping[Site, Tensor]

    @property
    def n_pos(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the sums."""
        return torch.promote_types(self.model.dtype, torch.float32)

    def at(self, kind: str, layer: int | None = None) -> Tensor:
        """The recorded value of a site, `[pos, ...]`."""
        return self.values[Site(kind, layer)]

    def mlp_norm(self, layer: int) -> Norm:
        """The norm before an MLP."""
        return self.model.layout.mlp_norm[layer] or Norm("none")

    def mlp_stream(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """The residual stream that the MLP of a layer reads, before its norm."""
        return self.at("resid_pre" if self.model.dims.parallel else "resid_mid", layer)

    def mlp_scale(self, layer: int) -> Float[Tensor, "pos 1"]:
        """The frozen scale of the norm before an MLP."""
        return self.mlp_norm(layer).scale(self.mlp_stream(layer))

    def mlp_post(self, layer: int) -> tuple[Norm, Float[Tensor, "pos 1"]]:
        """The norm after an MLP, and its frozen scale (1 without one)."""
        post = self.model.layout.mlp_post[layer]
        raw = self.at("mlp_raw", layer) if Site("mlp_raw", layer) in self.values else self.at("mlp_out", layer)
        return post, post.scale(raw)

    def attention_post(self, layer: int) -> tuple[Norm, Float[Tensor, "pos 1"]]:
        """The norm after the heads of a layer, and its frozen scale."""
        post = self.model.layout.attention[layer].post
        if post.kind == "none":
            return post, self.start().new_ones(self.n_pos, 1)
        return post, post.scale(self.model.layout.attention_total(layer, self.at("z", layer)))

    def written(
        self, kind: str, layer: int, vectors: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """What vectors that are written to `mlp_out` or `mlp_raw` add to the residual stream, without constants."""
        if kind == "mlp_out":
            return vectors
        post, scale = self.mlp_post(layer)
        return post.project(vectors) / scale[positions]

    def token_writes(self) -> Float[Tensor, "pos d_model"]:
        """What the tokens add to the residual stream, without learned positions where these are added by themselves."""
        embed, pos_embed, start = self.values.get(Site("embed")), self.values.get(Site("pos_embed")), self.start()
        if embed is None or pos_embed is None or not torch.allclose(embed + pos_embed, start, rtol=1e-3, atol=1e-5):
            return start
        return embed

    def start(self) -> Float[Tensor, "pos d_model"]:
        """The residual stream before the first layer."""
        return self.at("resid_pre", 0)

    def constants(self) -> dict[tuple[str, int], Float[Tensor, "pos d_model"]]:
        """What is added to the residual stream whatever was written before: learned positions, biases, `b_dec`.

        By place, as `backward` names it: `("input", -1)`, `("attn", layer)`, `("mlp", layer)`.
        """
        found = {("input", -1): self.start() - self.token_writes()}
        for layer in range(self.model.dims.n_layers):
            found["attn", layer] = self._attention_constant(layer)
            if self.has_mlp(layer):
                found["mlp", layer] = self._mlp_constant(layer)
        return found

    def has_mlp(self, layer: int) -> bool:
        """Whether the layer has an MLP."""
        return self.model.layout.mlp_norm[layer] is not None

    def _attention_constant(self, layer: int) -> Float[Tensor, "pos d_model"]:
        maps = self.model.layout.attention[layer]
        _, v = self.model.layout.folded(layer, "v", self.dtype)
        v = v.repeat_interleave(self.model.dims.n_heads // len(v), 0)
        z = einsum(self.at("pattern", layer).sum(-1), v, "head pos, head d_head -> pos head d_head")
        post, scale = self.attention_post(layer)
        out = post.project(self.model.layout.attention_total(layer, z)) / scale
        return out if maps.post.bias is None else out + maps.post.bias.to(out)

    def _mlp_constant(self, layer: int) -> Float[Tensor, "pos d_model"]:
        out = torch.zeros_like(self.start())
        every = torch.arange(self.n_pos, device=out.device)
        raw = False
        for at, basis in self.transcoders.items():
            for i, site in enumerate(basis.sites_out):
                if site.layer != layer:
                    continue
                constant = basis.b_dec[i].to(out)
                if i == 0 and basis.W_skip is not None and basis.sites_in[0].kind == "mlp_in":
                    bias = self.mlp_norm(at).bias
                    constant = constant if bias is None else constant + bias.to(out) @ basis.W_skip.to(out)
                out = out + self.written(site.kind, layer, constant.expand(self.n_pos, -1), every)
                raw = raw or site.kind == "mlp_raw"
        bias = self.model.layout.mlp_post[layer].bias
        return out + bias.to(out) if raw and bias is not None else out

    def errors(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """What the transcoders miss of what an MLP adds to the residual stream; all of it without a transcoder."""
        written = {site for basis in self.transcoders.values() for site in basis.sites_out if site.layer == layer}
        if not written:
            return self.at("mlp_out", layer)
        (site,) = written
        decoded = [
            basis.decode(basis.encode(self.values[basis.sites_in[0]]))[site]
            for basis in self.transcoders.values()
            if site in basis.sites_out
        ]
        missed = self.values[site] - sum(decoded[1:], decoded[0])
        return self.written(site.kind, layer, missed, torch.arange(self.n_pos, device=missed.device))

    def read_back(self, seed: Seed) -> Float[Tensor, " d_model"]:
        """The direction of the residual stream that a seed reads at its position."""
        wide = seed.direction.to(self.dtype)
        if seed.kind == "resid_final":
            norm, stream = self.model.layout.final_norm, self.at("resid_final")
        elif seed.kind == "mlp_in":
            norm, stream = self.mlp_norm(seed.layer), self.mlp_stream(seed.layer)
        else:
            return wide
        return norm.project_transposed(wide) / norm.scale(stream[seed.position])

    def read_constant(self, seed: Seed) -> float:
        """What the norm's own bias adds to what a seed reads."""
        if seed.kind not in ("resid_final", "mlp_in"):
            return 0.0
        norm = self.model.layout.final_norm if seed.kind == "resid_final" else self.mlp_norm(seed.layer)
        return 0.0 if norm.bias is None else float(norm.bias.to(self.dtype) @ seed.direction.to(self.dtype))

    def backward(
        self, seeds: Sequence[Seed], n_rows: int
    ) -> Iterator[tuple[tuple[str, int], Float[Tensor, "row pos d_model"]]]:
        """The gradient of every row's reading at each place of the residual stream, from the last to the first.

        Yields `(("mlp", layer), g)`, `(("attn", layer), g)` and in the end `(("input", -1), g)`: the reading changes by
        `<g, v>` when v is added there. Positions after a reader are exactly 0. `g` is only valid until the next step.

        Memory: a few tensors `[row, pos, d_model]`.
        """
        dims = self.model.dims
        here = self.start().new_zeros(n_rows, self.n_pos, dims.d_model)

        def seeded(layer: int, *kinds: str) -> None:
            for seed in seeds:
                if seed.layer == layer and seed.kind in kinds:
                    here[seed.row, seed.position] += self.read_back(seed)

        seeded(dims.n_layers, "resid_final")
        for layer in reversed(range(min(dims.n_layers, 1 + max(seed.layer for seed in seeds)))):
            if self.has_mlp(layer):
                yield ("mlp", layer), here
            after = here
            if dims.parallel:
                yield ("attn", layer), after
                here = after + self._through_attention(layer, after) + self._through_skip(layer, after)
                seeded(layer, "mlp_in")
            else:
                here = after + self._through_skip(layer, after)
                seeded(layer, "mlp_in", "resid_mid")
                yield ("attn", layer), here
                here = here + self._through_attention(layer, here)
            seeded(layer, "resid_pre")
        yield ("input", -1), here

    def _through_attention(self, layer: int, g: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """The gradient at the layer's input from the one at what its heads add."""
        maps, dims = self.model.layout.attention[layer], self.model.dims
        post, scale = self.attention_post(layer)
        at_z = einsum(
            post.project_transposed(g) / scale, maps.W_O.to(g), "row pos d, head d_head d -> row pos head d_head"
        )
        at_v = einsum(self.at("pattern", layer), at_z, "head query key, row query head d -> row key head d")
        at_v = at_v.unflatten(2, (dims.n_kv_heads, -1)).sum(3)
        at_input = einsum(at_v, maps.W["v"].to(g), "row pos kv d_head, kv d d_head -> row pos d")
        return maps.norm.project_transposed(at_input) / maps.norm.scale(self.at("resid_pre", layer))

    def _through_skip(self, layer: int, g: Float[Tensor, "row pos d_model"]) -> Tensor | float:
        basis = self.transcoders.get(layer)
        if basis is None or basis.W_skip is None:
            return 0.0
        site = basis.sites_out[0]
        if site.kind == "mlp_raw":
            post, scale = self.mlp_post(layer)
            g = post.project_transposed(g) / scale
        at_input = g @ basis.W_skip.to(g).T
        if basis.sites_in[0].kind != "mlp_in":
            return at_input
        return self.mlp_norm(layer).project_transposed(at_input) / self.mlp_scale(layer)


def check_transcoders(model: HookManager, bases: Sequence[Basis]) -> dict[int, Dictionary]:
    """The transcoders by the layer they read. Raises InputError or UnsupportedError for what has no exact graph."""
    found: dict[int, Dictionary] = {}
    for basis in bases:
        if not isinstance(basis, Dictionary) or isinstance(basis.activation, Gated) or basis.normalize != "none":
            raise UnsupportedError(
                f"The features of '{basis.name}' are not an affine reading before an activation function (a gate, a "
                "normalisation or another kind of basis), so edges into them are not exact; give plain transcoders."
            )
        model.resolve(basis)
        read, written = basis.sites_in, basis.sites_out
        if len(read) != 1 or read[0].kind not in READ or any(site.kind not in WRITTEN for site in written):
            sites = f"{' + '.join(map(str, read))} -> {' + '.join(map(str, written))}"
            raise InputError(
                f"An attribution graph needs transcoders, which read {', '.join(READ)} and write "
                f"{' or '.join(WRITTEN)}; '{basis.name}' is a {basis.kind} at {sites}."
            )
        if model.dims.parallel and read[0].kind == "resid_mid":
            raise InputError(f"'{basis.name}' reads resid_mid, and in this model MLP and attention read resid_pre.")
        layer = read[0].layer
        assert layer is not None
        if any(site.layer is None or site.layer < layer for site in written):
            raise InputError(f"'{basis.name}' writes before the layer that it reads.")
        if basis.W_skip is not None and written[0].layer != layer:
            raise UnsupportedError(f"The skip connection of '{basis.name}' does not end in the layer that it reads.")
        if layer in found:
            raise InputError(f"Two transcoders read layer {layer}: '{found[layer].name}' and '{basis.name}'; give one.")
        found[layer] = basis
    for layer in range(model.dims.n_layers):
        several = {str(site) for basis in found.values() for site in basis.sites_out if site.layer == layer}
        owners = [basis for basis in found.values() if any(site.layer == layer for site in basis.sites_out)]
        if len(several) > 1:
            raise InputError(f"Layer {layer} is written at {' and '.join(sorted(several))}; use one of them.")
        if len(owners) > 1 and not all(basis.cross_layer for basis in owners):
            names = ", ".join(basis.name for basis in owners)
            raise InputError(
                f"{names} all reconstruct the MLP of layer {layer}, and are not one cross-layer transcoder."
            )
    if not found:
        raise InputError("Give at least one transcoder, such as mi.load_bases('bundled:transcoders').")
    return found


def freeze(model: HookManager, tokens: Int[Tensor, " pos"], transcoders: Mapping[int, Dictionary]) -> FrozenRun:
    """The frozen run of one prompt. Cost: one forward, and its recorded sites.

    Raises UnsupportedError for a model whose patterns or MLPs cannot be recorded, InputError inside `intervene`.
    """
    dims = model.dims
    if model.edited:
        raise InputError("An attribution graph is of the model as it is; build it outside `intervene`.")
    if not dims.causal:
        raise UnsupportedError("Attribution graphs need a causal model.")
    kinds = ["resid_pre", "pattern"]
    sites = [Site("resid_final")] + [Site(kind) for kind in ("embed", "pos_embed") if model.has(Site(kind))]
    for layer in range(dims.n_layers):
        own = [*kinds]
        if model.layout.attention[layer].post.kind != "none":
            own.append("z")
        if model.layout.mlp_norm[layer] is not None:
            own += ["mlp_in", "mlp_out"] + ["resid_mid"] * (not dims.parallel)
            own += ["mlp_raw"] * model.has(Site("mlp_raw", layer))
        sites += [Site(kind, layer) for kind in own]
    run = model.run(tokens[None], record=sites)
    wide = torch.promote_types(model.dtype, torch.float32)
    values = {Site.parse(str(site)): value[0].to(wide) for site, value in run.values.items()}
    return FrozenRun(model, dict(transcoders), tokens.to(model.device), values)
