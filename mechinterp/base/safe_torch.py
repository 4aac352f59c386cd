"""Files of `torch.save`, read without executing anything in them.

`torch.load(weights_only=True)` reads the file. Before that, the archive is checked: it may hold only plain values and
whole tensors, uncompressed and no longer than the file, and the storage of every tensor must have its stated length.
What is loaded is a fresh copy of the archive, so that two zip readers cannot interpret it differently.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mechinterp.base.errors import FormatError, clipped

MAX_ENTRIES = 64
MAX_TUPLE = 64
"""Entries of a tuple, with those of nested tuples; ACDC's keys have 10. Hashing a deep tuple crashes Python."""
_BUILDS = """
PROTO STOP MARK GLOBAL REDUCE BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1
BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS APPEND
APPENDS BUILD
"""
_OPCODES = frozenset(_BUILDS.split())
"""The opcodes that `torch.save` writes for dictionaries, lists, tuples, strings, numbers and tensors."""
_TAKES = {
    **dict.fromkeys(("TUPLE", "SETITEMS", "APPENDS")),
    **{"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "BUILD": 1, "BINPERSID": 1, "SETITEM": 2, "APPEND": 1},
}
"""How many values an opcode pops from the stack; None: all above the last mark."""
_ITEM_BYTES = {"Bool": 1, "Half": 2, "BFloat16": 2, "Float": 4, "Double": 8, "Int": 4, "Long": 8}
_GLOBALS = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict", *(f"torch {n}Storage" for n in _ITEM_BYTES)}


_MADE = object()
"""An OrderedDict on the stack."""


@dataclass(frozen=True)
class _Tuple:
    """A tuple on the stack: its entries, and their number including nested ones."""

    parts: list[Any]
    size: int


def load_plain(content: bytes, where: str) -> Any:
    """The plain values and tensors (floats, booleans, integers; on the CPU) in a file of `torch.save`.

    Raises FormatError, in one line, for anything else: pickles, other objects, compressed or damaged archives.
    """
    if not content.startswith(b"PK\x03\x04"):
        raise FormatError(
            f"{where} is not a file of torch.save (since torch 1.6). Pickles are never read, as they can run code; "
            "load it where you trust it and write it again with torch.save."
        )
    entries = _entries(content, where)
    folder, pickled = _pickle(entries, where)
    _check_pickle(pickled, {name.removeprefix(folder): len(data) for name, data in entries.items()}, where)
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    copy.seek(0)
    try:
        return torch.load(copy, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, ValueError, TypeError, KeyError, EOFError, IndexError) as error:
        raise _broken(where, error) from error
    except (AttributeError, AssertionError, OverflowError) as error:  # from a tensor with a wrong description
        raise _broken(where, error) from error


def check_tensor(value: object, shape: tuple[int, ...], dtypes: set[torch.dtype], where: str) -> Tensor:
    """The value as a plain tensor of that shape and one of these dtypes. Raises FormatError if it is not one."""
    names = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    wanted = f"a dense {names} tensor of shape {list(shape)}"
    if (
        not isinstance(value, Tensor)
        or type(value) is not Tensor
        or value.layout != torch.strided
        or value.device.type != "cpu"
    ):
        raise FormatError(f"{where} must be {wanted}; got {type(value).__name__}.")
    if value.dtype not in dtypes or tuple(value.shape) != shape:
        raise FormatError(f"{where} must be {wanted}; got {str(value.dtype)[6:]} {clipped(list(value.shape))}.")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise FormatError(f"{where} holds NaN or infinity.")
    return value.detach()


def _entries(content: bytes, where: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            listed = archive.infolist()
            if len(listed) > MAX_ENTRIES or sum(entry.file_size for entry in listed) > len(content):
                raise FormatError(f"{where} has too many entries, or entries larger than the file.")
            for entry in listed:
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.filename in found:
                    raise FormatError(f"{where}: {clipped(entry.filename)} is compressed, encrypted or duplicated.")
                found[entry.filename] = archive.read(entry)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, OSError, EOFError) as error:
        raise _broken(where, error) from error
    return found


def _pickle(entries: dict[str, bytes], where: str) -> tuple[str, bytes]:
    """(The archive's folder, the pickle in it)."""
    found = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise FormatError(f"{where} is not a file of torch.save: it holds {len(found)} files data.pkl.")
    return found[0].removesuffix("data.pkl"), entries[found[0]]


def _check_pickle(pickled: bytes, sizes: dict[str, int], where: str) -> None:
    """Return None if the pickle builds only plain values, whole storages and short tuples.

    The opcodes are followed as by an unpickler, but nothing is built: other objects are None on the stack.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            name, value = opcode.name, cast(Any, argument)
            if name not in _OPCODES or (name == "GLOBAL" and value not in _GLOBALS):
                raise FormatError(f"{where} holds more than plain values: {clipped(value or name)}. It is not read.")
            if name in ("BINPUT", "LONG_BINPUT"):
                memo[int(value)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[int(value)])
            elif name == "MARK":
                marks.append(len(stack))
            elif name in _TAKES:
                start = marks.pop() if _TAKES[name] is None else len(stack) - cast(int, _TAKES[name])
                if start < 0 or (marks and start < marks[-1]):
                    raise IndexError("the stack is too short")
                taken = stack[start:]
                del stack[start:]
                if name == "BINPERSID":
                    _check_storage(taken[0], sizes, where)
                if name.startswith("TUPLE"):
                    stack.append(_Tuple(taken, 1 + sum(part.size if isinstance(part, _Tuple) else 1 for part in taken)))
                    if stack[-1].size > MAX_TUPLE:
                        raise FormatError(f"{where} holds a tuple of more than {MAX_TUPLE} entries in all.")
                elif name in ("BINPERSID", "REDUCE"):
                    stack.append(_MADE if name == "REDUCE" and _is_ordered_dict(taken) else None)
                elif name == "BUILD" and (not stack or stack[-1] is not _MADE):
                    raise FormatError(f"{where} sets attributes of an object. It is not read.")
            elif name not in ("STOP", "PROTO"):
                stack.append(_Tuple([], 1) if name == "EMPTY_TUPLE" else value)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise _broken(where, error) from error


def _is_ordered_dict(taken: list[Any]) -> bool:
    """Whether REDUCE makes an empty OrderedDict: a state_dict, whose one attribute (_metadata) BUILD sets."""
    empty = isinstance(taken[1], _Tuple) and not taken[1].parts
    return taken[0] == "collections OrderedDict" and empty


def _check_storage(described: Any, sizes: dict[str, int], where: str) -> None:
    """Return None if the described storage is as long as its entry in the archive."""
    five = isinstance(described, _Tuple) and len(described.parts) == 5
    tag, kind, key, device, count = described.parts if five else [None] * 5
    item = _ITEM_BYTES.get(str(kind).removeprefix("torch ").removesuffix("Storage"))
    whole = item is not None and type(count) is int and sizes.get(f"data/{key}") == count * item
    if tag != "storage" or type(device) is not str or not whole:
        raise FormatError(f"{where} holds a tensor with missing values or of an unsupported kind.")


def _broken(where: str, error: Exception) -> FormatError:
    reason = " ".join(str(error).split())[:120]
    return FormatError(f"{where} is not a file of torch.save, or it is damaged: {reason or type(error).__name__}.")
