"""Evaluation: the definition, its interval, and what it must not do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mechinterp as mi
from mechinterp.base.bootstrap import bootstrap_interval, ratio_of_means
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.replacement import build_replacement
from mechinterp.evaluation.faithfulness import (
    _example_ratios,
    check_denominator,
    evaluate,
    random_cuts,
)
from mechinterp.evaluation.sizes import size_curve
from mechinterp.graphs.circuit import Circuit, on_paths
from mechinterp.graphs.graph import build_graph
from tests.support.models_tiny import SHAPES, pairs, snapshot, tiny


def circuit_of(name: str, share: float = 0.5) -> Circuit:
    graph = build_graph(tiny(name))
    mask = (torch.rand(graph.possible.shape, generator=torch.Generator().manual_seed(1)) < share) & graph.possible
    kept = on_paths(graph, mask)
    return Circuit(graph, kept, int(mask.sum()))


@pytest.mark.parametrize("name", SHAPES)
def test_faithfulness_is_the_ratio_of_means_of_runs_with_all_other_edges_cut(name: str) -> None:
    model, circuit, some = tiny(name), circuit_of(name), pairs(5, padded=True)
    result = evaluate(model, circuit, some, n_random=2)
    ours, empty, full = (
        run_edges(model, circuit.graph, some, cut).double().mean()
        for cut in (circuit.cut, circuit.graph.possible, torch.zeros_like(circuit.kept))
    )
    assert result.circuit_value == pytest.approx(float(ours), abs=1e-6)
    assert result.faithfulness == pytest.approx(float((ours - empty) / (full - empty)), rel=1e-5, abs=1e-6)
    assert result.n_edges == circuit.n_edges and result.n_examples == 5


@pytest.mark.parametrize(
    ("metric", "replacement"),
    [
        ("logit_diff", "zero"),
        ("prob_diff", "mean"),
        ("kl_to_clean", "corrupt"),  # this one and accuracy are computed in any case and must not be doubled
        ("l2_to_clean", "mean"),
        ("accuracy", "zero"),
    ],
)
def test_every_metric_and_replacement_is_that_of_the_runs(metric: str, replacement: str) -> None:
    model, circuit, some = tiny("gpt2"), circuit_of("gpt2"), pairs(6, padded=True)
    graph = circuit.graph
    values = build_replacement(replacement, model, graph, some)
    cuts = torch.stack([circuit.cut, torch.zeros_like(circuit.kept), graph.possible])

    def runs(name: str) -> torch.Tensor:
        return run_edges(model, graph, some, cuts, metric=name, replacement=values).double()

    result = evaluate(model, circuit, some, metric=metric, replacement=replacement, n_random=0)
    ours, full, empty = runs(metric)[:3]
    assert torch.allclose(result.per_example.double(), torch.stack([ours, full, empty], 1), atol=1e-9)
    expected = (ours.mean() - empty.mean()) / (full.mean() - empty.mean())
    assert result.faithfulness == pytest.approx(float(expected))
    usable = (full - empty).abs() > 1e-9
    ratios = ((ours - empty) / (full - empty))[usable].sort().values
    assert result.n_ratio == len(ratios)
    assert result.example_quartiles[1] == pytest.approx(float(ratios.quantile(0.5)))
    assert result.kl == pytest.approx(float(runs("kl_to_clean")[0].mean()))
    assert result.accuracy == pytest.approx(float(runs("accuracy")[0].mean()))
    assert result.accuracy_full == pytest.approx(float(runs("accuracy")[1].mean()))


def test_random_circuits_are_run_as_the_circuit_is() -> None:
    model, circuit, some = tiny("gpt2"), circuit_of("gpt2"), pairs(4)
    graph = circuit.graph
    result = evaluate(model, circuit, some, n_random=3, seed=9)
    cuts = [graph.possible, torch.zeros_like(graph.possible), *random_cuts(graph, circuit.n_edges, 3, seed=9)]
    empty, full, *others = run_edges(model, graph, some, torch.stack(cuts)).double().mean(1).tolist()
    assert result.random_faithfulness == pytest.approx(tuple((m - empty) / (full - empty) for m in others))


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_the_whole_graph_has_faithfulness_one_and_the_empty_circuit_zero(name: str) -> None:
    model, some = tiny(name), pairs(4)
    graph = build_graph(model)
    whole = evaluate(model, Circuit(graph, graph.possible, graph.n_edges), some, n_random=1)
    none = evaluate(model, Circuit(graph, torch.zeros_like(graph.possible), 0), some, n_random=1)
    assert whole.faithfulness == pytest.approx(1, abs=1e-6) and whole.kl == pytest.approx(0, abs=1e-6)
    assert none.faithfulness == pytest.approx(0, abs=1e-6)
    assert whole.random_faithfulness == pytest.approx((1.0,), abs=1e-6)  # as many random edges: all of them


def test_the_batch_size_does_not_matter() -> None:
    model, circuit, some = tiny("llama"), circuit_of("llama"), pairs(5, padded=True)
    one, all_at_once = (evaluate(model, circuit, some, batch_size=n, n_random=2) for n in (1, 5))
    for field in ("faithfulness", "kl", "accuracy", "faithfulness_ci", "example_quartiles", "random_faithfulness"):
        assert getattr(one, field) == pytest.approx(getattr(all_at_once, field), rel=1e-4, abs=1e-5), field


def test_nothing_of_the_caller_changes() -> None:
    """Silent error 7: EAP-IG prunes or fills the caller's graph in place."""
    model, circuit, some = tiny("gpt2"), circuit_of("gpt2"), pairs(4)
    before, kept, possible = snapshot(model.bridge), circuit.kept.clone(), circuit.graph.possible.clone()
    digest = some.digest()
    evaluate(model, circuit, some)
    assert torch.equal(circuit.kept, kept) and torch.equal(circuit.graph.possible, possible)
    assert some.digest() == digest
    after = snapshot(model.bridge)
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[k], after[k]) if isinstance(before[k], torch.Tensor) else before[k] == after[k]
        for k in before
    )


