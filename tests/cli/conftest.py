"""What the tests of the command line share."""

from pathlib import Path

import pytest

from tests.support.commands import write


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A circuit file that needs no model to be shown."""
    return write(tmp_path / "toy.circuit.json")
