"""Where a model is: on one device, or layer by layer on several, as accelerate places it.

On several devices the one that holds the unembedding is the *main device*. What is recorded, edited and computed from a
run is there; the layers run where they are, and accelerate moves the residual stream from one to the next.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from mechinterp.base.errors import InputError, UnsupportedError, clip
from mechinterp.base.registry import unknown

PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
"""How accelerate shares the layers out: `auto` is `balanced`; `balanced_low_0` leaves room on the first device;
`sequential` fills one device after another."""
OFFLOADED = ("cpu", "disk")
DeviceMap = str | Mapping[str, Any]
_LAYER = re.compile(r".*?\.\d+(?=\.)")


def parse_device(device: torch.device | str | None) -> torch.device | None:
    """The torch device named `cpu`, `cuda`, `cuda:1`, ...; None stays None.

    Raises InputError for anything else, and for a device that this machine does not have.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"Unknown device {clip(repr(device), 60)}; give 'cpu', 'cuda', 'cuda:1' or 'mps'.") from error
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"Device {str(found)!r} cannot be used on this machine: {reason}.") from error
    return found


def parse_device_map(
    device_map: DeviceMap | None, max_memory: Mapping[Any, Any] | None, device: Any = None
) -> str | dict[str, str] | None:
    """The device map in the words of accelerate: a name, or the device of each part; None stays None.

    Args:
        device_map: One of `PLACEMENTS`, or devices by the names of modules.
        max_memory: How much each device may hold; only for a name.
        device: Must be None if there is a map.

    Raises InputError for an unknown name or device, UnsupportedError for parts that would be offloaded.

    >>> parse_device_map({"": "cpu"}, None)
    {'': 'cpu'}
    """
    if device_map is None:
        if max_memory is not None:
            raise InputError("`max_memory` belongs to a `device_map`; give device_map='auto', or leave it out.")
        return None
    if device is not None:
        raise InputError("Give `device` (one device) or `device_map` (several), not both.")
    if isinstance(device_map, str):
        if device_map not in PLACEMENTS:
            raise unknown("device map", device_map, PLACEMENTS)
        return device_map
    given: Any = device_map  # a user's, whatever the annotation says
    if not isinstance(given, Mapping) or not given:
        raise InputError(
            f"`device_map` is {', '.join(map(repr, PLACEMENTS))}, or a mapping from parts to devices, such as "
            f"{{'model.layers.0': 'cuda:0', ...}}; got {clip(repr(device_map), 60)}."
        )
    if max_memory is not None:
        raise InputError("`max_memory` belongs to a name such as device_map='auto'; a mapping places each part itself.")
    found = dict[str, str]()
    for part, place in cast(Mapping[object, object], given).items():
        if not isinstance(part, str):
            raise InputError(f"The parts of a `device_map` are names of modules; got {clip(repr(part), 60)}.")
        found[part] = "disk" if place == "disk" else str(parse_device(_of_number(place)))
    check_not_offloaded(found)
    return found


def _of_number(device: Any) -> Any:
    """Accelerate's numbers are of GPUs (or what else the machine has instead)."""
    if not isinstance(device, int):
        return device
    return f"{(torch.accelerator.current_accelerator() or torch.device('cuda')).type}:{device}"


def check_not_offloaded(device_map: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for parts that accelerate would keep off the device that computes with them."""
    places = {part: str(place) for part, place in device_map.items()}
    away = [part for part, place in places.items() if place in OFFLOADED]
    if "disk" in places.values() or (away and len(set(places.values())) > 1):
        raise UnsupportedError(
            f"The device map leaves {len(away)} of {len(places)} parts to the CPU or a disk ({clip(repr(away[0]), 60)} "
            f"to {places[away[0]]!r}). Accelerate loads such weights only while they are used, and the engines read "
            "the weights of all layers. Take devices with more memory in all, or dtype='bfloat16'."
        )


def place(module: nn.Module, device_map: str | dict[str, str], max_memory: Mapping[Any, Any] | None) -> nn.Module:
    """The module, which is changed, with its parts where the map says and hooks that move what they pass on.

    Raises UnsupportedError for parts that would be offloaded.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    own: Any = module
    if isinstance(device_map, str):
        whole: Any = list(getattr(own, "_no_split_modules", None) or ())
        given: Any = None if max_memory is None else dict(max_memory)
        if device_map == "sequential":
            memory = get_max_memory(given)
        else:
            low = device_map == "balanced_low_0"
            memory = get_balanced_memory(own, given, no_split_module_classes=whole, low_zero=low)
        places: Any = dict(infer_auto_device_map(own, max_memory=memory, no_split_module_classes=whole))
    else:
        places = dict(device_map)
    check_not_offloaded(places)
    return dispatch_model(own, places, skip_keys=getattr(own, "_skip_keys_device_placement", None))


def unplaced(module: nn.Module) -> nn.Module:
    """The module without the hooks with which accelerate moves what its parts pass on."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(module)
    return module


def check_placed(module: nn.Module, name: str) -> None:
    """Raises UnsupportedError unless all weights are in memory, each layer on one device, and what is between moved."""
    weights = dict(module.named_parameters())
    absent = [key for key, weight in weights.items() if weight.is_meta]
    if absent:
        raise UnsupportedError(
            f"The weights of {name} are not in memory ({len(absent)} of {len(weights)}, such as {absent[0]!r}: "
            "offloaded to the CPU or a disk by accelerate, or never loaded), and the engines read the weights of all "
            "layers. Take devices with more memory in all, or load it without `device_map`, such as "
            "load_model(..., device='cuda', dtype='bfloat16')."
        )
    devices = {key: str(weight.device) for key, weight in weights.items()}
    if len(set(devices.values())) < 2:
        return
    if not hasattr(module, "_hf_hook"):
        raise UnsupportedError(
            f"The weights of {name} are on several devices ({', '.join(sorted(set(devices.values())))}), and nothing "
            "moves activations from one to the next. Give load_model(..., device_map='balanced'), or place it with "
            "accelerate's dispatch_model."
        )
    layers = dict[str, str]()
    for key, device in devices.items():
        found = _LAYER.match(key)
        if found is not None and layers.setdefault(found[0], device) != device:
            raise UnsupportedError(
                f"'{found[0]}' of {name} is split over {layers[found[0]]} and {device}; a layer must be on one device. "
                "Give the device of the whole layer, or device_map='balanced', which keeps layers whole."
            )


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor itself where it is there already, otherwise a copy."""
    return tensor if tensor.device == device else tensor.to(device)


def called(module: Callable[[Tensor], Any], value: Tensor) -> Any:
    """What a part of the model makes of a value that may be on another device; the result is where the value is."""
    return back(module(on_device(value, home_of(module, value))), value)


def home_of(module: Any, like: Tensor) -> torch.device:
    """The device of a module's weights; that of `like` if it has none."""
    first = next(iter(module.parameters()), None) if isinstance(module, nn.Module) else None
    return like.device if first is None else first.device


def back(result: Any, value: Tensor) -> Any:
    """The result (a tensor, or a tuple with tensors) on the device of a value."""
    if isinstance(result, tuple):
        return tuple(back(part, value) for part in result)
    return on_device(result, value.device) if isinstance(result, Tensor) else result
