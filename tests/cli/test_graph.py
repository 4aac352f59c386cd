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
    assert printed.count("GraphValidation") == 4 and printed.count("EdgeValidation") == 1
    assert "the model's own gradient" in printed and "weakened by 0.1" in printed
    graph = mi.load_attribution_graph(out)
    assert [node.text for node in graph.targets] == ["Ryan", "Julie"] and graph.features


def test_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page, texts = tmp_path / "x.json", tmp_path / "new" / "x.html", tmp_path / "texts.txt"
    texts.write_text("Julie gave a bone to Ryan\n\nThen Ryan went to the market\n", "utf-8")
    words = ["graph", PROMPT, "--target", "Ryan", "--validate", "4", "--held", "nothing", "--out", str(out)]
    assert cli.main([*words, "--page", str(page), "--texts", str(texts)]) == 0
    printed, content = capsys.readouterr().out, page.read_text("utf-8")
    assert f"wrote {page}" in printed and "edges are derivatives with nothing held" in printed
    assert "--held nothing --validate 4 --texts texts.txt" in content and str(tmp_path) not in content
    assert "Influence from errors" in content and "Predicts real ablations" in content
    assert mi.load_attribution_graph(out).about["held"] == "nothing"


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        [" "],
        ["Then Zorp"],
        [PROMPT, "--target", "Zorp"],
        [PROMPT, "--transcoders", str(tmp_path / "none")],
        [PROMPT, "--held", "everything"],
        [PROMPT, "--no-supernodes", "--texts", "texts.txt"],
        [PROMPT, "--page", "x.html", "--texts", str(tmp_path / "none")],
    ):
        assert cli.main(["graph", *words]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1
    assert cli.main(["graph", "ioi"]) == 2
    assert "'ioi' is a task, and `graph` takes a prompt" in capsys.readouterr().err
