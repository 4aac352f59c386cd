"""One browser for the tests of a file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER = os.environ.get("CHROMIUM") or FOUND


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One headless Chromium for all tests. Skips where there is none, unless MECHINTERP_BROWSER=required."""
    problem = "no Chromium on the path (set CHROMIUM to one)" if BROWSER is None else ""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        problem = "playwright is not installed"
    if problem:
        assert os.environ.get("MECHINTERP_BROWSER") != "required", problem
        pytest.skip(problem)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()
