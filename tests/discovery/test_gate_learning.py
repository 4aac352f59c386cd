"""The examples of a learned mask's steps: every run goes round its own, whether they are kept or made again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.checkpoint import Checkpoint
from mechinterp.base.progress import no_progress
from mechinterp.discovery import gate_learning
from mechinterp.discovery.gate_learning import Block, GateLearning
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


def blocks(this: GateLearning, step: int) -> list[Block]:
    return [this.block(place, chunk) for place, chunk in this.examples(step)]


def test_a_run_goes_round_all_its_examples() -> None:
    this = learning()
    every = [blocks(this, step) for step in range(6)]
    assert [sum(len(block.pairs) for block in some) for some in every] == [2, 2, 1, 2, 2, 1]
    first = torch.cat([block.pairs.clean for some in every[:3] for block in some])
    assert sorted(first.tolist()) == sorted(this.job.pairs.clean.tolist())
    assert all(every[i][0] is every[i + 3][0] for i in range(3))
    other = learning(seed=1)
    assert first.tolist() != torch.cat([b.pairs.clean for step in range(3) for b in blocks(other, step)]).tolist()


def test_runs_take_turns() -> None:
    this = learning(n_runs=2)
    assert this.n_steps == 2 * SHORT["learning_steps"]
    for step in range(6):
        block = blocks(this, step)[0]
        chunk, reference = block.pairs, block.reference
        mine = this.job.pairs.clean[step % 2]
        assert bool((chunk.clean == mine).all())
        assert reference.shape[0] == len(chunk)
    assert [sum(len(block.pairs) for block in blocks(this, step)) for step in range(4)] == [2, 2, 1, 1]


def test_a_block_is_run_in_parts_of_the_batch_size() -> None:
    this = learning(examples=5, drawings=8)  # 32 at once: four examples of eight drawings
    assert [len(block.pairs) for block in blocks(this, 0)] == [4, 1]
