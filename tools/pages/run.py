"""Running the Python of a page, and what its results and pictures are now beside those that are stored.

In a page, a `text` block that directly follows a `python` block is what that block prints. A picture in `docs/pictures`
is `figure` as the blocks above it leave it, or, on the page of a method, the figure of its row (`docs/method_rows.py`).
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.notebooks.cells import FIGURE, drawn

DOCS = Path(__file__).parents[2] / "docs"
PART = re.compile(
    r"^```(?P<language>[a-z]+)[^\n]*\n(?P<block>.*?)^```$|^!\[(?P<alt>[^\]]*)\]\((?P<link>[^)]+\.svg)\)$", re.M | re.S
)
NUMBERS = re.compile(r"<metadata>(.*?)</metadata>", re.S)


@dataclass(frozen=True)
class Result:
    """A printed result or a picture of a page: what is stored, and what its code gives now."""

    stored: str
    now: str
    place: tuple[int, int]
    """Where the block's text, or the picture's link, stands in the page."""
    picture: Path | None = None
    figure: Any = None


def pages() -> list[Path]:
    """The pages of the documentation."""
    return sorted(DOCS.rglob("*.md"))


def pictures_of(path: Path) -> list[Path]:
    """The SVG files that a page shows."""
    return [_file(path, found["link"]) for found in PART.finditer(path.read_text("utf-8")) if found["link"]]


def run(path: Path) -> list[Result]:
    """The results of a page, in order, after running its Python in the current folder."""
    names: dict[str, Any] = {"__name__": "docs"}
    return list(_results(path, path.read_text(encoding="utf-8"), names))


def _results(path: Path, text: str, names: dict[str, Any]) -> Iterator[Result]:
    printed, end, number = "", -1, 0
    for found in PART.finditer(text):
        if found["language"] == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                code = compile(found["block"], f"{path.name}, block {number}", "exec", dont_inherit=True)
                exec(code, names)
            printed, end, number = out.getvalue(), found.end(), number + 1
        elif found["language"] == "text" and end >= 0 and not text[end : found.start()].strip():
            now = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
            yield Result(found["block"], now, found.span("block"))
        elif found["link"]:
            picture = _file(path, found["link"])
            figure = _of_method(path) or names.get("figure")
            if figure is None:
                raise ValueError(f"{path.name} shows {found['link']}, but no block above it makes `figure`.")
            yield Result(numbers(picture), numbers_of(figure), found.span("link"), picture, figure)


def _file(path: Path, link: str) -> Path:
    return (path.parent / link).resolve()


def _of_method(path: Path) -> Any:
    """The figure of a method's page from the stored rows; None for other pages."""
    sys.path[:0] = [str(DOCS)] * (str(DOCS) not in sys.path)
    import method_rows

    known = {"baselines": "random"}.get(path.stem, path.stem)
    return method_rows.figure(known) if path.parent.name == "methods" and known in method_rows.rows() else None


def numbers_of(figure: Any) -> str:
    """The numbers of a figure as text, as a stored notebook has them."""
    return FIGURE + json.dumps(drawn(figure), ensure_ascii=False)


def numbers(picture: Path) -> str:
    """The numbers that a stored picture was drawn from; nothing if it is missing."""
    found = NUMBERS.search(picture.read_text(encoding="utf-8")) if picture.exists() else None
    return html.unescape(found[1]) if found else ""
