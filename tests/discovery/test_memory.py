"""What a run takes in memory, estimated from one example, against what whole batches take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
import mechinterp.discovery.memory
import mechinterp.engines.edge_patching
import mechinterp.engines.write_table
from mechinterp.base.errors import InputError
from mechinterp.base.peak_memory import PeakMemory
from mechinterp.discovery.memory import auto_batch_size, measure_memory, run_bytes
from mechinterp.discovery.method import raw_scores
from mechinterp.engines.attribution_memory import attribution_bytes, measure_example
from mechinterp.engines.edge_attribution import edge_gradients
from mechinterp.engines.edge_patching import plan_runs, run_edges
from mechinterp.engines.mask_gradients import plan_gradients
from mechinterp.engines.write_table import rows_beside
from tests.support.models_tiny import build, pairs, small_cut

SHAPES = {
    "gpt2": (8, 24, {"n_embd": 64}),  # long prompts: what autograd keeps is most of it
    "llama": (16, 8, {}),  # many short ones
    "gpt2 with many heads": (4, 24, {"n_head": 16, "n_embd": 64}),  # many writers: the contraction is most of it
}


def test_memory_is_counted_from_what_is_made_until_it_is_freed() -> None:
    x = torch.ones(100, dtype=torch.float64)
    with PeakMemory() as used:
        y = x + 1
        z = y * 2
        del y
        view, same = z.view(10, 10), z.add_(1)
    assert (used.now, used.peak) == (800, 1600)
    del z, view, same
    assert used.now == 0


@pytest.mark.parametrize("name", SHAPES)
def test_the_estimate_is_within_a_quarter_of_the_measured_peak(name: str) -> None:
    n, length, sizes = SHAPES[name]
    model, some = build(name.partition(" ")[0], **sizes), pairs(n, length)
    graph = mi.build_graph(model)
    one = measure_example(model, graph, some, "logit_diff")
    for alphas in ((1.0,), (0.5, 1.0)):
        with PeakMemory() as used:
            edge_gradients(model, graph, some, "logit_diff", alphas=alphas)
        assert within_a_quarter(attribution_bytes(model, graph, one, n, len(alphas))["total"], used.peak)


@pytest.mark.slow
def test_so_it_is_for_learned_masks_and_for_runs_with_edges_cut() -> None:
    n, length, sizes = SHAPES["llama"]
    model, some = build("llama", **sizes), pairs(n, length)
    graph = mi.build_graph(model)
    memory = measure_memory(model, graph, some, "logit_diff", "mattr", {"drawings": 2})
    how: dict[str, Any] = {"learning_steps": 1, "runs": 1, "examples": n, "drawings": 2, "warm_start": "none"}
    with PeakMemory() as used:
        raw_scores(model, graph, some, method="mattr", batch_size=n, **how)
    assert within_a_quarter(run_bytes(model, graph, memory, n)["learned masks"], used.peak)
    cuts = torch.stack([small_cut(graph, 0.5, seed) for seed in range(3)])
    with PeakMemory() as used:
        run_edges(model, graph, some, cuts)
    assert within_a_quarter(3 * n * memory.patched, used.peak)


@pytest.mark.parametrize(("name", "n_tokens"), [("llama", 20), ("gpt2", 6)])
def test_so_it_is_where_the_writes_do_not_fit_together(
    name: str, n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, length, sizes = SHAPES[name]  # two examples of 8 tokens are run at a time, or a quarter of one of 24
    model, some = build(name.partition(" ")[0], **sizes), pairs(n, length)
    graph = mi.build_graph(model)
    per_token = (len(graph.writers) + rows_beside(graph)) * model.dims.d_model * 8
    monkeypatch.setattr(mechinterp.engines.write_table, "TABLE_BUDGET_BYTES", n_tokens * per_token)
    assert plan_runs(model, graph, (n, length)).tokens == (None if name == "llama" else n_tokens)
    memory = measure_memory(model, graph, some, "logit_diff", "eap", {})
    monkeypatch.setattr(mechinterp.engines.edge_patching, "WRITES_BUDGET_BYTES", 1)
    monkeypatch.setattr(mechinterp.discovery.memory, "WRITES_BUDGET_BYTES", 1)  # one circuit at a time
    with PeakMemory() as used:
        run_edges(model, graph, some, small_cut(graph, 0.5))
    assert within_a_quarter(run_bytes(model, graph, memory, n)["patched runs"], used.peak)


def test_so_it_is_for_masks_that_are_learned_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = build("gpt2", n_head=16, n_embd=64, n_layer=2), pairs(2, 24)
    graph = mi.build_graph(model)
    in_full = plan_gradients(model, graph, (1, 24)).nbytes
    monkeypatch.setattr(mechinterp.engines.write_table, "TABLE_BUDGET_BYTES", 2**19)
    assert plan_gradients(model, graph, (1, 24)).tokens is not None
    memory = measure_memory(model, graph, some, "logit_diff", "mattr", {"drawings": 2})
    how: dict[str, Any] = {"learning_steps": 1, "runs": 1, "examples": 2, "drawings": 2, "warm_start": "none"}
    with PeakMemory() as used:
        raw_scores(model, graph, some, method="mattr", batch_size=4, **how)
    assert within_a_quarter(run_bytes(model, graph, memory, 4)["learned masks"], used.peak)
    assert used.peak < 2 * 2 * in_full / 4


def test_an_ensemble_takes_what_its_largest_member_takes() -> None:
    model, some = build("gpt2"), pairs(2, 8)
    graph = mi.build_graph(model)
    one = measure_memory(model, graph, some, "logit_diff", "ensemble", {"methods": "eap,eap-ig:steps=7,relp"})
    assert (one.n_points, one.masked, one.drawings) == (7, None, 1)
    learned = measure_memory(model, graph, some, "logit_diff", "ensemble", {"methods": "eap,mattr:drawings=3"})
    assert learned.masked is not None and learned.drawings == 3


def within_a_quarter(estimate: float, measured: float) -> bool:
    return 0.75 * measured <= estimate <= 1.25 * measured


@pytest.mark.slow
def test_auto_is_the_largest_batch_whose_estimate_fits() -> None:
    model, some = build("gpt2"), pairs(9, 8)
    graph = mi.build_graph(model)
    memory = measure_memory(model, graph, some, "logit_diff", "eap-ig", {})
    total = {size: run_bytes(model, graph, memory, size)["total"] for size in (1, 2, 4, 8, 16)}
    assert memory.weights < total[1] < total[2] < total[16]
    # A few per cent beside the edge, since the first run of a model makes more than later ones.
    for budget, expected in ((1.05 * total[4], 4), (0.95 * total[8], 4), (2 * total[16], 16)):
        assert auto_batch_size(model, graph, some, budget=int(budget)) == expected
    with pytest.raises(InputError, match="more than the"):
        auto_batch_size(model, graph, some, budget=int(0.9 * total[1]))
