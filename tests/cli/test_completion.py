"""Shell completion: names of circuits, tasks, methods and metrics, soon and without torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def completed(line: str, *, code: str = "") -> str:
    """What bash is told for a line that ends at the cursor."""
    words = line.split(" ")
    environment = {**os.environ, "_DISCOVER_CIRCUIT_COMPLETE": "complete_bash", "COMP_WORDS": line}
    environment["COMP_CWORD"] = str(len(words) - 1)
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "mechinterp"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("discover-circuit show ioi-bundled-m", ["ioi-bundled-mattr"]),
        ("discover-circuit run io", ["ioi", "ioi_distractor"]),
        ("discover-circuit run ioi --method eap-i", ["eap-ig", "eap-ig-activations"]),
        ("discover-circuit compare ioi --methods eap,edge", ["eap,edge-pruning"]),
        ("discover-circuit run ioi --metric accu", ["accuracy"]),
    ],
)
@pytest.mark.slow
def test_names_are_completed(line: str, found: list[str]) -> None:
    assert completed(line).split() == found


def test_completion_imports_no_torch() -> None:
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        "from mechinterp.cli.app import main; main()"
    )
    found = completed("discover-circuit verify ioi-bundled-m", code=code).split()
    assert found == ["ioi-bundled-mattr", "False"]
