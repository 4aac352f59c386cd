"""The weights of a model under TransformerLens's names, read-only: `model.W_Q[5, 3]`, `model.W_OV["L9H9"]`.

They are the weights that the model runs with: no norm is folded in and nothing is centred. Every access gives a copy,
so the model cannot be changed through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.models.components import check_head
from mechinterp.models.layout import Layout
from mechinterp.models.sites import Address
from mechinterp.models.source import ModelInfo


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One kind of weight in every layer.

    `weights[5]` is that of layer 5; `weights[5, 3]` and `weights["L5H3"]` are those of head 3 in it. Iterating gives
    one layer after the other; `stack()` is one tensor with a first axis `layer`.

    Args:
        name: TransformerLens's name of the weight.
        layout: The layout that holds it.
        of_layer: The weight of a layer and, where its rows are heads, of a head (or of `slice(None)`, all).
        rows: What its first axis is: `head`, `kv_head`, or "" where it has no heads.
    """

    name: str
    layout: Layout
    of_layer: Callable[[int, Any], Tensor]
    rows: str = ""

    def __len__(self) -> int:
        return self.layout.dims.n_layers

    def __iter__(self) -> Iterator[Tensor]:
        return (self[layer] for layer in range(len(self)))

    def __repr__(self) -> str:
        return f"{self.name}: {len(self)} layers of {list(self[0].shape)}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `stack()`."""
        return (len(self), *self[0].shape)

    def stack(self) -> Float[Tensor, "layer ..."]:
        """The weights of all layers in one tensor, a copy."""
        return torch.stack(list(self))

    def __getitem__(self, index: Any) -> Tensor:
        """A copy of the weight of a layer, or of a head.

        Args:
            index: A layer; a layer and further indices, the first of which is the head; or a head's name. Negative
                numbers count from the end.

        Raises InputError for a layer or head that the model does not have.
        """
        layer, *rest = self._head(index) if isinstance(index, str) else index if isinstance(index, tuple) else (index,)
        n = len(self)
        if isinstance(layer, bool) or not isinstance(layer, int) or not -n <= layer < n:
            raise InputError(f"{self.name}[{layer!r}] does not exist: the model has layers 0 to {n - 1}.")
        if not rest or not self.rows or not isinstance(rest[0], int):
            found = self.of_layer(layer % n, slice(None))
            return found[tuple(rest)].clone() if rest else found.clone()
        head, *rest = rest
        most = self.layout.dims.n_heads if self.rows == "head" else self.layout.dims.n_kv_heads
        if not -most <= head < most:
            raise InputError(f"{self.name}[{layer}, {head}] does not exist: a layer has {self.rows}s 0 to {most - 1}.")
        found = self.of_layer(layer % n, head % most)
        return found[tuple(rest)].clone() if rest else found.clone()

    def _head(self, name: str) -> tuple[int, int]:
        found, dims = Address.parse(name), self.layout.dims
        if found.kind not in ("head", "kv_head") or found.channel or found.position or not self.rows:
            raise InputError(f"{self.name}[{name!r}] does not exist: give a layer, as in {self.name}[0], or a head.")
        channel = {"kv_head": "k"}.get(self.rows, "q")
        check_head(dims, name, "kv" if found.kind == "kv_head" else "h", found.number, channel)
        return found.layer, found.number