def test_ratio_of_means_is_not_the_mean_of_ratios() -> None:
    rows = torch.tensor([[1.0, 2.0, 0.0], [10.0, 10.0, 0.0]])
    assert float(ratio_of_means(rows[None])) == pytest.approx(11 / 12)  # not (1/2 + 1) / 2


def test_a_vanishing_denominator_is_refused() -> None:
    full = torch.tensor([3.0, -3.0, 1.0])
    with pytest.raises(mi.InputError, match="alike"):
        check_denominator(full, full + 1e-6)
    check_denominator(full, full - 1)
    model, circuit = tiny("gpt2"), circuit_of("gpt2")
    some = pairs(3)
    same = mi.Pairs(clean=some.clean, corrupt=some.clean, mask=some.mask, right=some.right, wrong=some.wrong)
    with pytest.raises(mi.InputError, match="alike"):
        evaluate(model, circuit, same)


def test_random_circuits_have_the_size_and_follow_the_seed() -> None:
    graph = build_graph(tiny("gpt2"))
    cuts = random_cuts(graph, 17, 4, seed=5)
    assert all(int((graph.possible & ~cut).sum()) == 17 and not bool((cut & ~graph.possible).any()) for cut in cuts)
    assert all(torch.equal(a, b) for a, b in zip(cuts, random_cuts(graph, 17, 4, seed=5), strict=True))
    assert not torch.equal(cuts[0], cuts[1]) and not torch.equal(cuts[0], random_cuts(graph, 17, 1, seed=6)[0])


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        sample = torch.randn(60, 1, generator=generator) + 2
        low, high = bootstrap_interval(lambda t: t.mean((1, 2)), sample, resamples=300, seed=trial)
        covered += low <= 2 <= high
    # 95 % of 200 is 190; the percentile interval of 60 draws covers a little less; 4 standard errors are 12.
    assert 174 <= covered <= 200


@pytest.mark.parametrize(("level", "quantile"), [(0.95, 1.95996), (0.5, 0.67449)])
def test_the_interval_of_a_normal_mean_has_the_normal_width(level: float, quantile: float) -> None:
    sample = torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7
    low, high = bootstrap_interval(lambda t: t.mean((1, 2)), sample, resamples=4000, level=level)
    error = float(sample.std()) / 20
    # 4000 resamples give the ends within a few hundredths of the standard error.
    assert (low, high) == pytest.approx(
        (float(sample.mean()) - quantile * error, float(sample.mean()) + quantile * error), abs=0.12 * error
    )


def test_the_interval_is_the_same_under_a_seed() -> None:
    sample = torch.rand(30, 3) + torch.tensor([1.0, 2.0, 0.0])
    assert bootstrap_interval(ratio_of_means, sample, seed=3) == bootstrap_interval(ratio_of_means, sample, seed=3)
    assert bootstrap_interval(ratio_of_means, sample, seed=3) != bootstrap_interval(ratio_of_means, sample, seed=4)


