"""`read_texts`: the texts of a file, one after the other, so that a corpus may be larger than the memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mechinterp.base.canonical_json import parse_json
from mechinterp.base.errors import FormatError, clip
from mechinterp.base.plain_files import bounded_lines

MAX_LINE_BYTES = 2**20
"""The longest line that is read: more than 100,000 tokens."""


@dataclass(frozen=True)
class TextFile:
    """The texts of a file, read anew in every loop; only one line at a time is in memory.

    Args:
        path: A `.jsonl` file (one object a line), or any other text file (one text a line). Empty lines are left out.
        field: The text in an object.
    """

    path: Path
    field: str = "text"

    def __iter__(self) -> Iterator[str]:
        as_json = self.path.suffix.lower() == ".jsonl"
        for number, line in bounded_lines(self.path, MAX_LINE_BYTES):
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if content.strip():
                where = f"{clip(str(self.path), 200)}, line {number}"
                text = self._of_object(content, where) if as_json else _decoded(content, where)
                if text.strip():
                    yield text

    def _of_object(self, content: bytes, where: str) -> str:
        found = parse_json(content, where)
        if not isinstance(found, dict):
            raise FormatError(f"{where}: a line is an object; got {type(found).__name__}.")
        values = cast(dict[str, object], found)
        if self.field not in values:
            raise FormatError(f"{where} has no {self.field!r}; give `field`, one of: {clip(', '.join(values), 200)}.")
        text = values[self.field]
        if not isinstance(text, str):
            raise FormatError(f"{where}: {self.field!r} must be a text; got {type(text).__name__}.")
        return text


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where} is not UTF-8 text (byte {error.start} of the line).") from error


def read_texts(path: str | os.PathLike[str], *, field: str = "text") -> TextFile:
    """The texts of a file as a corpus for `describe`, `strongest_examples`, `feature_notes` and others.

    The file is read anew in every loop over it, a line at a time, so it may be larger than the memory.

    Args:
        path: A `.jsonl` file, an object a line; or a file with a text a line. UTF-8. Empty lines are left out.
        field: Which value of an object is its text.

    Raises FormatError, in one line with the number of the line, for a file that cannot be read or has no text, a line
    of more than 1 MiB, or one that is not a text; later lines are checked when they are reached.
    """
    found = TextFile(Path(path), field)
    if next(iter(found), None) is None:
        raise FormatError(f"{clip(str(path), 200)} has no text; one a line is expected.")
    return found
