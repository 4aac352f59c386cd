"""The first-order engine: it is the derivative of the exact one, and it adds up."""

from __future__ import annotations

import pytest
import torch

import mechinterp.engines.edge_attribution
from mechinterp.base.errors import InputError
from mechinterp.base.peak_memory import PeakMemory
from mechinterp.engines.edge_attribution import activation_path_gradients, edge_gradients
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.replacement import Replacement, build_replacement
from mechinterp.graphs.graph import Graph, build_graph
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import Metric, get_metric
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import ALL_FLOAT64, D_MODEL, D_VOCAB, EVERY, build, pairs, snapshot, tiny

LOGIT_DIFF = get_metric("logit_diff")


def slope(
    model: HookManager,
    graph: Graph,
    some: Pairs,
    direction: torch.Tensor,
    metric: Metric,
    replacement: Replacement | None,
    step: float,
) -> float:
    """Minus the derivative of the exact engine at the uncut graph, along a direction of partial cuts.

    One-sided, since a cut is never negative: the five-point formula, with an error of order step^4.
    """
    cuts = torch.stack([direction * (step * i) for i in range(5)])
    values = run_edges(model, graph, some, cuts, metric=metric, replacement=replacement).double().sum(1)
    return float((values * torch.tensor([25.0, -48.0, 36.0, -16.0, 3.0])).sum() / (12 * step))


@pytest.mark.parametrize("kind", ["corrupt", "mean", "mean-positional", "zero"])
@pytest.mark.parametrize("name", EVERY)
def test_edge_gradients_are_the_derivative_of_run_edges(name: str, kind: str) -> None:
    """In random directions over all edges at once, with other numbers for every edge."""
    model, some = tiny(name), pairs(4, 6, padded=kind != "mean-positional")
    graph = build_graph(model)
    replacement = build_replacement(kind, model, graph, some)
    gradients = edge_gradients(model, graph, some, LOGIT_DIFF, replacement=replacement)
    # Noise is (rounding of a value of about 10) x 50 / (12 step): 1e-9 in float64; 1e-3 where parts run in float32.
    step, near = (1e-4, 1e-6) if name in ALL_FLOAT64 else (3e-3, 5e-3)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.rand(graph.possible.shape, generator=generator, dtype=torch.float64) ** 4 * graph.possible
        expected = float((gradients * direction).sum())
        got = slope(model, graph, some, direction, LOGIT_DIFF, replacement, step)
        assert got == pytest.approx(expected, abs=near * (1 + float((gradients.abs() * direction).sum())))


