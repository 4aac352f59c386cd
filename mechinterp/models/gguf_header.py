"""The header of a GGUF file, read with every number checked against the file's size before anything follows from it.

A GGUF is a header (settings by name, then name, shape, type and place of every tensor) and the tensors. The libraries
that read it believe its numbers: a file of a kilobyte can make them loop for hours or ask for terabytes. So it is read
here first; what this module accepts has a bounded cost there.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from mechinterp.base.errors import FormatError, clip
from mechinterp.base.plain_files import read_beginning

MAX_HEADER = 64 * 2**20
"""Bytes. Headers hold the tokenizer: Gemma's 262,144 words take 7 MB, the longest in use."""
MAX_ENTRIES = 2_000_000
"""Values of all settings together, those in arrays one by one; Llama 4's tokenizer has 840,000."""
MAX_TENSORS = 65_536
MAX_NAME = 1024
"""Bytes of the name of a setting or tensor."""
MAX_KEPT = 1024
"""Longer arrays are checked, but not kept; only tokenizers have them."""
MAX_DIMS = 4
VERSIONS = (2, 3)
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header states it: `shape` has the fastest axis first."""

    name: str
    shape: tuple[int, ...]
    type: str
    """Its GGML type, such as `Q4_1`."""

    @property
    def n_weights(self) -> int:
        """The number of its entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """The settings (long arrays are None) and tensors of a GGUF file."""

    settings: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """The family in GGUF's words, such as `llama`."""
        return self.settings["general.architecture"]

    @property
    def n_weights(self) -> int:
        """The number of weights in all tensors."""
        return sum(tensor.n_weights for tensor in self.tensors)

    @property
    def types(self) -> tuple[str, ...]:
        """The types of the tensors, that of most weights first."""
        count: dict[str, int] = {}
        for tensor in self.tensors:
            count[tensor.type] = count.get(tensor.type, 0) + tensor.n_weights
        return tuple(sorted(count, key=lambda name: (-count[name], name)))


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file, after checking it against the file's size.

    Cost: at most `MAX_HEADER` bytes are read, and `MAX_ENTRIES` values walked over. Raises FormatError, in one line,
    for anything that is not as the format says.
    """
    content, size = read_beginning(path, MAX_HEADER)
    return _Header(clip(str(path), 200), content, size).read()


class _Header:
    """A walk over the bytes of a header."""

    def __init__(self, shown: str, content: bytes, size: int) -> None:
        self.shown, self.content, self.size = shown, content, size
        self.at, self.entries = 0, 0

    def read(self) -> GgufHeader:
        if self.content[:4] != b"GGUF":
            self.fail("is not a GGUF file: it does not begin with 'GGUF'")
        self.at = 4
        version = self.number("<I")
        if version not in VERSIONS:
            swapped = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            self.fail(f"is GGUF version {version}{swapped}; versions {' and '.join(map(str, VERSIONS))} can be read")
        n_tensors, n_settings = self.number("<Q"), self.number("<Q")
        if not 0 < n_tensors <= MAX_TENSORS:
            self.fail(f"says that it holds {n_tensors} tensors; 1 to {MAX_TENSORS} can be read")
        settings: dict[str, Any] = {}
        for _ in range(self.counted(n_settings, 8 + 1 + 4 + 1, "settings")):
            name = self.text(MAX_NAME, "the name of a setting")
            if name in settings:
                self.fail(f"has the setting {clip(name, 60)!r} twice")
            settings[name] = self.value(self.number("<I"), name)
        if not isinstance(settings.get("general.architecture"), str):
            self.fail("does not say its architecture ('general.architecture')")
        alignment = settings.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            self.fail(f"has the alignment {alignment!r}; it must be a power of two")
        return GgufHeader(settings, self.tensors(n_tensors, alignment))

    def tensors(self, n_tensors: int, alignment: int) -> tuple[GgufTensor, ...]:
        found: list[GgufTensor] = []
        places: list[tuple[int, int]] = []
        names: set[str] = set()
        for _ in range(self.counted(n_tensors, 8 + 1 + 4 + 8 + 4 + 8, "tensors")):
            name = self.text(MAX_NAME, "the name of a tensor")
            if name in names:
                self.fail(f"has the tensor {clip(name, 60)!r} twice")
            names.add(name)
            what, n_dims = f"tensor {clip(name, 60)!r}", self.number("<I")
            if not 1 <= n_dims <= MAX_DIMS:
                self.fail(f"gives {what} {n_dims} axes; it can have 1 to {MAX_DIMS}")
            shape = tuple(self.number("<Q") for _ in range(n_dims))
            kind, start = self.number("<I"), self.number("<Q")
            if any(not 0 < length < 2**31 for length in shape):
                self.fail(f"gives {what} the shape {list(shape)}")
            type_name, block, width = _ggml_type(kind) or self.fail(f"gives {what} the type {kind}, which is unknown")
            if shape[0] % block:
                self.fail(f"gives {what} rows of {shape[0]} weights; {type_name} has blocks of {block}")
            if start % alignment:
                self.fail(f"places {what} at byte {start}, no multiple of the alignment {alignment}")
            places.append((start, start + math.prod(shape) // block * width))
            found.append(GgufTensor(name, shape, type_name))
        first = -(-self.at // alignment) * alignment
        last = max(end for _, end in places)
        if first + last > self.size:
            missing = first + last - self.size
            self.fail(f"is cut off: its tensors need {missing} more bytes than the {self.size} that are there")
        places.sort()
        if any(later[0] < earlier[1] for earlier, later in pairwise(places)):
            self.fail("has tensors that overlap")
        return tuple(found)

    def value(self, kind: int, name: str) -> Any:
        """One value; None for an array that is too long to be kept."""
        self.entry()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text(MAX_HEADER, f"the setting {clip(name, 60)!r}")
        if kind != ARRAY:
            self.fail(f"gives the setting {clip(name, 60)!r} the type {kind}, which is unknown")
        inner, length = self.number("<I"), self.number("<Q")
        if inner not in SCALARS and inner != STRING:
            self.fail(f"gives the setting {clip(name, 60)!r} an array of type {inner}, which cannot be read")
        least = 8 if inner == STRING else struct.calcsize(SCALARS[inner])
        self.counted(length, least, f"values of {clip(name, 60)!r}")
        values = [self.value(inner, name) for _ in range(length)]
        return tuple(values) if length <= MAX_KEPT else None

    def entry(self) -> None:
        self.entries += 1
        if self.entries > MAX_ENTRIES:
            self.fail(f"has more than {MAX_ENTRIES} values in its settings, the most that are read")

    def counted(self, count: int, least: int, what: str) -> int:
        """The count, if so many things of at least `least` bytes can follow in the file."""
        if count * least > self.size - self.at:
            self.fail(f"says that {count} {what} follow; the file is too short for that")
        if count > MAX_ENTRIES:
            self.fail(f"says that {count} {what} follow; the most that are read is {MAX_ENTRIES}")
        return count

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def text(self, most: int, what: str) -> str:
        length = self.number("<Q")
        if length > most:
            self.fail(f"says that {what} has {length} bytes; the most that are read is {most}")
        try:
            return self.bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"has {what} in letters that are not UTF-8")

    def bytes(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.content):
            if self.size > len(self.content):
                self.fail(f"has a header of more than {MAX_HEADER} bytes, the most that is read")
            self.fail(f"is cut off: it ends inside its header, after {self.size} bytes")
        found, self.at = self.content[self.at : end], end
        return found

    def fail(self, what: str) -> NoReturn:
        raise FormatError(f"{self.shown} {what}.")


def _ggml_type(number: int) -> tuple[str, int, int] | None:
    """(name, weights of a block, bytes of a block) of a GGML type; None if the gguf package does not know it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        return None
    return (kind.name, *GGML_QUANT_SIZES[kind]) if kind in GGML_QUANT_SIZES else None


def layers_in(header: GgufHeader) -> set[int]:
    """The numbers of the layers that have tensors (`blk.3.attn_q.weight`)."""
    found = (re.match(r"blk\.(\d{1,9})\.", tensor.name) for tensor in header.tensors)
    return {int(match[1]) for match in found if match}
