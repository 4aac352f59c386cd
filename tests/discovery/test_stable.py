"""Scores and circuits over bootstrap resamples: exactly those of the drawn examples, however they are computed."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.discovery.method import METHODS, Job, Method, raw_scores
from mechinterp.discovery.stable import (
    CircuitStability,
    StableScores,
    block_resamples,
    circuit_stability,
    on_graph,
    resampled_scores,
    stability_at,
    stable_scores,
)
from mechinterp.graphs.select import select
from tests.support.models_tiny import SHAPES, pairs, tiny

EACH_ONCE = torch.arange(4)[None]
DRAWN = torch.tensor([[0, 0, 2, 3], [1, 1, 1, 1], [3, 2, 1, 0]])


def bootstrap(seed: int = 0, **more: Any) -> StableScores:
    model = tiny("gpt2")
    return stable_scores(model, mi.build_graph(model), pairs(4, 5), method="eap", resamples=12, seed=seed, **more)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "eap-ig") for name in SHAPES), *(("gpt2", m) for m in ("exact", "clean-corrupted", "relp"))],
)
def test_each_example_once_gives_the_scores_themselves(name: str, method: str) -> None:
    model, some = tiny(name), pairs(4, 5, padded=True)
    graph = mi.build_graph(model)
    every, samples = resampled_scores(model, graph, some, EACH_ONCE, {"method": method})
    expected = mi.score_edges(model, graph, some, method=method)
    # Sums in another order: float64, but some shapes compute in float32 inside.
    torch.testing.assert_close(every.values, expected.values, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(on_graph(graph, samples[0]), expected.values.double(), rtol=1e-5, atol=1e-7)
    assert dict(every.cost) == dict(expected.cost) and every.count == 4 and every.pairs is some


@pytest.mark.parametrize("how", ["calibrated", "rank"])
@pytest.mark.parametrize("level", ["edge", "node"])
def test_resamples_of_an_ensemble_are_those_of_its_members_combined(how: str, level: str) -> None:
    model, some = tiny("gpt2"), pairs(4, 5)
    graph = mi.build_graph(model, level=level)
    asked: dict[str, Any] = {"method": "ensemble", "methods": "eap,relp", "how": how, "weights": "2,1"}
    every, samples = resampled_scores(model, graph, some, DRAWN, asked)
    whole = mi.score_edges(model, graph, some, **asked)
    torch.testing.assert_close(every.values.double(), whole.values.double(), rtol=1e-6, atol=1e-9)  # sums are float32
    assert dict(every.cost) == dict(whole.cost) and dict(every.parameters) == dict(whole.parameters)
    for sample, rows in zip(samples, DRAWN, strict=True):
        expected = mi.score_edges(model, graph, some[rows], **asked).values.double()
        torch.testing.assert_close(on_graph(graph, sample), expected, rtol=1e-5, atol=1e-7)


def stronger_half(job: Job) -> mi.Scores:
    """EAP's scores, the weaker half of the edges at 0: they do not add up over examples."""
    scores = METHODS.get("eap").run(job)
    limit = scores.total[job.graph.possible].abs().median()
    return replace(scores, total=torch.where(scores.total.abs() > limit, scores.total, 0), additive=False)


@pytest.mark.parametrize(
    "asked", [{"method": "eap"}, {"method": "eap", "replacement": "mean"}, {"method": "stronger-half"}]
)
def test_a_resample_has_the_scores_of_the_drawn_examples(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS._values, "stronger-half", Method("stronger-half", "", "", stronger_half))
    monkeypatch.setitem(METHODS._about, "stronger-half", "")  # type: ignore[index]
    model, some = tiny("gpt2"), pairs(4, 5)
    graph = mi.build_graph(model)
    _, samples = resampled_scores(model, graph, some, DRAWN, asked)
    for rows, sample in zip(DRAWN, samples, strict=True):
        expected = mi.score_edges(model, graph, some[rows], **asked)
        torch.testing.assert_close(on_graph(graph, sample), expected.values, rtol=0, atol=1e-9)
    assert not torch.equal(samples[0], samples[1])


@pytest.mark.parametrize("agreement", [0.6, 0.9, 1.0])
def test_an_edge_stays_when_its_sign_does(agreement: float) -> None:
    stable = bootstrap(agreement=agreement)
    values, kept = stable.every.to_dict(), stable.scores.to_dict()
    for i, (name, value) in enumerate(values.items()):
        same = sum(float(sample) * value > 0 for sample in stable.samples[:, i])
        assert float(stable.frequency[stable.every.graph.edge_index(name)]) == pytest.approx(same / 12)
        assert kept[name] == (value if same / 12 >= agreement else 0)
    n_stable = sum(value != 0 for value in kept.values())
    assert 0 < n_stable < len(values)
    frame = stable.to_frame()
    assert list(frame["edge"]) == list(stable.every.to_frame()["edge"]) and frame["stable"].sum() == n_stable
    assert (frame["stable"] == (frame["frequency"] >= agreement)).all()