class WeightsByName:
    """TransformerLens's names of weights as read-only properties; `HookManager` has them."""

    layout: Layout
    bridge: Any
    info: ModelInfo

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The token embedding, a copy."""
        return self._embedding("W_E", "embed")

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """The position embedding, a copy. Raises UnsupportedError for a model without one, such as a rotary one."""
        return self._embedding("W_pos", "pos_embed")

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding, a copy; times the constant that scales the logits, where there is one (Cohere, Granite)."""
        return self.layout.W_U.clone()

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias, a copy; zeros where the model has none."""
        b_U = self.layout.b_U
        return self.layout.W_U.new_zeros(self.layout.W_U.shape[1]) if b_U is None else b_U.clone()

    @property
    def W_Q(self) -> LayerWeights:
        """`[head, d_model, d_head]` of each layer."""
        return self._of_heads("W_Q", "q", "head")

    @property
    def W_K(self) -> LayerWeights:
        """`[head, d_model, d_head]` of each layer; one row per key/value head where query heads share them."""
        return self._of_heads("W_K", "k", "kv_head")

    @property
    def W_V(self) -> LayerWeights:
        """`[head, d_model, d_head]` of each layer; one row per key/value head where query heads share them."""
        return self._of_heads("W_V", "v", "kv_head")

    @property
    def W_O(self) -> LayerWeights:
        """`[head, d_head, d_model]` of each layer."""
        return LayerWeights("W_O", self.layout, lambda layer, head: self.layout.attention[layer].W_O[head], "head")

    @property
    def b_Q(self) -> LayerWeights:
        """`[head, d_head]` of each layer."""
        return self._of_heads("b_Q", "q", "head")

    @property
    def b_K(self) -> LayerWeights:
        """`[head, d_head]` of each layer; one row per key/value head."""
        return self._of_heads("b_K", "k", "kv_head")

    @property
    def b_V(self) -> LayerWeights:
        """`[head, d_head]` of each layer; one row per key/value head."""
        return self._of_heads("b_V", "v", "kv_head")

    @property
    def b_O(self) -> LayerWeights:
        """`[d_model]` of each layer."""
        return LayerWeights("b_O", self.layout, lambda layer, _: self._given("b_O", self.layout.attention[layer].b_O))

    @property
    def W_in(self) -> LayerWeights:
        """`[d_model, neuron]` of each layer's MLP."""
        return self._of_mlp("W_in")

    @property
    def W_gate(self) -> LayerWeights:
        """`[d_model, neuron]` of each layer's gated MLP."""
        return self._of_mlp("W_gate")

    @property
    def W_out(self) -> LayerWeights:
        """`[neuron, d_model]` of each layer's MLP."""
        return self._of_mlp("W_out")

    @property
    def b_in(self) -> LayerWeights:
        """`[neuron]` of each layer's MLP."""
        return self._of_mlp("b_in")

    @property
    def b_out(self) -> LayerWeights:
        """`[d_model]` of each layer's MLP."""
        return self._of_mlp("b_out")

    @property
    def W_OV(self) -> LayerWeights:
        """`W_V @ W_O` of every head, `[head, d_model, d_model]` of each layer; `W_OV["L9H9"]` is one head's."""
        return LayerWeights("W_OV", self.layout, self._products("v"), "head")

    @property
    def W_QK(self) -> LayerWeights:
        """`W_Q @ W_K^T` of every head, `[head, d_model, d_model]` (query, key) of each layer; without rotation.

        Scores are this, over the square root of `d_head`, only where positions are not rotated: in a rotary model a
        rotation by the distance stands between the two.
        """
        return LayerWeights("W_QK", self.layout, self._products("k"), "head")

    def _products(self, channel: str) -> Callable[[int, Any], Tensor]:
        def of_layer(layer: int, head: Any) -> Tensor:
            maps, dims = self.layout.attention[layer], self.layout.dims
            serving = torch.arange(dims.n_heads) // (dims.n_heads // dims.n_kv_heads)
            shared = maps.W[channel][serving[head]]
            return shared @ maps.W_O[head] if channel == "v" else maps.W["q"][head] @ shared.mT

        return of_layer

    def _of_heads(self, name: str, channel: str, rows: str) -> LayerWeights:
        def of_layer(layer: int, head: Any) -> Tensor:
            maps = self.layout.attention[layer]
            if name.startswith("W"):
                return maps.W[channel][head]
            return self._given(name, maps.b[channel]).reshape(len(maps.W[channel]), -1)[head]

        return LayerWeights(name, self.layout, of_layer, rows)

    def _of_mlp(self, name: str) -> LayerWeights:
        def of_layer(layer: int, _: Any) -> Tensor:
            return self._given(name, getattr(self.layout.neurons(layer), name))

        return LayerWeights(name, self.layout, of_layer)

    def _given(self, name: str, weight: Tensor | None) -> Tensor:
        if weight is None:
            raise UnsupportedError(f"{self.info.architecture} has no {name}.")
        return weight

    def _embedding(self, name: str, part: str) -> Tensor:
        component = getattr(self.bridge, part, None)
        weight = None if component is None else getattr(component, name, None)
        if weight is None and component is not None:
            weight = getattr(component, "weight", None)
        return self._given(name, weight).detach().to(self.layout.W_U.device, copy=True)
