"""JSON for circuit files: read strictly, written so that a diff shows one change per line."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn, cast

from mechinterp.base.errors import FormatError

MAX_DEPTH = 32
MAX_VALUES = 2**22
"""The most values in a text; each may take 100 bytes of memory, however short its text is."""
MAX_DIGITS = 19
"""The most digits of a whole number: those of 64 bits."""
WIDTH = 110


def parse_json(content: bytes, where: str, max_values: int = MAX_VALUES) -> Any:
    """The value of a JSON text.

    Raises FormatError, with `where` in front, for text that is not UTF-8 or not JSON, and for JSON on which parsers
    disagree: duplicate keys, NaN and infinities (1e999 too), whole numbers beyond 64 bits, lone surrogates, and values
    nested deeper than `MAX_DEPTH`. A text of more than `max_values` values is refused before it is read.
    """
    check_size(content, where, max_values)
    if not content.strip():
        raise FormatError(f"{where} is empty; JSON is expected.")
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
        _check(value, MAX_DEPTH)
    except UnicodeDecodeError as error:
        raise FormatError(f"{where} is not UTF-8 text (byte {error.start}).") from error
    except RecursionError as error:
        raise FormatError(f"{where} is nested more than {MAX_DEPTH} levels deep.") from error
    except ValueError as error:
        raise FormatError(f"{where} is not valid JSON: {error}.") from error
    return value


def check_size(content: bytes, where: str, max_values: int = MAX_VALUES) -> None:
    """Return None when the text cannot hold more values than that. Raises FormatError; the text is not parsed."""
    # Every value but the first follows a comma, a bracket or a brace. A repeated key takes no extra memory, so only
    # half of the keys are counted.
    if len(content) > max_values and (
        content.count(b",") + content.count(b"[") + content.count(b"{") + content.count(b'"') // 4 > max_values
    ):
        raise FormatError(f"{where} holds more than the {max_values:,} values that it can have.")


def render_json(value: Any) -> str:
    """The value as diffable text: sorted keys; a list or object of plain values is on one line if it fits.

    The same value always gives the same text. Raises ValueError for NaN and infinities.
    """
    return _render(value, 0) + "\n"


def canonical_sha256(value: Any) -> str:
    """sha256 (hex) of the value's canonical JSON: sorted keys, no spaces, ASCII."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def six_digits(number: float) -> float:
    """The number at 6 significant digits; zero has no sign.

    >>> six_digits(0.12345678), six_digits(-1e-300), six_digits(-0.0)
    (0.123457, -1e-300, 0.0)
    """
    return float(f"{number:.6g}") + 0.0


def _no_duplicates(items: Sequence[tuple[str, object]]) -> dict[str, object]:
    made: dict[str, object] = {}
    for key, value in items:
        if key in made:
            raise ValueError(f"the key {key[:80]!r} is given twice")
        made[key] = value
    return made


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _bounded(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"the whole number {text[:40]}... has more than {MAX_DIGITS} digits")
    return int(text)


def _check(value: object, levels: int) -> None:
    """Return None when strings can be written as UTF-8 and nothing is nested too deeply."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a surrogate pair") from None
    elif isinstance(value, (dict, list)):
        if levels == 0:
            raise RecursionError
        if isinstance(value, dict):
            entries = cast(dict[str, object], value)
            for key in entries:
                _check(key, levels)
            parts: Sequence[object] = list(entries.values())
        else:
            parts = cast(list[object], value)
        for part in parts:
            _check(part, levels - 1)


def _render(value: Any, indent: int) -> str:
    line = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, (dict, list)) or not value:
        return line
    parts: list[Any] = list(cast(dict[str, Any], value).values()) if isinstance(value, dict) else value
    flat = not any(isinstance(part, (dict, list)) and part for part in parts)
    numbers = isinstance(value, list) and all(isinstance(part, (int, float)) for part in parts)
    if numbers or (flat and len(line) + indent <= WIDTH):
        return line
    pad = " " * (indent + 2)
    if isinstance(value, dict):
        entries = cast(dict[str, Any], value)
        lines = [
            f"{json.dumps(key, ensure_ascii=False)}: {_render(entries[key], indent + 2)}" for key in sorted(entries)
        ]
        return "{\n" + ",\n".join(pad + text for text in lines) + "\n" + " " * indent + "}"
    return "[\n" + ",\n".join(pad + _render(part, indent + 2) for part in parts) + "\n" + " " * indent + "]"
