"""`mattr`: the gates, their gradient, the order it learns, and its resumed and repeated runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.discovery import checkpoint, gate_learning
from mechinterp.discovery.matryoshka import TopKGates, hard_top_k, soft_top_k
from mechinterp.discovery.stable import block_resamples, resampled_scores, stability_at
from tests.support.known_circuits import known
from tests.support.models_tiny import pairs, tiny

SHORT: dict[str, Any] = {"method": "mattr", "learning_steps": 4, "drawings": 2, "runs": 2}
STRENGTH = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.7], dtype=torch.float64)
SIZES = torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64)


def test_the_gates_sum_to_the_size_and_keep_the_order() -> None:
    soft = soft_top_k(STRENGTH, SIZES, 0.5)
    torch.testing.assert_close(soft.sum(1), SIZES)
    assert torch.equal(soft.argsort(1, descending=True), STRENGTH.argsort(descending=True).expand(3, -1))
    torch.testing.assert_close(soft_top_k(STRENGTH, SIZES, 1e-3)[2], torch.tensor([1.0, 0, 1, 1, 1]).double())
    assert hard_top_k(STRENGTH, SIZES).tolist()[0] == [False, False, True, False, False]
    assert hard_top_k(torch.zeros(3), torch.tensor([2.0])).tolist() == [[True, True, False]]  # ties: the first


def test_the_gradient_is_that_of_the_soft_gates() -> None:
    """The hard gates have the same one."""
    strength = STRENGTH.clone().requires_grad_()
    gradcheck = torch.autograd.gradcheck(lambda s: TopKGates.apply(s, SIZES, 0.5, False), strength, atol=1e-6)
    assert gradcheck
    weights = torch.arange(15, dtype=torch.float64).view(3, 5)
    found: list[torch.Tensor] = []
    for hard in (False, True):
        gates = TopKGates.apply(strength, SIZES, 0.5, hard)
        assert isinstance(gates, torch.Tensor)
        found += torch.autograd.grad((gates * weights).sum(), strength)
    assert torch.equal(found[0], found[1])
    assert float(found[0].sum().abs()) < 1e-9  # a shift of all strengths changes nothing


@pytest.mark.slow
def test_it_puts_a_known_circuit_first() -> None:
    one = known("reverse")
    graph = mi.build_graph(one.model, split_input=True)
    truth = one.truth("derived_resample")
    scores = mi.score_edges(one.model, graph, one.pairs[:16], method="mattr", metric="l2_to_clean", runs=1, smallest=1)
    ranked = list(scores.to_frame()["edge"])
    assert set(ranked[: len(truth)]) == truth


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_batches_and_kept_examples_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = tiny(name), pairs(3, 5)
    graph = mi.build_graph(model)
    one = mi.score_edges(model, graph, some, batch_size=1, **SHORT)
    assert one.samples is not None and one.samples.shape == (2, graph.n_edges)
    torch.testing.assert_close(one.samples.mean(0), one.values[graph.possible].double(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(one.samples[0], one.samples[1])
    assert float(one.values[graph.possible].min()) > 0
    monkeypatch.setattr(gate_learning, "KEPT_BYTES", 0)
    other = mi.score_edges(model, graph, some, batch_size=32, **SHORT)
    torch.testing.assert_close(one.values, other.values, rtol=1e-5, atol=1e-6)


def test_nodes_and_positions_are_units() -> None:
    model, some = tiny("gpt2"), pairs(3, 5)
    graph = mi.build_graph(model, level="node")
    scores = mi.score_edges(model, graph, some, warm_start="none", **SHORT)
    first = graph.first_of_unit
    values = scores.values[first[:, 0], first[:, 1]]
    for unit in range(graph.n_units):
        assert set(scores.values[graph.unit == unit].tolist()) == {float(values[unit])}
    assert mi.score_edges(model, graph, some, **{**SHORT, "runs": 1}).samples is None


def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY_SECONDS", 0.0)
    model, some = tiny("gpt2"), pairs(3, 5)
    graph = mi.build_graph(model)
    whole = mi.score_edges(model, graph, some, **SHORT)

    def killed(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mi.score_edges(model, graph, some, resume=tmp_path / "state", progress=killed, **SHORT)
    again = mi.score_edges(model, graph, some, resume=tmp_path / "state", **SHORT)
    assert torch.equal(whole.total, again.total) and dict(whole.cost) == dict(again.cost)


def test_nonsense_is_refused() -> None:
    model, some = tiny("gpt2"), pairs(3)
    for wrong in ({"temperature": 0.0}, {"runs": 0}, {"warm_start": "mattr"}, {"smallest": 0}):
        with pytest.raises(InputError):
            mi.score_edges(model, mi.build_graph(model), some, method="mattr", **wrong)


def test_blocks_are_drawn_whole_and_give_the_scores_of_their_examples() -> None:
    rows = block_resamples(11, 3, seed=0, blocks=5)
    assert rows.shape == (3, 10)
    assert all(set(range(2 * b, 2 * b + 2)) <= set(row) for row in rows.tolist() for b in {r // 2 for r in row})
    model, some = tiny("gpt2"), pairs(6, 5)
    graph = mi.build_graph(model)
    rows = block_resamples(6, 3, seed=1, blocks=3)
    every, samples = resampled_scores(model, graph, some, rows, {"method": "eap"})
    expected = mi.score_edges(model, graph, some, method="eap")
    torch.testing.assert_close(every.values, expected.values, rtol=1e-5, atol=1e-7)
    for chosen, sample in zip(rows, samples, strict=True):
        drawn = mi.score_edges(model, graph, some[chosen], method="eap")
        torch.testing.assert_close(sample, drawn.values[graph.possible].double(), rtol=1e-5, atol=1e-7)
    found = stability_at(every, samples, 20)
    assert found.resamples == 3 and 0 < found.jaccard <= 1 and found.jaccard_by_chance < 0.5
    assert int(found.core().sum()) <= found.circuit.n_edges
    alike = stability_at(every, samples[:1].expand(3, -1), 20)
    assert alike.jaccard == 1 and set(alike.frequency[graph.possible].tolist()) == {0.0, 1.0}
