"""What a terminal or a pipe gets: no control codes, no lost letters, whatever it can show."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mechinterp.cli import app as cli
from mechinterp.views.terminal_tables import plain
from tests.support.commands import in_one_process, process, write
from tests.support.toy_circuits import toy_circuit, toy_document


@pytest.mark.slow
def test_output_to_a_pipe_has_no_control_codes(toy: Path) -> None:
    done = in_one_process((0, ["show", str(toy)]), (0, ["list"]), (0, ["--help"]), (2, ["run", "ioy"]))
    text = (done.stdout + done.stderr).replace("\r\n", "\n")
    assert "Usage: discover-circuit" in text and "Unknown task 'ioy'" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_console_that_knows_few_letters_gets_question_marks(encoding: str, tmp_path: Path) -> None:
    record = toy_document(toy_circuit()).model_dump(mode="json", exclude_none=True)
    pairs = {"évaluation ☃": record["pairs"]["evaluation"], **record["pairs"]}
    evaluation = {**record["evaluation"][0], "pairs": "évaluation ☃"}
    path = write(tmp_path / "toy.circuit.json", pairs=pairs, evaluation=[evaluation])
    missing = str(tmp_path / "☃.circuit.json")
    done = in_one_process((0, ["show", str(path)]), (0, ["list"]), (2, ["show", missing]), PYTHONIOENCODING=encoding)
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("columns", ["1", "20", "40", "300"])
def test_a_narrow_terminal_loses_no_letters(columns: str, toy: Path) -> None:
    done = process("show", str(toy), "--top", "1000", COLUMNS=columns, NO_COLOR="1", TERM="dumb")
    assert done.returncode == 0
    if int(columns) >= 40:
        edges = {edge["name"] for edge in json.loads(toy.read_text("utf-8"))["edges"]}
        assert edges <= set(done.stdout.split())


@pytest.mark.slow
def test_a_reader_that_stops_reading_is_no_error(toy: Path) -> None:
    command = [sys.executable, "-m", "mechinterp", "show", str(toy), "--top", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141


def test_texts_of_a_file_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nasty = "[bold red]x[/]\x1b]0;owned\x07\x1b[2J"
    head = next(name for name in toy_circuit().nodes if name.startswith("a"))
    record = toy_document(toy_circuit()).model_dump(mode="json", exclude_none=True)
    metric = {**record["evaluation"][0]["metric"], "name": nasty, "unit": nasty}
    path = write(
        tmp_path / "toy.circuit.json",
        roles={"m": {"label": nasty, "nodes": [head]}},
        evaluation=[{**record["evaluation"][0], "metric": metric}],
    )
    assert cli.main(["show", str(path), "--top", "99"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out
    assert "[bold red]x[/]" in out  # a text, not a colour


def test_plain_makes_one_printable_line() -> None:
    assert plain("a\nb\t c\x1b[1m \u202e d é") == "a b c?[1m ? d é"
