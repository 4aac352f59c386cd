"""The README's Python runs as it stands there, and its commands are those of the Makefile and the CLI."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_block_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), namespace)
    if "circuit" in namespace:
        assert (tmp_path / "ioi.circuit.json").exists()
        stated = re.search(r"# (Evaluation\(.*), \.\.\.$", BLOCKS[number], re.MULTILINE)
        assert stated is not None and repr(namespace["result"]).startswith(stated[1])
        assert namespace["result"].faithfulness > 0.95  # type: ignore[attr-defined]
        verification = namespace["mi"].verify("ioi.circuit.json")  # type: ignore[attr-defined]
        assert verification.ok, str(verification)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("target", re.findall(r"`make ([a-z-]+)`", README))
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}( [a-z-]+)*:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
