"""Weights that are not plain numbers: packed integers of a quantised model.

A quantised model (bitsandbytes, GPTQ, ...) runs as any other, since its modules unpack what they multiply with. What
reads a weight as a matrix is refused, by the name of the part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor means something only together with scales: small integers, or floats of one byte.

    >>> is_packed(torch.zeros(2, dtype=torch.int8)), is_packed(torch.zeros(2)), is_packed(torch.arange(2))
    (True, False, False)
    """
    if tensor.is_floating_point():
        return tensor.dtype.itemsize < 2
    return tensor.dtype not in (torch.bool, torch.int64) and not tensor.is_complex()


def packed_in(parts: Iterable[Any]) -> str | None:
    """The first packed tensor of some modules in words (`Linear4bit keeps 'weight' as torch.uint8`), or None.

    Args:
        parts: Modules, or TransformerLens's bridges of modules; what is neither has no tensors.
    """
    for part in parts:
        module = getattr(part, "original_component", None) or part
        for own in module.modules() if isinstance(module, nn.Module) else ():
            for name, tensor in _tensors(own):
                if is_packed(tensor):
                    return f"{type(own).__name__} keeps {name!r} as {tensor.dtype}"
    return None


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """All that says what a module's weights are, by name: its parameters; of modules with packed tensors all they save.

    Scales and zero points are not parameters in most quantised modules, but other scales make another model.
    """
    found: dict[str, Tensor] = dict(module.named_parameters())
    for prefix, own in module.named_modules():
        if any(is_packed(tensor) for _, tensor in _tensors(own)):
            saved = own.state_dict(prefix=f"{prefix}." if prefix else "")
            found |= {name: value for name, value in saved.items() if isinstance(value, Tensor)}
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)
