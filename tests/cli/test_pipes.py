"""What goes to a pipe or a file is not wrapped: neither words nor paths nor tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechinterp.cli import app as cli


def test_a_table_in_a_pipe_has_one_line_for_each_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line == line.rstrip() for line in lines)
    for name in ("ioi-bundled-mattr", "docstring-heimersheim2023-edges"):
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert line.endswith(f"{name}.circuit.json")  # the path is whole
    assert cli.main(["show", "ioi-wang2022-heads"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (movers,) = (line for line in lines if line.startswith("backup name mover "))
    assert movers.count("@end") == 8


def test_columns_say_how_wide_a_table_may_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60 and "ioi-bundled-mattr" in " ".join(lines)


def test_files_are_not_replaced_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of `export`, `import`, `diff`, `view` and `graph`: refused in one line, and left as they are."""
    there = tmp_path / "there.dot"
    there.write_text("mine")
    for words in (
        ["export", "ioi-bundled-eap-ig", "--format", "dot", "--out"],
        ["diff", "ioi-bundled-eap-ig", "ioi-bundled-mattr", "--out"],
        ["view", "ioi-bundled-eap-ig", "--no-open", "--out"],
        ["graph", "Then Julie and Ryan went", "--out"],
    ):
        assert cli.main([*words, str(there)]) == 2
        err = capsys.readouterr().err
        assert err == f"discover-circuit: {there} is there already. Add --force to replace it, or give another --out.\n"
        assert there.read_text() == "mine"
    assert cli.main(["export", "ioi-bundled-eap-ig", "--format", "dot", "--out", str(there), "--force"]) == 0
    assert there.read_text().startswith("digraph")
