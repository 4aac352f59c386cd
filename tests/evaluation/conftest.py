"""Models that several files of these tests run."""

from __future__ import annotations

import pytest

import mechinterp as mi


@pytest.fixture(scope="session")
def bundled_model() -> mi.HookManager:
    """The bundled model, loaded once; tests leave it as they found it."""
    return mi.load_model("bundled")
