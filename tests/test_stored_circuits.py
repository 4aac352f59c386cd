"""Every circuit that ships with the package holds what it claims."""

from pathlib import Path

import pytest

import mechinterp as mi

STORED = sorted((Path(__file__).parents[1] / "circuits").glob("*.circuit.json"))


def test_there_are_stored_circuits() -> None:
    assert {"ioi-bundled-cd.circuit.json", "ioi-bundled-eap-ig.circuit.json"} <= {path.name for path in STORED}


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.name.partition(".")[0])
def test_a_stored_circuit_verifies(path: Path) -> None:
    assert mi.verify(path).ok
