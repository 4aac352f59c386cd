"""Tables of writes that do not fit: some examples at a time, or windows of tokens, with the whole table's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

import mechinterp as mi
import mechinterp.engines.edge_patching
import mechinterp.engines.write_table
from mechinterp.base.peak_memory import PeakMemory
from mechinterp.discovery.cut_loss import CutLoss
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.mask_gradients import mask_gradients
from mechinterp.engines.replacement import build_replacement
from mechinterp.engines.window_table import MOST_BEHIND, WindowTable
from mechinterp.engines.write_table import TablePlan, plan_table, rows_beside
from mechinterp.graphs.graph import Graph, build_graph
from mechinterp.models.interventions import Intervention
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import ALL_FLOAT64, D_MODEL, N_LAYERS, build, pairs, small_cut, tiny


def near(name: str) -> dict[str, Any]:
    """Float64 rounding; where Hugging Face computes norms in float32, that of values that differ in the last bit."""
    return {"rtol": 0, "atol": 1e-11 if name in ALL_FLOAT64 else 5e-6}


def budget(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(mechinterp.engines.write_table, "TABLE_BUDGET_BYTES", size)


def bytes_of(graph: Graph, n_tokens: int) -> int:
    """As many bytes as the writes of some tokens take in full, in float64."""
    return n_tokens * (len(graph.writers) + rows_beside(graph)) * graph.dims.d_model * 8


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens the windows of all runs had."""
    seen: list[int] = []
    original = WindowTable.sums

    def counted(self: WindowTable, window: Any, *others: Any) -> torch.Tensor:
        seen.append(window.tokens.stop - window.tokens.start)
        return original(self, window, *others)

    monkeypatch.setattr(WindowTable, "sums", counted)
    yield seen


def some(n: int = 3, *, padded: bool = False) -> Pairs:
    """Pairs of 7 tokens (or 7, 6, 5) with two named positions."""
    end = [6 - row if padded else 6 for row in range(n)]
    return pairs(n, 7, padded=padded, positions={"a": [1, 2, 1, 3, 2][:n], "end": end})


@cache
def graph_for(name: str, kind: str) -> Graph:
    model = tiny(name)
    drawn = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=drawn, dtype=torch.float64)

    if kind == "features":  # more than `MOST_BEHIND`, of a transcoder, and of the attention as one writer
        n = MOST_BEHIND + 2
        reader = mi.transcoder("mlp_in.1", "mlp_out.1", draw(D_MODEL, n), draw(n, D_MODEL))
        inside = mi.sae("attn_out.2", draw(D_MODEL, 6), draw(6, D_MODEL))
        return build_graph(model, features={reader: list(range(n)), inside: [1, 4]}, positions=("a", "end"))
    if kind == "cross-layer":
        reads, writes = ([f"{site}.{layer}" for layer in range(N_LAYERS)] for site in ("mlp_in", "mlp_out"))
        W_dec = [0.3 * draw(4, N_LAYERS - layer, D_MODEL) for layer in range(N_LAYERS)]
        bases = mi.cross_layer_transcoder(reads, writes, draw(N_LAYERS, D_MODEL, 4), W_dec)
        return build_graph(model, features={basis: [1, 3] for basis in bases}, positions=("a", "end"))
    options: dict[str, Any] = {
        "positions": {"neurons": {1: [4, 5]}, "positions": ("a", "end")},
        "neurons": {"neurons": {0: [3, 8], 2: [0, 1, 30]}, "split_input": name == "gpt2"},
        "experts": {"experts": True},
    }.get(kind, {})
    return build_graph(model, **options)


CASES = [
    *((name, "whole") for name in ("gpt2", "neox", "llama", "gemma2", "mixtral", "lfm2", "attention-only", "no-norm")),
    *(("gpt2", kind) for kind in ("positions", "neurons", "features", "cross-layer")),
    *(("neox", kind) for kind in ("positions", "features")),
    *(("gemma2", kind) for kind in ("positions", "neurons")),
    ("llama", "positions"),
    ("mixtral", "experts"),
]


