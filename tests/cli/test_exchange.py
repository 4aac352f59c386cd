"""Export, import, validate and cite from the command line: lines, exit codes, files; no model where none is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mechinterp as mi
from mechinterp.circuit_file.formats.names import EXPORTS
from mechinterp.cli import app as cli

STORED = Path(__file__).parents[2] / "circuits" / "ioi-bundled-eap-ig.circuit.json"
PUBLISHED = STORED.parent / "tracr-reverse-resample.circuit.json"


@pytest.mark.parametrize("format", [name for name in EXPORTS if name != "mib"])
def test_every_format_is_written(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", str(STORED), "--format", format]) == 0
    (written,) = tmp_path.iterdir()
    text = capsys.readouterr().out
    assert f"wrote {written.name}" in text and EXPORTS.get(format).lost in text and written.stat().st_size > 500


@pytest.mark.slow
def test_what_was_exported_can_be_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, back = tmp_path / "graph.json", tmp_path / "back.circuit.json"
    assert cli.main(["export", str(STORED), "--format", "eap-ig-json", "--out", str(made)]) == 0
    assert cli.main(["import", str(made), "--format", "eap-ig-json", "--out", str(back)]) == 0
    assert mi.load_circuit(back).edges == mi.load_circuit(STORED).edges
    assert cli.main(["validate", str(back)]) == 0
    text = capsys.readouterr().out
    assert "status imported" in text and f"valid: {back}" in text


def test_cite_names_the_hash_and_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cite", str(STORED)]) == 0
    own = capsys.readouterr().out
    assert re.search(r"^@misc\{ioi-bundled-eap-ig,$", own, flags=re.M) and own.count("{") == own.count("}")
    assert "circuit sha256 " in own and "author = {{mechinterp contributors}}," in own
    assert "circuit file ioi-bundled-eap-ig.circuit.json of the Python package mechinterp-circuits 0.1.0" in own
    assert "@misc{mechinterp-circuits," in own and "version = {0.1.0}," in own
    assert cli.main(["cite", str(PUBLISHED)]) == 0
    assert capsys.readouterr().out.count("@") == 3


def test_cite_takes_author_year_and_address_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / STORED.name
    copy.write_bytes(STORED.read_bytes())
    (tmp_path / "ioi-bundled-eap-ig.scores.safetensors").write_bytes(
        (STORED.parent / "ioi-bundled-eap-ig.scores.safetensors").read_bytes()
    )
    assert cli.main(["cite", str(copy)]) == 0
    found = capsys.readouterr()
    assert "no author, year, url; add: --author ... --year ... --url ..." in found.err
    assert "author" not in found.out.split("@misc{mechinterp")[0] and "package" not in found.out.split("@misc{mech")[0]
    told = ["--author", "A. Lovelace and A. Turing", "--year", "2026", "--url", "https://example.org/x_y"]
    assert cli.main(["cite", str(copy), *told]) == 0
    found = capsys.readouterr()
    first = found.out.split("@misc{mechinterp")[0]
    for line in ("author = {A. Lovelace and A. Turing},", "year = {2026},", r"url = {https://example.org/x\_y},"):
        assert line in first
    assert found.err == ""


def test_validate_a_submission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with one task of one model that MIB has, in which a file is missing: three lines, then the verdict."""
    (tmp_path / "ioi_gpt2").mkdir()
    assert cli.main(["validate", str(tmp_path)]) == 2
    found = capsys.readouterr()
    assert found.out.count("\n") == 3 and "at least 2 tasks" in found.out and "3 problems" in found.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "STORED", "--format", "svg"], "Unknown export format 'svg'"),
        (["export", "nothing.circuit.json", "--format", "csv"], "nothing.circuit.json"),
        (["export", "STORED", "--format", "mib"], "mib"),
        (["import", "STORED", "--format", "eap-ig-json", "--out", "x.circuit.json"], "circuit.json"),
        (["import", "STORED", "--format", "eap-ig-json", "--out", "x.json"], "circuit.json"),
        (["validate", "MODEL"], "not a submission that MIB accepts: 2 problems"),
        (["cite", "nothing"], "nothing"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    monkeypatch.chdir(tmp_path)
    names = {"STORED": str(STORED), "MODEL": str(model)}
    assert cli.main([names.get(word, word) for word in arguments]) == 2
    found = capsys.readouterr()
    assert found.err.count("\n") == 1 and words.lower() in found.err.lower() and "Traceback" not in found.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