def test_they_are_not_taken_for_plain_scores() -> None:
    stable = bootstrap(agreement=0.9)
    assert stable.scores.parameters["bootstrap_agreement"] == 0.9
    with pytest.raises(mi.InputError, match="cannot be added"):
        _ = stable.scores + stable.scores
    assert stable.every.additive and "bootstrap_agreement" not in stable.every.parameters


@pytest.mark.slow
def test_the_batch_size_does_not_matter_and_the_seed_decides() -> None:
    one, other = bootstrap(batch_size=1), bootstrap(batch_size=3)
    assert torch.equal(one.samples, other.samples) and torch.equal(one.scores.total, other.scores.total)
    assert not torch.equal(one.samples, bootstrap(seed=1).samples)


@pytest.mark.parametrize("keywords", [{"edges": 30}, {"edges": "25%", "rule": "greedy", "by": "value"}])
def test_inclusion_counts_the_circuits_of_the_resamples(keywords: dict[str, Any]) -> None:
    stable = bootstrap()
    found = circuit_stability(stable, **keywords)
    graph = stable.every.graph
    sets: list[set[str]] = []
    for sample in stable.samples:
        scores = mi.Scores(graph, on_graph(graph, sample), 1, "eap", "logit_diff", "corrupt")
        sets.append(set(select(graph, scores, **keywords).edges))
    assert found.jaccard == pytest.approx(sum(len(a & b) / len(a | b) for a, b in combinations(sets, 2)) / 66)
    assert 0 < found.jaccard < 1 and found.resamples == 12
    shares = {name: sum(name in one for one in sets) / 12 for name in graph.edge_names()}
    assert all(float(found.frequency[graph.edge_index(n)]) == pytest.approx(shares[n]) for n in shares)
    assert found.circuit.edges == select(graph, stable.every, **keywords).edges
    frame = found.to_frame()
    assert set(frame["edge"]) == {n for n, share in shares.items() if share} | set(found.circuit.edges)
    assert set(frame["edge"][frame["in_circuit"]]) == set(found.circuit.edges)


@pytest.mark.parametrize("positions", [(), ("a", "end")])
def test_where_nodes_are_chosen_nodes_are_counted(positions: tuple[str, ...]) -> None:
    model = tiny("gpt2")
    some = pairs(3, 6, padded=True, positions={"a": [1, 2, 1], "end": [5, 4, 3]})
    graph = mi.build_graph(model, level="node", positions=positions)
    stable = stable_scores(model, graph, some, method="eap", resamples=12)
    found = circuit_stability(stable, edges=14)
    sets: list[set[str]] = []
    for sample in stable.samples:
        scores = mi.Scores(graph, on_graph(graph, sample), 1, "eap", "logit_diff", "corrupt")
        sets.append({*select(graph, scores, nodes=14).nodes} - {"logits"})
    own, n_all = {*found.circuit.nodes} - {"logits"}, graph.n_units
    assert found.jaccard == pytest.approx(sum(len(a & b) / len(a | b) for a, b in combinations(sets, 2)) / 66)
    assert found.jaccard_by_chance == pytest.approx(len(own) / (2 * n_all - len(own))) and found.jaccard < 1
    shares = {name: sum(name in one for one in sets) / 12 for name in graph.unit_names()}
    for r, w in graph.possible.nonzero().tolist():
        assert float(found.frequency[r, w]) == pytest.approx(shares[graph.node_name(w, int(graph.position[r]))])
    assert 0 < found.n_core == sum(shares[name] >= 0.9 for name in own) < len(own)
    assert found.n_often_outside == sum(share >= 0.5 for name, share in shares.items() if name not in own)
    frame = found.to_frame()
    assert list(frame.columns) == ["node", "frequency", "in_circuit"] and set(frame["node"][frame["in_circuit"]]) == own
    assert dict(zip(frame["node"], frame["frequency"], strict=True)) == pytest.approx(
        {name: share for name, share in shares.items() if share or name in own}
    )