@pytest.mark.parametrize("name", ["gpt2", "no-norm", "neox", "attention-only"])
def test_every_single_edge_is_its_own_derivative(name: str) -> None:
    model, some = tiny(name), pairs(2, 5, padded=True)
    graph = build_graph(model)
    edges = graph.possible.nonzero()[::5]
    gradients = edge_gradients(model, graph, some, LOGIT_DIFF)
    one = torch.zeros(len(edges), *graph.possible.shape, dtype=torch.float64)
    one[torch.arange(len(edges)), edges[:, 0], edges[:, 1]] = 1e-6
    values = run_edges(model, graph, some, torch.cat([torch.zeros_like(one[:1]), one])).sum(1)
    # Forward differences: the second derivative (of the order 1 to 100 here) times the step.
    torch.testing.assert_close(
        (values[0] - values[1:]) / 1e-6, gradients[edges[:, 0], edges[:, 1]], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("metric", ["prob_diff", "logit_diff"])
def test_metrics_at_several_positions(metric: str) -> None:
    model, some = tiny("gpt2"), pairs(4, 7, answer_pos=[[3, 6], [2, -1], [1, 6], [0, -1]])
    graph = build_graph(model)
    direction = torch.rand(graph.possible.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    direction = direction * graph.possible
    gradients = edge_gradients(model, graph, some, get_metric(metric))
    got = slope(model, graph, some, direction, get_metric(metric), None, 1e-4)
    assert got == pytest.approx(float((gradients * direction).sum()), rel=1e-5)


def test_on_a_linear_edge_the_estimate_is_exact() -> None:
    """Without a norm, an edge into the logits is linear: the first order is all there is."""
    model, some = tiny("no-norm"), pairs(4, 6)
    graph = build_graph(model)
    gradients = edge_gradients(model, graph, some, LOGIT_DIFF)
    full = run_edges(model, graph, some, torch.zeros_like(graph.possible))
    for writer, name in enumerate(graph.writers):
        cut = run_edges(model, graph, some, graph.mask_of([f"{name}->logits"]))
        assert float((full - cut).sum()) == pytest.approx(float(gradients[-1, writer]), abs=1e-10)
    # And all of them together are the whole difference of the two runs.
    corrupt = run_edges(model, graph, some, graph.possible)
    assert float((full - corrupt).sum()) == pytest.approx(float(gradients[-1].sum()), abs=1e-9)


# -- integrated gradients ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "split"), [(name, False) for name in EVERY] + [("gpt2", True), ("no-norm", True)])
def test_completeness_of_integrated_gradients(name: str, split: bool) -> None:
    """Over the edges that leave the input, the scores add up to the whole effect, clean minus corrupt.

    The input's write is read by every reader, so the sum of the readers' gradients is the gradient at the input; its
    integral along the straight line between the two inputs, times the difference of the inputs, is the difference of
    the metric. That holds for every shape; other writers' edges have no such identity.
    """
    # Small weights, so that a few midpoints integrate well: their error falls with the square of the step.
    model, some = build(name, scale=0.15), pairs(2, 5, padded=True)
    graph = build_graph(model, split_input=split)
    ends = run_edges(model, graph, some, torch.stack([torch.zeros_like(graph.possible), graph.possible])).sum(1)
    errors: list[float] = []
    for steps in (4, 16):
        alphas = [(k + 0.5) / steps for k in range(steps)]
        scores = edge_gradients(model, graph, some, LOGIT_DIFF, alphas=alphas)
        errors.append(abs(float(scores[:, : graph.n_inputs].sum() - (ends[0] - ends[1]))))
    assert errors[1] < 5e-2 * float((ends[0] - ends[1]).abs())
    assert errors[1] < errors[0] / 6 + 1e-5  # a sixteenth in the limit; float32 noise in the rotary shapes


def test_an_alpha_of_one_is_the_clean_run_and_the_average_is_one() -> None:
    model, some = tiny("gpt2"), pairs(3, 6, padded=True)
    graph = build_graph(model)
    once = edge_gradients(model, graph, some, LOGIT_DIFF)
    nearly = edge_gradients(model, graph, some, LOGIT_DIFF, alphas=[1 - 1e-9])  # by the interpolating road
    torch.testing.assert_close(nearly, once, rtol=1e-6, atol=1e-6)
    half = edge_gradients(model, graph, some, LOGIT_DIFF, alphas=[0.5])
    both = edge_gradients(model, graph, some, LOGIT_DIFF, alphas=[0.5, 1.0])
    torch.testing.assert_close(both, (once + half) / 2, rtol=1e-10, atol=1e-10)


def test_an_alpha_of_zero_has_its_gradient_at_the_corrupt_run() -> None:
    model, some = tiny("gpt2"), pairs(3, 6, padded=True)
    swapped = Pairs(clean=some.corrupt, corrupt=some.clean, mask=some.mask, right=some.right, wrong=some.wrong)
    graph = build_graph(model)
    at_corrupt = edge_gradients(model, graph, some, LOGIT_DIFF, alphas=[0.0])
    # The same gradients from the other side, where the difference of the writes has the other sign.
    torch.testing.assert_close(at_corrupt, -edge_gradients(model, graph, swapped, LOGIT_DIFF), rtol=1e-9, atol=1e-9)


# -- sums and batches --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_batch_is_the_sum_of_its_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Five rows: in the last, the window of a padded query (4, in Gemma-2) holds padding only.
    model, some = tiny(name), pairs(5, 7, padded=True)
    graph = build_graph(model)
    near = 1e-9 if name in ALL_FLOAT64 else 1e-4
    for alphas in ((1.0,), (0.25, 0.75)):
        whole = edge_gradients(model, graph, some, LOGIT_DIFF, alphas=alphas)
        parts = sum(edge_gradients(model, graph, some[i : i + 1], LOGIT_DIFF, alphas=alphas) for i in range(5))
        torch.testing.assert_close(parts, whole, rtol=0, atol=near)
        with monkeypatch.context() as patched:
            patched.setattr(mechinterp.engines.edge_attribution, "TOKEN_BUDGET_BYTES", 1)
            patched.setattr(mechinterp.engines.edge_attribution, "STEPS_BUDGET_BYTES", 1)
            chunked = edge_gradients(model, graph, some, LOGIT_DIFF, alphas=alphas)
        torch.testing.assert_close(chunked, whole, rtol=0, atol=near)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_one_token_and_one_point_at_a_time_give_the_same_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With means per position, named positions and parts of writers, which are all cut into windows of their own."""
    model, padded = tiny(name), pairs(2, 5, padded=True)
    even = pairs(2, 5, positions={"end": torch.tensor([4, 4]), "first": torch.tensor([0, 1])})
    graph, placed = build_graph(model, neurons={1: [2, 5]}), build_graph(model, positions=["end", "first"])
    means = build_replacement("mean-positional", model, graph, even)
    alphas = (0.5, 1.0, 0.0)

    def scores() -> list[torch.Tensor]:
        return [
            edge_gradients(model, graph, even, LOGIT_DIFF, replacement=means, alphas=alphas),
            edge_gradients(model, placed, even, LOGIT_DIFF, alphas=alphas),
            activation_path_gradients(model, graph, padded, LOGIT_DIFF, alphas),
        ]

    whole = scores()
    monkeypatch.setattr(mechinterp.engines.edge_attribution, "TOKEN_BUDGET_BYTES", 1)
    monkeypatch.setattr(mechinterp.engines.edge_attribution, "STEPS_BUDGET_BYTES", 1)
    near = 1e-9 if name in ALL_FLOAT64 else 1e-4
    for got, expected in zip(scores(), whole, strict=True):
        assert bool(expected.any())
        torch.testing.assert_close(got, expected, rtol=0, atol=near)


@pytest.mark.slow
def test_memory_grows_neither_with_the_points_of_the_path_nor_with_writes_times_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, graph = tiny("gpt2"), build_graph(tiny("gpt2"))

    def peak(n_points: int, length: int) -> int:
        alphas = [(k + 1) / n_points for k in range(n_points)]
        with PeakMemory() as used:
            edge_gradients(model, graph, pairs(2, length)[:1], LOGIT_DIFF, alphas=alphas)
        return used.peak

    peak(1, 4)  # what the model keeps from its first run is not counted
    assert peak(6, 8) > 1.5 * peak(2, 8)  # all points fit: the measurement sees them
    monkeypatch.setattr(mechinterp.engines.edge_attribution, "STEPS_BUDGET_BYTES", 1)
    assert peak(6, 8) < 1.02 * peak(2, 8)
    model = build("gpt2", n_head=16)  # many writers, so that their writes are most of the memory
    graph = build_graph(model)
    whole = peak(1, 16)
    monkeypatch.setattr(mechinterp.engines.edge_attribution, "TOKEN_BUDGET_BYTES", 1)
    table = len(graph.writers) * 16 * D_MODEL * 8
    assert peak(1, 16) < whole - 3 / 4 * table  # one example, cut into its tokens; what is left is the model's own


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_scored_where_there_is_no_edge_and_nothing_is_left_behind(name: str) -> None:
    model, some = build(name), pairs(3, 6)
    graph = build_graph(model)
    before = snapshot(model.bridge)
    gradients = edge_gradients(model, graph, some, LOGIT_DIFF, alphas=[0.5, 1.0])
    assert snapshot(model.bridge) == before
    assert not gradients.requires_grad
    assert not bool(gradients[~graph.possible].any())
    assert float((gradients[graph.possible] != 0).double().mean()) > 0.99


def test_equal_prompts_score_zero() -> None:
    some = pairs(3, 6)
    same = Pairs(clean=some.clean, corrupt=some.clean.clone(), right=some.right, wrong=some.wrong)
    graph = build_graph(tiny("gpt2"))
    assert float(edge_gradients(tiny("gpt2"), graph, same, LOGIT_DIFF).abs().max()) < 1e-12  # float64 rounding


@pytest.mark.slow
def test_lower_precision_models_accumulate_in_float32() -> None:
    some = pairs(4, 6, padded=True)
    graph = build_graph(tiny("gpt2"))
    exact = edge_gradients(tiny("gpt2"), graph, some, LOGIT_DIFF)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):  # relative to the largest; bfloat16 has 8 bits
        got = edge_gradients(build("gpt2", dtype=dtype), graph, some, LOGIT_DIFF)
        assert got.dtype == torch.float32
        assert float((got.double() - exact).abs().max()) < near * float(exact.abs().max())


def test_metrics_without_gradient_and_pairs_of_another_model_are_refused() -> None:
    model, some = tiny("gpt2"), pairs(3, 6)
    graph = build_graph(model)
    with pytest.raises(InputError, match="no gradient"):
        edge_gradients(model, graph, some, get_metric("accuracy"))
    other = build_graph(build("gpt2", n_layer=2))
    with pytest.raises(InputError, match="other dimensions"):
        edge_gradients(model, other, some, LOGIT_DIFF)
    beyond = Pairs(clean=some.clean, corrupt=some.corrupt, right=[D_VOCAB] * 3, wrong=[1] * 3)
    with pytest.raises(InputError, match="vocabulary"):
        edge_gradients(model, graph, beyond, LOGIT_DIFF)
