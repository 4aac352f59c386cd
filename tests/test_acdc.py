"""ACDC: the same as one edge after another by plain runs, whatever is tried at once; and what it shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.discovery import checkpoint
from mechinterp.discovery.acdc import acdc_thresholds
from mechinterp.edges import edge_logits
from mechinterp.metrics import get_metric
from mechinterp.patched_run import run_prefix
from mechinterp.replacement import corrupt_replacement
from tests.models_tiny import SHAPES, build, pairs, small_cut, tiny

TWO_LAYERS = {"gpt2": {"n_layer": 2}, "llama": {"num_hidden_layers": 2}}


def by_hand(model: mi.HookManager, some: mi.Pairs, metric: str, tau: float) -> set[str]:
    """The edges that are kept, one at a time, each by a run of its own."""
    graph = mi.build_graph(model)
    sign = get_metric(metric).direction
    cut = torch.zeros_like(graph.possible)
    loss = -sign * float(mi.run_edges(model, graph, some, cut, metric=metric).mean())
    kept: set[str] = set()
    for r, w in reversed(graph.possible.nonzero().tolist()):
        cut[r, w] = True
        then = -sign * float(mi.run_edges(model, graph, some, cut, metric=metric).mean())
        if then - loss >= tau:
            cut[r, w] = False
            kept.add(graph.edge_name(r, w))
        else:
            loss = then
    return kept


def names(scores: mi.Scores) -> set[str]:
    return {name for name, value in scores.to_dict().items() if value != 0}


@pytest.mark.parametrize(("name", "metric", "tau"), [("gpt2", "kl_to_clean", 0.02), ("llama", "logit_diff", 0.05)])
def test_it_keeps_what_one_edge_after_another_keeps(name: str, metric: str, tau: float) -> None:
    some = pairs(3, 5, padded=True)
    model = build(name, **TWO_LAYERS[name])
    expected = by_hand(model, some, metric, tau)
    graph = mi.build_graph(model)
    assert 0 < len(expected) < graph.n_edges
    at_once, batch_size = (8, 3) if name == "gpt2" else (32, 2)
    scores = mi.score_edges(
        model, graph, some, method="acdc", metric=metric, tau=tau, at_once=at_once, batch_size=batch_size
    )
    assert names(scores) == expected
    assert all(value == 0 or value >= tau - 1e-9 for value in scores.to_dict().values())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_a_shared_prefix_changes_no_logit(name: str, layer: int) -> None:
    model, some = tiny(name), pairs(3, padded=True)
    graph = mi.build_graph(model)
    values = corrupt_replacement(model, graph).on(some)
    cut = small_cut(graph)
    first = graph.channel_readers(layer, "q").start if layer < 3 else len(graph.readers) - 1
    cut[:first] = False
    masks = torch.stack([cut, small_cut(graph, seed=1) & cut]).float()
    prefix = run_prefix(model, graph, some, values, layer)
    plain = list(edge_logits(model, graph, some, masks, values))
    shared = list(edge_logits(model, graph, some, masks, values, prefix=prefix))
    for one, other in zip(plain, shared, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_killed_search_goes_on_to_the_same_circuit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY_SECONDS", 0.0)
    model, some = tiny("gpt2"), pairs(3, 5)
    graph = mi.build_graph(model)
    keywords: dict[str, Any] = {"method": "acdc", "metric": "kl_to_clean", "tau": 0.02}
    whole = mi.score_edges(model, graph, some, **keywords)

    class Killed(BaseException): ...

    def kill(done: int, total: int) -> None:
        if done > 100:
            raise Killed

    state = tmp_path / "state"
    with pytest.raises(Killed):
        mi.score_edges(model, graph, some, resume=state, progress=kill, **keywords)
    told: list[int] = []
    again = mi.score_edges(model, graph, some, resume=state, progress=lambda d, t: told.append(d), **keywords)
    assert told[0] > 100 and torch.equal(again.values, whole.values)
    assert dict(again.cost) == dict(whole.cost)


def test_the_circuit_of_the_bundled_model_does_the_task() -> None:
    model = mi.load_model("bundled")
    some = mi.load_task("ioi").pairs(model, n=20, split="train", seed=0)
    graph = mi.build_graph(model)
    scores = mi.score_edges(model, graph, some, method="acdc", tau=0.1)
    circuit = mi.select(graph, scores, threshold=0.0)
    assert circuit.n_edges < graph.n_edges / 3
    assert mi.evaluate(model, circuit, some).faithfulness > 0.7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0}, "tau must be"),
        ({"tau": "x"}, "tau must be"),
        ({"at_once": 0}, "at_once"),
        ({"at_once": 99}, "at_once"),
    ],
)
def test_bad_settings_get_one_clear_line(settings: dict[str, Any], message: str) -> None:
    model = tiny("gpt2")
    with pytest.raises(mi.InputError, match=message):
        mi.score_edges(model, mi.build_graph(model), pairs(3), method="acdc", **settings)


@pytest.mark.parametrize("level", ["edge", "node"])
def test_several_thresholds_at_once_are_each_of_them(level: str) -> None:
    model, some = build("gpt2", n_layer=2), pairs(3, 5)
    graph = mi.build_graph(model, level=level)
    taus = [0.3, 0.005, 0.08]
    together = acdc_thresholds(model, graph, some, taus)
    alone = {tau: mi.score_edges(model, graph, some, method="acdc", metric="kl_to_clean", tau=tau) for tau in taus}
    assert len({frozenset(names(scores)) for scores in alone.values()}) == len(taus)  # they differ
    for tau in taus:
        assert names(together[tau]) == names(alone[tau])
        torch.testing.assert_close(together[tau].values, alone[tau].values, rtol=0, atol=1e-9)
        assert together[tau].parameters == alone[tau].parameters
    assert together[0.3].cost["forwards"] < sum(scores.cost["forwards"] for scores in alone.values())
