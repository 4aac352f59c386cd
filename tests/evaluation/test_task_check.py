"""The task check: its numbers by hand, and which models pass it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.evaluation.task_check import CHANCE, TaskCheck, check_performance, wilson_interval
from tests.support.models_tiny import pairs, tiny

PASSED = TaskCheck("logit_diff", 100, 3.0, 1.0, 2.0, (1.5, 2.5), 0.9, (0.82, 0.95))


@pytest.mark.parametrize(("share", "n"), [(1.0, 20), (0.0, 20), (0.5, 12), (0.83, 200), (0.61, 37)])
def test_the_interval_of_a_share_is_where_it_is_z_deviations_away(share: float, n: int) -> None:
    """Its bounds p solve (share - p)**2 = z**2 p (1 - p) / n, one on each side."""
    z = 1.959964
    low, high = wilson_interval(share, n)
    assert 0 <= low <= share <= high <= 1 and low < high
    for bound in (low, high):
        assert (share - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / n, abs=1e-12)
    assert (low == 0) == (share == 0) and (high == 1) == (share == 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ()),
        ({"difference_ci": (-0.1, 4.1)}, ("is not above that of corrupt ones (3 and 1, difference 2 [-0.1, 4.1])",)),
        ({"difference_ci": (0.0, 4.0)}, ("is not above",)),
        ({"accuracy": 0.55, "accuracy_ci": (0.45, 0.65)}, ("accuracy 55% [45%, 65%] is not above chance (50%)",)),
        ({"accuracy_ci": (CHANCE, 0.95)}, ("not above chance",)),
        ({"accuracy": None, "accuracy_ci": None}, ()),
        ({"difference_ci": (-1.0, 1.0), "accuracy_ci": (0.4, 0.6)}, ("is not above", "chance")),
    ],
)
def test_why_there_is_nothing_to_explain(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    found = replace(PASSED, **changes).failures
    assert len(found) == len(words)
    assert all(part in text for part, text in zip(words, found, strict=True))


@pytest.mark.parametrize("metric", ["logit_diff", "kl_to_clean"])
def test_its_numbers_are_those_of_the_metric_by_hand(metric: str) -> None:
    model, some = tiny("gpt2"), pairs(7, padded=True)
    found = check_performance(model, some, metric=metric, batch_size=3)
    rows = torch.arange(7)[:, None]
    clean, corrupt = (
        model.run(tokens, some.mask).logits[rows, some.answer_pos] for tokens in (some.clean, some.corrupt)
    )
    by_name = mi.METRICS.get(metric)
    values = [by_name(logits, some, clean).double() for logits in (clean, corrupt)]
    assert found.clean == pytest.approx(float(values[0].mean()), abs=1e-9)
    assert found.corrupt == pytest.approx(float(values[1].mean()), abs=1e-9)
    assert found.difference == pytest.approx(by_name.direction * (found.clean - found.corrupt), abs=1e-9)
    if metric == "kl_to_clean":  # lower is better: the clean prompts are 0 away from themselves
        assert found.difference > 0 and found.clean == pytest.approx(0, abs=1e-9)
    assert some.right is not None and some.wrong is not None
    logits = clean[:, 0]
    beats = [float(logits[i, some.right[i, 0]] > logits[i, some.wrong[i, 0]]) for i in range(7)]
    assert found.accuracy == pytest.approx(sum(beats) / 7) and 0 < sum(beats) < 7
    assert found.accuracy_ci == wilson_interval(sum(beats) / 7, 7)
    whole = check_performance(model, some, metric=metric, batch_size=32)
    assert whole.difference_ci == pytest.approx(found.difference_ci, abs=1e-9)
    low, high = found.difference_ci
    assert low < found.difference < high
    assert check_performance(model, some, metric=metric, seed=1).difference_ci != whole.difference_ci


def test_templates_add_up_to_all() -> None:
    model, some = tiny("gpt2"), pairs(6)
    names = ("x", "y", "x", "x", "z", "y")
    found = check_performance(model, some, templates=names)
    assert [row[:2] for row in found.by_template] == [("x", 3), ("y", 2), ("z", 1)]
    assert found.accuracy is not None
    for column, total in ((2, found.accuracy), (3, found.difference)):
        assert sum(row[1] * float(row[column] or 0) for row in found.by_template) / 6 == pytest.approx(total)
    alone = check_performance(model, some[[0, 2, 3]])
    assert found.by_template[0][2:] == (pytest.approx(alone.accuracy), pytest.approx(alone.difference))
    frame = found.to_frame()
    assert list(frame["template"]) == ["x", "y", "z", "all"] and list(frame["examples"]) == [3, 2, 1, 6]
    assert check_performance(model, some).by_template == ()


def test_pairs_without_answers_have_no_accuracy() -> None:
    model, some = tiny("gpt2"), pairs(5)
    plain = mi.Pairs(clean=some.clean, corrupt=some.corrupt)
    found = check_performance(model, plain, metric="kl_to_clean")
    assert found.accuracy is None and found.accuracy_ci is None and not found.failures
    assert found.to_frame()["accuracy"].isna().all()
    with pytest.raises(InputError, match="needs"):
        check_performance(model, plain)


def test_a_template_too_few_is_an_error() -> None:
    with pytest.raises(InputError, match="5 pairs, but 2 templates"):
        check_performance(tiny("gpt2"), pairs(5), templates=("x", "y"))


def test_a_random_model_does_not_do_a_task_of_random_answers() -> None:
    found = check_performance(tiny("gpt2"), pairs(60))
    assert any("chance" in text for text in found.failures)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ioi", "greater_than", "induction"])
def test_the_bundled_model_does_its_tasks_and_not_their_opposites(task: str, bundled_model: mi.HookManager) -> None:
    loaded = mi.load_task(task)
    some = loaded.pairs(bundled_model, n=24, split="train", seed=0)
    templates = loaded.row_templates("train", 0, 24)
    found = check_performance(bundled_model, some, metric=loaded.metric, templates=templates)
    assert found.failures == () and found.accuracy is not None and found.accuracy > 0.9
    assert sum(row[1] for row in found.by_template) == 24
    if task != "greater_than":  # its wrong years begin as the prompt ends
        wrong = replace(some, right=some.wrong, wrong=some.right)
        opposite = check_performance(bundled_model, wrong, metric=loaded.metric)
        assert len(opposite.failures) == 2 and opposite.difference == pytest.approx(-found.difference, rel=1e-4)


def test_the_first_pairs_of_a_split_are_not_among_the_next(bundled_model: mi.HookManager) -> None:
    task = mi.load_task("ioi")
    every, rest = task.pairs(bundled_model, n=12), task.pairs(bundled_model, n=7, skip=5)
    assert rest.clean_text == every.clean_text[5:] and rest.digest() == every[5:].digest()
    assert not set(rest.clean_text or ()) & set(every[:5].clean_text or ())
