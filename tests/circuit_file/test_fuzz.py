"""Three hundred cases of `tests/support/fuzz.py`, by `make test-all`; `make fuzz` runs ten thousand."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.exhaustive
def test_changed_files_are_answered_with_one_line() -> None:
    """In a process of its own, where nothing checks shapes and types: the limits are those of the real commands."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.support.fuzz", "300"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, encoding="utf-8", timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "300 cases, 0 problems" in done.stdout
