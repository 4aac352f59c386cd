"""Weights that are not plain numbers: packed integers of a quantised model, or on no device at all.

A quantised model (bitsandbytes, GPTQ, ...) runs as any other, since its modules unpack what they multiply with. What
reads a weight as a matrix is refused, by the name of the part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp.base.errors import UnsupportedError


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


def check_in_one_place(module: nn.Module, name: str) -> None:
    """Raises UnsupportedError unless all weights are in the memory of one device.

    The engines put what all layers write into one table, and the maps of the layers are multiplied with it.
    """
    weights = dict(module.named_parameters())
    absent = [key for key, weight in weights.items() if weight.is_meta]
    if absent:
        raise UnsupportedError(
            f"The weights of {name} are not in memory ({len(absent)} of {len(weights)}, such as {absent[0]!r}: "
            "offloaded to the CPU or a disk by accelerate, or never loaded). Load it without `device_map`, such as "
            "load_model(..., device='cuda', dtype='bfloat16')."
        )
    devices = sorted({str(weight.device) for weight in weights.values()})
    if len(devices) > 1:
        raise UnsupportedError(
            f"The weights of {name} are on several devices ({', '.join(devices)}), as `device_map` of accelerate puts "
            "them; the sums over all layers are made on one. Put the model on one device, such as "
            "load_model(..., device='cuda', dtype='bfloat16'). To use several, let each take a share of the examples: "
            "torchrun, or --shard."
        )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)
