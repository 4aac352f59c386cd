"""`over_batches`: a computation over the examples in batches, with the results combined."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.shards import State, current, fold_shared

Examples = TypeVar("Examples", bound="Batched")
Combine = Literal["sum"] | int
"""`sum`, or the axis along which the batches' tensors are joined."""


@runtime_checkable
class Batched(Protocol):
    """Examples that can be sliced, such as `Pairs`."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Any: ...


def batches(examples: Examples, size: int | None) -> Iterator[tuple[slice, Examples]]:
    """The rows of every batch and the batch itself, in order; one batch of all examples for None.

    Raises InputError for a size below 1.
    """
    size = len(examples) if size is None else size
    if size < 1:
        raise InputError(f"batch_size must be at least 1; got {size}.")
    for first in range(0, len(examples), size):
        rows = slice(first, min(first + size, len(examples)))
        yield rows, examples[rows]


def over_batches(
    examples: Examples,
    size: int | None,
    function: Callable[[Examples, slice], Mapping[str, Tensor | float]],
    combine: Mapping[str, Combine],
) -> dict[str, Tensor]:
    """The results of `function` on every batch, combined by name: summed, or joined along an axis.

    Sums are over examples, in the dtype that the function returns; a number counts as a float64 tensor. The result
    does not depend on the batch size, up to the order of the sums. Where processes share the work (see
    `mechinterp.base.shards`), each computes some of the batches; all get the result, to the last bit that of one
    process, then on the CPU.

    Args:
        examples: The pairs.
        size: Examples per batch; None: all in one batch.
        function: Called with a batch and its rows.
        combine: `"sum"` or the axis to join along, for every name that the function returns.
    """
    pieces, shared = list(batches(examples, size)), current().count > 1

    def compute(number: int) -> tuple[int, State]:
        rows, batch = pieces[number]
        found = {name: _tensor(value) for name, value in function(batch, rows).items()}
        return number, {name: value.cpu() for name, value in found.items()} if shared else found

    def add(state: State, found: tuple[int, State]) -> State:
        number, values = found
        for name, how in combine.items():
            if how == "sum":
                state[name] = state[name] + values[name] if name in state else values[name]
            else:
                state[f"{name} {number}"] = values[name]
        return state

    state, numbers = fold_shared(len(pieces), compute, add), range(len(pieces))
    return {
        name: state[name] if how == "sum" else torch.cat([state[f"{name} {number}"] for number in numbers], how)
        for name, how in combine.items()
    }


def _tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
