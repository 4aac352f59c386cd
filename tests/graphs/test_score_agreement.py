"""How alike two scores are: correlations against scipy, overlaps by hand, and one model in two precisions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scipy.stats
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from tests.support.models_tiny import huggingface, pairs, tiny


def test_the_numbers_are_those_of_scipy() -> None:
    model, p = tiny("gpt2"), pairs(3, 5)
    graph = mi.build_graph(model)
    first = mi.score_edges(model, graph, p, method="eap")
    noise = torch.randn(first.total.shape, generator=torch.Generator().manual_seed(0)).double()
    total = first.total + 2 * first.total.std() * noise * graph.possible
    total[0] = 0  # ties
    second = replace(first, total=total)
    found = mi.score_agreement(first, second)
    a, b = (scores.values[graph.possible].double().numpy() for scores in (first, second))
    assert found.correlation == pytest.approx(scipy.stats.pearsonr(a, b)[0])
    assert found.rank_correlation == pytest.approx(scipy.stats.spearmanr(a, b)[0])
    assert found.largest_difference == pytest.approx(abs(b - a).max() / abs(a).max())
    assert found.sign_changes == pytest.approx(((a > 0) & (b < 0) | (a < 0) & (b > 0)).mean())
    size = int(found.overlap["units"].iloc[-1])
    shared = set(a.argsort()[-size:]) & set(b.argsort()[-size:])
    assert found.overlap["overlap"].iloc[-1] == pytest.approx(len(shared) / size)
    top = found.differences.iloc[0]
    assert (
        first.to_dict()[top["name"]] == pytest.approx(top["first"])
        and top["difference"] == top["second"] - top["first"]
    )
    same = mi.score_agreement(first, first)
    assert same.rank_correlation == pytest.approx(1) and same.largest_difference == 0 and "100%" in repr(same)


@pytest.mark.parametrize("level", ["edge", "node"])
def test_one_model_in_two_precisions(level: str) -> None:
    p = pairs(3, 5)
    models = [mi.load_model(huggingface("gpt2", dtype=dtype)) for dtype in (torch.float64, torch.bfloat16)]
    scores = [mi.score_edges(m, mi.build_graph(m, level=level), p, method="eap") for m in models]  # type: ignore[arg-type]
    found = mi.score_agreement(*scores)
    assert 0.9 < found.correlation < 1 and 1e-6 < found.largest_difference < 0.3
    assert len(found.differences) == scores[0].graph.n_units


def test_what_is_refused() -> None:
    model, p = tiny("gpt2"), pairs(3, 5)
    scores = mi.score_edges(model, mi.build_graph(model), p, method="eap")
    nodes = mi.score_edges(model, mi.build_graph(model, level="node"), p, method="eap")
    with pytest.raises(InputError, match="of two graphs"):
        mi.score_agreement(scores, nodes)
    with pytest.raises(InputError, match="of two metrics"):
        mi.score_agreement(scores, mi.score_edges(model, scores.graph, p, method="eap", metric="prob_diff"))
