"""What counts as the same output of a notebook, and what does not."""

from __future__ import annotations

import json
from pathlib import Path

import plotly.graph_objects as go
import pytest

from tools.notebooks.cells import run
from tools.notebooks.compare import differences


def printed(text: str) -> list[list[dict[str, object]]]:
    return [[{"output_type": "stream", "name": "stdout", "text": text}]]


@pytest.mark.parametrize(
    ("stored", "now"),
    [
        ("faithfulness 0.98 of a2.h1", "Faithfulness:  0.99,  of 'a2.h1'"),  # the last digit, and other words
        ("error 3.1e-07", "error 8.4e-06"),  # both are rounding errors
        ("12,345 bytes", "12,400 bytes"),  # less than a percent
        ("97 %, [96, 99]", "97% [96, 99]"),
        ("sha256 0123456789abcdef0123", "sha256 fedcba98765432100123"),
    ],
)
def test_these_are_the_same(stored: str, now: str) -> None:
    assert not differences(printed(stored), printed(now))


@pytest.mark.parametrize(
    ("stored", "now"),
    [
        ("faithfulness 0.98", "faithfulness 0.95"),
        ("faithfulness 0.98", "faithfulness -0.98"),
        ("head a2.h1", "head a2.h3"),
        ("89 of 479 edges", "92 of 479 edges"),
        ("1 2 3", "1 2"),
        ("1 2", "1 2 3"),
        ("0.98", "nothing"),
        ("0.5", "half"),
        ("0.00012", "0.0"),
    ],
)
def test_these_are_not(stored: str, now: str) -> None:
    (found,) = differences(printed(stored), printed(now))
    assert found.startswith("code cell 0: ")


def test_another_number_of_cells_is_one_line() -> None:
    assert differences([[], []], [[]]) == ["2 code cells are stored and 1 were run"]


def test_a_cell_shows_what_it_prints_its_last_value_and_the_numbers_of_a_figure(tmp_path: Path) -> None:
    """In the folder, with a change; then a table that a figure draws is compared by its largest value."""
    source = "import plotly.graph_objects as go\nA = 1\nprint('a', A)\nopen('file', 'w').close()\n"
    source += "go.Figure(go.Bar(y=[A, 2000.0]))"
    cells = [{"cell_type": "code", "source": source.splitlines(keepends=True)}, {"cell_type": "code", "source": "A"}]
    path = tmp_path / "x.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    (tmp_path / "in").mkdir()
    shown, names = run(path, tmp_path / "in", ("A = 1", "A = 1.5"))
    assert names["A"] == 1.5 and (tmp_path / "in" / "file").is_file()
    (text, figure), (value,) = shown
    assert text["text"] == "a 1.5\n" and value["data"] == {"text/plain": "1.5"}
    assert isinstance(figure["data"]["figure"], go.Figure)
    drawn = figure["data"]["text/plain"]
    assert drawn == 'Figure [{"type": "bar", "y": [1.5, 2000.0]}]'
    for other, same in (("1.5, 2001.0", True), ("2.5, 2000.0", True), ("5.5, 2000.0", False), ("1.5, 2100.0", False)):
        changed = {"data": {"text/plain": drawn.replace("1.5, 2000.0", other)}}
        assert bool(differences([[figure]], [[changed]])) != same, other
