"""`load_pairs`: a user's own pairs from a JSONL or CSV file, as texts or as token ids.

`read_rows` reads a file into checked rows without a tokenizer; `load_pairs` encodes them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from mechinterp.base.canonical_json import parse_json
from mechinterp.base.errors import FormatError, InputError, clip
from mechinterp.base.plain_files import read_bounded
from mechinterp.base.registry import unknown
from mechinterp.tasks.make import check_against
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.source import Dropped, FileSource, Report
from mechinterp.tasks.tokenization import Encoder, encoder_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Encoded:
    row: FileRow
    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    right: tuple[int, ...] | None
    wrong: tuple[int, ...] | None


def load_pairs(
    path: str | Path,
    model_or_tokenizer: Any = None,
    *,
    strict: bool = False,
    prepend_bos: bool | None = None,
) -> Pairs:
    """The pairs of a `.jsonl` or `.csv` file with the columns clean, corrupt, right, wrong, positions.

    `clean` and `corrupt` are texts, or lists of token ids that are used as they are. `right` and `wrong` (optional)
    are one answer or a list; an answer as text includes its leading space. `positions` (optional) maps names to token
    indices, counted in the ids that the model reads, including BOS. In CSV, lists and positions are JSON in a cell.

    Args:
        path: The file.
        model_or_tokenizer: A model with a tokenizer, or a Hugging Face tokenizer; not needed for token ids.
        strict: Whether a row that the tokenizer cannot use (clean and corrupt of different lengths, an answer that is
            not one token) is an error; by default it is left out and listed in `Pairs.report`.
        prepend_bos: Whether texts are encoded with the BOS token first; by default as the tokenizer does it.

    Raises FormatError, with the line, for a malformed file, InputError for texts without a tokenizer.
    """
    path = Path(path)
    file = read_rows(path)
    encoder = _encoder(file, model_or_tokenizer, prepend_bos)
    kept: list[_Encoded] = []
    dropped: list[Dropped] = []
    for row in file.rows:
        encoded = _encode(row, encoder, str(path))
        if isinstance(encoded, _Encoded):
            kept.append(encoded)
        elif strict:
            raise FormatError(f"{path}, line {row.line}: {encoded}.")
        else:
            dropped.append(Dropped(f"line {row.line}", encoded))
    _report(file, kept, dropped, str(path))
    _warn_of_missing_spaces(kept, encoder, str(path))
    texts = any(isinstance(row.clean, str) for row in file.rows)
    policy = encoder.prepend_bos if encoder is not None and texts else None
    source = FileSource(file=file.name, sha256=file.sha256, prepend_bos=policy)
    try:
        pairs = _assemble(kept, source, Report(tuple(dropped)))
        check_against(pairs, model_or_tokenizer)
    except InputError as error:
        raise FormatError(f"{path}: {error} (rows count the examples that were kept, from 0)") from error
    return pairs


def _encoder(file: PairsFile, model_or_tokenizer: Any, prepend_bos: bool | None) -> Encoder | None:
    texts = any(isinstance(part, str) for row in file.rows for part in _parts(row))
    if not texts:
        return None
    if model_or_tokenizer is None:
        raise InputError(f"{file.name} holds texts; give load_pairs the model or its tokenizer.")
    return encoder_of(model_or_tokenizer, prepend_bos)


def _parts(row: FileRow) -> tuple[object, ...]:
    return (row.clean, row.corrupt, *(row.right or ()), *(row.wrong or ()))


def _encode(row: FileRow, encoder: Encoder | None, where: str) -> _Encoded | str:
    """The row as token ids, or why this tokenizer cannot use it."""
    clean, corrupt = _ids(row.clean, encoder), _ids(row.corrupt, encoder)
    for name, text, ids in (("clean", row.clean, clean), ("corrupt", row.corrupt, corrupt)):
        if encoder is not None and isinstance(text, str) and encoder.unknown(ids):
            return f"{name} has words that the tokenizer does not know"
    if len(clean) != len(corrupt):
        return f"{len(clean)} tokens clean, {len(corrupt)} corrupt"
    right, wrong = _answer_ids(row.right, encoder), _answer_ids(row.wrong, encoder)
    if isinstance(right, str) or isinstance(wrong, str):
        return right if isinstance(right, str) else str(wrong)
    shared = set(right or ()) & set(wrong or ())
    if shared:
        raise FormatError(f"{where}, line {row.line}: right and wrong share the token {min(shared)}.")
    for name, index in row.positions.items():
        if index >= len(clean):
            raise FormatError(
                f"{where}, line {row.line}: the position {name!r} is {index}, but there are {len(clean)} tokens."
            )
    return _Encoded(row, clean, corrupt, right, wrong)


def _ids(given: Text, encoder: Encoder | None) -> tuple[int, ...]:
    if not isinstance(given, str):
        return given
    return () if encoder is None else encoder.encode([given])[0].ids


def _answer_ids(given: Sequence[str | int] | None, encoder: Encoder | None) -> tuple[int, ...] | str | None:
    if given is None:
        return None
    ids: list[int] = []
    for answer in given:
        if isinstance(answer, int):
            ids.append(answer)
            continue
        found = () if encoder is None else encoder.pieces([answer])[0][0]
        if len(found) != 1:
            return f"the answer {answer!r} is {len(found)} tokens, not one"
        if encoder is not None and encoder.unknown(found):
            return f"the answer {answer!r} is not in the tokenizer's vocabulary"
        ids.append(found[0])
    return tuple(dict.fromkeys(ids))


def _report(file: PairsFile, kept: Sequence[_Encoded], dropped: Sequence[Dropped], where: str) -> None:
    if dropped:
        first = f"{dropped[0].what}: {dropped[0].why}"
        log.warning("%s: %d of %d rows dropped (%s)", where, len(dropped), len(file.rows), first)
        if len(kept) < 2:
            raise FormatError(
                f"{where}: {len(dropped)} of {len(file.rows)} rows cannot be used ({first}), and pairs need "
                "at least two."
            )


def _warn_of_missing_spaces(kept: Sequence[_Encoded], encoder: Encoder | None, where: str) -> None:
    """Log the answers that would be other tokens with a leading space, if the prompt does not end with one."""
    bare = [
        (entry.row.line, answer)
        for entry in kept
        for answer in (*(entry.row.right or ()), *(entry.row.wrong or ()))
        if isinstance(answer, str) and not answer[0].isspace()
        if isinstance(entry.row.clean, str) and not entry.row.clean[-1].isspace()
    ]
    if encoder is None or not bare:
        return
    answers = sorted({answer for _, answer in bare})
    plain, spaced = encoder.pieces(answers), encoder.pieces([f" {answer}" for answer in answers])
    doubtful = {answer for answer, (one, _), (two, _) in zip(answers, plain, spaced, strict=True) if one != two}
    lines = [line for line, answer in bare if answer in doubtful]
    if lines:
        log.warning(
            "%s: %d answers have no space before them though the prompt ends without one (first in line %d); "
            "with it they are other tokens. Write ' Mary', not 'Mary', if a new word is meant.",
            where,
            len(lines),
            lines[0],
        )


def _assemble(kept: Sequence[_Encoded], source: FileSource, report: Report) -> Pairs:
    first = kept[0].row
    texts = all(isinstance(entry.row.clean, str) for entry in kept)
    return Pairs(
        clean=[entry.clean for entry in kept],
        corrupt=[entry.corrupt for entry in kept],
        right=None if first.right is None else [entry.right or () for entry in kept],
        wrong=None if first.wrong is None else [entry.wrong or () for entry in kept],
        positions={name: [entry.row.positions[name] for entry in kept] for name in first.positions},
        clean_text=[str(entry.row.clean) for entry in kept] if texts else None,
        corrupt_text=[str(entry.row.corrupt) for entry in kept] if texts else None,
        source=source,
        report=report,
    )


MAX_BYTES = 64 * 2**20
MAX_ROWS = 250_000
MAX_LETTERS = 1_000_000
"""The most characters of a prompt; the longest contexts are some 100,000 tokens."""
MAX_NAMED = 1000
"""The most named positions of a row."""
LARGEST_ID = 2**31 - 1
REQUIRED = ("clean", "corrupt")
COLUMNS = (*REQUIRED, "right", "wrong", "positions")

Text: TypeAlias = str | tuple[int, ...]
"""A prompt as text, or as token ids."""
Answers: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class FileRow:
    """One example as it is in the file; `line` counts from 1."""

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
            raise FormatError(f"{path} has more than {MAX_ROWS} rows; split it.")
        rows.append(_row(given, line, f"{path}, line {line}"))
    if len(rows) < 2:
        raise FormatError(f"{path} holds {len(rows)} examples; pairs need at least two.")
    _check_alike(rows, str(path))
    return PairsFile(path.name, hashlib.sha256(content).hexdigest(), tuple(rows))


def _jsonl(text: str, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(): a JSON string may contain U+2028 and the like, which do not end a line of JSONL.
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
            raise FormatError(f"{where}: a text of {len(given)} characters is longer than any model can read.")
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
