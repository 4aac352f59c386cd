"""The files of a basis: a folder or a file, on disk or on the hub, read within bounds and without running anything.

What is read is noted with its sha256, which becomes part of the source of the basis.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mechinterp.base.canonical_json import parse_json
from mechinterp.base.errors import FormatError, HubNotReached, InputError, clip, clipped
from mechinterp.base.plain_files import exists, file_sha256, is_file, is_folder, read_bounded
from mechinterp.base.safe_torch import load_plain
from mechinterp.models.feature_basis import BasisSource
from mechinterp.models.refusal import refusing

MAX_TEXT_BYTES = 4 * 2**20
MAX_TENSOR_BYTES = 32 * 2**30
"""Of one file; a layer of the largest cross-layer transcoders has some 10 GiB."""
MAX_YAML_BYTES = 2**18
MAX_GROWTH = 8
"""How many times larger than its file what is unpacked from an npz may be."""
MAX_FILES = 100_000
MAX_TENSORS = 1000
_PATTERNS = ("*.json", "*.yaml", "*.safetensors", "*.npz", "*.pt")
_HUB = re.compile(
    r"(?P<repo>[\w.-]{1,96}/[\w.-]{1,96})(?:/(?P<path>[^@]+))?(?:@(?P<revision>[\w./-]{1,200}))?", re.ASCII
)


class Files:
    """A folder of files; `only` is set if a single file was named. Raises FormatError for what cannot be read."""

    def __init__(self, folder: Path, label: str, revision: str = "", only: str = "") -> None:
        self.folder, self.label, self.revision, self.only = folder, label, revision, only
        self.sha256: dict[str, str] = {}

    def has(self, name: str) -> bool:
        """Whether there is a plain file of that name."""
        return is_file(self.folder / name)

    def names(self, pattern: str) -> list[str]:
        """The files that match a pattern such as `layer_*.safetensors`, in order of the numbers in their names."""
        found: list[str] = []
        for path in self.folder.glob(pattern):
            if is_file(path):
                found.append(path.relative_to(self.folder).as_posix())
            if len(found) > MAX_FILES:
                raise FormatError(f"{self.label} holds more than {MAX_FILES:,} files.")
        return sorted(found, key=_natural)

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file."""
        return self._object(parse_json(read_bounded(self._noted(name), MAX_TEXT_BYTES), self._where(name)), name)

    def yaml(self, name: str) -> dict[str, Any]:
        """The object in a YAML file."""
        content = read_bounded(self._noted(name), MAX_YAML_BYTES)
        try:
            text = content.decode("utf-8")
            if re.search(r"(?m)(^|[\s\[,{:-])[&*][\w-]", text):
                raise FormatError(f"{self._where(name)} has anchors or aliases, which are not read.")
            return self._object(yaml.safe_load(text), name)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise FormatError(f"{self._where(name)} is not YAML: {clip(' '.join(str(error).split()), 120)}.") from error

    def safetensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file."""
        path = self._noted(name)
        try:
            with safe_open(path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
                opened: Any = file
                names = list(opened.keys())
                if len(names) > MAX_TENSORS:
                    raise FormatError(f"{self._where(name)} holds more than {MAX_TENSORS:,} tensors.")
                return {key: self._float(opened.get_tensor(key), key, name) for key in names}
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{self._where(name)} is not a safetensors file: {clip(str(error), 120)}.") from error

    def npz(self, name: str) -> dict[str, Tensor]:
        """The arrays of an npz file; one with Python objects in it is refused."""
        path = self._noted(name)
        try:
            with zipfile.ZipFile(path) as archive:
                listed = archive.infolist()
                most = MAX_GROWTH * path.stat().st_size + 2**20
                if len(listed) > MAX_TENSORS or sum(entry.file_size for entry in listed) > most:
                    raise FormatError(f"{self._where(name)} is too large, or holds too many arrays.")
                found: dict[str, Tensor] = {}
                for entry in listed:
                    array = _array(archive.read(entry))
                    if array.dtype.kind != "f":
                        raise FormatError(f"{self._where(name)}: {clipped(entry.filename)} does not hold floats.")
                    key = entry.filename.removesuffix(".npy")
                    found[key] = self._float(torch.from_numpy(np.ascontiguousarray(array)), key, name)
                return found
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, OSError, EOFError) as error:
            raise FormatError(f"{self._where(name)} is not an npz file of floats: {clip(str(error), 120)}.") from error

    def torch(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file of `torch.save`, read as described in `base/safe_torch.py`."""
        path = self._noted(name)
        loaded = load_plain(read_bounded(path, path.stat().st_size), self._where(name))
        if not isinstance(loaded, dict):
            raise FormatError(f"{self._where(name)} must hold a dictionary of tensors; got {type(loaded).__name__}.")
        # Not loaded.items(): an attribute of that name may have been set in the file.
        items = OrderedDict.items(loaded) if isinstance(loaded, OrderedDict) else loaded.items()
        found: dict[str, Tensor] = {}
        for key, value in items:
            if not isinstance(key, str) or type(value) is not Tensor:
                raise FormatError(f"{self._where(name)} must hold tensors by name; {clipped(key)} is none.")
            found[key] = self._float(value, key, name)
        return found

    def source(self, format: str, **about: Any) -> BasisSource:
        """Where the basis comes from, with the hashes of the files that were read."""
        words = {name: clip(str(value), 300) for name, value in about.items() if value not in (None, "")}
        return BasisSource(self.label, format, self.revision, dict(sorted(self.sha256.items())), words)

    def _where(self, name: str) -> str:
        return clip(f"{self.label}/{name}" if not self.only else self.label, 200)

    def _noted(self, name: str) -> Path:
        path = self.folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise FormatError(f"{clip(name, 100)!r} leads out of the folder {self.label}.")
        if not is_file(path):
            raise FormatError(f"{clip(self.label, 200)} has no file {clip(name, 100)!r}.")
        if path.stat().st_size > MAX_TENSOR_BYTES:
            raise FormatError(f"{self._where(name)} is larger than {MAX_TENSOR_BYTES:,} bytes, the most that is read.")
        self.sha256[name] = file_sha256(path)
        return path

    def _object(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in cast(dict[Any, Any], value)):
            raise FormatError(f"{self._where(name)} must hold an object with names; got {type(value).__name__}.")
        return cast(dict[str, Any], value)

    def _float(self, value: Tensor, key: str, name: str) -> Tensor:
        value = value.detach()
        if value.dtype not in _DTYPES:
            raise FormatError(f"{self._where(name)}: {clipped(key)} is of type {str(value.dtype)[6:]}, not supported.")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise FormatError(f"{self._where(name)}: {clipped(key)} holds NaN or infinity.")
        return value


