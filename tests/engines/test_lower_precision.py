"""bfloat16 weights with float32 sums: bfloat16 has 8 bits, so a sum 256 times as large as a number stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.engines.means import site_means
from mechinterp.models.sites import Site
from tests.support.models_tiny import huggingface, pairs

EPS = 2.0**-8
BATCH = 8


@pytest.fixture(scope="module")
def both() -> tuple[mi.HookManager, mi.HookManager]:
    """A model in bfloat16, and the same numbers in float32."""
    module = huggingface("llama", dtype=torch.bfloat16)
    low = mi.load_model(module)
    return low, mi.load_model(module, dtype="float32")


def scored(method: str, **settings: Any) -> Callable[[mi.HookManager, mi.Pairs], Tensor]:
    return lambda model, some: (
        mi.score_edges(model, mi.build_graph(model), some, method=method, batch_size=BATCH, **settings).values
    )


def all_cut(model: mi.HookManager, some: mi.Pairs) -> Tensor:
    graph = mi.build_graph(model)
    return mi.run_edges(model, graph, some, graph.possible, batch_size=BATCH)


RUNS: dict[str, Callable[[mi.HookManager, mi.Pairs], Tensor]] = {
    "eap": scored("eap"),
    "eap-ig": scored("eap-ig", steps=3),
    "relp": scored("relp"),
    "run_edges": all_cut,
    "activation_patching": lambda model, some: mi.activation_patching(model, some).values,
}


@pytest.mark.parametrize("name", RUNS)
def test_bfloat16_is_within_its_rounding_of_float32(name: str, both: tuple[mi.HookManager, mi.HookManager]) -> None:
    found, expected = (RUNS[name](model, pairs(4, 6)) for model in both)
    assert found.dtype == torch.float32
    off = float((found - expected).abs().max()) / float(expected.abs().max())
    assert 0 < off < 12 * EPS  # 0: it was not computed in bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eap-ig"])
def test_sums_over_examples_lose_no_digits(name: str, both: tuple[mi.HookManager, mi.HookManager]) -> None:
    one = pairs(2, 5)
    few, many = (RUNS[name](both[0], one[[0] * n]) for n in (BATCH, 12 * BATCH))
    assert float((many - few).abs().max()) < 1e-6 * float(few.abs().max())  # float32; bfloat16 would lose 4e-3


def test_means_over_examples_lose_no_digits(both: tuple[mi.HookManager, mi.HookManager]) -> None:
    one, site = pairs(2, 5), Site("resid_post", 1)
    few, many = (site_means(both[0], one[[0] * n], [site], "mean", BATCH)[site] for n in (BATCH, 12 * BATCH))
    assert many.dtype in (torch.float32, torch.float64)
    assert float((many - few).abs().max()) < 1e-6 * float(few.abs().max())
