"""Drawing figures as SVG, the same bytes for the same figure, in one Chromium for all of them."""

from __future__ import annotations

import contextlib
import html
import json
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

from plotly.offline import get_plotlyjs

Draw = Callable[[Any, str], str]
"""(figure, its numbers) -> SVG."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRAW = """([figure, size]) => {
  let state = 1;
  Math.random = () => (state = state * 16807 % 2147483647) / 2147483647;  // the names of parts, alike each time
  return Plotly.toImage(figure, size);
}"""
WIDTH = 680
TOP = 16
"""Pixels above a figure that has nothing there."""
LARGEST = 60_000
"""Bytes of a picture."""


@contextlib.contextmanager
def drawing() -> Iterator[Draw]:
    """A block with a function that draws; the SVG keeps the numbers as metadata."""
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"]).new_page()
        page.set_content("<html><body></body></html>")
        page.add_script_tag(content=get_plotlyjs())

        def draw(figure: Any, numbers: str) -> str:
            given = json.loads(_trimmed(figure).to_json())
            size = {"format": "svg", "width": WIDTH, "height": given["layout"]["height"]}
            url = page.evaluate(DRAW, [given, size])
            return _settled(unquote(url.partition(",")[2]), numbers)

        yield draw


def _trimmed(figure: Any) -> Any:
    figure = type(figure)(figure)
    if not figure.layout.title.text and not figure.layout.annotations and not figure.layout.showlegend:
        figure.update_layout(height=figure.layout.height - figure.layout.margin.t + TOP, margin={"t": TOP})
    return figure


def _settled(drawn: str, numbers: str) -> str:
    """The SVG without digits that nobody sees, and with its numbers."""
    drawn = re.sub(r"(?<=[\d-])(\.\d\d)\d+(?![\d%])", r"\1", drawn)
    drawn = f"{drawn.rpartition('</svg>')[0]}<metadata>{html.escape(numbers, quote=False)}</metadata></svg>\n"
    if len(drawn.encode("utf-8")) > LARGEST:
        raise SystemExit(f"A picture has {len(drawn):,} bytes, more than {LARGEST:,}: draw fewer cells.")
    return drawn
