"""The examples of a learned mask's steps: every run goes round its own, whether they are kept or made again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.progress import no_progress
from mechinterp.discovery import gate_learning
from mechinterp.discovery.checkpoint import Checkpoint
from mechinterp.discovery.gate_learning import GateLearning
from mechinterp.discovery.method import METHODS, Job
from mechinterp.tasks.metrics import get_metric
from tests.support.models_tiny import pairs, tiny

SHORT: dict[str, Any] = {"learning_steps": 7, "drawings": 2, "examples": 2}


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples each forward of the full model had."""
    own, seen = gate_learning.clean_logits, list[int]()
    monkeypatch.setattr(
        gate_learning, "clean_logits", lambda model, some: (seen.append(len(some)), own(model, some))[1]
    )
    return seen


@pytest.mark.parametrize("replacement", ["corrupt", "mean"])
@pytest.mark.parametrize("method", ["edge-pruning", "mattr"])
def test_examples_that_are_kept_and_made_again_give_the_same(
    method: str, replacement: str, monkeypatch: pytest.MonkeyPatch, forwards: list[int]
) -> None:
    model, some = tiny("gpt2"), pairs(3, 5, padded=True)
    graph = mi.build_graph(model, level="node")
    settings = {**SHORT, "replacement": replacement, **({"runs": 1} if method == "mattr" else {})}
    kept = mi.score_edges(model, graph, some, method=method, **settings)
    assert forwards == [2, 1]  # once per block, whatever the steps
    forwards.clear()
    monkeypatch.setattr(gate_learning, "KEPT_BYTES", 0)
    again = mi.score_edges(model, graph, some, method=method, **settings)
    assert forwards == [2, 1, 2, 1, 2, 1, 2]
    assert torch.equal(kept.values, again.values) and kept.cost == again.cost


def learning(n_runs: int = 1, **settings: Any) -> GateLearning:
    model, some = tiny("gpt2"), pairs(5)
    asked = {**METHODS.get("edge-pruning").defaults, **SHORT, **settings}
    job = Job(model, mi.build_graph(model), some, get_metric("kl_to_clean"), asked, 32, no_progress, Checkpoint())
    runs = [some[[i, i, i]] for i in range(n_runs)]
    return GateLearning(job, {"x": torch.zeros(1, dtype=torch.float64)}, runs=runs if n_runs > 1 else None)


def test_a_run_goes_round_all_its_examples() -> None:
    this = learning()
    blocks = [this.block(step) for step in range(6)]
    assert [block.n for block in blocks] == [2, 2, 1, 2, 2, 1]
    first = torch.cat([chunk.clean for block in blocks[:3] for chunk, _, _ in block.chunks])
    assert sorted(first.tolist()) == sorted(this.job.pairs.clean.tolist())
    assert all(blocks[i] is blocks[i + 3] for i in range(3))
    assert (
        first.tolist()
        != torch.cat([c.clean for s in range(3) for c, _, _ in learning(seed=1).block(s).chunks]).tolist()
    )


def test_runs_take_turns() -> None:
    this = learning(n_runs=2)
    assert this.n_steps == 2 * SHORT["learning_steps"]
    for step in range(6):
        (chunk, _, reference) = this.block(step).chunks[0]
        mine = this.job.pairs.clean[step % 2]
        assert bool((chunk.clean == mine).all())
        assert reference.shape[0] == len(chunk)
    assert [this.block(step).n for step in range(4)] == [2, 2, 1, 1]


def test_a_block_is_run_in_parts_of_the_batch_size() -> None:
    this = learning(examples=5, drawings=8)  # 32 at once: four examples of eight drawings
    assert [len(chunk) for chunk, _, _ in this.block(0).chunks] == [4, 1]