def open_files(where: str | Path, revision: str | None = None) -> Files:
    """The files of a folder, of one file, or of `org/name/folder@revision` on the hub.

    Raises InputError for a place that does not exist, HubNotReached if the hub cannot be reached.
    """
    text = str(where)
    if is_folder(text):
        return Files(Path(text), text)
    if is_file(text):
        return Files(Path(text).parent, text, only=Path(text).name)
    found = _HUB.fullmatch(text)
    if found is None or exists(text) or text.startswith((".", "/", "~")):
        raise InputError(
            f"There is no folder {clip(text, 200)!r}; give a folder, a file, or org/name/folder@revision on the hub."
        )
    if revision and found["revision"] and revision != found["revision"]:
        raise InputError(f"Two revisions are given: {found['revision']!r} and `revision={revision!r}`; give one.")
    return _from_hub(found["repo"], found["path"] or "", revision or found["revision"])


def _from_hub(repo: str, path: str, revision: str | None) -> Files:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    parts = [part for part in path.split("/") if part]
    if not {".", ".."}.isdisjoint(parts) or not path.isprintable() or not set(path).isdisjoint("\\:*?["):
        raise InputError(f"{clip(path, 200)!r} is not the path of a folder in a repository.")
    path = "/".join(parts)
    wanted = [f"{path}/{pattern}" if path else pattern for pattern in _PATTERNS] + ([path] if path else [])
    shown = f"{repo}/{path}".rstrip("/")
    with refusing(f"Cannot load the feature basis {shown!r} from the hub", kind=InputError):
        try:
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise HubNotReached(
                f"The feature basis {shown!r} is not cached and the hub cannot be reached; give a folder on disk."
            ) from error
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision or ""
    if path and is_file(folder / path):
        return Files((folder / path).parent, shown, commit, (folder / path).name)
    if not is_folder(folder / path):
        raise InputError(f"The repository {repo!r} has no folder {path!r} at {revision or 'main'!r}.")
    return Files(folder / path, shown, commit)


_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool}


def _array(content: bytes) -> Any:
    """The array of an npy file. Raises ValueError for one whose header promises more than there is, or for objects."""
    file = io.BytesIO(content)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read_header:
        raise ValueError(f"it is of version {version}")
    shape, _, dtype = read_header[version](file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError("an array does not have the size that it states, or holds objects")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts `layer_2` before `layer_10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


class Entries:
    """The values of a JSON or YAML object, read with their types. Raises FormatError, naming the place."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, clip(where, 200)

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        return str(self._typed(key, str, default, "a text"))

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        return bool(self._typed(key, bool, default, "true or false"))

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 0."""
        value = self._typed(key, int, default, "a whole number")
        if isinstance(value, bool) or not 0 <= value < 2**40:
            raise FormatError(f"{self.where}: {key!r} must be a whole number of at least 0; got {clipped(value)}.")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._typed(key, (int, float), default, "a number")
        if isinstance(value, bool) or not math.isfinite(value):
            raise FormatError(f"{self.where}: {key!r} must be a finite number; got {clipped(value)}.")
        return float(value)

    def inner(self, key: str) -> Entries:
        """An object; empty if it is missing."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise FormatError(f"{self.where}: {key!r} must be an object; got {type(value).__name__}.")
        return Entries(cast("dict[str, Any]", value or {}), f"{self.where}: {key}")

    def get(self, key: str) -> Any:
        """The value, whatever it is; None if it is missing."""
        return self.values.get(key)

    def _typed(self, key: str, kind: Any, default: Any, words: str) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise FormatError(f"{self.where} does not say {key!r}, which must be {words}.")
        if not isinstance(value, kind):
            raise FormatError(f"{self.where}: {key!r} must be {words}; got {clipped(value)}.")
        return value


def take(tensors: Mapping[str, Tensor], name: str, shape: tuple[int | None, ...], where: str) -> Tensor:
    """The tensor of that name as floats of that shape (None: any size). Raises FormatError otherwise."""
    value = tensors.get(name)
    if value is None:
        raise FormatError(f"{where} has no tensor {name!r}; it has {clip(', '.join(sorted(tensors)), 200) or 'none'}.")
    fits = value.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, value.shape, strict=True))
    if not fits or not value.is_floating_point():
        wanted = [size if size is not None else "any" for size in shape]
        raise FormatError(
            f"{where}: {name!r} must be floats of shape {wanted}; got {str(value.dtype)[6:]} {list(value.shape)}."
        )
    return value