def masks_of(graph: Graph) -> torch.Tensor:
    """Few edges, many edges, parts of edges, all edges of some nodes, and the last layers only."""
    few, many = small_cut(graph, 0.05, 1).float(), small_cut(graph, 0.6, 2).float()
    nodes = torch.zeros_like(few)
    nodes[:, [1, len(graph.writers) // 2]] = 1
    late = few.clone()
    late[: len(few) // 2] = 0
    partly = many * torch.rand(many.shape, generator=torch.Generator().manual_seed(3))
    return torch.stack([few, many, partly, nodes * graph.possible, late])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_windows_have_the_numbers_of_the_whole_table(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch, windows: list[int]
) -> None:
    model, graph, ids = tiny(name), graph_for(name, kind), some(padded=True)
    masks = masks_of(graph)
    expected = run_edges(model, graph, ids, masks)
    assert not windows
    budget(monkeypatch, 4 * bytes_of(graph, 1))
    found = run_edges(model, graph, ids, masks)
    # Those of few writers may have more tokens; whole examples are never cut where they fit.
    assert min(windows) < 7 and max(windows) < 21
    torch.testing.assert_close(found, expected, **near(name))
    assert float((expected[0] - expected[1]).abs().max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradients_in_the_mask_are_those_of_the_whole_table(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch, windows: list[int]
) -> None:
    model, graph, ids, metric = tiny(name), graph_for(name, kind), some(padded=True), get_metric("logit_diff")
    values, masks = build_replacement("corrupt", model, graph, ids).on(ids), masks_of(graph)[[0, 2]].double()

    def found() -> tuple[torch.Tensor, torch.Tensor]:
        return mask_gradients(
            model, graph, ids, masks, values, lambda logits: torch.stack([metric(row, ids) for row in logits])
        )

    expected = found()
    assert not windows
    budget(monkeypatch, 3 * 4 * bytes_of(graph, 1))
    losses, gradients = found()
    assert min(windows) < 7 and max(windows) < 21
    torch.testing.assert_close(losses, expected[0], **near(name))
    torch.testing.assert_close(gradients, expected[1], rtol=1e-5, atol=near(name)["atol"])
    assert float(gradients.abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["mean", "mean-positional", "zero"])
def test_so_they_have_for_every_replacement(kind: str, monkeypatch: pytest.MonkeyPatch, windows: list[int]) -> None:
    model, graph, ids = tiny("gpt2"), graph_for("gpt2", "whole"), some()
    values = build_replacement(kind, model, graph, ids)
    expected = run_edges(model, graph, ids, masks_of(graph), replacement=values)
    budget(monkeypatch, 1)
    found = run_edges(model, graph, ids, masks_of(graph), replacement=values)
    assert set(windows) == {1}
    torch.testing.assert_close(found, expected, **near("gpt2"))


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_examples_are_run_some_at_a_time_where_one_fits(
    name: str, monkeypatch: pytest.MonkeyPatch, windows: list[int]
) -> None:
    model, graph, ids = tiny(name), graph_for(name, "positions"), some(5)
    expected = run_edges(model, graph, ids, masks_of(graph))
    budget(monkeypatch, bytes_of(graph, 2 * 7))
    monkeypatch.setattr(mechinterp.engines.edge_patching, "WRITES_BUDGET_BYTES", 1)  # one mask at a time
    torch.testing.assert_close(run_edges(model, graph, ids, masks_of(graph)), expected, **near(name))
    assert not windows


def test_a_shared_prefix_keeps_what_the_writes_are_made_of(monkeypatch: pytest.MonkeyPatch, windows: list[int]) -> None:
    model, graph, ids = tiny("llama"), graph_for("llama", "whole"), some(4)
    first = graph.readers_before[1]
    begun = small_cut(graph, 0.3, 1).float()
    masks = torch.stack([begun, begun, begun])
    for i, mask in enumerate(masks):
        mask[first:] = small_cut(graph, 0.1, 2 + i)[first:].float()

    def loss() -> torch.Tensor:
        return CutLoss.of(model, graph, ids, get_metric("logit_diff"), "corrupt", 4).of_masks(masks, 1)

    expected = loss()
    for n_tokens in (1, 5, 20):
        budget(monkeypatch, bytes_of(graph, n_tokens))
        torch.testing.assert_close(loss(), expected, **near("llama"))
    assert windows


def test_edits_of_the_user_act_on_all_examples_together(monkeypatch: pytest.MonkeyPatch, windows: list[int]) -> None:
    model, graph, ids = build("gpt2"), graph_for("gpt2", "whole"), some(4)
    by_row = torch.linspace(0.5, 1.5, 4, dtype=torch.float64)[:, None, None]
    with model.intervene(Intervention("z.0", lambda value: value * by_row[..., None])):
        expected = run_edges(model, graph, ids, masks_of(graph))
        budget(monkeypatch, bytes_of(graph, 7))
        found = run_edges(model, graph, ids, masks_of(graph))
    assert windows
    torch.testing.assert_close(found, expected, **near("gpt2"))


def test_the_plan_is_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_for("gpt2", "whole")
    n_rows, size = len(graph.writers) + rows_beside(graph), bytes_of(graph, 20)
    budget(monkeypatch, size)
    assert plan_table(graph, n_rows, 2, 10, 8) == TablePlan(2, None, size)
    assert plan_table(graph, n_rows, 3, 10, 8) == TablePlan(2, None, size)
    assert plan_table(graph, n_rows, 3, 10, 8, together=True) == TablePlan(3, 20, size)
    assert plan_table(graph, n_rows, 3, 21, 8) == TablePlan(3, 20, size)


def test_windows_take_a_fraction_of_the_memory_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, taken, model = pairs(2, 24)[:1], list[int](), build("gpt2", n_embd=256, n_head=32)
    graph = build_graph(model)
    cut = small_cut(graph, 0.5)
    for size in (2**31, 2**19):
        budget(monkeypatch, size)
        with PeakMemory() as used:
            run_edges(model, graph, ids, cut)
        taken.append(used.peak)
    assert taken[1] < taken[0] / 4