def test_the_curve_ends_at_one_and_agrees_with_evaluate() -> None:
    model, some = tiny("qwen2"), pairs(4)
    graph = build_graph(model)
    scores = mi.score_edges(model, graph, some, method="eap")
    points = size_curve(model, scores, some, [60, graph.n_edges])
    assert points[-1].faithfulness == pytest.approx(1, abs=1e-6)
    circuit = mi.select(graph, scores, edges=60)
    assert points[0].n_edges == circuit.n_edges
    assert points[0].faithfulness == pytest.approx(evaluate(model, circuit, some).faithfulness, abs=1e-6)


def test_pairs_without_answers_are_evaluated_by_kl() -> None:
    model, circuit, some = tiny("gpt2"), circuit_of("gpt2"), pairs(4)
    bare = mi.Pairs(clean=some.clean, corrupt=some.corrupt, mask=some.mask)
    result = evaluate(model, circuit, bare, metric="kl_to_clean")
    assert result.accuracy is None and result.full_value == pytest.approx(0, abs=1e-9)
    assert result.circuit_value == pytest.approx(result.kl)
    with pytest.raises(mi.InputError, match="right"):
        evaluate(model, circuit, bare)


def test_the_frame_per_example_agrees_with_the_summary() -> None:
    model, circuit, some = tiny("gpt2"), circuit_of("gpt2"), pairs(6, padded=True)
    corrupt = some.corrupt.clone()
    corrupt[2] = some.clean[2]  # full and empty are alike on this example
    result = evaluate(model, circuit, replace(some, corrupt=corrupt), n_random=0)
    frame = result.per_example_frame()
    assert frame.usable.tolist() == [True, True, False, True, True, True] and result.n_ratio == 5
    assert frame.ratio.isna().tolist() == (~frame.usable).tolist()
    assert frame.ratio.median() == pytest.approx(result.example_quartiles[1])
    ours, full, empty = frame[["circuit", "full", "empty"]].mean()
    assert (ours - empty) / (full - empty) == pytest.approx(result.faithfulness)
    rows = frame[frame.usable]
    assert rows.ratio.tolist() == pytest.approx(((rows.circuit - rows["empty"]) / (rows.full - rows["empty"])).tolist())


def test_an_interval_leaves_out_resamples_without_a_ratio() -> None:
    """Where no drawn example tells full from empty, 0 / 0 made the whole interval NaN."""
    full, empty = torch.tensor([1.0, 1, 1, 0, 0, 0]), torch.tensor([0.0, 0, 1, 0, 0, 0])
    rows = torch.stack([torch.tensor([1.0, 0, 1, 0, 0, 0]), full, empty], 1)
    low, high = bootstrap_interval(ratio_of_means, rows)
    assert 0 <= low < 0.5 < high <= 1
    same = torch.ones(4, 3)
    with pytest.raises(mi.InputError, match="not defined on any resample"):
        bootstrap_interval(ratio_of_means, same)
    many = torch.cat([rows] * 40)  # every resample has a ratio: the interval is the plain one
    drawn = torch.randint(len(many), (2000, len(many)), generator=torch.Generator().manual_seed(0))
    values = ratio_of_means(many.double()[drawn])
    assert bootstrap_interval(ratio_of_means, many) == (values.quantile(0.025), values.quantile(0.975))


@pytest.mark.slow
def test_an_evaluation_of_accuracy_can_be_saved_and_verified(tmp_path: Path) -> None:
    """Few of its examples tell the full model from the empty one."""
    model = mi.load_model("bundled")
    task = mi.load_task("ioi")
    train, test = (task.pairs(model, n=20, split=split) for split in ("train", "test"))
    graph = build_graph(model)
    scores = mi.score_edges(model, graph, train, method="eap")
    circuit = mi.select(graph, scores, edges=200)
    plain = evaluate(model, circuit, test, metric="accuracy", n_random=0).per_example
    telling = int((plain[:, 1] > plain[:, 2]).nonzero()[0])
    one = torch.arange(len(test))[:, None] == telling  # in the others the corrupt prompt is the clean one
    some = replace(test, corrupt=torch.where(one, test.corrupt, test.clean), source=None)
    found = evaluate(model, circuit, some, metric="accuracy", n_random=1)
    assert all(torch.tensor(found.faithfulness_ci).isfinite())
    path = tmp_path / "a.circuit.json"
    mi.save_circuit(path, circuit, model=model, result=found)
    assert mi.verify(path).ok


def test_quartiles_are_there_when_the_circuits_own_values_are_huge() -> None:
    rows = torch.tensor([[1e9, 1.0, 0.0], [1e9, 1.0, 0.5]])
    ratios, usable = _example_ratios(rows)
    assert usable.all() and ratios.isfinite().all()
