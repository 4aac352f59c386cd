"""`path-patching` as a method: exact edges, from the logits back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.discovery.cd import between
from tests.support.models_tiny import SHAPES, pairs, tiny


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_its_scores_are_the_exact_ones_of_the_edges_that_it_visits(name: str) -> None:
    model, some = tiny(name), pairs(3, 5, padded=True)
    graph = mi.build_graph(model)
    exact = mi.score_edges(model, graph, some, method="exact").values
    whole, two = (
        mi.score_edges(model, graph, some, method="path-patching", top=top, batch_size=size)
        for top, size in ((100, 3), (2, 2))
    )
    torch.testing.assert_close(whole.values, exact, rtol=0, atol=1e-5)
    kept = two.values != 0
    torch.testing.assert_close(two.values[kept], exact[kept], rtol=0, atol=1e-5)
    nodes = [node for node in mi.select(graph, two, threshold=0.0).nodes if node != "logits"]
    assert len(nodes) < len(graph.writers) and not bool((kept & ~between(graph, nodes)).any())


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_other_meaning_and_the_circuit_of_the_bundled_model() -> None:
    model = mi.load_model("bundled")
    some = mi.load_task("ioi").pairs(model, n=8, split="train", seed=0)
    graph = mi.build_graph(model)
    direct, through = (
        mi.score_edges(model, graph, some, method="path-patching", meaning=meaning, top=8)
        for meaning in ("direct", "mlps-recomputed")
    )
    assert not torch.equal(direct.values, through.values)
    assert mi.evaluate(model, mi.select(graph, direct, threshold=0.0), some).faithfulness > 0.8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": 0}, "top must be"),
        ({"meaning": "both"}, "meaning"),
        ({"replacement": "zero"}, "Unknown replacement 'zero'. Known: corrupt"),
    ],
)
def test_bad_settings_get_one_clear_line(settings: dict[str, Any], message: str) -> None:
    model = tiny("gpt2")
    with pytest.raises(mi.InputError, match=message):
        mi.score_edges(model, mi.build_graph(model), pairs(3), method="path-patching", **settings)
