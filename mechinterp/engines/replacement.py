"""The value that a cut edge carries instead: the corrupt run's write, a mean, or zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.batches import batches
from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.graphs.graph import Graph
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

KINDS = ("corrupt", "mean", "mean-positional", "zero")
"""corrupt: the write in the paired corrupt prompt (resample). mean: its mean over all real tokens of the reference
pairs' corrupt prompts. mean-positional: the same per position, for prompts of one length. zero: no write."""


@runtime_checkable
class Values(Protocol):
    """The replacement writes for one batch of pairs."""

    def inputs(self, name: str) -> Tensor:
        """The write of an input node, broadcastable to `[batch, pos, d_model]`."""
        ...

    def head_differences(self, layer: int, z: Float[Tensor, "*axes head d_head"]) -> Float[Tensor, "head *axes d"]:
        """What each head writes with `z`, minus its replacement."""
        ...

    def mlp(self, layer: int) -> Tensor:
        """The write of an MLP, broadcastable to `[batch, pos, d_model]`."""
        ...

    def neuron_differences(self, layer: int, post: Tensor, chosen: Tensor) -> Float[Tensor, "neuron *axes d"]:
        """What each of the chosen neurons writes with `post` (the values of all), minus its replacement."""
        ...

    def rows(self, chosen: slice) -> Values:
        """The values of some of the examples."""
        ...


@dataclass(frozen=True)
class Replacement:
    """A kind of replacement on one model; `on(pairs)` gives its values for a batch."""

    kind: str
    on: Callable[[Pairs], Values]


def input_sites(graph: Graph) -> list[Site]:
    """The sites of the graph's input writers."""
    return [Site("embed"), Site("pos_embed")] if graph.split_input else [Site("resid_pre", 0)]


def write_sites(model: HookManager, graph: Graph) -> list[Site]:
    """The sites with every write in compact form: inputs, `z`, `mlp_out`, and `mlp_post` for single neurons."""
    sites = input_sites(graph) + [Site("z", layer) for layer in range(model.dims.n_layers)]
    if model.dims.has_mlp:
        sites += [Site("mlp_out", layer) for layer in range(model.dims.n_layers)]
    return sites + [Site("mlp_post", layer) for layer in range(model.dims.n_layers) if graph.neurons_of(layer)]


def record_writes(model: HookManager, graph: Graph, tokens: Tensor, pairs: Pairs) -> CompactWrites:
    """The writes of every node of one run in compact form: one forward up to the last write."""
    last = Site("mlp_out" if model.dims.has_mlp else "attn_out", model.dims.n_layers - 1)
    run = model.run(tokens, pairs.mask, record=write_sites(model, graph), stop=last)
    dtype = torch.promote_types(model.dtype, torch.float32)
    return CompactWrites(model, {str(site): value.to(dtype) for site, value in run.values.items()}, graph.split_input)


@dataclass(frozen=True)
class CompactWrites:
    """Writes kept as `z` and `mlp_out`, so that `[..., head, d_model]` is never stored for the whole model."""

    model: HookManager
    values: dict[str, Tensor]
    split_input: bool

    def inputs(self, name: str) -> Tensor:
        """The write of `input`, `embed` or `pos_embed`."""
        return self.values[name if self.split_input else "resid_pre.0"]

    def z(self, layer: int) -> Tensor:
        """The head outputs of a layer."""
        return self.values[f"z.{layer}"]

    def head_differences(self, layer: int, z: Tensor) -> Tensor:
        """What each head writes with `z`, minus its recorded write."""
        return self.model.layout.head_write_differences(layer, z, self.z(layer).expand_as(z))

    def mlp(self, layer: int) -> Tensor:
        """The write of a layer's MLP."""
        return self.values[f"mlp_out.{layer}"]

    def neuron_differences(self, layer: int, post: Tensor, chosen: Tensor) -> Tensor:
        """What each of the chosen neurons writes with `post`, minus its recorded write."""
        layout, own = self.model.layout, self.values[f"mlp_post.{layer}"]
        if layout.neurons(layer).post.kind == "none":
            return layout.neuron_writes(layer, post - own, chosen)
        return layout.neuron_writes(layer, post, chosen) - layout.neuron_writes(layer, own.expand_as(post), chosen)

    def rows(self, chosen: slice) -> CompactWrites:
        """The writes of some of the examples."""
        return CompactWrites(self.model, {k: v[chosen] for k, v in self.values.items()}, self.split_input)


