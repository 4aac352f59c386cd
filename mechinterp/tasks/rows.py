"""Reading a JSONL or CSV file of pairs into checked rows; nothing here knows a tokenizer."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from mechinterp.errors import FormatError, clip
from mechinterp.jsontext import parse_json
from mechinterp.plain_files import read_bounded
from mechinterp.registry import unknown

MAX_BYTES = 64 * 2**20
MAX_ROWS = 250_000
MAX_LETTERS = 1_000_000
"""Of one prompt; the longest contexts are some 100,000 tokens."""
MAX_NAMED = 1000
"""Named positions of a row."""
LARGEST_ID = 2**31 - 1
REQUIRED = ("clean", "corrupt")
COLUMNS = (*REQUIRED, "right", "wrong", "positions")

Text: TypeAlias = str | tuple[int, ...]
"""A prompt as text, or as token ids."""
Answers: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class FileRow:
    """One example as the file gives it; `line` counts from 1."""

    line: int
    clean: Text
    corrupt: Text
    right: Answers | None
    wrong: Answers | None
    positions: Mapping[str, int]


@dataclass(frozen=True)
class PairsFile:
    """The rows of a file, and the SHA-256 of its bytes."""

    name: str
    sha256: str
    rows: tuple[FileRow, ...]


def read_rows(path: Path) -> PairsFile:
    """The rows of a `.jsonl` or `.csv` file. Raises FormatError with the line for anything malformed."""
    readers: dict[str, Callable[[str, str], Iterator[tuple[int, dict[str, Any]]]]] = {
        ".jsonl": _jsonl,
        ".csv": _csv,
    }
    if path.suffix.lower() not in readers:
        raise FormatError(f"{path}: pairs are read from .jsonl or .csv files; got {path.suffix or 'no suffix'!r}.")
    content = read_bounded(path, MAX_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    rows: list[FileRow] = []
    for line, given in readers[path.suffix.lower()](text, str(path)):
        if len(rows) == MAX_ROWS:
            raise FormatError(f"{path} has more than {MAX_ROWS} rows; cut it into parts.")
        rows.append(_row(given, line, f"{path}, line {line}"))
    if len(rows) < 2:
        raise FormatError(f"{path} holds {len(rows)} examples; pairs need at least two.")
    _check_alike(rows, str(path))
    return PairsFile(path.name, hashlib.sha256(content).hexdigest(), tuple(rows))


def _jsonl(text: str, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(): a JSON string may hold U+2028 and its like, which are no line ends here.
    line, end = 1, 0
    for found in re.finditer(r"[^\n]+", text):
        line, end, content = line + text.count("\n", end, found.start()), found.end(), found[0]
        if content.strip():
            given = _json(content, f"{where}, line {line}")
            if not isinstance(given, dict):
                raise FormatError(f"{where}, line {line}: a row is an object; got {type(given).__name__}.")
            yield line, cast(dict[str, Any], given)


def _csv(text: str, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise FormatError(f"{where} is empty.")
        seen: set[str] = set()
        for name in header:
            if name in seen:
                raise FormatError(f"{where}: the column {clip(name, 60)!r} is given twice.")
            if name not in COLUMNS:
                raise FormatError(f"{where}, line 1: {unknown('column', name, COLUMNS)}")
            seen.add(name)
        for cells in reader:
            if not cells:
                continue
            line = reader.line_num
            if len(cells) != len(header):
                raise FormatError(f"{where}, line {line}: {len(cells)} cells, but {len(header)} columns.")
            yield line, _cells(dict(zip(header, cells, strict=True)), f"{where}, line {line}")
    except csv.Error as error:
        raise FormatError(f"{where}, line {reader.line_num}: not valid CSV ({error}).") from error


def _cells(row: dict[str, str], where: str) -> dict[str, Any]:
    """The cells with their types: a prompt that is a JSON list is token ids, and so are its answers then.

    In a row of texts an answer that is a JSON list is several texts; anything else is the text itself.
    """
    made: dict[str, Any] = {name: cell for name, cell in row.items() if cell or name not in COLUMNS[2:]}
    as_ids = all(_is_list(row.get(name, "")) for name in REQUIRED)
    for name, cell in made.items():
        is_answer = name in ("right", "wrong")
        if name == "positions" or (as_ids and name in COLUMNS) or (is_answer and _is_list(cell)):
            made[name] = _json(cell, f"{where}, {name}")
    return made


def _is_list(cell: str) -> bool:
    try:
        return isinstance(json.loads(cell), list)
    except (ValueError, RecursionError):
        return False


def _json(text: str, where: str) -> object:
    return parse_json(text.encode("utf-8"), where)


def _row(given: Mapping[str, Any], line: int, where: str) -> FileRow:
    for name in given:
        if name not in COLUMNS:
            raise FormatError(f"{where}: {unknown('column', str(name), COLUMNS)}")
    for name in REQUIRED:
        if name not in given:
            raise FormatError(f"{where}: {name!r} is missing; a row has clean and corrupt.")
    clean, corrupt = (_prompt(given[name], f"{where}, {name}") for name in REQUIRED)
    if isinstance(clean, str) != isinstance(corrupt, str):
        raise FormatError(f"{where}: clean and corrupt must both be text or both be token ids.")
    right, wrong = (_answers(given.get(name), f"{where}, {name}") for name in ("right", "wrong"))
    if wrong is not None and right is None:
        raise FormatError(f"{where}: wrong is given without right.")
    return FileRow(line, clean, corrupt, right, wrong, _positions(given.get("positions"), where))


def _prompt(given: object, where: str) -> Text:
    if isinstance(given, str) and given:
        if len(given) > MAX_LETTERS:
            raise FormatError(f"{where}: a text of {len(given)} letters is longer than any model reads.")
        return given
    if isinstance(given, list) and given:
        return tuple(_token_id(entry, where) for entry in cast(list[object], given))
    raise FormatError(f"{where}: must be a text or a list of token ids, not empty; got {_short(given)}.")


def _answers(given: object, where: str) -> Answers | None:
    if given is None:
        return None
    entries = cast(list[object], given) if isinstance(given, list) else [given]
    if not entries:
        raise FormatError(f"{where}: the list of answers is empty.")
    return tuple(entry if isinstance(entry, str) and entry else _token_id(entry, where) for entry in entries)


def _positions(given: object, where: str) -> dict[str, int]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise FormatError(f"{where}, positions: must map names to token indices; got {_short(given)}.")
    entries = cast(dict[str, object], given)
    if len(entries) > MAX_NAMED or any(not 1 <= len(name) <= 100 for name in entries):
        raise FormatError(f"{where}, positions: at most {MAX_NAMED} names, of 1 to 100 letters.")
    return {name: _token_id(index, f"{where}, positions.{name}") for name, index in entries.items()}


def _token_id(given: object, where: str) -> int:
    if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given <= LARGEST_ID:
        raise FormatError(f"{where}: expected a whole number from 0 to {LARGEST_ID}; got {_short(given)}.")
    return given


def _short(given: object) -> str:
    return clip(repr(given), 60)


def _check_alike(rows: Sequence[FileRow], where: str) -> None:
    """Return None when every row has the same optional columns. Raises FormatError otherwise."""
    first = rows[0]
    for row in rows[1:]:
        for name in ("right", "wrong"):
            if (getattr(row, name) is None) != (getattr(first, name) is None):
                raise FormatError(f"{where}: line {row.line} and line {first.line} differ in having {name!r}.")
        if set(row.positions) != set(first.positions):
            raise FormatError(
                f"{where}: every row needs the same positions; line {first.line} has "
                f"{_short(sorted(first.positions))}, line {row.line} has {_short(sorted(row.positions))}."
            )
