"""The pure maps of one model: how readers read the residual stream and how writers write to it.

This module neither runs the model nor uses hooks. `HookManager` checks every map against the running model at load,
so a map that is wrong for an architecture is an error at load, not a wrong number later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.errors import UnsupportedError
from mechinterp.models.activation import activation_function
from mechinterp.models.block_parts import HEAD_PARTS, attention_of, factor_of, mixer_of, mlp_of, norm_of
from mechinterp.models.norm import Norm, measure_norm
from mechinterp.models.packed_weights import packed_in
from mechinterp.models.placement import on_device


@dataclass(frozen=True)
class LayerDims:
    """What one layer of a hybrid model has.

    Args:
        n_heads: Its heads; 0 for none.
        n_kv_heads: Its key/value heads.
        mixer: Whether something that is read as a whole takes the place of heads: a convolution, a state-space layer.
        mlp: Whether it has an MLP.
    """

    n_heads: int
    n_kv_heads: int
    mixer: bool
    mlp: bool


@dataclass(frozen=True)
class Dims:
    """Sizes and shape of one model. `n_kv_heads` < `n_heads` under grouped-query attention.

    In a hybrid model `n_heads` and `n_kv_heads` are those of the layer with most, and `layers` says what each has.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    d_vocab_out: int
    n_ctx: int
    has_mlp: bool
    """Whether any layer has an MLP."""
    parallel: bool
    """Attention and MLP of a layer both read the layer's input (GPT-NeoX)."""
    causal: bool
    layers: tuple[LayerDims, ...] = ()
    """Layer by layer, if they differ; empty: all have `n_heads` heads, and an MLP if `has_mlp`."""

    def layer(self, number: int) -> LayerDims:
        """What a layer has."""
        return self.layers[number] if self.layers else LayerDims(self.n_heads, self.n_kv_heads, False, self.has_mlp)

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        """The layers with an MLP."""
        return tuple(layer for layer in range(self.n_layers) if self.layer(layer).mlp)

    @property
    def head_layers(self) -> tuple[int, ...]:
        """The layers with heads."""
        return tuple(layer for layer in range(self.n_layers) if self.layer(layer).n_heads)

    def mlp_reads_input(self, layer: int) -> bool:
        """Whether the MLP of a layer reads the layer's input: beside the attention, or because nothing is before it."""
        own = self.layer(layer)
        return self.parallel or not (own.n_heads or own.mixer)


@dataclass(frozen=True)
class AttentionMaps:
    """Weights of one attention layer, `[head, d_model, d_head]` for q, k, v and `[head, d_head, d_model]` out."""

    norm: Norm
    W: Mapping[str, Tensor]
    b: Mapping[str, Tensor | None]
    W_O: Tensor
    b_O: Tensor | None
    post: Norm
    """The post-norm; or the constant by which the output is multiplied (Granite), as a norm of kind `none`."""


@dataclass(frozen=True)
class MixerMaps:
    """What is known of a part that mixes tokens and is read as a whole: the norm before it, and what comes after it."""

    norm: Norm
    post: Norm
    """A post-norm, a constant multiplier (as a norm of kind `none`), or nothing."""


@dataclass(frozen=True)
class Attentions:
    """The attention of every layer; one without heads, or of packed weights, is refused by name when asked for."""

    maps: tuple[AttentionMaps | None, ...]
    packed: Mapping[int, str] = field(default_factory=dict[int, str])
    """The layers whose weights of q, k, v or the output are packed (a quantised model), and how."""

    def __getitem__(self, layer: int) -> AttentionMaps:
        found = self.maps[layer]
        if layer in self.packed:
            raise UnsupportedError(_of_packed(f"the attention of layer {layer}", self.packed[layer]))
        if found is None:
            raise UnsupportedError(
                f"Layer {layer} of this model has no heads (what mixes tokens there is one node, 'a{layer}'); take a "
                "method or analysis that does not go through single heads, such as 'eap-ig'."
            )
        return found

    def until(self, layer: int) -> Attentions:
        """Those of the layers before this one."""
        return Attentions(self.maps[:layer], {at: how for at, how in self.packed.items() if at < layer})


