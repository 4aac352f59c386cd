"""What several writers write, less what replaces it: as it is (`Dense`), or as activations times directions
(`LowRank`).

A head writes another vector at every token, a neuron one number times a direction that is always the same. So the
sums that engines take over writers need no `[neuron, token, d_model]`. Both kinds give the same numbers
(`LowRank.dense()`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor


@runtime_checkable
class WriteBlock(Protocol):
    """The writes of some writers, `[writer, *axes, d_model]`; the last of the axes is `pos`, before it is `batch`."""

    def dense(self) -> Float[Tensor, "writer *axes d_model"]:
        """Every write in full."""
        ...

    def total(self) -> Float[Tensor, "*axes d_model"]:
        """The sum over the writers."""
        ...

    def total_where(self, chosen: Bool[Tensor, "writer ..."]) -> Float[Tensor, "*axes d_model"]:
        """The sum over the writers that are chosen there; `chosen` may have axes of length 1."""
        ...

    def weighted_sum(self, weights: Float[Tensor, "port writer"]) -> Float[Tensor, "port *axes d_model"]:
        """For every port the sum of the weighted writes: what the exact engine subtracts."""
        ...

    def inner(self, gradients: Float[Tensor, "port *axes d_model"]) -> Float[Tensor, "port writer"]:
        """The product of every gradient with every write, summed over tokens: a first-order score."""
        ...

    def accumulate(
        self, weights: Float[Tensor, "port writer"], gradients: Float[Tensor, "port *axes d_model"]
    ) -> Float[Tensor, "writer ..."]:
        """The gradient of `weighted_sum` at the writes (`Dense`) or at the activations (`LowRank`)."""
        ...

    def minus(self, constant: WriteBlock) -> WriteBlock:
        """Less a write that is the same in every example, `[writer, d_model]`, or one per position."""
        ...

    def sums(self, mask: Bool[Tensor, "batch pos"], *, positional: bool) -> WriteBlock:
        """The sums over real tokens, or over examples at each position."""
        ...

    def add(self, other: WriteBlock) -> WriteBlock:
        """The sum of two blocks of the same writers."""
        ...

    def divided(self, number: float) -> WriteBlock:
        """Every write divided by a number."""
        ...

    def expand(self, n: int) -> WriteBlock:
        """The same writes for `n` candidates, from `[writer, 1, ...]`."""
        ...

    def at(self, positions: slice) -> WriteBlock:
        """Of a write that is the same in every example, that at some positions, if it is one per position."""
        ...


@dataclass(frozen=True)
class Dense:
    """Writes as they are."""

    writes: Float[Tensor, "writer *axes d_model"]

    def dense(self) -> Tensor:
        """Every write in full."""
        return self.writes

    def total(self) -> Tensor:
        """The sum over the writers."""
        return self.writes[0] if len(self.writes) == 1 else self.writes.sum(0)

    def total_where(self, chosen: Tensor) -> Tensor:
        """The sum over the writers that are chosen there."""
        return torch.where(chosen[..., None], self.writes, 0).sum(0)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """For every port the sum of the weighted writes."""
        return torch.tensordot(weights, self.writes, 1)

    def inner(self, gradients: Tensor) -> Tensor:
        """The product of every gradient with every write, summed over tokens."""
        return gradients.flatten(1) @ self.writes.flatten(1).T

    def accumulate(self, weights: Tensor, gradients: Tensor) -> Tensor:
        """The gradient of `weighted_sum` at the writes."""
        return torch.tensordot(weights.T, gradients, 1)

    def minus(self, constant: WriteBlock) -> Dense:
        """Less a write that is the same in every example."""
        assert isinstance(constant, Dense)
        return Dense(self.writes - _broadcast(constant.writes, self.writes))

    def sums(self, mask: Tensor, *, positional: bool) -> Dense:
        """The sums over real tokens, or over examples at each position."""
        kept = self.writes * mask[..., None]
        return Dense(kept.sum(-3) if positional else kept.sum((-3, -2)))

    def add(self, other: WriteBlock) -> Dense:
        """The sum of two blocks of the same writers."""
        assert isinstance(other, Dense)
        return Dense(self.writes + other.writes)

    def divided(self, number: float) -> Dense:
        """Every write divided by a number."""
        return Dense(self.writes / number)

    def expand(self, n: int) -> Dense:
        """The same writes for `n` candidates."""
        return Dense(self.writes.expand(-1, n, *self.writes.shape[2:]))

    def at(self, positions: slice) -> Dense:
        """Of a write that is the same in every example, that at some positions, if it is one per position."""
        return self if self.writes.ndim == 2 else Dense(self.writes[:, positions])


@dataclass(frozen=True)
class LowRank:
    """Activations times directions: writer w writes `values[w] * directions[w]`."""

    values: Float[Tensor, "writer ..."]
    directions: Float[Tensor, "writer d_model"]

    def dense(self) -> Tensor:
        """Every write in full; for tests and small blocks."""
        return einsum(self.values, self.directions, "writer ..., writer d_model -> writer ... d_model")

    def total(self) -> Tensor:
        """The sum over the writers: one product of the activations with the directions."""
        return self.values.movedim(0, -1) @ self.directions

    def total_where(self, chosen: Tensor) -> Tensor:
        """The sum over the writers that are chosen there."""
        return LowRank(torch.where(chosen, self.values, 0), self.directions).total()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """For every port the sum of the weighted writes."""
        found = self.values.new_empty(len(weights), *self.values.shape[1:], self.directions.shape[1])
        for rows in _in_parts(len(weights), self.directions):
            weighted = weights[rows].unflatten(1, (-1, *[1] * (self.values.ndim - 1))) * self.values
            found[rows] = weighted.movedim(1, -1) @ self.directions
        return found

    def inner(self, gradients: Tensor) -> Tensor:
        """The product of every gradient with every write, summed over tokens."""
        values = self.values.flatten(1).T  # [token, writer]
        found = gradients.new_empty(len(gradients), len(self.values))
        for rows in _in_parts(len(gradients), self.directions):
            along = gradients[rows].flatten(1, -2) @ self.directions.T  # [port, token, writer]
            found[rows] = (along * values).sum(1)
        return found

    def accumulate(self, weights: Tensor, gradients: Tensor) -> Tensor:
        """The gradient of `weighted_sum` at the activations."""
        found = torch.zeros_like(self.values)
        for rows in _in_parts(len(weights), self.directions):
            along = gradients[rows] @ self.directions.T  # [port, *axes, writer]
            found += einsum(weights[rows], along, "port writer, port ... writer -> writer ...")
        return found

    def minus(self, constant: WriteBlock) -> LowRank:
        """Less a write that is the same in every example."""
        assert isinstance(constant, LowRank)
        return LowRank(self.values - _broadcast(constant.values, self.values), self.directions)

    def sums(self, mask: Tensor, *, positional: bool) -> LowRank:
        """The sums over real tokens, or over examples at each position."""
        kept = self.values * mask
        return LowRank(kept.sum(-2) if positional else kept.sum((-2, -1)), self.directions)

    def add(self, other: WriteBlock) -> LowRank:
        """The sum of two blocks of the same writers."""
        assert isinstance(other, LowRank)
        return LowRank(self.values + other.values, self.directions)

    def divided(self, number: float) -> LowRank:
        """Every write divided by a number."""
        return LowRank(self.values / number, self.directions)

    def expand(self, n: int) -> LowRank:
        """The same writes for `n` candidates."""
        return LowRank(self.values.expand(-1, n, *self.values.shape[2:]), self.directions)

    def at(self, positions: slice) -> LowRank:
        """Of a write that is the same in every example, that at some positions, if it is one per position."""
        return self if self.values.ndim == 1 else LowRank(self.values[:, positions], self.directions)


def less_parts(whole: WriteBlock, parts: dict[int, Tensor]) -> WriteBlock:
    """The block without what parts of its writers write, by the number of the writer."""
    if not parts:
        return whole
    if isinstance(whole, Dense) and len(whole.writes) == 1:
        return Dense((whole.writes[0] - parts[0])[None])
    writes = whole.dense().clone()
    for writer, part in parts.items():
        writes[writer] -= part
    return Dense(writes)


def _broadcast(constant: Tensor, values: Tensor) -> Tensor:
    """The constants with axes for what they do not depend on, after the writer."""
    return constant.reshape(constant.shape[0], *[1] * (values.ndim - constant.ndim), *constant.shape[1:])


def _in_parts(n_ports: int, directions: Float[Tensor, "writer d_model"]) -> Iterator[slice]:
    """Some ports at a time, so that `[port, token, writer]` is not much larger than 64 streams."""
    n_writers, d_model = directions.shape
    size = max(1, 64 * d_model // max(1, n_writers))
    return (slice(first, first + size) for first in range(0, n_ports, size))
