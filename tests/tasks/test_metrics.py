"""Each metric against its definition, and what no metric may do: reduce, leak between examples, lose digits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from mechinterp.base.errors import InputError
from mechinterp.tasks.metrics import (
    Metric,
    accuracy,
    get_metric,
    kl_to_clean,
    l2_to_clean,
    log_prob,
    logit_diff,
    metric_names,
    prob,
    prob_diff,
    register_metric,
)
from mechinterp.tasks.pairs import Pairs

D_VOCAB = 11
OF_TWO_LOGITS = {"direction"}
"""Metrics of a model with two logits; tests/analysis/test_directions.py has theirs."""
ALL = [get_metric(name) for name in metric_names() if name not in OF_TWO_LOGITS]


def some_pairs(n: int = 5, n_answer: int = 2, seed: int = 0) -> Pairs:
    """Rows with one or two right and one to three wrong answers, and one or more answer positions."""
    generator = torch.Generator().manual_seed(seed)
    right, wrong, answer_pos = [], [], []
    for row in range(n):
        ids = torch.randperm(6, generator=generator).tolist()
        right.append(ids[: 1 + row % 2])
        wrong.append(ids[2 : 3 + row % 3])
        answer_pos.append(list(range(3 - row % n_answer, 4)))
    prompt = torch.randint(6, D_VOCAB, (n, 4), generator=generator)
    return Pairs(clean=prompt, corrupt=prompt.flip(1), right=right, wrong=wrong, answer_pos=answer_pos)


def some_logits(pairs: Pairs, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*pairs.answer_pos.shape, D_VOCAB, generator=generator)


def value(metric: Metric, logits: torch.Tensor, pairs: Pairs, clean: torch.Tensor) -> torch.Tensor:
    return metric(logits, pairs, clean if metric.needs_reference else None)


def test_logit_diff_is_the_difference_of_the_means() -> None:
    pairs = Pairs(clean=[[7], [7]], corrupt=[[8], [8]], right=[[0, 1], [2]], wrong=[[2], [0, 1, 3]])
    logits = torch.tensor([[[1.0, 3.0, 0.5, 9.0]], [[1.0, 2.0, 10.0, 6.0]]])
    assert logit_diff(logits, pairs).tolist() == [2.0 - 0.5, 10.0 - 3.0]


def test_prob_diff_adds_probabilities() -> None:
    pairs = Pairs(clean=[[3], [3]], corrupt=[[3], [3]], right=[[0, 1], [2]], wrong=[[2], [0]])
    logits = torch.log(torch.tensor([[[0.2, 0.3, 0.1, 0.4]], [[0.7, 0.1, 0.1, 0.1]]]))
    assert torch.allclose(prob_diff(logits, pairs), torch.tensor([0.4, -0.6]))


def test_prob_adds_the_right_answers_and_needs_no_wrong_ones() -> None:
    pairs = Pairs(clean=[[3], [3]], corrupt=[[3], [3]], right=[[0, 1], [2]])
    logits = torch.log(torch.tensor([[[0.1, 0.2, 0.3, 0.4]], [[0.7, 0.1, 0.1, 0.1]]]))
    assert torch.allclose(prob(logits, pairs), torch.tensor([0.3, 0.1]))
    assert torch.allclose(log_prob(logits, pairs), torch.tensor([0.3, 0.1]).log())
    with pytest.raises(InputError, match="needs right answers, but the pairs have no right ones"):
        prob(logits, Pairs(clean=[[3], [3]], corrupt=[[3], [3]]))
    with pytest.raises(InputError, match="needs right and wrong answers, but the pairs have no wrong ones"):
        prob_diff(logits, pairs)


def test_kl_is_summed_over_the_vocabulary_in_nats_and_clean_comes_first() -> None:
    pairs = Pairs(clean=[[0], [0]], corrupt=[[1], [1]])
    clean = torch.log(torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]]))
    ours = torch.log(torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]))
    expected = [
        0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
        0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5),
    ]
    assert kl_to_clean(ours, pairs, clean).tolist() == pytest.approx(expected, rel=1e-5)


def test_l2_is_the_distance_of_the_logits() -> None:
    pairs = Pairs(clean=[[0], [0]], corrupt=[[1], [1]])
    clean = torch.zeros(2, 1, 3)
    ours = torch.tensor([[[3.0, 0.0, 4.0]], [[0.0, 2.0, 0.0]]])
    assert l2_to_clean(ours, pairs, clean).tolist() == [5.0, 2.0]


def test_accuracy_takes_the_best_answers_and_a_tie_is_wrong() -> None:
    pairs = Pairs(clean=[[9]] * 3, corrupt=[[9]] * 3, right=[[0, 1], [0, 1], [0, 1]], wrong=[2, 2, 2])
    logits = torch.tensor([[[0.0, 2.0, 1.0]], [[0.0, 0.5, 1.0]], [[1.0, 0.0, 1.0]]])
    assert accuracy(logits, pairs).tolist() == [1.0, 0.0, 0.0]


def test_several_answer_positions_are_averaged_over_the_entries_of_the_example() -> None:
    prompts = [[5, 6, 7], [5, 6, 7]]
    pairs = Pairs(clean=prompts, corrupt=prompts, right=[0, 0], wrong=[1, 1], answer_pos=[[0, 2], [2, -1]])
    logits = torch.tensor([[[1.0, 0.0], [4.0, 0.0]], [[6.0, 1.0], [100.0, 0.0]]])
    assert logit_diff(logits, pairs).tolist() == [2.5, 5.0]


@pytest.mark.parametrize("metric", [metric for metric in ALL if metric.differentiable], ids=lambda m: m.name)
@pytest.mark.parametrize("garbage", [math.inf, math.nan])
def test_what_stands_where_there_is_no_entry_reaches_neither_value_nor_gradient(metric, garbage) -> None:
    pairs = some_pairs()
    clean, logits = some_logits(pairs, seed=2), some_logits(pairs)
    expected = value(metric, logits, pairs, clean)
    spoilt = torch.where((pairs.answer_pos == -1)[:, :, None], garbage, logits).requires_grad_()
    got = value(metric, spoilt, pairs, clean)
    assert torch.equal(got, expected)
    got.sum().backward()
    assert spoilt.grad is not None and bool(spoilt.grad.isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("metric", ALL, ids=lambda m: m.name)
@given(cut=st.integers(1, 5), seed=st.integers(0, 20))
def test_the_batch_split_changes_nothing(metric: Metric, cut: int, seed: int) -> None:
    pairs = some_pairs(n=6, seed=seed)
    logits, clean = some_logits(pairs, seed), some_logits(pairs, seed + 1)
    whole = value(metric, logits, pairs, clean)
    parts = [value(metric, logits[rows], pairs[rows], clean[rows]) for rows in (slice(0, cut), slice(cut, None))]
    assert whole.shape == (6,)
    # Not bit for bit: a vectorised reduction may take another order for another shape.
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metric", ALL, ids=lambda m: m.name)
def test_columns_suffice_where_they_are_offered(metric: Metric) -> None:
    pairs = some_pairs()
    logits = some_logits(pairs)
    columns = metric.columns(pairs)
    if columns is None:
        assert not metric.columns_suffice
        with pytest.raises(InputError, match="whole vocabulary"):
            metric.on_columns(logits, torch.arange(D_VOCAB), pairs)
        return
    assert columns.tolist() == sorted({*pairs.right.flatten().tolist(), *pairs.wrong.flatten().tolist()} - {-1})
    assert torch.equal(metric.on_columns(logits[..., columns], columns, pairs), metric(logits, pairs))
    # The columns of all pairs serve a part of them.
    part = pairs[1:3]
    assert torch.equal(metric.on_columns(logits[1:3][..., columns], columns, part), metric(logits[1:3], part))


def test_columns_that_lack_an_answer_are_refused() -> None:
    pairs = some_pairs()
    columns = logit_diff.columns(pairs)
    assert columns is not None
    for left_out in range(len(columns)):
        fewer = torch.cat([columns[:left_out], columns[left_out + 1 :]])
        with pytest.raises(InputError, match=f"answer {int(columns[left_out])}"):
            logit_diff.on_columns(torch.zeros(*pairs.answer_pos.shape, len(fewer)), fewer, pairs)


def test_gradient_of_logit_diff_is_one_over_the_number_of_answers() -> None:
    pairs = Pairs(clean=[[7], [7]], corrupt=[[8], [8]], right=[[0, 1], [2]], wrong=[[2], [0]])
    logits = torch.zeros(2, 1, 3, requires_grad=True)
    logit_diff(logits, pairs).sum().backward()
    assert logits.grad.squeeze(1).tolist() == [[0.5, 0.5, -1.0], [-1.0, 0.0, 1.0]]


@pytest.mark.parametrize("metric", [metric for metric in ALL if metric.differentiable], ids=lambda m: m.name)
def test_gradients_are_those_of_finite_differences(metric: Metric) -> None:
    pairs = some_pairs(n=3)
    clean = some_logits(pairs, seed=2).double()
    logits = some_logits(pairs).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value(metric, x, pairs, clean), (logits,))


@pytest.mark.parametrize("metric", [kl_to_clean, l2_to_clean], ids=lambda m: m.name)
def test_distance_is_zero_to_itself_positive_elsewhere_and_lower_is_better(metric: Metric) -> None:
    pairs = some_pairs()
    clean = some_logits(pairs)
    # Rounding of the log-softmax: a few units in the last place of numbers around 10.
    assert torch.allclose(metric(clean, pairs, clean), torch.zeros(5), atol=1e-5)
    assert bool((metric(some_logits(pairs, seed=7), pairs, clean) > 0.1).all())
    assert metric.direction == -1


def test_gradient_of_l2_at_the_clean_run_is_finite() -> None:
    pairs = some_pairs()
    clean = some_logits(pairs)
    logits = clean.clone().requires_grad_()
    l2_to_clean(logits, pairs, clean).sum().backward()
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("metric", ALL, ids=lambda m: m.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_have_float32_or_better(metric: Metric, dtype: torch.dtype) -> None:
    pairs = some_pairs()
    logits, clean = some_logits(pairs).to(dtype), some_logits(pairs, seed=2).to(dtype)
    got = value(metric, logits, pairs, clean)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    exact = value(metric, logits.double(), pairs, clean.double())
    # The inputs are exactly the same numbers; only the arithmetic differs.
    assert torch.allclose(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", [logit_diff, prob_diff, accuracy], ids=lambda m: m.name)
def test_missing_answers_are_refused_with_a_way_out(metric: Metric) -> None:
    pairs = Pairs(clean=[[0], [0]], corrupt=[[1], [1]], right=[2, 2])
    with pytest.raises(InputError, match=r"no wrong ones.*kl_to_clean"):
        metric(torch.zeros(2, 1, 4), pairs)


def test_missing_reference_is_refused() -> None:
    with pytest.raises(InputError, match="clean run's logits"):
        kl_to_clean(torch.zeros(2, 1, 4), Pairs(clean=[[0], [0]], corrupt=[[1], [1]]))


def test_logits_of_every_position_are_refused() -> None:
    pairs = Pairs(clean=[[0, 1], [0, 1]], corrupt=[[1, 1], [1, 1]], right=[2, 2], wrong=[3, 3])
    with pytest.raises(InputError, match=r"\[2, 1, \.\.\.\]; got \(2, 2, 4\)"):
        logit_diff(torch.zeros(2, 2, 4), pairs)
    with pytest.raises((InputError, TypeCheckError)):
        logit_diff(torch.zeros(2, 4), pairs)


def test_unknown_and_duplicate_names_are_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'logit_diff'"):
        get_metric("logit_dif")
    with pytest.raises(InputError, match="registered already"):
        register_metric(logit_diff)


def test_a_metric_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(InputError, match="direction"):
        Metric("other", logit_diff.at_positions, 0, "logits", True, False)
    with pytest.raises(InputError, match="columns_suffice"):
        Metric("other", logit_diff.at_positions, 1, "logits", True, True, columns_suffice=True)
