"""ACDC: the same as one edge after another by plain runs, whatever is tried at once; and what it shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.discovery import checkpoint
from mechinterp.discovery.acdc import acdc_thresholds
from mechinterp.engines.edge_patching import edge_logits, run_prefix
from mechinterp.engines.replacement import corrupt_replacement
from mechinterp.tasks.metrics import get_metric
from tests.support.models_tiny import SHAPES, build, pairs, small_cut, tiny

TWO_LAYERS = {"gpt2": {"n_layer": 2}, "llama": {"num_hidden_layers": 2}}


def by_hand(
    model: mi.HookManager, some: mi.Pairs, metric: str, tau: float, order: list[list[int]] | None = None
) -> set[str]:
    """The edges that are kept, one at a time, each by a run of its own; by default the last edge first."""
    graph = mi.build_graph(model)
    sign = get_metric(metric).direction
    cut = torch.zeros_like(graph.possible)
    loss = -sign * float(mi.run_edges(model, graph, some, cut, metric=metric).mean())
    kept: set[str] = set()
    for r, w in order or list(reversed(graph.possible.nonzero().tolist())):
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


@pytest.mark.slow
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


def order_by_hand(model: mi.HookManager, some: mi.Pairs, order: str, metric: str) -> list[list[int]]:
    """The edges as (reader, writer) in one of the other orders."""
    graph = mi.build_graph(model)
    edges = graph.possible.nonzero().tolist()
    if order == "random":
        generator = torch.Generator().manual_seed(7)
        return [edges[i] for i in torch.randperm(len(edges), generator=generator).tolist()]
    values = mi.score_edges(model, graph, some, method="eap-ig", metric=metric).values.abs()
    strongest = float(values.max())
    return sorted(reversed(edges), key=lambda e: round(float(values[e[0], e[1]]) / strongest * 1e4))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["score", "random"])
def test_another_order_is_one_edge_after_another_too(order: str) -> None:
    model, some = build("gpt2", n_layer=1), pairs(3, 5)
    graph = mi.build_graph(model)
    tried = order_by_hand(model, some, order, "kl_to_clean")
    expected = by_hand(model, some, "kl_to_clean", 0.08, tried)
    found = [
        names(
            mi.score_edges(
                model, graph, some, method="acdc", metric="kl_to_clean", tau=0.08, order=order, order_seed=7, at_once=k
            )
        )
        for k in (1, 16)
    ]
    assert found[0] == found[1] == expected
    default = mi.score_edges(model, graph, some, method="acdc", metric="kl_to_clean", tau=0.08)
    assert expected != names(default)  # the order decides


@pytest.mark.slow
def test_orders_are_compared() -> None:
    model, some = build("gpt2", n_layer=1), pairs(3, 5)
    graph = mi.build_graph(model)
    told: list[tuple[int, int]] = []
    found = mi.acdc_orders(model, graph, some, tau=0.02, seeds=2, progress=lambda *done: told.append(done))
    assert list(found.scores) == ["reverse", "score", "random 0", "random 1"]
    assert told == [(i, 4) for i in range(5)]
    for name, (order, seed) in {"score": ("score", 0), "random 1": ("random", 1)}.items():
        assert found.scores[name].parameters["order"] == order
        assert found.scores[name].parameters["order_seed"] == seed
        assert found.kept[name] == names(found.scores[name])
    kept = list(found.kept.values())
    assert found.core == kept[0] & kept[1] & kept[2] & kept[3] < found.union
    shares = [len(a & b) / len(a | b) for i, a in enumerate(kept) for b in kept[:i]]
    assert found.mean_jaccard == pytest.approx(sum(shares) / 6) and found.mean_jaccard < 1
    table = found.to_frame().set_index("order")
    assert table["kept"].tolist() == [len(one) for one in kept] and set(table["core"]) == {len(found.core)}
    assert table.loc["score", "jaccard to score"] == 1
    assert set(found.frequency().query("`share of orders` == 1")["kept"]) == found.core


@pytest.mark.slow
def test_orders_of_nodes_are_compared_by_node() -> None:
    model, some = build("gpt2", n_layer=1), pairs(3, 5)
    graph = mi.build_graph(model, level="node")
    found = mi.acdc_orders(model, graph, some, tau=0.02, seeds=1)
    assert found.union and found.union <= set(graph.unit_names())


@pytest.mark.slow
@pytest.mark.parametrize("order", ["reverse", "random", "score"])
def test_a_killed_search_goes_on_to_the_same_circuit(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "EVERY_SECONDS", 0.0)
    model, some = build("gpt2", n_layer=2), pairs(3, 5)
    graph = mi.build_graph(model)
    keywords: dict[str, Any] = {"method": "acdc", "metric": "kl_to_clean", "tau": 0.02, "order": order}
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


def test_a_search_in_another_order_is_another_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY_SECONDS", 0.0)
    model, some = tiny("gpt2"), pairs(3)
    graph = mi.build_graph(model, level="node")

    def kill(done: int, total: int) -> None:
        if done > 3:
            raise KeyboardInterrupt

    keywords: dict[str, Any] = {"method": "acdc", "tau": 0.02, "order": "random", "resume": tmp_path / "state"}
    with pytest.raises(KeyboardInterrupt):
        mi.score_edges(model, graph, some, progress=kill, **keywords)
    with pytest.raises(mi.InputError, match="another run"):
        mi.score_edges(model, graph, some, order_seed=1, **keywords)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_circuit_of_the_bundled_model_does_the_task() -> None:
    model = mi.load_model("bundled")
    some = mi.load_task("ioi").pairs(model, n=8, split="train", seed=0)
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
        ({"order": "scores"}, "Did you mean 'score'"),
        ({"order_seed": -1}, "order_seed"),
        ({"order": "score", "metric": "accuracy"}, "order='reverse'"),
    ],
)
def test_bad_settings_get_one_clear_line(settings: dict[str, Any], message: str) -> None:
    model = tiny("gpt2")
    with pytest.raises(mi.InputError, match=message):
        mi.score_edges(model, mi.build_graph(model), pairs(3), method="acdc", **settings)


@pytest.mark.slow
@pytest.mark.parametrize(("level", "order"), [("edge", "reverse"), ("node", "reverse"), ("node", "random")])
def test_several_thresholds_at_once_are_each_of_them(level: str, order: str) -> None:
    model, some = build("gpt2", n_layer=2), pairs(3, 5)
    graph = mi.build_graph(model, level=level)
    taus = [0.3, 0.005, 0.08]
    together = acdc_thresholds(model, graph, some, taus, order=order)
    alone = {
        tau: mi.score_edges(model, graph, some, method="acdc", metric="kl_to_clean", tau=tau, order=order)
        for tau in taus
    }
    assert len({frozenset(names(scores)) for scores in alone.values()}) == len(taus)  # they differ
    for tau in taus:
        assert names(together[tau]) == names(alone[tau])
        torch.testing.assert_close(together[tau].values, alone[tau].values, rtol=0, atol=1e-9)
        assert together[tau].parameters == alone[tau].parameters
    assert together[0.3].cost["forwards"] < sum(scores.cost["forwards"] for scores in alone.values())
