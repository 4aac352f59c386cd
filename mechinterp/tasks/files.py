"""`load_pairs`: a user's own pairs from a JSONL or CSV file, as texts or as token ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechinterp.errors import FormatError, InputError
from mechinterp.tasks.encoder import Encoder, encoder_of
from mechinterp.tasks.make import check_against
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.rows import FileRow, PairsFile, Text, read_rows
from mechinterp.tasks.source import Dropped, FileSource, Report

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

    `clean` and `corrupt` are texts, or lists of token ids that are taken as they are. `right` and `wrong`
    (optional) are one answer or a list; an answer as text holds its leading space. `positions` (optional)
    maps names to token indices, counted in the ids that the model sees, BOS included. In CSV, lists and
    positions are JSON in a cell. `prepend_bos=None` does what the tokenizer itself does with a text.

    A row that the tokenizer cannot use (other lengths of clean and corrupt, an answer that is not one token)
    is left out and listed in `Pairs.report`; with `strict=True` it is an error. Raises FormatError.

    The model or tokenizer may be left out when the file holds token ids only.
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
    """Log the answers that are another token with a space before them, where the prompt ends without one."""
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
