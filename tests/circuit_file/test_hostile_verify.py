"""Re-sealed files with settings of odd types or sizes, verified with their model: failed claims, no traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mechinterp as mi
from mechinterp.circuit_file.verify.claims import Verification
from mechinterp.models.hook_manager import HookManager
from tests.support.fuzz import Place, place_in
from tests.support.hostile_json import put, sealed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    yield place_in(tmp_path_factory.mktemp("place"))


@pytest.fixture
def whole(place: Place) -> dict[str, Any]:
    return json.loads(json.dumps(place.seeds["all"]))


def verified(place: Place, content: dict[str, Any], folder: Path, *, rescore: bool = True) -> Verification:
    (folder / "all.scores.safetensors").write_bytes(place.sidecar)
    path = folder / "all.circuit.json"
    assert sealed(content, path)
    model: HookManager = place.models["tiny"]
    return mi.verify(path, model=model, rescore=rescore)


def why(found: Verification, claim: str) -> str:
    """Why the claim failed, in one line that is not too long."""
    (said,) = [str(entry) for entry in found.failed if entry.name == claim]
    assert "\n" not in said and len(said) < 700
    return said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bootstrap_seed": "x", "bootstrap_resamples": 2, "bootstrap_agreement": 0.9}, "seed must be a whole number"),
        ({"bootstrap_resamples": "x"}, "resamples must be a whole number"),
        ({"bootstrap_agreement": "x"}, "agreement must be a number"),
        ({"replacement": 3}, "replacement must be a text"),
        ({"replacement": "x" * 9000}, "x..."),
        ({"resume": "/etc/passwd"}, "has no parameter 'resume'"),
        ({"steps": 10**12}, "has no parameter 'steps'"),
    ],
)
def test_odd_settings_of_a_method_are_failed_claims(
    settings: dict[str, Any], words: str, place: Place, whole: dict[str, Any], tmp_path: Path
) -> None:
    whole["discovery"]["parameters"] |= settings
    assert words in why(verified(place, whole, tmp_path), "scores again")


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("eap-ig", {"steps": "x"}, "steps must be a whole number"),
        ("eap-ig", {"steps": 10**12}, "steps must be a whole number, at least 1 and at most 1000"),
        (
            "subnetwork-probing",
            {"learning_steps": 10**12},
            "at most 100000",
        ),
        ("edge-pruning", {"lr": "x"}, "lr must be a number"),
        ("random", {"seed": 10**19 - 1}, "seed must be a number of at most 64 bits"),
        ("acdc", {"at_once": 0.5}, "at_once must be a whole number"),
        ("cd", {"mlps": "x"}, "mlps must be true or false"),
        ("nothing", {}, "Unknown method 'nothing'"),
    ],
)
def test_odd_settings_of_other_methods(
    method: str, settings: dict[str, Any], words: str, place: Place, whole: dict[str, Any], tmp_path: Path
) -> None:
    whole["discovery"] |= {"method": method, "parameters": settings}
    assert words in why(verified(place, whole, tmp_path), "scores again")


@pytest.mark.parametrize("metric", ["accuracy", "nothing", "x" * 900])
def test_odd_metrics_are_failed_claims(metric: str, place: Place, whole: dict[str, Any], tmp_path: Path) -> None:
    """A gradient of accuracy there is none of; its ratio is often not a number."""
    whole["discovery"]["metric"]["name"] = metric
    whole["evaluation"][0]["metric"]["name"] = metric
    whole["curve"]["metric"] = metric
    found = verified(place, whole, tmp_path)
    assert not found.ok and why(found, "scores again")


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("curve", "points"), [{"n_selected": 0, "n_edges": 0, "faithfulness": 0.0}]),
        (("curve", "points"), [{"n_selected": 2**53, "n_edges": 0, "faithfulness": 0.0}]),
        (("curve", "replacement"), "x" * 900),
        (("selection", "parameters"), {"edges": 30, "rule": 3, "by": False, "ratio": "x"}),
        (("selection", "size"), {"target": 2.0, "pairs": "discovery"}),
        (("evaluation", 0, "ablation", "value"), "x" * 900),
        (("evaluation", 0, "seed"), -(2**63)),
        (("predictions", 0, "measure", "query"), "nowhere" * 100),
        (("predictions", 0, "measure", "head"), "a9.h9"),
        (("model", "dtype"), "float64"),
    ],
)
def test_odd_results_are_failed_claims(
    at: tuple[Any, ...], value: Any, place: Place, whole: dict[str, Any], tmp_path: Path
) -> None:
    put(whole, at, value)
    whole["predictions"][0]["controls"] = []
    found = verified(place, whole, tmp_path, rescore=False)
    assert not found.ok
    assert all(len(str(claim)) < 1200 for claim in found.claims)
