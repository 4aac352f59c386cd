"""What the engines say of one graph, for tests that compare graphs or engines with each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mechinterp.engines.edge_attribution import activation_path_gradients, edge_gradients
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.mask_gradients import mask_gradients
from mechinterp.engines.replacement import corrupt_replacement
from mechinterp.graphs.graph import Graph
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import small_cut

LOGIT_DIFF = get_metric("logit_diff")


def engine_tables(model: HookManager, graph: Graph, ids: Pairs, cuts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs with these cuts, their slopes in the mask, gradients along the inputs, and along the activations."""
    values = corrupt_replacement(model, graph).on(ids)
    slopes = mask_gradients(model, graph, ids, cuts, values, lambda logits: logits[..., 1].sum(-1))[1]
    return (
        run_edges(model, graph, ids, cuts),
        slopes,
        edge_gradients(model, graph, ids, LOGIT_DIFF, alphas=(0.3, 1.0)),
        activation_path_gradients(model, graph, ids, LOGIT_DIFF, (0.4,)),
    )


def check_slopes(
    model: HookManager, graph: Graph, ids: Pairs, among: Iterable[Tensor], near: dict[str, Any], step: float, rel: float
) -> None:
    """At no cut the slopes in the mask are minus the scores; elsewhere they are finite differences among some edges."""
    values = corrupt_replacement(model, graph).on(ids)
    cut = 0.1 + 0.8 * torch.rand(graph.possible.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masks = torch.stack([cut * graph.possible, torch.zeros_like(cut)])
    found, slopes = mask_gradients(
        model, graph, ids, masks, values, lambda logits: torch.stack([LOGIT_DIFF(row, ids) for row in logits])
    )
    torch.testing.assert_close(found, run_edges(model, graph, ids, masks), **near)
    torch.testing.assert_close(-slopes[1], edge_gradients(model, graph, ids, LOGIT_DIFF), **near)
    for edges in among:
        drawn = torch.randn(cut.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        direction = drawn.clamp(-2, 2) * (edges & graph.possible)
        up, down = (run_edges(model, graph, ids, masks[0] + s * step * direction).sum() for s in (1, -1))
        assert float((slopes[0] * direction).sum()) == pytest.approx(float(up - down) / (2 * step), rel=rel, abs=1e-3)
        assert float((slopes[0] * direction).abs().max()) > 1e-3


def check_batches(model: HookManager, graph: Graph, ids: Pairs, near: dict[str, Any]) -> None:
    """A batch is its examples one by one, without padding."""
    cut = 0.8 * small_cut(graph, 0.5).double()
    whole, total = run_edges(model, graph, ids, cut), edge_gradients(model, graph, ids, LOGIT_DIFF)
    one_by_one, scores = [], torch.zeros_like(total)
    for row in range(len(ids)):
        n = int(ids.lengths[row])
        twice = ids[[row, row]]  # Pairs have at least two rows
        bare = replace(twice, clean=twice.clean[:, :n], corrupt=twice.corrupt[:, :n], mask=None)
        one_by_one.append(run_edges(model, graph, bare, cut)[:1])
        scores = scores + edge_gradients(model, graph, bare, LOGIT_DIFF) / 2
    torch.testing.assert_close(whole, torch.cat(one_by_one), **near)
    torch.testing.assert_close(total, scores, **near)
