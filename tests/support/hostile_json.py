"""Mutations of circuit files that keep to their structure, and what a command must do with whatever comes out."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import random
import re
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechinterp.base.errors import MechInterpError
from mechinterp.circuit_file.schema import circuit_sha256
from mechinterp.circuit_file.store import file_sha256, open_circuit_file
from mechinterp.cli import app as cli

UNCAUGHT = 99
MOST_LETTERS = 1100
"""Of the one line that a command says on stderr."""
EVIL = "[/x] [link=http://a.b]c[/link] \x1b]0;d\x07\x1b[2J \u202e\u2066\u200f :smile: ^~\\write18{e}"
"""Markup, terminal controls, bidi controls and TeX in one text."""


@dataclass(frozen=True)
class Done:
    """What one command did."""

    arguments: tuple[str, ...]
    code: int
    out: str
    err: str
    seconds: float

    def problems(self, allowed: tuple[int, ...] = (0, 1, 2, 3)) -> list[str]:
        """What no command may do, whatever it is given; empty when all is well."""
        found: list[str] = []
        if self.code not in allowed:
            found.append(f"exit code {self.code}, not one of {allowed}")
        lines = [line for line in self.err.splitlines() if not line.startswith("warning: ")]
        if lines and re.search(r" has \d+ problems:$", lines[0]):  # of a file of one's own: each is on an indented line
            lines = [lines[0], *(line for line in lines[1:] if not line.startswith("  "))]
        if self.code in (0, 1) and lines:
            found.append(f"exit code {self.code} with lines on stderr")
        if self.code in (2, 3) and (len(lines) != 1 or not lines[0].startswith("discover-circuit: ")):
            found.append(f"exit code {self.code} with {len(lines)} lines on stderr")
        if any(len(line) > MOST_LETTERS for line in lines):
            found.append("a line of more than 1,100 letters on stderr")
        for text in (self.out, self.err):
            steering = {letter for letter in text if letter != "\n" and unicodedata.category(letter) in ("Cc", "Cf")}
            if steering:
                found.append(f"steers the terminal: {sorted(steering)}")
        return found


def run(*arguments: str | Path) -> Done:
    """One command in this process, its output captured."""
    given = tuple(map(str, arguments))
    out, err = io.StringIO(), io.StringIO()
    start = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(given)
        except Exception as error:  # `main` lets none pass
            code = UNCAUGHT
            err.write(f"{type(error).__name__}: {error}")
    return Done(given, code, out.getvalue(), err.getvalue(), time.process_time() - start)


def sealed(content: dict[str, Any], path: Path) -> bool:
    """Write the content with its hashes made right, as somebody would on purpose; False when it is no circuit file."""
    path.write_text(json.dumps(content), "utf-8")
    try:
        content["integrity"]["circuit_sha256"] = circuit_sha256(open_circuit_file(path).document)
        content["integrity"]["file_sha256"] = file_sha256(content)
    except (MechInterpError, KeyError, TypeError, ValueError):
        return False
    path.write_text(json.dumps(content), "utf-8")
    return True


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside, the outer ones first."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(entries):
        yield (*at, key)
        yield from places(entry, (*at, key))


def get(content: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        content = content[key]
    return content


def put(content: Any, at: tuple[Any, ...], value: Any) -> None:
    get(content, at[:-1])[at[-1]] = value


NUMBERS = (0, -1, 1, 2, 3, 10**6, 2**31, 2**53, 2**63, 10**18, -(10**18), 0.5, -0.0, 1e-300, 1e300, True)
TEXTS = (
    *("", "x", EVIL, "x" * 300, "x" * 900, "x" * 20_000, "../../etc/passwd", "/dev/zero", "/proc/self/mem", "-x", "."),
    *("bundled", "gpt2", "org/name@main", "a0.h0", "m0", "logits", "a0.h0->m0", "accuracy", "float8_e4m3fn", "\u0000"),
    *("input->logits", "rest", "a0.h0@end", "0" * 64, "task", "tokens", "mean", "node", "published", "directory", "\n"),
)
OTHERS: tuple[Any, ...] = (None, [], {}, [[]], {"x": 1}, {EVIL: EVIL}, [1, "x", None], [[1] * 200, [1]])


NAMES_OF_PARTS = ("nodes", "edges", "integrity")
"""What holds no free text."""


def _has_settings(content: dict[str, Any], key: str) -> bool:
    part = content.get(key)
    return isinstance(part, dict) and isinstance(part.get("parameters"), dict)


def mutated(content: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The content with one to three changes: values of the same or another type, entries gone, doubled or added."""
    content = copy.deepcopy(content)
    # Parts by name first: a list of 60 edges must not take all the changes.
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        part = draw.choice(sorted(content))
        known = [(part,), *places(content[part], (part,))]
        at = draw.choice(known)
        old, parent = get(content, at), get(content, at[:-1])
        kind = draw.random()
        words = [place for place in known if isinstance(get(content, place), str) and part not in NAMES_OF_PARTS]
        if kind < 0.25 and words:
            put(content, draw.choice(words), draw.choice((EVIL, EVIL, "x" * 300, "x" * 900, draw.choice(TEXTS))))
        elif kind < 0.35:
            settings = [content[key]["parameters"] for key in ("selection", "discovery") if _has_settings(content, key)]
            for chosen in settings[:1] if draw.random() < 0.5 else settings[-1:]:
                name = draw.choice([*chosen, "threshold", "ratio", "by", "rule", "edges", "steps", "bootstrap_seed"])
                chosen[name] = draw.choice((*NUMBERS, *TEXTS, "1%", "ilp", "greedy"))
        elif kind < 0.5:
            put(content, at, _like(old, draw))
        elif kind < 0.6:
            put(content, at, copy.deepcopy(draw.choice((*NUMBERS, *TEXTS, *OTHERS))))
        elif kind < 0.7:
            del parent[at[-1]]
        elif kind < 0.8:
            source = draw.choice(known)
            put(content, at, copy.deepcopy(get(content, source)))
        elif kind < 0.92 and isinstance(parent, list):
            parent.extend(copy.deepcopy(draw.choice(parent)) for _ in range(draw.choice((1, 2, 50, 2000))))
        elif isinstance(parent, dict):
            parent[draw.choice(TEXTS) or "y"] = copy.deepcopy(draw.choice((*OTHERS, *NUMBERS, old)))
        if not content:
            break
    return content


