"""Commands in processes of their own, and the circuit file that they are given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.toy_circuits import toy_circuit, toy_document


def write(path: Path, **changes: Any) -> Path:
    document = toy_document(toy_circuit(), **changes)
    path.write_text(json.dumps(document.model_dump(mode="json", exclude_none=True)), "utf-8")
    return path


def process(*arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "mechinterp", *arguments]
    environ = {**os.environ, "PYTHONUTF8": "0", **environment}
    return subprocess.run(command, capture_output=True, text=True, encoding="latin-1", env=environ, timeout=300)


def in_one_process(*given: tuple[int, list[str]], **environment: str) -> subprocess.CompletedProcess[str]:
    """What several commands print, each of which must end with its exit code."""
    code = f"""
from mechinterp.cli.app import main

for code, words in {given!r}:
    got = main(words)
    assert got == code, (got, words)
"""
    done = process(code=code, **environment)
    assert done.returncode == 0, done.stderr[-500:]
    return done
