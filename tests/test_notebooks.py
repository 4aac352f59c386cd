"""Every notebook runs from top to bottom, on the bundled model and on one with other names, and holds no output."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.other_model import EXTRA_LAYERS, save_other_model

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SETTING = 'MODEL = "bundled"'
A_NAME = r"\ba\d+\.(h|kv)\d+|\bm\d+\b|\b(resid_\w+|[qkvz]|mlp_\w+|pattern|attn_out)\.\d+"
"""A head, an MLP or a site of one layer, written out."""
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[str]:
    """The sources of the cells of one kind (`code`, `markdown`)."""
    content = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in content if cell["cell_type"] == kind]


def ran(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, model: str = "bundled") -> dict[str, Any]:
    """What the notebook's cells leave behind when they are run in a folder, on a model instead of the bundled one."""
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {}
    for number, source in enumerate(cells(path, "code")):
        source = source.replace(SETTING, f"MODEL = {model!r}")
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), namespace)
    assert namespace["MODEL"] == model
    return namespace


@pytest.mark.slow
@each
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(path, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_other_model(tmp_path_factory.mktemp("other")))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS[:2], ids=lambda path: path.stem)  # the others take longest
def test_it_runs_on_another_model(path: Path, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for GPT-2: the other sizes of the first cell, and layers and heads that the bundled model does not have."""
    left = ran(path, tmp_path, monkeypatch, other)
    if "by_hand" in path.stem:  # the circuit of the bundled model is found again, a layer further up
        a_layer_down = [
            re.sub(r"\d+", lambda n: str(int(n[0]) - EXTRA_LAYERS), head, count=1) for head in left["FOUND"]
        ]
        assert set(a_layer_down) == {"a2.h1", "a2.h3", "a3.h0", "a3.h2", "a1.h0", "a0.h0", "a0.h1", "a0.h3"}


@each
def test_nothing_in_it_is_of_one_model_only(path: Path) -> None:
    """The model is named in one place, and no head, MLP or layer is (but for examples in backticks)."""
    code = cells(path, "code")
    assert sum(source.count(SETTING) for source in code) == 1 and SETTING in code[0]
    prose = [re.sub(r"`[^`]*`", "", source) for source in cells(path, "markdown")]
    for source in (*code, *prose):
        found = re.search(A_NAME, source)
        assert found is None, f"{found and found[0]} in {path.name}"


@each
def test_it_can_be_compared(path: Path) -> None:
    """No output, no counts, and names of cells that say what they are, so that a diff shows what was changed."""
    content = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names = [cell["id"] for cell in content]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in names)
    for cell in content:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_there_are_notebooks() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]
