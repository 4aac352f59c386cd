"""`over_batches`: a computation over the examples in batches, with the results combined."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from mechinterp.base.errors import InputError

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
    does not depend on the batch size, up to the order of the sums.

    Args:
        examples: The pairs.
        size: Examples per batch; None: all in one batch.
        function: Called with a batch and its rows.
        combine: `"sum"` or the axis to join along, for every name that the function returns.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in combine}
    for rows, batch in batches(examples, size):
        for name, value in function(batch, rows).items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            how = combine[name]
            if how == "sum" and found[name]:
                found[name][0] = found[name][0] + tensor
            else:
                found[name].append(tensor)
    return {
        name: parts[0] if combine[name] == "sum" else torch.cat(parts, int(combine[name]))
        for name, parts in found.items()
    }
