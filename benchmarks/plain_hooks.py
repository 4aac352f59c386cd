"""Edges and patching by forward hooks on a Hugging Face model: slow, independent of TransformerLens and our engines.

A hook knows the names of modules (`family_models.Modules`) and nothing else about the model: what a node reads is
computed by the model's own norm and projection on another residual stream, what it writes is the model's own output.
If `share` requires a gradient, `logits` is differentiable in it; EAP is that derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.family_models import N_HEADS, Modules

Writes = dict[str, Tensor]
"""Node -> what it adds to the residual stream, `[batch, pos, d_model]`."""


class PlainModel:
    """A model with its modules by role."""

    def __init__(self, module: nn.Module, names: Modules, n_kv: int, n_heads: int = N_HEADS) -> None:
        self.module, self.names, self.n_kv, self.n_heads = module, names, n_kv, n_heads
        self.layers: list[Any] = list(module.get_submodule(names.layers))  # pyright: ignore[reportArgumentType]
        config: Any = module.config
        self.factor = float(getattr(config, names.residual)) if names.residual else 1.0

    def part(self, layer: int, name: str) -> nn.Module:
        """The module of a layer."""
        return self.layers[layer].get_submodule(name)

    def has(self, layer: int, name: str) -> bool:
        """Whether a layer has a module of this name."""
        return bool(name) and any(found == name for found, _ in self.layers[layer].named_modules())

    def readers(self, layer: int) -> list[tuple[str, str, int]]:
        """(name, channel, head) of what a layer's attention reads."""
        shared = "kv" if self.n_kv < self.n_heads else "h"
        found = [(f"a{layer}.h{head}<q>", "q", head) for head in range(self.n_heads)]
        return found + [(f"a{layer}.{shared}{head}<{c}>", c, head) for c in "kv" for head in range(self.n_kv)]

    def logits(self, tokens: Tensor) -> Tensor:
        """The model's own logits. No mask is needed: padding is on the right, where no real token attends to it."""
        return self.module(tokens).logits

    def columns(self, channel: str, head: int, width: int) -> slice:
        """Which columns of its projection's output a head's q, k or v are."""
        fused, n_kv, n_heads = self.names.fused, self.n_kv, self.n_heads
        if not fused:
            d_head = width // (n_heads if channel == "q" else n_kv)
            return slice(head * d_head, (head + 1) * d_head)
        d_head = width // (n_heads + 2 * n_kv)
        if fused == "blocks":  # all of q, then all of k, then all of v
            first = {"q": 0, "k": n_heads, "v": n_heads + n_kv}[channel] + head
        else:  # head by head, in the order that the name says
            first = 3 * head + fused.index(channel)
        return slice(first * d_head, (first + 1) * d_head)


@contextmanager
def hooked(hooks: Sequence[Any]) -> Iterator[None]:
    """Removes the hooks at the end."""
    with ExitStack() as stack:
        for handle in hooks:
            stack.callback(handle.remove)
        yield


def bare(module: nn.Module, x: Tensor) -> Tensor:
    """The module's forward on x, without its hooks."""
    out = module.forward(x)
    return out[0] if isinstance(out, tuple) else out


