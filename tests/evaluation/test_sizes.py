"""The default size: which curves give which size, how it is searched, and that the numbers are those of the runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.base.bootstrap import bootstrap_interval, ratio_of_means
from mechinterp.base.progress import Progress
from mechinterp.evaluation.sizes import (
    RESAMPLES,
    CurvePoint,
    Levels,
    SizeSearch,
    chosen_size,
    search_size,
    size_curve,
    size_grid,
)
from mechinterp.graphs.scores import Scores
from tests.support.models_tiny import pairs, tiny

HOW: dict[str, object] = {"rule": "top", "by": "magnitude", "ratio": None}
N = 24


class MadeUp(SizeSearch):
    """A search whose circuits have made-up values: the faithfulness and the share of the empty circuit's KL by size.

    The full model has 3 on every example and the empty circuit 1; `noise` is the examples' standard deviation.
    """

    def __init__(self, value: Callable[[int], float], kl: Callable[[int], float], noise: float = 0.0, **more: Any):
        model = tiny("gpt2")
        graph = mi.build_graph(model)
        table = torch.rand(graph.possible.shape, generator=torch.Generator().manual_seed(0)) * graph.possible
        scores = Scores(graph, table, 1, "random", "logit_diff", "corrupt")
        super().__init__(model, scores, [(scores, pairs(N))], HOW, "logit_diff", "corrupt", 32, **more)
        self.value, self.kl_share, self.noise = value, kl, noise
        self.asked: list[int] = []

    def _run(self, number: int, sizes: Sequence[int], progress: Progress) -> tuple[Tensor, Tensor]:
        self.asked += sizes
        values, kl = [torch.full((N,), 3.0), torch.full((N,), 1.0)], [torch.zeros(N), torch.full((N,), 2.0)]
        for size in sizes:
            draw = torch.randn(N, generator=torch.Generator().manual_seed(size))
            values.append(1 + 2 * self.value(size) + self.noise * draw)
            kl.append(torch.full((N,), 2 * self.kl_share(size)))
        progress(len(sizes), len(sizes))
        return torch.stack(values, 1).double(), torch.stack(kl, 1).double()


def rising(at: int) -> Callable[[int], float]:
    """Faithful from this size on."""
    return lambda size: 1.0 if size >= at else 0.5


def faithful(size: int) -> float:
    return 1.0


def close(size: int) -> float:
    """A KL divergence of 1 % of the empty circuit's."""
    return 0.01


# -- the rule ----------------------------------------------------------------------------------------------------------


def points(passing: dict[int, float | None]) -> list[CurvePoint]:
    return [CurvePoint(size, size, 1.0, (0.95, 1.05), 0.1, share) for size, share in passing.items()]


@pytest.mark.parametrize(
    ("passing", "size"),
    [
        ({4: 0.0, 8: 1.0, 16: 1.0, 32: 1.0}, 8),
        ({4: 0.0, 8: 1.0, 16: 0.5, 32: 1.0, 40: 1.0}, 32),  # one lucky crossing is no answer
        ({4: 0.89, 8: 0.9, 16: 0.9}, 8),  # on enough resamples
        ({32: 1.0, 8: 1.0, 4: 0.0, 16: 0.0}, 32),  # the order of the points does not matter; the last needs no other
        ({4: 0.0, 32: 0.0, 51: 1.0, 100: 1.0}, None),  # above half
        ({4: 0.0, 50: 1.0, 100: 1.0}, 50),
        ({4: 0.0, 50: 1.0, 100: 0.0}, None),  # what confirms a size may be above half, but must pass, too
        ({4: None, 8: None}, None),  # nothing was measured
        ({}, None),
    ],
)
def test_the_smallest_size_that_passes_as_does_the_next(passing: dict[int, float | None], size: int | None) -> None:
    assert chosen_size(points(passing), 100, Levels()) == size


def test_a_size_passes_as_often_as_resamples_say() -> None:
    """By hand: the interval moves with the resample's faithfulness, and the KL divergence is compared there, too."""
    search = MadeUp(lambda size: 0.97, lambda size: 0.15, noise=0.25, seed=5)
    search.measure([10])
    point, rows = search.point(10), search.rows(10)
    assert point.interval == bootstrap_interval(ratio_of_means, rows, seed=5)
    assert point.kl == pytest.approx(0.3) and search.kl_empty == pytest.approx(2.0)
    drawn = torch.randint(N, (RESAMPLES, N), generator=torch.Generator().manual_seed(5))
    passed = 0
    for chosen in drawn:
        value = float(((rows[chosen, 0] - rows[chosen, 2]).mean()) / (rows[chosen, 1] - rows[chosen, 2]).mean())
        low, high = (bound + value - point.faithfulness for bound in point.interval)
        passed += low >= 0.92 and high <= 1.1
    assert point.passing == pytest.approx(passed / RESAMPLES) and 0 < passed < RESAMPLES
    wide = MadeUp(lambda size: 0.97, lambda size: 0.15, noise=0.25, seed=5, levels=Levels(low=0.0, high=2.0))
    wide.measure([10])
    assert wide.point(10).passing == 1
    far = MadeUp(lambda size: 0.97, lambda size: 0.21, seed=5)  # the KL level is .2
    far.measure([10])
    assert far.point(10).passing == 0


