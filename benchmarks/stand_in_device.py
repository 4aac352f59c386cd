"""A stand-in for a second device on a machine that has none: tensors that say `meta` and compute on the CPU.

As on a GPU, an operation that mixes the two devices raises, as do `.numpy()` and a CPU generator for a tensor that is
made on the device. So a tensor that is made on the wrong device is found without a GPU. Kernels, and the rounding of
another device, are not tested.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
CPU = torch.device("cpu")
MOVES = {"aten._to_copy.default", "aten.copy_.default", "aten._pin_memory.default"}
"""They may have tensors of both devices."""
INDEXING = ("aten.index.", "aten.index_put.", "aten.index_put_.", "aten._index_put_impl_.")
"""Their indices may be on the CPU if what is indexed is not."""
SYNCS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.is_nonzero")


class OnDevice(Tensor):
    """A tensor on the stand-in; `held` is on the CPU."""

    held: Tensor
    is_meta = False  # type: ignore[assignment]  # it has values, and libraries ask

    @staticmethod
    def __new__(cls: Any, held: Tensor, requires_grad: bool = False) -> OnDevice:
        held = held.held if isinstance(held, OnDevice) else held
        out = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        out.held = held.detach()
        return out

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        out = OnDevice(self.held.clone())
        return torch.nn.Parameter(out, self.requires_grad) if isinstance(self, torch.nn.Parameter) else out

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        StandIn.count("aten.tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """Makes a tensor from Python's numbers on the CPU first: torch would leave out the numbers of a `meta` tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"} if not _is_there(args[0]) else kwargs).to(DEVICE)
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(DEVICE)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnDevice):
            return func(args[0], _with_tensors(args[1]), *args[2:])
        return func(*args, **kwargs)


def _with_tensors(index: Any) -> Any:
    """An index in which lists are tensors, whose numbers torch would leave out, too."""
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _is_there(value: Any) -> bool:
    return isinstance(value, OnDevice)


class StandIn(TorchDispatchMode):
    """Makes `device="meta"` the stand-in while it is active; `syncs` counts what would make the host wait."""

    active: StandIn | None = None

    def __init__(self) -> None:
        super().__init__()
        self.syncs = Counter[str]()
        self.from_data = _FromData()
        # TransformerLens asks whether a weight has values by the name of its device.
        self.patches = [
            mock.patch("transformer_lens.utilities.quantization.unreadable_weight_reason", lambda weight: None),
            mock.patch("transformers.PreTrainedModel.to", _moved),
        ]

    def __enter__(self) -> StandIn:
        StandIn.active = self
        for patch in self.patches:
            patch.start()
        self.from_data.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        StandIn.active = None
        super().__exit__(*error)
        self.from_data.__exit__(*error)
        for patch in self.patches:
            patch.stop()

    @staticmethod
    def count(name: str) -> None:
        """Counts an operation that makes the host wait."""
        if StandIn.active is not None:
            StandIn.active.syncs[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if OnDevice not in types and torch.device(kwargs.get("device") or "cpu") != DEVICE:
            return func(*args, **kwargs)  # all on the CPU
        return run(func, args, kwargs)


def _moved(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The module, moved; parameters that were one are one again (a real device changes them in place)."""
    torch.nn.Module.to(module, *args, **kwargs)
    module.tie_weights()
    return module


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Computes on the CPU; the result is on the stand-in if an argument is, or if it is made there."""
    name = str(func)
    given = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
    there = [part for part in given if isinstance(part, OnDevice)]
    here = [part for part in given if not isinstance(part, OnDevice)]
    asked = kwargs.get("device")
    onto = bool(there) if asked is None else torch.device(asked) == DEVICE
    if there and here:
        _check(name, args, here)
    if onto and kwargs.get("generator") is not None:
        raise RuntimeError("Expected a generator of the device, but found one of the CPU.")
    if there and (name.startswith(SYNCS) or (name == "aten._to_copy.default" and not onto)):
        StandIn.count(name)
    if there and name.startswith("aten.index.") and any(t is not None and t.dtype == torch.bool for t in args[1]):
        StandIn.count("aten.index by a boolean mask")
    if name == "aten.copy_.default":
        onto = isinstance(args[0], OnDevice)
        if there and not onto:
            StandIn.count(name)
    kwargs = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs
    found = func(*_each(_held, args), **{key: _each(_held, value) for key, value in kwargs.items()})
    known = {id(part.held): part for part in there}
    if name.startswith("aten.detach"):
        known = {}
    if not onto:
        return found
    return _each(lambda t: known[id(t)] if id(t) in known else OnDevice(t), found)


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among an operation's arguments, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _each(change: Callable[[Tensor], Any], value: Any) -> Any:
    """A value with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)([_each(change, part) for part in value]) if isinstance(value, (list, tuple)) else value


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, OnDevice) else tensor


def _check(name: str, args: Any, here: list[Tensor]) -> None:
    """Raises RuntimeError where CUDA would, for operations of tensors on both devices."""
    if name in MOVES:
        return
    if name.startswith(INDEXING) and isinstance(args[0], OnDevice):
        here = [t for t in args[2:3] if isinstance(t, Tensor) and not isinstance(t, OnDevice)]
    joins = name.startswith(("aten.cat.", "aten.stack."))
    if any(part.ndim or joins for part in here):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got some of both.")


def over_two_devices(module: Any, main: torch.device = DEVICE, other: torch.device = CPU) -> Any:
    """The module, which is changed, split by accelerate: the second half of its layers and the unembedding on `main`.

    Args:
        module: A decoder of Hugging Face, on the CPU.
        main: The main device.
        other: Where the rest is; an embedding that is tied to the unembedding is with it.
    """
    from accelerate import dispatch_model

    ends = [layer() for layer in (module.get_input_embeddings, module.get_output_embeddings)]
    begins = main if ends[0].weight is ends[1].weight else other
    places: dict[str, Any] = {}
    for name, part in module.base_model.named_children():
        path, layers = f"{module.base_model_prefix}.{name}", list(part) if isinstance(part, torch.nn.ModuleList) else []
        for i in range(len(layers)):
            places[f"{path}.{i}"] = str(other if i < len(layers) // 2 else main)
        if layers:
            begins = main
        else:
            places[path] = str(begins)
    places |= {name: str(main) for name, _ in module.named_children() if name != module.base_model_prefix}
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it says that the parts on the CPU are offloaded
    # The CPU as accelerate's main device, if it is one: otherwise accelerate takes the parts on the CPU for offloaded.
    first: Any = "cpu" if CPU in (main, other) else str(other)
    return dispatch_model(module, places, main_device=first, skip_keys=module._skip_keys_device_placement)
