"""Running the cells of a notebook in this process, and what each of them shows. No kernel: the import is paid once."""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

FOLDER = Path(__file__).parents[2] / "notebooks"
FIGURE = "Figure "
"""What the text of a figure begins with; its numbers follow as JSON on one line, so that they can be compared."""
SHOWN = ("type", "name", "x", "y", "z", "text")
"""What of a trace is compared: what it draws, not how."""
DIGITS = 4
"""Significant digits of the numbers of a stored figure."""


def notebooks() -> list[Path]:
    """All notebooks, in order."""
    return sorted(FOLDER.glob("*.ipynb"))


def read_cells(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The cells of a notebook, or those of one kind (`code`, `markdown`), with their sources as one text."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if kind in (None, cell["cell_type"])]


def run(path: Path, folder: Path, change: tuple[str, str] = ("", "")) -> tuple[list[list[dict[str, Any]]], dict]:
    """What each code cell shows when all are run in a folder, and the names that they leave.

    Args:
        path: the notebook.
        folder: where it runs, for the files that it writes.
        change: text of its cells, and what stands there instead; `('MODEL = "bundled"', 'MODEL = "gpt2"')`.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    shown: list[list[dict[str, Any]]] = []
    with working_in(folder):
        for number, cell in enumerate(read_cells(path, "code")):
            source = cell["source"].replace(*change) if change[0] else cell["source"]
            shown.append(list(_run_cell(source, f"{path.name}, code cell {number}", names)))
    return shown, names


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """A block in which relative paths are of this folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _run_cell(source: str, name: str, names: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is printed, then the value of the last expression, as a notebook shows them."""
    body = ast.parse(source, name).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    value = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), name, "exec", dont_inherit=True), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), names)
    if printed.getvalue():
        yield {"output_type": "stream", "name": "stdout", "text": printed.getvalue()}
    if value is not None:
        yield {"output_type": "execute_result", "data": _data(value), "execution_count": None, "metadata": {}}


def _data(value: Any) -> dict[str, Any]:
    """The value in the forms in which a notebook keeps it; a figure stays one until its picture is drawn."""
    if isinstance(value, go.Figure):
        return {"figure": value, "text/plain": FIGURE + json.dumps(drawn(value), ensure_ascii=False)}
    table = getattr(value, "_repr_html_", lambda: None)()
    return ({"text/html": table} if table else {}) | {"text/plain": repr(value)}


def drawn(figure: go.Figure) -> list[dict[str, Any]]:
    """What of each trace of a figure is compared, with numbers of a few digits."""
    traces = json.loads(str(figure.to_json()))["data"]
    return [{key: _rounded(trace[key]) for key in SHOWN if key in trace} for trace in traces]


def _rounded(value: Any) -> Any:
    """The same JSON with numbers of a few digits, and arrays that plotly packed as lists."""
    if isinstance(value, dict) and "bdata" in value:
        packed = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
        shape = [int(size) for size in str(value.get("shape", len(packed))).split(",")]
        return _rounded(packed.reshape(shape).tolist())
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{DIGITS}g}")
    return value
