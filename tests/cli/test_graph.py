"""`discover-circuit graph`: checked, pruned, written, and refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

import mechinterp as mi
from mechinterp.cli import app as cli

PROMPT = "Then Julie and Ryan went to the market . Julie gave a bone to"


def test_the_graph_of_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "x.graph.json"
    words = ["graph", PROMPT, "--target", "Ryan", "--target", "Julie", "--validate", "4", "--out", str(out)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "add up to what it reads" in printed and "the largest edges into target: 'Ryan'" in printed
    assert printed.count("GraphValidation") == 3 and printed.count("EdgeValidation") == 1
    graph = mi.load_attribution_graph(out)
    assert [node.text for node in graph.targets] == ["Ryan", "Julie"] and graph.features


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        [" "],
        ["Then Zorp"],
        [PROMPT, "--target", "Zorp"],
        [PROMPT, "--transcoders", str(tmp_path / "none")],
    ):
        assert cli.main(["graph", *words]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1