def test_the_same_circuit_in_every_resample_has_jaccard_one() -> None:
    stable = bootstrap()
    found: CircuitStability = circuit_stability(stable, edges="100%")
    assert found.jaccard == 1 and float(found.frequency.sum()) == pytest.approx(stable.every.graph.n_edges)


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "blocks", "size"), [(23, 5, 4), (20, 40, 1), (40, 40, 1), (7, 3, 2)])
def test_a_block_is_drawn_whole(n: int, blocks: int, size: int) -> None:
    rows = block_resamples(n, 6, 3, blocks)
    n_blocks = min(n, blocks)
    assert rows.shape == (6, n_blocks * size) and n_blocks * size > n - n_blocks
    parts = rows.unflatten(1, (n_blocks, size))
    assert bool((parts[:, :, 0] % size == 0).all())
    assert bool((parts.diff(dim=2) == 1).all()) and int(parts.max()) < n_blocks * size
    assert len(parts[:, :, 0].unique()) > n_blocks / 2  # drawn from all of them, and differently each time
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(rows, block_resamples(n, 6, 3, blocks)) and not torch.equal(
        rows, block_resamples(n, 6, 4, blocks)
    )


def test_the_scores_of_a_resample_of_blocks_are_those_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the cost of the blocks: each example is scored once, the ones in no block as well."""
    model, some = tiny("gpt2"), pairs(11, 5)
    graph, rows = mi.build_graph(model), block_resamples(11, 5, 0, blocks=4)
    scored: list[int] = []

    def counted(model: Any, graph: Any, pairs: Any, **asked: Any) -> mi.Scores:
        scored.append(len(pairs))
        return raw_scores(model, graph, pairs, **asked)

    monkeypatch.setattr("mechinterp.discovery.score_pieces.raw_scores", counted)
    every, samples = resampled_scores(model, graph, some, rows, {"method": "eap"})
    assert sum(scored) == 11 and len(scored) <= 5  # four blocks of two and the three that are left over
    for drawn, sample in zip(rows, samples, strict=True):
        expected = mi.score_edges(model, graph, some[drawn], method="eap")
        torch.testing.assert_close(on_graph(graph, sample), expected.values, rtol=0, atol=1e-9)
    torch.testing.assert_close(every.values, mi.score_edges(model, graph, some, method="eap").values, rtol=0, atol=1e-9)


# -- stability of any scores -------------------------------------------------------------------------------------------


def test_frequency_core_and_jaccard_of_made_up_samples() -> None:
    """Ten resamples, of which eight choose the circuit's edges, one exchanges an edge, and one chooses nothing."""
    model = tiny("gpt2")
    graph = mi.build_graph(model)
    names = graph.edge_names()
    chosen = ["input->m0", "m0->logits", "input->m1", "m1->logits"]
    other = [*chosen[:2], "input->a0.h0<v>", "a0.h0->logits"]
    without = ["a0.h0->m0", "a0.h1->m0", "a0.h2->m0", "a0.h3->m0"]  # on no path: nothing leads to these heads

    def sample(strongest: list[str]) -> torch.Tensor:
        values = torch.full((graph.n_edges,), 0.1, dtype=torch.float64)
        for rank, name in enumerate(strongest):
            values[names.index(name)] = 5.0 - rank
        return values

    samples = torch.stack([*[sample(chosen)] * 8, sample(other), sample(without)])
    scores = mi.Scores(graph, on_graph(graph, sample(chosen)), 1, "made-up", "logit_diff", "corrupt")
    found = stability_at(scores, samples, 4)
    assert set(found.circuit.edges) == set(chosen) and found.resamples == 10

    def frequency(name: str) -> float:
        return float(found.frequency[graph.edge_index(name)])

    assert [frequency(name) for name in chosen] == pytest.approx([0.9, 0.9, 0.8, 0.8])
    assert [frequency(name) for name in other[2:]] == pytest.approx([0.1, 0.1])
    core = found.core()
    assert {graph.edge_name(*at) for at in core.nonzero().tolist()} == set(chosen[:2])
    assert int(found.core(0.8).sum()) == 4 and found.n_often_outside == 0
    # Of 45 pairs of resamples 28 share all, 8 share 2 of 6 edges, 9 have one that is empty.
    assert found.jaccard == pytest.approx((28 * 1 + 8 * 2 / 6 + 9 * 0) / 45)
    assert found.jaccard_by_chance == pytest.approx(4 / (2 * graph.n_edges - 4))
    outside = stability_at(scores, torch.stack([sample(other)] * 4), 4)
    assert outside.n_often_outside == 2 and outside.jaccard == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"resamples": 1}, "resamples"),
        ({"resamples": True}, "resamples"),
        ({"agreement": 0.5}, "agreement"),
        ({"agreement": 1.5}, "agreement"),
        ({"method": "eapp"}, "Did you mean 'eap'"),
        ({"steps": 3}, "no parameter 'steps'"),
        ({"pairs": pairs(2)[:1]}, "at least 2 pairs"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], words: str) -> None:
    model = tiny("gpt2")
    given = {"pairs": pairs(3, 5), "method": "eap", **arguments}
    with pytest.raises(mi.InputError, match=words):
        stable_scores(model, mi.build_graph(model), **given)
