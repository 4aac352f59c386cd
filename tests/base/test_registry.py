"""Registries: names without imports, values when they are used, one clear line for everything that is wrong."""

from __future__ import annotations

import pytest

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.base.registry import Entry, Registry
from mechinterp.circuit_file.formats.names import EXPORTS, IMPORTS


def registry() -> Registry[object]:
    return Registry(
        "colour", {"red": Entry("colorsys:ONE_THIRD", "a third"), "absent": Entry("no_such:x", "not there")}
    )


@pytest.mark.parametrize("known", [mi.METHODS, mi.METRICS, EXPORTS, IMPORTS], ids=lambda known: known.kind)
def test_every_entry_of_the_package_is_there_under_its_own_name(known: Registry[object]) -> None:
    assert len(known) >= 5 and tuple(sorted(known)) == known.names()
    for name, about in known.about().items():
        assert getattr(known.get(name), "name", name) == name and about


def test_names_are_listed_and_values_imported_on_use() -> None:
    known = registry()
    assert known.names() == ("absent", "red") and list(known) == ["red", "absent"] and known.about()["red"] == "a third"
    assert known.get("red") == 1 / 3
    with pytest.raises(ImportError):  # of this package, so it is a mistake here and not of a plug-in
        known.get("absent")


def test_names_can_be_added_once() -> None:
    known = registry()
    assert known.register("blue", 2, "a number") == known.get("blue") == 2
    assert "blue" in known and known.about()["blue"] == "a number"
    for name in ("blue", "red"):
        with pytest.raises(InputError, match=f"'{name}' is registered already"):
            known.register(name, 3)
    assert known.get("red") == 1 / 3


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(InputError, match=r"Unknown colour 'rd'. Did you mean 'red'. Known: absent, red."):
        registry().get("rd")