def _like(old: Any, draw: random.Random) -> Any:
    """Another value of the same type."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return draw.choice((old + 1, old - 1, 0, -1, 1, 2 * old, 7, 64, 1000, 2**20, 2**53))
    if isinstance(old, float):
        return draw.choice((old * 1.01, -old, 0.0, 1e300, -1e-300, 1.0))
    if isinstance(old, str):
        if draw.random() < 0.5 or not old:
            return draw.choice(TEXTS)
        place = draw.randrange(len(old))
        return old[:place] + draw.choice(("", "0", "x", "[/x]", "\x1b[1m", "@", "->", "\u202e")) + old[place + 1 :]
    if isinstance(old, list):
        return draw.choice((old[1:], old[:-1], old + old, old[::-1], old * 40 if len(old) < 100 else old))
    if isinstance(old, dict):
        items = list(old.items())
        draw.shuffle(items)
        return dict(items[1:])
    return draw.choice(TEXTS)


def harmed(content: bytes, draw: random.Random) -> bytes:
    """The bytes with one to three of them changed, cut out or put in."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(content) + 1)
        put_in = draw.choice((b"0", b'"', b"[", b"{", b"1e999", b"NaN", b"\x00", b"\xff", b"9" * 50, b"\\ud800", b"\n"))
        kind = draw.random()
        if kind < 0.3 and at < len(content):
            content = content[:at] + bytes([content[at] ^ draw.randrange(1, 256)]) + content[at + 1 :]
        elif kind < 0.6:
            content = content[:at] + content[at + draw.choice((1, 2, 20, 400, 10**6)) :]
        else:
            content = content[:at] + put_in + content[at:]
    return content


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
