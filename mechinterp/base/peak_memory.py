"""`PeakMemory`: the most bytes that tensors take at one time, on any device, counted operation by operation."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Counts the storages that operations make inside the block, until they are freed; not what one has inside itself.

    `peak` is beyond what was there before: the weights, and whatever else is older, do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {_key(value) for value in tree_iter((args, kwargs or {})) if isinstance(value, Tensor)}
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor) and _key(value) not in old:
                self._count(value)
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, value: Tensor) -> None:
        storage, key = value.untyped_storage(), _key(value)
        if key in self._counted:
            return
        size = storage.nbytes()
        self.now += size
        self._counted[key] = weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        del self._counted[key]
        self.now -= size


def _key(value: Tensor) -> int:
    return value.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
