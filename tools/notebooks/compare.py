"""Comparing what two runs of a notebook show: their numbers and the names that have numbers, not their bytes.

Wording, spaces and pictures may differ; a number that moved, a head that came or went, or a table that is gone may not.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tools.notebooks.cells import FIGURE

SHARE = 0.01
"""Numbers may differ by this share: other processors and libraries sum in another order."""
NOTHING = 1e-4
"""Numbers below it are rounding errors of the computation; two of them count as equal."""
NUMBER = re.compile(r"[-+]?(\d[\d,]*\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
HASH = re.compile(r"[0-9a-f]{16,}$")

Shown = Sequence[dict[str, Any]]
"""What one cell shows."""


def differences(stored: Sequence[Shown], now: Sequence[Shown]) -> list[str]:
    """One line for each cell that shows something else now; empty if there is none."""
    if len(stored) != len(now):
        return [f"{len(stored)} code cells are stored and {len(now)} were run"]
    found = ((number, _difference(*both)) for number, both in enumerate(zip(stored, now, strict=True)))
    return [f"code cell {number}: {text}" for number, text in found if text]


def _difference(stored: Shown, now: Shown) -> str:
    before, after = ([entry for shown in side for entry in _entries(shown)] for side in (stored, now))
    for was, got in zip(before, after, strict=False):
        if not _same(was, got):
            return f"{was[0]!r} is stored, now {got[0]!r}"
    if len(before) != len(after):
        longer = before if len(before) > len(after) else after
        return f"{len(before)} numbers are stored, now {len(after)}; the first of the others is {longer[-1][0]!r}"
    return ""


def _entries(shown: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(what stands there, by how much it may differ) in order."""
    data = shown.get("data", {})
    text = "".join(data.get("text/html") or data.get("text/plain") or shown.get("text", ""))
    if text.startswith(FIGURE + "["):
        yield from _of_json(json.loads(text.removeprefix(FIGURE)))
        return
    if "text/html" in data:
        text = html.unescape(re.sub(r"<style.*?</style>|<[^>]*>", " ", text, flags=re.DOTALL))
    for word in re.split(r"[\s()\[\]{}:;=|'\"/]+|,(?!\d)|\.(?:\s|$)|(?<=\d)%", text):
        word = word.rstrip(".,")
        if re.search(r"\d", word) and not HASH.match(word):
            yield word, _allowance(word)


def _allowance(word: str) -> float:
    """By how much a printed number may differ: a share of it, or 1.5 of its last digit. A name: not at all."""
    if not NUMBER.match(word):
        return 0.0
    digits, _, power = word.lower().replace(",", "").partition("e")
    decimals = len(digits.partition(".")[2])
    last = 10.0 ** (int(power or 0) - decimals) if "." in digits or power else 0.0
    return max(SHARE * abs(_value(word)), 1.5 * last)


def _of_json(value: Any, largest: float = 0.0) -> Iterator[tuple[str, float]]:
    """The numbers of a figure; one may differ by a share of itself or a tenth of that of the largest beside it."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _of_json(value[key])
    elif isinstance(value, list):
        numbers = [
            abs(entry) for row in value for entry in (row if isinstance(row, list) else [row]) if _is_number(entry)
        ]
        for entry in value:
            yield from _of_json(entry, max([largest, *numbers]))
    elif _is_number(value):
        yield repr(value), max(SHARE * abs(value), SHARE / 10 * largest)
    elif isinstance(value, str):
        yield from ((word, _allowance(word)) for word in re.split(r"<[^>]*>|\s+", value) if re.search(r"\d", word))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _value(word: str) -> float:
    return float(word.replace(",", ""))


def _same(was: tuple[str, float], now: tuple[str, float]) -> bool:
    if was[0] == now[0]:
        return True
    if not (NUMBER.match(was[0]) and NUMBER.match(now[0])):
        return False
    before, after = _value(was[0]), _value(now[0])
    return abs(before - after) <= min(was[1], now[1]) or max(abs(before), abs(after)) < NOTHING
