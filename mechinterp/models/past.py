"""Keys and values of the tokens before a position, so that a run can continue from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Past:
    """Keys and values of the first tokens of a run, per layer, as its attention used them (after any rotation).

    A causal model's first tokens do not depend on later ones, so any run that is the same up to `n_pos` can reuse them.
    """

    layers: tuple[tuple[Float[Tensor, "batch kv_head pos d_head"], Float[Tensor, "batch kv_head pos d_head"]], ...]

    @property
    def n_pos(self) -> int:
        """How many tokens it holds."""
        return self.layers[0][0].shape[2]

    def upto(self, n_pos: int) -> Past:
        """Its first `n_pos` tokens."""
        return Past(tuple((keys[:, :, :n_pos], values[:, :, :n_pos]) for keys, values in self.layers))

    def repeated(self, times: int, first_layer: int = 0) -> Past:
        """Every example `times` times: all of them, then all of them again.

        For a run that starts at `first_layer`; earlier layers are not copied, only their shapes are right.
        """
        rows = self.layers[0][0].shape[0] * times

        def several(layer: int, kept: Tensor) -> Tensor:
            return kept[:1].expand(rows, -1, -1, -1) if layer < first_layer else kept.repeat(times, 1, 1, 1)

        return Past(tuple((several(i, keys), several(i, values)) for i, (keys, values) in enumerate(self.layers)))

    def cache(self) -> Any:
        """A new cache of the transformers library with these keys and values."""
        from transformers.cache_utils import DynamicLayer

        cache = empty_cache()
        for keys, values in self.layers:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values  # not through `update`, which would copy them
            cache.layers.append(layer)
        return cache


def empty_cache() -> Any:
    """A cache of the transformers library that keeps every token, also in layers with a sliding window."""
    from transformers import DynamicCache

    return DynamicCache()


def past_of(cache: Any, n_layers: int) -> Past | None:
    """The keys and values in the cache after a run, or None if the model does not use a cache."""
    layers = [(layer.keys, layer.values) for layer in getattr(cache, "layers", ())]
    if len(layers) != n_layers or any(keys is None or values is None for keys, values in layers):
        return None
    return Past(tuple(layers))