def run_plain(
    model: PlainModel,
    tokens: Tensor,
    *,
    share: Mapping[str, Mapping[str, Tensor | float]] | None = None,
    replacement: Writes | None = None,
    patch: Callable[[str, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Writes]:
    """(logits, what every node writes and `z` of every head) with edges cut in part and values replaced.

    `share` is, per reader and writer, how much of the edge carries its replacement. `patch` maps (name, value) of
    `resid_pre.L`, `z.L` and `mlp_out.L` to the value that the model goes on with.
    """
    names, share, replacement = model.names, share or {}, replacement or {}
    writes: Writes = {}
    resid: dict[str, Tensor] = {}
    shape = tokens.shape
    patch = patch or (lambda name, value: value)

    def seen(reader: str, stream: Tensor) -> Tensor:
        for writer, amount in share.get(reader, {}).items():
            stream = stream - amount * (writes[writer] - replacement[writer])
        return stream

    def enter(layer: int):
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = patch(f"resid_pre.{layer}", args[0] if args else kwargs["hidden_states"])
            resid[f"pre.{layer}"] = value.clone()
            if layer == 0:
                writes["input"] = value.clone()
            return ((value, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": value})

        return hook

    def read_attention(layer: int, channels: str):
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            new = out.clone()
            for reader, channel, head in model.readers(layer):
                if channel not in channels or reader not in share:
                    continue
                stream = seen(reader, resid[f"pre.{layer}"])
                normed = bare(model.part(layer, names.norm), stream) if names.norm else stream
                read = bare(module, normed).view(*out.shape)
                where = model.columns(channel, head, out.shape[-1])
                new[..., where] = read[..., where]
            return new

        return hook

    def write_heads(layer: int):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].reshape(*shape, -1)
            z = patch(f"z.{layer}", z.unflatten(-1, (model.n_heads, -1))).flatten(-2)
            nothing = bare(module, torch.zeros_like(z))
            total = bare(module, z)
            scale = torch.full_like(total, model.factor)
            if names.attention_post:
                scale = bare(model.part(layer, names.attention_post), total) / total
            d_head = z.shape[-1] // model.n_heads
            for head in range(model.n_heads):
                own = torch.zeros_like(z)
                own[..., head * d_head : (head + 1) * d_head] = z[..., head * d_head : (head + 1) * d_head]
                writes[f"a{layer}.h{head}"] = (bare(module, own) - nothing) * scale
            writes[f"z.{layer}"] = z.unflatten(-1, (model.n_heads, -1)).clone()
            return (z.reshape(args[0].shape), *args[1:])

        return hook

    def read_mixer(layer: int):
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if f"a{layer}" not in share:
                return None
            value = bare(model.part(layer, names.norm), seen(f"a{layer}", resid[f"pre.{layer}"]))
            return ((value, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": value})

        return hook

    def write_mixer(layer: int):
        def hook(module: Any, args: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            post = names.attention_post
            writes[f"a{layer}"] = bare(model.part(layer, post), out) if post else out * model.factor

        return hook

    def keep_middle(layer: int):
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            resid.setdefault(f"mid.{layer}", args[0].reshape(*shape, -1).clone())

        return hook

    def read_mlp(layer: int):
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            if f"m{layer}" not in share:
                return None
            stream = resid[f"pre.{layer}" if names.parallel else f"mid.{layer}"]
            stream = seen(f"m{layer}", stream)
            value = bare(model.part(layer, names.mlp_norm), stream) if names.mlp_norm else stream
            value = value.reshape(given.shape)
            return ((value, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": value})

        return hook

    def write_mlp(layer: int):
        def hook(module: Any, args: Any, out: Any) -> Any:
            raw = out[0] if isinstance(out, tuple) else out
            value = patch(f"mlp_out.{layer}", raw.reshape(*shape, -1) * model.factor)
            writes[f"m{layer}"] = value.clone()
            raw = (value / model.factor).reshape(raw.shape)
            return (raw, *out[1:]) if isinstance(out, tuple) else raw

        return hook

    def read_logits(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        last = len(model.layers) - 1
        if (
            f"m{last}" not in writes and f"a{last}" not in writes
        ):  # the final norm is used on the embedding too (NanoChat)
            return None
        return (seen("logits", args[0]), *args[1:])

    hooks: list[Any] = []
    for layer in range(len(model.layers)):
        hooks.append(model.layers[layer].register_forward_pre_hook(enter(layer), with_kwargs=True))
        mixers = [name for name in names.mixer.split() if model.has(layer, name)]
        if mixers and (names.mixer_layers is None or layer in names.mixer_layers):
            mixer = model.part(layer, mixers[0])
            hooks.append(mixer.register_forward_pre_hook(read_mixer(layer), with_kwargs=True))
            hooks.append(mixer.register_forward_hook(write_mixer(layer)))
        else:
            for path in dict.fromkeys((names.q, names.k, names.v)):
                channels = "".join(c for c, own in zip("qkv", (names.q, names.k, names.v), strict=True) if own == path)
                hooks.append(model.part(layer, path).register_forward_hook(read_attention(layer, channels)))
            hooks.append(model.part(layer, names.o).register_forward_pre_hook(write_heads(layer)))
        if not names.mlp:
            continue
        if not names.parallel:
            before = model.part(layer, names.mlp_norm or names.mlp)
            hooks.append(before.register_forward_pre_hook(keep_middle(layer)))
        entry = model.part(layer, names.mlp)
        hooks.append(entry.register_forward_pre_hook(read_mlp(layer), with_kwargs=True))
        out = model.part(layer, names.mlp_post or names.mlp_out or names.mlp)
        hooks.append(out.register_forward_hook(write_mlp(layer)))
    hooks.append(model.module.get_submodule(names.final_norm).register_forward_pre_hook(read_logits))
    with hooked(hooks):
        return model.logits(tokens), writes
