"""The hypothesis tests: their statistics, their level under the null, and their outcomes for known circuits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binom, binomtest

import mechinterp as mi
from mechinterp.evaluation.against_random import RandomPaths, minimality_test, necessity_test, sufficiency_test
from mechinterp.evaluation.hypotheses import (
    HypothesisTest,
    equivalence_test,
    hsic_test,
    independence_test,
    sign_p_value,
)
from mechinterp.graphs.circuit import Circuit, on_paths
from tests.support.known_circuits import NAMES, known
from tests.support.models_tiny import SHAPES, pairs, small_cut, tiny


def circuit_of(name: str, share: float = 0.6) -> Circuit:
    graph = mi.build_graph(tiny(name))
    kept = on_paths(graph, small_cut(graph, share, seed=1))
    return Circuit(graph, kept, int(kept.sum()))


def whole(graph: mi.Graph) -> Circuit:
    return Circuit(graph, graph.possible, graph.n_edges)


Bundled = tuple[mi.HookManager, mi.Pairs, Circuit, Circuit]


@pytest.fixture(scope="module")
def bundled(bundled_model: mi.HookManager) -> Bundled:
    """The bundled model, some pairs, its stored circuit, and a tiny random one."""
    stored = mi.load_circuit(Path(__file__).parents[2] / "circuits" / "ioi-bundled-eap-ig.circuit.json")
    kept = RandomPaths(stored.graph, 3).circuit(8)
    some = mi.load_task("ioi").pairs(bundled_model, n=20, split="test", seed=0)
    return bundled_model, some, stored, Circuit(stored.graph, kept, int(kept.sum()))


@pytest.mark.parametrize("n", [1, 7, 12])
def test_the_sign_test_is_the_binomial_one(n: int) -> None:
    for wins in range(n + 1):
        assert sign_p_value(n, wins, 0, 0.0) == pytest.approx(binomtest(wins, n, 0.5).pvalue)
        for ties in range(n - wins + 1):
            off = abs((wins + ties / 2) / n - 0.5) - 1e-12
            exact = {p: sum(binom.pmf(k, n, p) for k in range(n + 1) if abs(k / n - 0.5) >= off) for p in (0.6, 0.55)}
            assert sign_p_value(n, wins, ties, 0.1) == pytest.approx(exact[0.6])
            assert exact[0.55] <= exact[0.6] + 1e-12  # the end of the null is its worst case


@pytest.mark.parametrize(("name", "metric"), [*((name, "logit_diff") for name in SHAPES), ("gpt2", "accuracy")])
def test_the_whole_graph_is_equivalent_to_the_model(name: str, metric: str) -> None:
    model, some = tiny(name), pairs(6, padded=True)
    found = equivalence_test(model, whole(mi.build_graph(model)), some, metric=metric, batch_size=4)
    assert (found.statistic, found.p_value, found.details["ties"]) == (0, 1, 6) and not found.rejected
    assert "no proof of it" in found.verdict


def test_equivalence_counts_on_how_many_examples_the_circuit_does_better() -> None:
    model, circuit, some = tiny("gpt2"), circuit_of("gpt2"), pairs(9, padded=True)
    cuts = torch.stack([torch.zeros_like(circuit.cut), circuit.cut])
    full, ours = mi.run_edges(model, circuit.graph, some, cuts)
    wins = int((ours > full).sum())
    found = equivalence_test(model, circuit, some, epsilon=0.2)
    assert found.details == {"epsilon": 0.2, "circuit_better": wins, "ties": 0, "model_better": 9 - wins}
    assert found.statistic == pytest.approx(abs(wins / 9 - 0.5))
    assert found.p_value == pytest.approx(sign_p_value(9, wins, 0, 0.2))
    assert found.to_frame().p_value[0] == found.p_value and found.to_frame().attrs["ablation"]["set"] == "complement"


def test_hsic_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 12, generator=generator, dtype=torch.float64)

    def kernel(v: torch.Tensor) -> torch.Tensor:
        apart = torch.tensor([abs(float(a - b)) for i, a in enumerate(v) for b in v[i + 1 :]], dtype=torch.float64)
        return torch.tensor([[torch.exp(-((a - b) ** 2) / (2 * apart.median() ** 2)) for b in v] for a in v]).double()

    h = torch.eye(12, dtype=torch.float64) - 1 / 12
    expected = torch.trace(kernel(x) @ h @ kernel(y) @ h) / 11**2
    assert hsic_test(x, y, 10)[0] == pytest.approx(float(expected), rel=1e-6)
    assert hsic_test(y * 3 + 5, x, 10)[0] == pytest.approx(float(expected), rel=1e-6)  # neither units nor order matter
    assert hsic_test(x, torch.ones(12), 10) == (0.0, 1.0)


def test_permutation_p_values_are_uniform_under_the_null_and_small_for_any_dependence() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [hsic_test(*torch.randn(2, 16, generator=generator), 19, seed=i)[1] for i in range(200)]
    for level in (0.1, 0.25, 0.5, 0.75):
        below = sum(p <= level + 1e-9 for p in drawn)
        # p takes the values 1/20, ..., 1 with equal probability; 4 standard errors.
        assert below == pytest.approx(200 * level, abs=4 * (200 * level * (1 - level)) ** 0.5)
    x = torch.linspace(-1, 1, 30)
    assert hsic_test(x**2, x, 199)[1] == 1 / 200  # uncorrelated, yet dependent
    assert hsic_test(x**2, x, 50, seed=1) == hsic_test(x**2, x, 50, seed=1)


def test_a_metric_of_two_values_has_a_bandwidth_too() -> None:
    values = torch.tensor([1.0] * 15 + [0.0] * 5)  # most are equal: the median distance is 0
    assert hsic_test(values, values, 199)[1] == 1 / 200


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_independence_is_between_the_model_and_the_model_without_the_circuit(name: str) -> None:
    model, circuit, some = tiny(name), circuit_of(name), pairs(8, padded=True)
    cuts = torch.stack([torch.zeros_like(circuit.kept), circuit.kept, circuit.graph.possible])
    full, without, corrupt = mi.run_edges(model, circuit.graph, some, cuts).double()
    found = independence_test(model, circuit, some, n_permutations=60, seed=2, batch_size=3)
    statistic, p_value = hsic_test(without, full, 60, 2)
    assert found.statistic == pytest.approx(statistic, rel=1e-4) and found.p_value == pytest.approx(p_value)
    assert found.details["p_value_all_cut"] == pytest.approx(hsic_test(corrupt, full, 60, 2)[1])
    assert found.ablation.set == "circuit"


@pytest.mark.parametrize(
    ("name", "split"),
    # Plain, with split input (only GPT-2), with parallel blocks, with shared K and V.
    [("gpt2", False), ("gpt2", True), ("neox", False), ("llama", False)],
)
def test_random_circuits_lie_on_paths_and_have_the_size(name: str, split: bool) -> None:
    graph = mi.build_graph(tiny(name), split_input=split)
    longest = 2 * tiny(name).dims.n_layers + 1
    for n in (1, 20, graph.n_edges - 1, graph.n_edges):
        mask = RandomPaths(graph, 5).circuit(n)
        assert torch.equal(on_paths(graph, mask), mask) and not bool((mask & ~graph.possible).any())
        assert n <= int(mask.sum()) < n + longest
        assert torch.equal(mask, RandomPaths(graph, 5).circuit(n))
    paths, kept = RandomPaths(graph, 6), RandomPaths(graph, 5).circuit(20)
    for _ in range(10):
        inflated, edge = paths.added_path(kept)
        assert torch.equal(on_paths(graph, inflated), inflated) and bool(inflated[edge]) and not bool(kept[edge])
        assert bool((inflated | ~kept).all()) and int(inflated.sum() - kept.sum()) <= longest
    some = small_cut(graph, 0.4)
    inside = RandomPaths(graph, 8, within=some).circuit(5)
    assert not bool((inside & ~some).any()) and torch.equal(on_paths(graph, inside), inside)
    first = [graph.edge_name(*edge) for edge in paths.through((len(graph.readers) - 1, 0))]
    assert first == [f"{graph.writers[0]}->logits"]


def test_every_edge_is_drawn_for_a_random_circuit_of_one_path() -> None:
    graph = mi.build_graph(tiny("gpt2"))
    paths = RandomPaths(graph, 0)
    counts = sum(paths.circuit(1).long() for _ in range(2000))
    assert bool((counts[graph.possible] > 0).all())  # each edge starts one path in n_edges draws


def effects(name: str, circuit: Circuit, some: mi.Pairs, cuts: list[torch.Tensor], whole_first: bool) -> list[float]:
    """The mean squared changes of the metric by each mask, from the whole model or from the circuit."""
    first = torch.zeros_like(circuit.cut) if whole_first else circuit.cut
    before, *after = mi.run_edges(tiny(name), circuit.graph, some, torch.stack([first, *cuts])).double()
    return [float(((one - before) ** 2).mean()) for one in after]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_the_tests_against_random_circuits_count_as_they_say(name: str) -> None:
    model, circuit, some = tiny(name), circuit_of(name, 0.4), pairs(4, padded=True)
    paths = RandomPaths(circuit.graph, 7)
    drawn = [paths.circuit(circuit.n_edges) for _ in range(12)]
    ours, *others = effects(name, circuit, some, [circuit.cut, *[circuit.graph.possible & ~d for d in drawn]], True)
    wins = sum(ours <= other for other in others)
    found = sufficiency_test(model, circuit, some, n_random=12, quantile=0.7, seed=7, batch_size=3)
    assert found.statistic == wins / 12 and found.details["effect"] == pytest.approx(ours, rel=1e-4)
    assert found.p_value == pytest.approx(binom.sf(wins - 1, 12, 0.7))
    ours, *others = effects(name, circuit, some, [circuit.kept, *drawn], True)
    wins = sum(ours > other for other in others)
    found = necessity_test(model, circuit, some, n_random=12, quantile=0.7, seed=7, batch_size=2)
    assert found.statistic == wins / 12 and found.p_value == pytest.approx(binom.sf(wins - 1, 12, 0.7))


@pytest.mark.slow
def test_minimality_compares_each_edge_with_added_ones() -> None:
    model, circuit, some = tiny("gpt2"), circuit_of("gpt2", 0.2), pairs(3)
    found = minimality_test(model, circuit, some, n_random=6, seed=4, batch_size=2)
    names = {edge.edge for edge in found.edges}
    assert names == set(circuit.edges) and len(found.random_effects) == 6
    for edge in found.edges[:3]:
        cut = circuit.cut.clone()
        cut[circuit.graph.edge_index(edge.edge)] = True
        assert edge.effect == pytest.approx(effects("gpt2", circuit, some, [cut], False)[0], rel=1e-4, abs=1e-9)
        assert edge.n_larger == sum(edge.effect > other for other in found.random_effects)
        assert edge.p_value == pytest.approx(binom.cdf(edge.n_larger, 6, 0.9))
        assert edge.corrected == min(1, edge.p_value * circuit.n_edges)
    paths, expected = RandomPaths(circuit.graph, 4), []
    for _ in range(6):
        inflated, one = paths.added_path(circuit.kept)
        cuts = torch.stack([circuit.graph.possible & ~inflated] * 2)
        cuts[1][one] = True
        before, after = mi.run_edges(model, circuit.graph, some, cuts).double()
        expected.append(float(((before - after) ** 2).mean()))
    assert list(found.random_effects) == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert found.test.p_value == min(edge.corrected for edge in found.edges)
    frame = found.to_frame()
    assert frame.rejected.sum() == found.test.details["n_rejected"] and len(frame) == circuit.n_edges


@pytest.mark.parametrize("name", NAMES)
def test_a_true_circuit_passes_them_all_and_a_padded_one_is_not_minimal(name: str) -> None:
    this = known(name)
    graph, some = mi.build_graph(this.model, split_input=True), this.pairs[:6]
    kept = graph.mask_of(sorted(this.truth("derived_resample")))
    settings: dict[str, Any] = {"metric": "l2_to_clean", "n_random": 40}
    truth = Circuit(graph, kept, int(kept.sum()))
    minimal = minimality_test(this.model, truth, some, **settings)
    assert minimal.test.statistic == 1 and not minimal.test.rejected
    assert sufficiency_test(this.model, truth, some, **settings).rejected
    outside = necessity_test(this.model, truth, some, drawn_from="complement", random_edges=2, **settings)
    assert outside.statistic == 1 and outside.rejected and "evidence for it" in outside.verdict
    padded = kept | RandomPaths(graph, 1).circuit(6)
    found = minimality_test(this.model, Circuit(graph, padded, int(padded.sum())), some, **settings)
    superfluous = {edge.edge for edge in found.edges if edge.corrected <= 0.05}
    assert superfluous == {graph.edge_name(*at) for at in (padded & ~kept).nonzero().tolist()} and found.test.rejected


@pytest.mark.slow
def test_a_discovered_circuit_passes_and_a_tiny_random_one_fails(bundled: Bundled) -> None:
    model, some, stored, tiny_one = bundled
    assert equivalence_test(model, tiny_one, some).rejected
    ours, random = (sufficiency_test(model, circuit, some[:8], n_random=30) for circuit in (stored, tiny_one))
    assert ours.rejected and not random.rejected


@pytest.mark.slow
def test_seed_and_batch_size() -> None:
    model, circuit, some = tiny("gpt2"), circuit_of("gpt2", 0.15), pairs(4, padded=True)
    calls: list[Any] = [
        lambda **k: independence_test(model, circuit, some, n_permutations=20, **k),
        lambda **k: sufficiency_test(model, circuit, some, n_random=3, **k),
        lambda **k: necessity_test(model, circuit, some, n_random=3, **k),
        lambda **k: minimality_test(model, circuit, some, n_random=3, **k).test,
    ]

    def outcome(found: HypothesisTest) -> list[Any]:
        return [found.p_value, pytest.approx(found.statistic, rel=1e-4), found.null]

    for call in calls:
        first = call(seed=1, batch_size=3)
        assert outcome(first) == outcome(call(seed=1, batch_size=4))
        assert first.details != call(seed=2).details


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c, p: equivalence_test(m, c, p, metric="kl_to_clean"), "distance from the model"),
        (lambda m, c, p: independence_test(m, c, p, metric="l2_to_clean"), "distance from the model"),
        (lambda m, c, p: equivalence_test(m, c, p, epsilon=0.5), "epsilon must be"),
        (lambda m, c, p: equivalence_test(m, c, p, alpha=0.0), "alpha must lie"),
        (lambda m, c, p: sufficiency_test(m, c, p, quantile=1.0), "quantile must lie"),
        (lambda m, c, p: sufficiency_test(m, c, p, random_edges=10**6), "Random circuits can have"),
        (lambda m, c, p: necessity_test(m, c, p, random_edges=0), "Random circuits can have"),
        (lambda m, c, p: necessity_test(m, whole(c.graph), p), "Random circuits can have"),
        (lambda m, c, p: necessity_test(m, c, p, drawn_from="complememt"), "Did you mean 'complement'"),
        (lambda m, c, p: minimality_test(m, whole(c.graph), p), "whole graph"),
        (lambda m, c, p: independence_test(m, c, p, n_permutations=0), "at least one permutation"),
        (lambda m, c, p: independence_test(m, c, p[:3]), "at least 4 examples"),
        (lambda m, c, p: RandomPaths(c.graph, 0).circuit(0), "Random paths can have"),
    ],
)
def test_invalid_arguments_are_refused_with_one_clear_line(call: Any, message: str) -> None:
    with pytest.raises(mi.InputError, match=message):
        call(tiny("gpt2"), circuit_of("gpt2"), pairs(5))


def test_independence_needs_a_metric_that_varies(bundled: Bundled) -> None:
    model, some, stored, _ = bundled
    with pytest.raises(mi.InputError, match="nothing can depend on it"):
        independence_test(model, stored, some, metric="accuracy")
