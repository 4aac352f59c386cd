"""Learned masks: the gates' distribution, a planted circuit found, the same result however it is run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.discovery import checkpoint
from mechinterp.discovery.checkpoint import Checkpoint
from mechinterp.discovery.gate_learning import GateLearning
from mechinterp.discovery.mask_learning import BETA, HIGH, LOW, hard_concrete, open_chance
from mechinterp.discovery.method import Job, no_progress
from mechinterp.tasks.metrics import get_metric
from tests.support.hand_circuits import HAND
from tests.support.known_circuits import known
from tests.support.models_tiny import pairs, snapshot, tiny

METHODS = ("edge-pruning", "subnetwork-probing")
METHODS_DEFAULTS = dict(mi.METHODS.get("edge-pruning").defaults)
SHORT: dict[str, Any] = {"learning_steps": 12, "drawings": 2}


def test_gates_are_open_as_often_as_the_formula_says() -> None:
    log_alpha = torch.tensor([-2.0, 0.0, 1.5], dtype=torch.float64)
    noise = torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gates = hard_concrete(log_alpha.expand(len(noise), -1), noise.expand(-1, 3))
    assert float(gates.min()) == 0 and float(gates.max()) == 1
    # four standard deviations of a share of 200,000 drawings
    torch.testing.assert_close((gates > 0).double().mean(0), open_chance(log_alpha), rtol=0, atol=4 * 0.5 / 447)
    by_hand = torch.sigmoid((torch.log(noise / (1 - noise)) + log_alpha) / BETA) * (HIGH - LOW) + LOW
    torch.testing.assert_close(gates, by_hand.clamp(0, 1))
    assert float(open_chance(torch.tensor([BETA * math.log(-LOW / HIGH)]))) == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["kl", "metric"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HAND)
def test_a_planted_circuit_is_found(name: str, method: str, objective: str) -> None:
    this = HAND[name]()
    settings = {"objective": objective, "learning_steps": 100, "examples": 6, "drawings": 2}
    scores = mi.score_edges(this.model, this.graph, this.pairs, method=method, **settings)
    assert set(mi.select(this.graph, scores, threshold=0.5).edges) == this.truth


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_same_however_it_is_run(method: str) -> None:
    model, some = tiny("gpt2"), pairs(5, padded=True)
    graph = mi.build_graph(model)
    before = snapshot(model.bridge)
    runs = [
        mi.score_edges(model, graph, some, method=method, batch_size=size, examples=4, **SHORT) for size in (4, 4, 3)
    ]
    assert snapshot(model.bridge) == before
    assert torch.equal(runs[0].values, runs[1].values)
    torch.testing.assert_close(runs[0].values, runs[2].values, rtol=0, atol=1e-6)
    steps = 2 * (6 * 4 + 6 * 1)  # two drawings, of blocks of 4 and of 1
    assert runs[0].cost == {"forwards": 2 * 5 + steps, "backwards": steps}
    other = mi.score_edges(model, graph, some, method=method, seed=1, examples=4, **SHORT)
    assert not torch.equal(runs[0].values, other.values)


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_to_the_same_mask(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY_SECONDS", 0.0)
    model, some = tiny("gpt2"), pairs(3, 5)
    graph = mi.build_graph(model, level="node")
    whole = mi.score_edges(model, graph, some, method=method, **SHORT)

    def killed(done: int, total: int) -> None:
        if done == 7:
            raise Killed

    state = tmp_path / "state"
    with pytest.raises(Killed):
        mi.score_edges(model, graph, some, method=method, resume=state, progress=killed, **SHORT)
    assert state.exists()
    calls: list[int] = []
    again = mi.score_edges(
        model, graph, some, method=method, resume=state, progress=lambda done, _: calls.append(done), **SHORT
    )
    assert calls[0] == 7 and torch.equal(again.values, whole.values) and again.cost == whole.cost
    assert not state.exists()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_several_drawings_find_what_flat_steps_hide_from_one() -> None:
    """`hist` counts with a sharp attention and an MLP of steep steps: most drawings have no slope there."""
    this = known("hist_small")
    graph = mi.build_graph(this.model, split_input=True)
    found = [
        mi.score_edges(
            this.model,
            graph,
            this.pairs,
            method="subnetwork-probing",
            metric="l2_to_clean",
            objective="metric",
            learning_steps=120,
            examples=examples,
            drawings=32 // examples,
            batch_size=64,
        )
        for examples in (4, 32)
    ]
    assert found[0].cost["backwards"] == found[1].cost["backwards"]
    truth = this.truth("derived_resample")
    several, one = ({name for name, chance in scores.to_dict().items() if chance > 0.5} for scores in found)
    assert several == truth and one < truth


def test_gates_of_several_drawings_have_the_mean_gradient() -> None:
    model, some = tiny("gpt2"), pairs(3)
    graph = mi.build_graph(model, level="node")
    settings = {**METHODS_DEFAULTS, "examples": 3, "drawings": 2}
    job = Job(model, graph, some, get_metric("kl_to_clean"), settings, 32, no_progress, Checkpoint())
    learning = GateLearning(job, {"unused": torch.zeros(1, dtype=torch.float64)})
    gates = torch.rand(2, graph.n_units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = learning._gate_gradient(gates, learning.examples(0))
    for i in range(2):
        alone = learning._gate_gradient(gates[i : i + 1], learning.examples(0))
        torch.testing.assert_close(2 * both[i], alone[0], rtol=0, atol=1e-6)  # float32
    assert not torch.allclose(both[0], both[1])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_price_and_the_target_decide_the_size() -> None:
    model, some = tiny("gpt2"), pairs(4)
    graph = mi.build_graph(model)
    steps = {"learning_steps": 25, "drawings": 1}

    def size(method: str, **settings: Any) -> int:
        return int((mi.score_edges(model, graph, some, method=method, **steps, **settings).values > 0.5).sum())

    assert size("subnetwork-probing", penalty=50.0) < size("subnetwork-probing", penalty=0.5)
    assert size("edge-pruning", target=0.1) < size("edge-pruning", target=0.6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 0.0}, "target"),
        ({"target": "half"}, "target"),
        ({"learning_steps": 0}, "learning_steps"),
        ({"objective": "kll"}, "objective"),
        ({"examples": 1.5}, "examples"),
        ({"drawings": 0}, "drawings"),
        ({"lr": float("nan")}, "lr"),
        ({"objective": "metric", "metric": "accuracy"}, "gradient"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any], message: str) -> None:
    model = tiny("gpt2")
    with pytest.raises(InputError, match=message):
        mi.score_edges(model, mi.build_graph(model), pairs(3), method="edge-pruning", **settings)
