"""Texts of files: read anew in every loop, a line at a time, and refused in one line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

import mechinterp as mi
from mechinterp.base.errors import FormatError
from mechinterp.base.text_files import MAX_LINE_BYTES


def test_the_texts_are_the_lines_in_every_loop(tmp_path: Path) -> None:
    plain, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_bytes(b"\xef\xbb\xbfone text\r\n\n  \nw\xc3\xb6rter \xe2\x80\xa8 too\nlast")
    found = mi.read_texts(plain)
    assert list(found) == list(found) == ["one text", "wörter \u2028 too", "last"]
    rows.write_text("\n".join(json.dumps({"text": text, "n": 1}) for text in found), "utf-8")
    assert list(mi.read_texts(rows)) == list(found)
    rows.write_text('{"body": "a\\nb"}\n', "utf-8")
    assert list(mi.read_texts(rows, field="body")) == ["a\nb"]


@pytest.mark.slow
def test_one_line_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("a text of some words\n" * 200_000, "utf-8")
    tracemalloc.start()
    assert sum(1 for _ in mi.read_texts(path)) == 200_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 10


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\n \n", "has no text"),
        ("a.txt", b"good\n\xff\n", "line 2 is not UTF-8"),
        ("a.txt", b"good\n" + b"x" * (MAX_LINE_BYTES + 1), "line 2 has more than"),
        ("a.jsonl", b"text\n", "line 1 is not valid JSON"),
        ("a.jsonl", b"[1]\n", "an object; got list"),
        ("a.jsonl", b'{"body": "x"}\n', "has no 'text'; give `field`, one of: body"),
        ("a.jsonl", b'{"text": 3}\n', "must be a text; got int"),
        ("a.jsonl", b'{"text": ' + b"[" * 5000, r"nested|valid JSON"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=said) as raised:
        list(mi.read_texts(tmp_path / name))
    assert len(str(raised.value).splitlines()) == 1


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(FormatError, match=r"plain file|cannot be read"):
            mi.read_texts(path)