@dataclass(frozen=True)
class MlpMaps:
    """Weights of one MLP: `[d_model, neuron]` in (and gate), `[neuron, d_model]` out, and the post-norm."""

    W_in: Tensor
    b_in: Tensor | None
    W_gate: Tensor | None
    W_out: Tensor
    b_out: Tensor | None
    post: Norm
    b_gate: Tensor | None = None
    activation: str | None = None
    """The name of its activation function, as measured at load; None: unknown."""

    def activated_by(self, activation: str | None) -> MlpMaps:
        """The same with the name of its activation function."""
        return replace(self, activation=activation)

    def before_activation(self, mlp_in: Float[Tensor, "*axes d_model"]) -> tuple[Tensor, Tensor | None]:
        """(the activation function's input, the factor of its output: None without a gate)."""

        def read(weight: Tensor, bias: Tensor | None) -> Tensor:
            out = mlp_in @ weight.to(mlp_in.dtype)
            return out if bias is None else out + bias.to(mlp_in.dtype)

        up = read(self.W_in, self.b_in)
        return (up, None) if self.W_gate is None else (read(self.W_gate, self.b_gate), up)

    def __call__(self, mlp_in: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """Its output before the post-norm. Its activation function must be known."""
        assert self.activation is not None
        given, up = self.before_activation(mlp_in)
        post = activation_function(self.activation)(given)
        out = (post if up is None else post * up) @ self.W_out.to(mlp_in.dtype)
        return out if self.b_out is None else out + self.b_out.to(mlp_in.dtype)


def _copied(name: str) -> Any:
    """A weight of a layer on another device, copied to the main device whenever it is read, and not kept."""

    def read(maps: Any) -> Tensor | None:
        weight: Tensor | None = getattr(maps.own, name)
        return None if weight is None else weight.to(maps.device)

    return property(read)


class _Copies(Mapping[str, Any]):
    """The same for weights by name."""

    def __init__(self, own: Mapping[str, Any], device: torch.device) -> None:
        self.own, self.device = own, device

    def __getitem__(self, name: str) -> Any:
        weight = self.own[name]
        return None if weight is None else weight.to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


class AttentionElsewhere(AttentionMaps):
    """The attention of a layer on another device: its norms are on the main device, its matrices are copied there."""

    W_O, b_O = _copied("W_O"), _copied("b_O")

    def __init__(self, own: AttentionMaps, device: torch.device) -> None:
        vars(self).update(own=own, device=device, norm=own.norm, post=own.post)
        vars(self).update(W=_Copies(own.W, device), b=_Copies(own.b, device))


class MlpElsewhere(MlpMaps):
    """The same for an MLP."""

    W_in, b_in, W_gate, b_gate = _copied("W_in"), _copied("b_in"), _copied("W_gate"), _copied("b_gate")
    W_out, b_out = _copied("W_out"), _copied("b_out")

    def __init__(self, own: MlpMaps, device: torch.device) -> None:
        vars(self).update(own=own, device=device, post=own.post, activation=own.activation)

    def activated_by(self, activation: str | None) -> MlpMaps:
        """The same with the name of its activation function."""
        return MlpElsewhere(vars(self)["own"].activated_by(activation), vars(self)["device"])


@dataclass(frozen=True)
class Layout:
    """Read and write maps of one model. All maps work in the dtype of their argument."""

    dims: Dims
    attention: Attentions
    mlp_norm: tuple[Norm | None, ...]
    mlp_maps: tuple[MlpMaps | None, ...]
    """None for a layer without an MLP, or with one that is not a pair of matrices (a mixture of experts)."""
    mlp_post: tuple[Norm, ...]
    """What comes after each MLP: a post-norm, a constant multiplier (as a norm of kind `none`), or nothing."""
    final_norm: Norm
    W_U: Float[Tensor, "d_model d_vocab"]
    """Times the constant that scales the logits (Cohere, Granite), in which case it is a copy."""
    b_U: Float[Tensor, " d_vocab"] | None
    soft_cap: float | None
    mixers: tuple[MixerMaps | None, ...] = ()
    """Layer by layer, what takes the place of heads; empty: nothing does in any layer."""
    packed_mlps: Mapping[int, str] = field(default_factory=dict[int, str])
    """The layers whose MLP has packed weights (a quantised model), and how."""

    def mixer(self, layer: int) -> MixerMaps:
        """What takes the place of heads in a layer. Raises UnsupportedError for a layer with heads."""
        found = self.mixers[layer] if self.mixers else None
        if found is None:
            raise UnsupportedError(f"Nothing takes the place of attention in layer {layer}.")
        return found

    def read_heads(
        self, layer: int, channel: str, resid: Float[Tensor, "head *axes d_model"]
    ) -> Float[Tensor, "head *axes d_head"]:
        """q, k or v of every head, each head from its own residual stream."""
        maps = self.attention[layer]
        weight, constant = self.folded(layer, channel, resid.dtype)
        flat, factor, _ = maps.norm.factored(resid.flatten(1, -2))
        if factor is None:
            out = torch.baddbmm(constant[:, None], flat, weight)
        else:
            out = torch.addcmul(constant[:, None], torch.bmm(flat, weight), factor)
        return out.unflatten(1, resid.shape[1:-1])

    def folded(
        self, layer: int, channel: str, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head"]]:
        """(weight, constant) of `standardize(resid) @ weight + constant`: the norm's own weight and bias folded in."""
        maps = self.attention[layer]
        weight, bias = maps.W[channel].to(dtype), maps.b[channel]
        constant = weight.new_zeros(weight.shape[0], weight.shape[2]) if bias is None else bias.to(dtype)
        if maps.norm.bias is not None:
            constant = constant + maps.norm.bias.to(dtype) @ weight
        if maps.norm.weight is not None:
            weight = weight * maps.norm.weight.to(dtype)[:, None]
        return weight, constant

    def read_mixer(self, layer: int, resid: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """The input of what takes the place of heads. Raises UnsupportedError for a layer with heads."""
        return self.mixer(layer).norm(resid)

    def read_mlp(self, layer: int, resid: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """The MLP's input after its norm. Raises UnsupportedError for a layer without an MLP."""
        norm = self.mlp_norm[layer]
        if norm is None:
            raise UnsupportedError(f"Layer {layer} has no MLP.")
        return norm(resid)

    def attention_total(self, layer: int, z: Float[Tensor, "*axes head d_head"]) -> Float[Tensor, "*axes d_model"]:
        """The sum of all heads and the output bias, before any post-norm."""
        maps = self.attention[layer]
        total = einsum(z, maps.W_O.to(z.dtype), "... head d_head, head d_head d_model -> ... d_model")
        return total if maps.b_O is None else total + maps.b_O.to(z.dtype)

    def head_writes(self, layer: int, z: Float[Tensor, "*axes head d_head"]) -> Float[Tensor, "head *axes d_model"]:
        """What each head adds to the residual stream; the output bias belongs to no head.

        Under a post-norm (Gemma-2) a head's write is its share of the normed sum, with the scale that the sum of
        all heads has in the same run; so the writes (and the bias's share) add up to the layer's output exactly.
        """
        maps = self.attention[layer]
        by_head = rearrange(z, "... head d_head -> head (...) d_head")
        writes = torch.bmm(by_head, maps.W_O.to(z.dtype)).unflatten(1, z.shape[:-2])
        if maps.post.kind == "none":
            return maps.post.project(writes)
        return maps.post.project(writes) / maps.post.scale(self.attention_total(layer, z))

    def head_write_differences(
        self, layer: int, z: Float[Tensor, "*axes head d_head"], other: Float[Tensor, "*axes head d_head"]
    ) -> Float[Tensor, "head *axes d_model"]:
        """`head_writes(z) - head_writes(other)`, in one product where the write is linear in z."""
        if self.attention[layer].post.kind == "none":
            return self.head_writes(layer, z - other)
        return self.head_writes(layer, z) - self.head_writes(layer, other)

    def attention_bias(
        self, layer: int, z: Float[Tensor, "*axes head d_head"]
    ) -> Float[Tensor, "*axes d_model"] | None:
        """What the attention layer adds besides its heads (output bias, post-norm bias), or None."""
        maps = self.attention[layer]
        parts: list[Tensor] = []
        if maps.b_O is not None:
            bias = maps.b_O.to(z.dtype).expand(*z.shape[:-2], -1)
            bias = maps.post.project(bias)
            if maps.post.kind != "none":
                bias = bias / maps.post.scale(self.attention_total(layer, z))
            parts.append(bias)
        if maps.post.bias is not None:
            parts.append(maps.post.bias.to(z.dtype).expand(*z.shape[:-2], -1))
        return sum(parts[1:], parts[0]) if parts else None

    def neurons(self, layer: int) -> MlpMaps:
        """The weights of a layer's MLP. Raises UnsupportedError if it is not a pair of matrices."""
        maps = self.mlp_maps[layer]
        if layer in self.packed_mlps:
            raise UnsupportedError(_of_packed(f"the MLP of layer {layer}", self.packed_mlps[layer]))
        if maps is None:
            raise UnsupportedError(f"Layer {layer} has no MLP with one input and one output matrix.")
        return maps

    def neuron_parts(
        self, layer: int, post: Float[Tensor, "*axes d_mlp"], chosen: Sequence[int]
    ) -> tuple[Float[Tensor, "neuron ..."], Float[Tensor, "neuron d_model"]]:
        """(value, direction) of the chosen neurons, whose product each adds to the residual stream.

        `post` are the values of all of the MLP. Under a post-norm a neuron's value is divided by the scale of the
        normed sum, so that it is its share of it, as for heads.
        """
        maps = self.neurons(layer)
        W_out = maps.W_out.to(post.dtype)
        values = post[..., chosen].movedim(-1, 0)
        directions = maps.post.project(W_out[chosen])
        if maps.post.kind == "none":
            return values, directions
        total = post @ W_out if maps.b_out is None else post @ W_out + maps.b_out.to(post.dtype)
        return values / maps.post.scale(total)[..., 0], directions

    def unembed(
        self, resid: Float[Tensor, "*axes d_model"], columns: Int[Tensor, " n_columns"] | None = None
    ) -> Float[Tensor, "*axes n_columns"]:
        """Logits of the final residual stream, of all tokens or of the given columns only."""
        weight, bias = self.W_U, self.b_U
        if columns is not None:
            weight, bias = weight[:, columns], None if bias is None else bias[columns]
        logits = self.final_norm(resid) @ weight.to(resid.dtype)
        if bias is not None:
            logits = logits + bias.to(resid.dtype)
        if self.soft_cap:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits


def _of_packed(part: str, how: str) -> str:
    return (
        f"The weights of {part} are quantised ({how}), and this reads them as plain numbers. Load the model without "
        "quantisation (a GGUF file is dequantised), or take what reads activations only, such as activation_patching."
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _norm_of(block: Any, name: str, label: str, like: Tensor, d_model: int) -> Norm:
    # `like` is on the main device, and so is the norm.
    component = getattr(block, name, None)
    return Norm("none") if component is None else measure_norm(label, component, like, d_model).on(like.device)


def _post_of(block: Any, name: str, label: str, like: Tensor, d_model: int) -> Norm:
    """The norm after a part of a layer, or the constant by which its output is multiplied."""
    factor = factor_of(block)
    if factor == 1.0:
        return _norm_of(block, name, label, like, d_model)
    if getattr(block, name, None) is not None:
        raise UnsupportedError(f"{label} is a post-norm whose output is multiplied by {factor:g}: not supported.")
    # In float32 or better: rounding to bfloat16 would change the multiplier.
    wide = torch.promote_types(like.dtype, torch.float32)
    return Norm("none", like.new_full((d_model,), factor, dtype=wide))


def _logit_scale(bridge: Any, soft_cap: float | None) -> float:
    """The factor of the unembedding's output before any soft cap, from TransformerLens's adapter."""
    transform = getattr(getattr(bridge, "adapter", None), "apply_output_logits_transform", None)
    if transform is None:
        return 1.0
    small = 1.0 if soft_cap is None else 2.0**-20  # a soft cap is the identity on so small a number
    return float(transform(torch.tensor([small], dtype=torch.float64))) / small


def _scaled(tensor: Tensor | None, factor: float) -> Tensor | None:
    return tensor if tensor is None or abs(factor - 1) < 1e-9 else tensor * factor


def _attention_maps(attn: Any, norm: Norm, post: Norm, main: torch.device) -> AttentionMaps:
    found = AttentionMaps(
        norm=norm,
        W={"q": attn.W_Q.detach(), "k": attn.W_K.detach(), "v": attn.W_V.detach()},
        b={"q": _detached(attn.b_Q), "k": _detached(attn.b_K), "v": _detached(attn.b_V)},
        W_O=attn.W_O.detach(),
        b_O=_detached(attn.b_O),
        post=post,
    )
    return found if found.W_O.device == main else AttentionElsewhere(found, main)


def _mlp_maps(mlp: Any, post: Norm, main: torch.device) -> MlpMaps | None:
    if packed_in([mlp]) is not None:
        return None
    parts = {name: getattr(mlp, name, None) for name in ("W_in", "b_in", "W_gate", "b_gate", "W_out", "b_out")}
    if any(part is not None and not isinstance(part, Tensor) for part in parts.values()):
        return None
    if parts["W_in"] is None or parts["W_out"] is None or parts["W_in"].ndim != 2 or parts["W_out"].ndim != 2:
        return None
    if parts["W_in"].shape[1] != len(parts["W_out"]):  # gate and input in one matrix (ModernBERT)
        return None
    found = MlpMaps(**{name: _detached(part) for name, part in parts.items()}, post=post)  # pyright: ignore[reportArgumentType]
    return found if found.W_in.device == main else MlpElsewhere(found, main)


def build_layout(bridge: Any) -> Layout:
    """The layout of a TransformerBridge, its weights shared with the model, not copied.

    Raises UnsupportedError, naming the part, for models whose residual stream has another structure.
    """
    cfg = bridge.cfg
    blocks = getattr(bridge, "blocks", None)
    if blocks is None or len(blocks) == 0:
        raise UnsupportedError(f"{cfg.architecture} has no single stack of layers; only decoder stacks are supported.")
    main = bridge.W_U.device
    floating = next(p for p in bridge.original_model.parameters() if p.is_floating_point())
    like = torch.empty(0, dtype=floating.dtype, device=main)
    d_model = int(cfg.d_model)
    attention: list[AttentionMaps | None] = []
    packed, packed_mlps = dict[int, str](), dict[int, str]()
    mixers: list[MixerMaps | None] = []
    mlp_norms: list[Norm | None] = []
    mlp_maps: list[MlpMaps | None] = []
    mlp_posts: list[Norm] = []
    parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
    for layer, block in enumerate(blocks):
        label = f"blocks.{layer}"
        before = _norm_of(block, norm_of(block), f"{label}.{norm_of(block)}", like, d_model)
        after = _post_of(block, "ln1_post", f"{label}.ln1_post", like, d_model)
        attn = attention_of(block)
        if attn is not None and (how := packed_in(getattr(attn, part) for part in HEAD_PARTS)) is not None:
            packed[layer] = how
        attention.append(None if attn is None or layer in packed else _attention_maps(attn, before, after, main))
        mixers.append(MixerMaps(before, after) if mixer_of(block) else None)
        own = attention[-1]
        if own is not None and own.post.kind != "none" and own.b_O is not None and bool(own.b_O.any()):
            raise UnsupportedError(
                f"Layer {layer} of {cfg.architecture} has an output bias under a post-norm: what the bias writes "
                "depends on the prompt but does not belong to any head, so edges cannot be exact."
            )
        # In a parallel layer without a second norm the MLP reads what the attention reads (GPT-J, Phi, Cohere), and so
        # does an MLP that is all that a layer has.
        alone = attn is None and mixers[-1] is None
        shared = (parallel and getattr(block, "ln2", None) is None) or alone
        norm = before if shared else _norm_of(block, "ln2", f"{label}.ln2", like, d_model)
        mlp = mlp_of(block)
        mlp_norms.append(norm if mlp else None)
        mlp_posts.append(_post_of(block, "ln2_post", f"{label}.ln2_post", like, d_model))
        part = getattr(block, mlp or "mlp", None)
        mlp_maps.append(_mlp_maps(part, mlp_posts[-1], main))
        if mlp and (how := packed_in([part])) is not None:
            packed_mlps[layer] = how
    if not any(attention) and not any(mixers) and not packed:
        raise UnsupportedError(f"No layer of {cfg.architecture} has attention, or anything known in its place.")
    soft_cap = float(cap) if (cap := getattr(cfg, "output_logits_soft_cap", None)) and cap > 0 else None
    factor = _logit_scale(bridge, soft_cap)
    W_U, b_U = _scaled(bridge.W_U.detach(), factor), _scaled(_detached(getattr(bridge, "b_U", None)), factor)
    assert W_U is not None
    b_U = None if b_U is None else on_device(b_U, main)
    stated = int(cfg.n_heads), int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads)
    layers = tuple(
        LayerDims(
            *(stated if layer in packed else (0, 0) if maps is None else (len(maps.W["q"]), len(maps.W["k"]))),
            mixer is not None,
            norm is not None,
        )
        for layer, (maps, mixer, norm) in enumerate(zip(attention, mixers, mlp_norms, strict=True))
    )
    hybrid = len(set(layers)) > 1 or any(mixers)
    n_heads = max(layer.n_heads for layer in layers) if hybrid else int(cfg.n_heads)
    n_kv_heads = max(layer.n_kv_heads for layer in layers) if hybrid else getattr(cfg, "n_key_value_heads", None)
    dims = Dims(
        n_layers=len(blocks),
        n_heads=n_heads,
        n_kv_heads=int(n_kv_heads or n_heads),
        d_model=d_model,
        d_head=max((int(maps.W["q"].shape[-1]) for maps in attention if maps is not None), default=int(cfg.d_head)),
        d_vocab=int(cfg.d_vocab),
        d_vocab_out=int(W_U.shape[1]),
        n_ctx=int(cfg.n_ctx),
        has_mlp=any(norm is not None for norm in mlp_norms),
        parallel=parallel,
        causal=str(getattr(cfg, "attention_dir", "causal")) == "causal",
        layers=layers if hybrid else (),
    )
    return Layout(
        dims=dims,
        attention=Attentions(tuple(attention), packed),
        mlp_norm=tuple(mlp_norms),
        mlp_maps=tuple(mlp_maps),
        mlp_post=tuple(mlp_posts),
        final_norm=_norm_of(bridge, "ln_final", "ln_final", like, d_model),
        W_U=W_U,
        b_U=b_U,
        soft_cap=soft_cap,
        mixers=tuple(mixers) if any(mixers) else (),
        packed_mlps=packed_mlps,
    )