@dataclass(frozen=True)
class ConstantWrites:
    """The same writes for every example: means (per position or not) or zero."""

    model: HookManager
    writes: dict[str, Tensor]
    """Per node `[d_model]` or `[pos, d_model]`; per layer `a{l}` the heads' `[head, (pos,) d_model]`, `n{l}` the chosen
    neurons' likewise."""

    def inputs(self, name: str) -> Tensor:
        """The write of an input node."""
        return self.writes[name]

    def head_differences(self, layer: int, z: Tensor) -> Tensor:
        """What each head writes with `z`, minus its constant."""
        current = self.model.layout.head_writes(layer, z)
        constant = self.writes[f"a{layer}"]
        missing = current.ndim - constant.ndim
        return current - constant.reshape(constant.shape[0], *([1] * missing), *constant.shape[1:])

    def mlp(self, layer: int) -> Tensor:
        """The write of a layer's MLP."""
        return self.writes[f"m{layer}"]

    def neuron_differences(self, layer: int, post: Tensor, chosen: Tensor) -> Tensor:
        """What each of the chosen neurons writes with `post`, minus its constant."""
        current = self.model.layout.neuron_writes(layer, post, chosen)
        constant = self.writes[f"n{layer}"]
        missing = current.ndim - constant.ndim
        return current - constant.reshape(constant.shape[0], *([1] * missing), *constant.shape[1:])

    def rows(self, chosen: slice) -> ConstantWrites:
        """The same writes: they do not depend on the example."""
        return self


def corrupt_replacement(model: HookManager, graph: Graph) -> Replacement:
    """Replaces a write by the same node's write in the paired corrupt prompt. One forward per batch."""
    return Replacement("corrupt", lambda pairs: record_writes(model, graph, pairs.corrupt, pairs))


def build_replacement(
    kind: str, model: HookManager, graph: Graph, reference: Pairs | None = None, batch_size: int | None = None
) -> Replacement:
    """The replacement of a kind; one forward per batch of `reference` for the means.

    Args:
        kind: One of `KINDS`.
        model: The model.
        graph: Its graph.
        reference: The pairs over whose corrupt prompts the means are taken; the other kinds do not need them.
        batch_size: Examples per batch for the means; 64 by default.

    Raises InputError for an unknown kind, a mean without `reference`, or a positional mean over different lengths.
    """
    if kind == "corrupt":
        return corrupt_replacement(model, graph)
    if kind == "zero":
        writes = _zeros(model, graph)
    elif kind in KINDS:
        if reference is None:
            raise InputError(f"Replacement {kind!r} needs reference pairs to take the mean over.")
        writes = _means(model, graph, reference.to(model.device), kind == "mean-positional", batch_size)
    else:
        raise unknown("replacement", kind, KINDS)
    values = ConstantWrites(model, writes)
    n_pos = reference.clean.shape[1] if reference is not None and kind == "mean-positional" else None

    def on(pairs: Pairs) -> Values:
        if n_pos is not None and pairs.clean.shape[1] != n_pos:
            raise InputError(
                f"The means per position have {n_pos} positions, the pairs {pairs.clean.shape[1]}; use pairs of one "
                "length, or replacement 'mean'."
            )
        return values

    return Replacement(kind, on)


def _zeros(model: HookManager, graph: Graph) -> dict[str, Tensor]:
    d = model.dims
    zero = torch.zeros(d.d_model, device=model.device, dtype=torch.promote_types(model.dtype, torch.float32))
    writes = {name: zero for name in graph.inputs} | {f"m{layer}": zero for layer in range(d.n_layers)}
    writes |= {f"n{layer}": zero.expand(len(graph.neurons_of(layer)), -1) for layer in range(d.n_layers)}
    return writes | {f"a{layer}": zero.expand(d.n_heads, -1) for layer in range(d.n_layers)}


def _means(
    model: HookManager, graph: Graph, reference: Pairs, positional: bool, batch_size: int | None
) -> dict[str, Tensor]:
    if positional and not bool(reference.mask.all()):
        raise InputError("A mean per position needs prompts of one length; use 'mean', or pairs without padding.")
    totals: dict[str, Tensor] = {}
    count = 0
    for _, chunk in batches(reference, batch_size or 64):
        compact = record_writes(model, graph, chunk.corrupt, chunk)
        count += len(chunk) if positional else int(chunk.mask.sum())
        for name, writes in _expanded(model, graph, compact):
            kept = writes * chunk.mask[..., None]
            total = kept.sum(-3) if positional else kept.sum((-3, -2))
            totals[name] = totals[name] + total if name in totals else total
    return {name: total / count for name, total in totals.items()}


def _expanded(model: HookManager, graph: Graph, compact: CompactWrites) -> list[tuple[str, Tensor]]:
    """(key, `[(head,) batch, pos, d_model]`) of every node, one layer's heads at a time."""
    parts = [(name, compact.inputs(name)) for name in graph.inputs]
    for layer in range(model.dims.n_layers):
        parts.append((f"a{layer}", model.layout.head_writes(layer, compact.z(layer))))
        if model.dims.has_mlp:
            parts.append((f"m{layer}", compact.mlp(layer)))
        if own := graph.neurons_of(layer):
            post, chosen = compact.values[f"mlp_post.{layer}"], torch.tensor(own, device=model.device)
            parts.append((f"n{layer}", model.layout.neuron_writes(layer, post, chosen)))
    return parts
