"""Every notebook runs from top to bottom, shows the numbers that it stores, and runs on a model with other names."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.other_model import EXTRA_LAYERS, save_other_model
from tools.notebooks.__main__ import LARGEST, REAL
from tools.notebooks.cells import notebooks, read_cells, run
from tools.notebooks.compare import differences

NOTEBOOKS = notebooks()
SETTING = 'MODEL = "bundled"'
A_NAME = r"\ba\d+\.(h|kv)\d+|\bm\d+\b|\b(resid_\w+|[qkvz]|mlp_\w+|pattern|attn_out)\.\d+"
"""A head, an MLP or a site of one layer, written out."""
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
ON_REAL_WEIGHTS = [path for path in NOTEBOOKS if REAL in read_cells(path, "code")[0]["source"]]
"""These are run by `make real`, which fetches the weights and says so where they are not available."""
BUNDLED = [path for path in NOTEBOOKS if path not in ON_REAL_WEIGHTS]


def sources(path: Path, kind: str) -> list[str]:
    """The sources of the cells of one kind (`code`, `markdown`)."""
    return [cell["source"] for cell in read_cells(path, kind)]


@pytest.mark.slow
@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_it_shows_the_numbers_that_it_stores(path: Path, tmp_path: Path) -> None:
    """`make notebooks` stores them. Words and pictures are not compared."""
    shown, _ = run(path, tmp_path)
    assert not differences([cell["outputs"] for cell in read_cells(path, "code")], shown)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_other_model(tmp_path_factory.mktemp("other")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",  # the others take longest
    [BUNDLED[0], pytest.param(BUNDLED[1], marks=pytest.mark.exhaustive)],
    ids=lambda path: path.stem,
)
def test_it_runs_on_another_model(path: Path, other: str, tmp_path: Path) -> None:
    """As for GPT-2: the other sizes of the first cell, and layers and heads that the bundled model does not have."""
    _, left = run(path, tmp_path, (SETTING, f"MODEL = {other!r}"))
    assert left["MODEL"] == other
    if "by_hand" in path.stem:  # the circuit of the bundled model is found again, a layer further up
        a_layer_down = [
            re.sub(r"\d+", lambda n: str(int(n[0]) - EXTRA_LAYERS), head, count=1) for head in left["FOUND"]
        ]
        assert set(a_layer_down) == {"a2.h1", "a2.h3", "a3.h0", "a3.h2", "a1.h0", "a0.h0", "a0.h1", "a0.h3"}


@each
def test_nothing_in_it_is_of_one_model_only(path: Path) -> None:
    """The model is named in one place, and no head, MLP or layer is (but for examples in backticks)."""
    code, named = sources(path, "code"), REAL if path in ON_REAL_WEIGHTS else SETTING
    assert sum(source.count(named) for source in code) == 1 and named in code[0]
    prose = [re.sub(r"`[^`]*`", "", source) for source in sources(path, "markdown")]
    for source in (*code, *prose):
        found = re.search(A_NAME, source)
        assert found is None, f"{found and found[0]} in {path.name}"


@each
def test_it_is_stored_as_make_notebooks_stores_it(path: Path) -> None:
    """Every cell was run in order, figures have a picture, and the names of cells say what they are."""
    cells = read_cells(path)
    names = [cell["id"] for cell in cells]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in names)
    code = read_cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    figures: list[dict[str, Any]] = [
        output["data"]
        for cell in code
        for output in cell["outputs"]
        if "".join(output.get("data", {}).get("text/plain", "")).startswith("Figure [")
    ]
    assert all(base64.b64decode(data["image/png"]).startswith(b"\x89PNG") for data in figures)
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
    assert path.stat().st_size <= LARGEST


def test_there_are_notebooks() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{number:02}" for number in range(1, len(NOTEBOOKS) + 1)]
    assert len(NOTEBOOKS) >= 6
    assert sum("image/png" in path.read_text(encoding="utf-8") for path in NOTEBOOKS) >= 4
