"""Two thousand cases of `tests/fuzz.py`; `make fuzz` runs ten thousand."""

from pathlib import Path

import pytest

from tests.fuzz import fuzz, place_in


@pytest.mark.slow
def test_changed_files_are_answered_with_one_line(tmp_path: Path) -> None:
    found = fuzz(place_in(tmp_path), 2000)
    assert not found, "\n".join(found[:20])
