"""Circuit files by name: found, or answered with the names that may be meant."""

from __future__ import annotations

import pytest

from mechinterp.base.errors import InputError
from mechinterp.circuit_file.named_files import find_file, stored_files


def test_a_stored_name_is_found() -> None:
    assert find_file("ioi-bundled-mattr") == stored_files()["ioi-bundled-mattr"]


@pytest.mark.parametrize(
    ("name", "meant", "other"),
    [
        ("ioi", "'ioi-bundled-mattr'", "ioi_distractor"),  # a task: its circuits, not those of tasks with longer names
        ("gendered", "'gendered_pronoun-bundled-eap-ig'", "ioi"),
        ("ioi-bundled-matr", "Did you mean 'ioi-bundled-mattr'? Known: ", "zorp"),
    ],
)
def test_another_name_is_answered_with_what_may_be_meant(name: str, meant: str, other: str) -> None:
    with pytest.raises(InputError) as error:
        find_file(name)
    assert str(error.value).startswith(f"Unknown circuit '{name}'. Did you mean ")
    assert meant in str(error.value) and other not in str(error.value)