# -- the search --------------------------------------------------------------------------------------------------------


def grid_of(search: SizeSearch) -> list[int]:
    half = search.scores.graph.n_units // 2
    return list(size_grid(half))


def doubled_of(search: SizeSearch) -> list[int]:
    return list(size_grid(search.scores.graph.n_units // 2, fine=1))


@pytest.mark.parametrize("at", [1, 5, 23, 61, 100])
def test_the_search_measures_the_grid_on_both_sides(at: int) -> None:
    search = MadeUp(rising(at), close)
    grid = grid_of(search)
    expected = next(size for size in grid if size >= at)
    steps, near = list[tuple[int, int]](), list[tuple[int, int]]()
    found = search_size(
        search,
        search.scores.graph.n_edges,
        progress=lambda *done: steps.append(done),
        progress_near=lambda *done: near.append(done),
    )
    assert found == expected
    doubled = doubled_of(search)
    assert len(search.asked) == len(set(search.asked)) <= len(doubled) + 2 + 14  # seven on each side
    assert {4, 8, 16} <= set(doubled) <= set(search.asked) and max(search.asked) == search.scores.graph.n_edges
    at = grid.index(expected)
    assert set(grid[max(0, at - 1) : at + 2]) <= set(search.asked)  # the sizes below and above were tried
    # The totals are those of what is then run, so that the time that is left follows from the speed.
    assert steps == [(len(doubled) + 1, len(doubled) + 1), (1, 1)]
    assert near[-2:] == [(len(search.asked) - len(doubled) - 1,) * 2, (1, 1)]


def test_the_progress_of_a_search_counts_what_is_run_and_no_more() -> None:
    """No size passes: nothing is measured near one. From the top down the total is the most that there can be."""
    search, steps, near = MadeUp(rising(10**6), close), list[tuple[int, int]](), list[tuple[int, int]]()
    told: dict[str, Progress] = {
        "progress": lambda *done: steps.append(done),
        "progress_near": lambda *done: near.append(done),
    }
    assert search_size(search, search.scores.graph.n_edges, **told) is None
    assert steps == [(len(search.asked), len(search.asked)), (1, 1)] and near == []
    steps.clear()
    n = len(search.asked)
    assert search_size(MadeUp(rising(10**6), close), search.scores.graph.n_edges, curve=False, **told) is None
    assert steps == [(1, n), (2, n), (1, 1)] and near == []


def test_a_lucky_size_of_the_coarse_grid_is_not_taken() -> None:
    lucky = doubled_of(MadeUp(faithful, close))[1]
    search = MadeUp(lambda size: 1.0 if size == lucky or size >= 70 else 0.5, close)
    found = search_size(search, search.scores.graph.n_edges)
    assert found == next(size for size in grid_of(search) if size >= 70)
    assert search.point(lucky).passing == 1 and lucky < 20


def test_a_curve_that_goes_down_again_is_searched_beyond() -> None:
    """32 passes, as its neighbour of the coarse grid does, but what is measured between them does not."""
    search = MadeUp(lambda size: 0.5 if size < 32 or 33 <= size <= 40 else 1.0, close)
    found = search_size(search, search.scores.graph.n_edges)
    grid = grid_of(search)
    assert found == next(size for size in grid if size > 40)
    assert search.point(32).passing == 1


@pytest.mark.parametrize(
    ("value", "kl"),
    [
        (rising(10**6), close),  # never faithful but with all edges
        (faithful, lambda size: 0.5),  # the metric is back, the output is not
        (lambda size: 1.3, close),  # overshoot
    ],
)
def test_no_small_circuit(value: Callable[[int], float], kl: Callable[[int], float]) -> None:
    search = MadeUp(value, kl)
    assert search_size(search, search.scores.graph.n_edges) is None
    assert search.curve(pairs(N), search.levels).spread is None


def test_without_the_curve_sizes_are_tried_from_the_largest_down() -> None:
    whole, short = MadeUp(rising(70), close), MadeUp(rising(70), close)
    n = whole.scores.graph.n_edges
    assert search_size(short, n, curve=False) == search_size(whole, n)
    assert set(short.asked) < set(whole.asked)
    assert min(short.asked) > min(whole.asked) == 4
    assert [size for size in short.asked if size >= 64][:2] == [n, grid_of(short)[-1]]


def test_a_given_size_is_measured_and_not_chosen() -> None:
    with_curve, alone = MadeUp(faithful, close), MadeUp(faithful, close)
    n = alone.scores.graph.n_edges
    assert search_size(alone, n, given=37, curve=False) is None and alone.asked == [37]
    assert search_size(with_curve, n, given=37) is None
    assert set(with_curve.asked) == {37, *doubled_of(with_curve), n}
    assert with_curve.curve(pairs(N), None).levels is None and with_curve.curve(pairs(N), None).spread is None


def test_few_scored_edges_are_the_largest_size() -> None:
    """Sizes with nothing but edges of score 0 more are not measured."""
    search = MadeUp(rising(20), close)
    assert search_size(search, 30) in range(20, 24)
    assert max(search.asked) == 30


def test_the_spread_is_what_single_resamples_choose() -> None:
    search = MadeUp(lambda size: min(1.0, 0.7 + 0.3 * size / 60), close, noise=0.2)
    size = search_size(search, search.scores.graph.n_edges)
    assert size is not None
    found = search.curve(pairs(N), search.levels).spread
    sizes = sorted(search.tables)
    drawn = torch.randint(N, (RESAMPLES, N), generator=torch.Generator().manual_seed(0))
    passed = {one: search._passes(one, search.point(one).interval or (0, 0)) for one in sizes}
    chosen: list[int] = []
    for i in range(len(drawn)):
        good = [bool(passed[one][i]) for one in sizes]
        half = search.scores.graph.n_units / 2
        fits = [k for k in range(len(sizes)) if good[k] and all(good[k : k + 2]) and sizes[k] <= half]
        chosen.append(sizes[fits[0]] if fits else 10**9)
    chosen.sort()
    assert found == (chosen[10], chosen[189])  # the central 90 % of 200
    assert found[0] < size <= found[1]


# -- on a model --------------------------------------------------------------------------------------------------------


def test_a_size_is_run_once_and_its_numbers_are_those_of_evaluate() -> None:
    model, some = tiny("gpt2"), pairs(6, padded=True)
    graph = mi.build_graph(model)
    scores = mi.score_edges(model, graph, pairs(5, seed=3), method="eap")
    calls: list[str] = []

    def keep(name: str, compute: Callable[[], Any]) -> Any:
        calls.append(name)
        return compute()

    search = SizeSearch(model, scores, [(scores, some)], HOW, "logit_diff", "corrupt", 4, keep=keep)
    search.measure([40, 80])
    search.measure([80, 120, 40])
    search.measure([40])
    assert calls == ["part 0 [40, 80]", "part 0 [120]"]
    for size in (40, 80, 120):
        circuit = mi.select(graph, scores, edges=size)
        result, point = mi.evaluate(model, circuit, some, n_random=0), search.point(size)
        assert point.n_edges == circuit.n_edges and point.n_selected == size
        # float64, other batches
        assert point.faithfulness == pytest.approx(result.faithfulness, rel=1e-6)
        assert point.interval == pytest.approx(result.faithfulness_ci, rel=1e-6)
        assert point.kl == pytest.approx(result.kl, rel=1e-6)
    again = size_curve(model, scores, some, [40, 80, 120], batch_size=6)
    for one, size in zip(again, (40, 80, 120), strict=True):
        assert one.faithfulness == pytest.approx(search.point(size).faithfulness, rel=1e-6)
        assert one.passing == search.point(size).passing


def test_with_folds_each_part_is_measured_with_its_own_scores() -> None:
    model, graph = tiny("gpt2"), mi.build_graph(tiny("gpt2"))
    parts = [pairs(3, seed=1), pairs(4, seed=2)]
    scores = [mi.score_edges(model, graph, part, method="eap") for part in reversed(parts)]
    every = scores[0] + scores[1]
    both = SizeSearch(model, every, list(zip(scores, parts, strict=True)), HOW, "logit_diff", "corrupt", 32)
    alone = [
        SizeSearch(model, own, [(own, part)], HOW, "logit_diff", "corrupt", 32)
        for own, part in zip(scores, parts, strict=True)
    ]
    steps: list[tuple[int, int]] = []
    for search in (both, *alone):
        search.measure([60], lambda *done: steps.append(done))
    expected = torch.cat([search.rows(60) for search in alone])
    torch.testing.assert_close(both.rows(60), expected, rtol=0, atol=1e-9)
    assert both.point(60).n_edges == mi.select(graph, every, edges=60).n_edges
    assert both.curve(parts[0], Levels()).folds == 2
    assert (14, 14) in steps  # 7 examples, the full circuit's empty one and a size
