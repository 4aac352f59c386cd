"""What a change of the code's layout must not change: digests of graphs, and the scores of every method.

The stored circuits are the third part: tests/circuit_file/test_stored_circuits.py verifies them.
`python -m tests.test_goldens` writes the recorded values anew; only a change that is meant to change them needs that.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

import mechinterp as mi
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import EVERY, tiny

RECORDED = Path(__file__).parent / "data" / "goldens.json"
KINDS = ("plain", "positions", "neurons", "node level")
SETTINGS: dict[str, dict[str, object]] = {
    "eap-ig-activations": {"steps": 2},
    "edge-pruning": {"learning_steps": 10},
    "subnetwork-probing": {"learning_steps": 10},
    "mattr": {"learning_steps": 5, "runs": 2, "drawings": 4},
    "acdc": {"metric": "kl_to_clean", "tau": 0.5},
}
"""Of methods that would take long with their defaults."""


def digest(shape: str, kind: str) -> str | None:
    """The digest of a tiny model's graph; None where the shape has no such graph."""
    if kind == "neurons" and shape == "attention-only":
        return None
    options: dict[str, dict[str, object]] = {
        "plain": {},
        "positions": {"positions": ("S2", "end"), "answers": "end"},
        "neurons": {"neurons": {0: (0, 3), 2: (5,)}},
        "node level": {"level": "node"},
    }
    return mi.build_graph(tiny(shape), **options[kind]).digest()  # type: ignore[arg-type]


@functools.cache
def bundled() -> tuple[HookManager, Pairs]:
    """The bundled model and 8 prompts of IOI."""
    model = mi.load_model("bundled")
    return model, mi.load_task("ioi").pairs(model, n=8, split="train", seed=0)


def summary(method: str) -> dict[str, object]:
    """Sums over the scores of all edges of the bundled model (8 prompts of IOI), and the strongest ten of them."""
    model, pairs = bundled()
    scores = mi.score_edges(model, mi.build_graph(model), pairs, method=method, **SETTINGS.get(method, {}))
    table = scores.total.double()
    ranked = sorted(scores.to_dict().items(), key=lambda entry: (-round(abs(entry[1]), 5), entry[0]))
    return {
        "sum": float(table.sum()),
        "sum of squares": float(table.square().sum()),
        "strongest": {name: float(value) for name, value in ranked[:10]},
    }


def recorded() -> dict[str, dict[str, object]]:
    """The values that were written down."""
    return json.loads(RECORDED.read_text("utf-8"))


@pytest.mark.parametrize("shape", EVERY)
def test_graphs_have_the_recorded_digests(shape: str) -> None:
    assert {kind: digest(shape, kind) for kind in KINDS} == recorded()["digests"][shape]


@pytest.mark.slow
@pytest.mark.parametrize("method", mi.METHODS.names())
def test_methods_give_the_recorded_scores(method: str) -> None:
    """To what another processor or another number of threads changes: sums of float32 in another order."""
    found, expected = summary(method), recorded()["scores"][method]
    for name in ("sum", "sum of squares"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-3), name  # type: ignore[index]
    assert found["strongest"] == pytest.approx(expected["strongest"], rel=1e-3, abs=1e-4)  # type: ignore[index]


def record() -> None:
    """Writes the values of the code as it is."""
    digests = {shape: {kind: digest(shape, kind) for kind in KINDS} for shape in EVERY}
    scores = {name: summary(name) for name in mi.METHODS.names()}
    RECORDED.write_text(json.dumps({"digests": digests, "scores": scores}, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    record()
