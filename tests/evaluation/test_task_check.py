"""Whether a model does the task, and the doubts that a file's own numbers raise."""

from __future__ import annotations

from pathlib import Path

import pytest

import mechinterp as mi
from mechinterp.circuit_file.store import open_circuit_file
from mechinterp.circuit_file.verify.doubts import doubts
from mechinterp.evaluation.task_check import check_performance, wilson_interval
from tests.support.models_tiny import pairs, tiny

STORED = Path(__file__).parents[2] / "circuits" / "ioi-bundled-mattr.circuit.json"


def test_a_model_that_does_the_task_passes_and_a_random_one_does_not() -> None:
    model, task = mi.load_model("bundled"), mi.load_task("ioi")
    templates = task.row_templates("train", 0, 30)
    found = check_performance(model, task.pairs(model, n=30), templates=templates, batch_size=7)
    assert found.failures == () and found.accuracy == 1.0
    low, high = found.difference_ci
    assert low < found.difference < high
    assert found.difference == pytest.approx(found.clean - found.corrupt, abs=1e-5)
    assert sum(n for _, n, _, _ in found.by_template) == 30 and len(found.by_template) > 1
    weighted = sum(n * difference for _, n, _, difference in found.by_template) / 30
    assert weighted == pytest.approx(found.difference)
    random = check_performance(tiny("gpt2"), pairs(20, 5))
    assert random.failures and random.difference_ci[0] <= 0
    with pytest.raises(mi.InputError, match="templates"):
        check_performance(model, task.pairs(model, n=4), templates=["one"])


def test_the_first_pairs_of_a_split_are_not_among_the_next() -> None:
    model, task = mi.load_model("bundled"), mi.load_task("ioi")
    every, rest = task.pairs(model, n=12), task.pairs(model, n=7, skip=5)
    assert rest.clean_text == every.clean_text[5:] and rest.digest() == every[5:].digest()


def test_the_interval_of_a_share() -> None:
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson 1927, by hand
    assert wilson_interval(1.0, 4)[0] == pytest.approx(4 / (4 + 1.959964**2))
    assert wilson_interval(0.0, 9)[0] == 0.0


@pytest.mark.parametrize(
    ("part", "change", "name"),
    [
        ("performance", {"difference": -0.1, "difference_ci": (-0.3, 0.1)}, "task not done"),
        ("performance", {"difference": 1.0, "difference_ci": (0.5, 1.5)}, "uncertain denominator"),
        ("performance", {"accuracy": 0.55, "accuracy_ci": (0.45, 0.65)}, "task not done"),
        ("performance", {"n_examples": 19}, "few train examples"),
        ("stability", {"jaccard": 0.79}, "unstable circuit"),
        ("stability", {"n_core": 40}, "small core"),
        ("evaluation", {"faithfulness": 1.2, "faithfulness_ci": (1.1, 1.3)}, "overshoot"),
        ("evaluation", {"n_edges": 240}, "large circuit"),
        ("size", {"spread": (40, 80)}, "uncertain size"),
        ("size", {"spread": None}, "uncertain size"),
    ],
)
def test_each_doubt_is_raised_by_its_number_alone(part: str, change: dict[str, object], name: str) -> None:
    document = open_circuit_file(STORED).document
    before = {doubt.name for doubt in doubts(document)}
    assert before == {"not faithful beyond doubt"}
    if part == "evaluation":
        changed = document.model_copy(update={part: (document.evaluation[0].model_copy(update=change),)})
    elif part == "size":
        assert document.selection.size is not None
        size = document.selection.size.model_copy(update=change)
        changed = document.model_copy(update={"selection": document.selection.model_copy(update={"size": size})})
    else:
        changed = document.model_copy(update={part: getattr(document, part).model_copy(update=change)})
    after = {doubt.name for doubt in doubts(changed)}
    assert name in after and after - before == {name}
