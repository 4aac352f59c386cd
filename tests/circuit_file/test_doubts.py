"""The doubts of a file: each is there exactly when its number says so, and the first lines of the output show it."""

from __future__ import annotations

from typing import Any

import pytest

from mechinterp.circuit_file.limits import FEW
from mechinterp.circuit_file.result_schema import CurveRecord, PerformanceRecord, SizeRule, StabilityRecord
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.circuit_file.summary import steadiness
from mechinterp.circuit_file.verify.doubts import doubts
from mechinterp.circuit_file.verify.warnings import stated_warnings
from tests.support.toy_circuits import toy_circuit, toy_document

CIRCUIT = toy_circuit()
N = CIRCUIT.n_edges
GOOD: dict[str, dict[str, Any]] = {
    "performance": {
        "pairs": "discovery",
        "metric": "logit_diff",
        "n_examples": 200,
        "clean": 3.4,
        "corrupt": -0.2,
        "difference": 3.6,
        "difference_ci": (3.2, 4.0),
        "accuracy": 0.97,
        "accuracy_ci": (0.94, 0.99),
        "seed": 0,
        "tolerance": {"relative": 1e-4, "absolute": 1e-5},
    },
    "stability": {
        "pairs": "discovery",
        "kind": "bootstrap over blocks of examples",
        "resamples": 100,
        "seed": 0,
        "jaccard": 0.85,
        "jaccard_by_chance": 0.1,
        "core_share": 0.9,
        "n_core": N,
        "n_often_outside": 0,
    },
    "size": {
        "rule": "smallest size that passes, as does the next larger one",
        "low": 0.9,
        "high": 1.1,
        "kl_share": 0.2,
        "most": 0.5,
        "agreement": 0.9,
        "spread": (50, 70),
        "pairs": "validation",
    },
    "evaluation": {"faithfulness": 0.96, "faithfulness_ci": (0.92, 0.99)},
}


def document(**changes: dict[str, Any]) -> CircuitFile:
    """A file without doubts, with fields of some records replaced."""
    parts = {name: {**GOOD[name], **changes.get(name, {})} for name in GOOD}
    plain = toy_document(CIRCUIT)
    return plain.model_copy(
        update={
            "performance": PerformanceRecord.model_validate(parts["performance"]),
            "stability": StabilityRecord.model_validate(parts["stability"]),
            "selection": plain.selection.model_copy(update={"size": SizeRule.model_validate(parts["size"])}),
            "evaluation": (plain.evaluation[0].model_copy(update=parts["evaluation"]),),
        }
    )


def test_a_good_file_has_none() -> None:
    assert doubts(document()) == ()
    plain = toy_document(CIRCUIT)
    assert doubts(plain) == () and doubts(plain.model_copy(update={"evaluation": ()})) == ()


CASES: list[tuple[dict[str, dict[str, Any]], set[str], str]] = [
    ({"performance": {"difference_ci": (0.0, 7.2)}}, {"task not done"}, "does not do the task"),
    ({"performance": {"difference_ci": (0.1, 7.1)}}, {"uncertain denominator"}, "3.6 [0.1, 7.1]"),
    ({"performance": {"difference_ci": (2.5, 4.7)}}, {"uncertain denominator"}, "uncertain"),
    ({"performance": {"difference_ci": (2.55, 4.65)}}, set(), ""),
    ({"performance": {"accuracy": 0.55, "accuracy_ci": (0.5, 0.6)}}, {"task not done"}, "55% [50%, 60%]"),
    ({"performance": {"accuracy_ci": (0.501, 0.99)}}, set(), ""),
    ({"performance": {"accuracy": None, "accuracy_ci": None}}, set(), ""),
    ({"performance": {"n_examples": FEW - 1}}, {"few train examples"}, f"with {FEW - 1} pairs"),
    ({"performance": {"n_examples": FEW}}, set(), ""),
    ({"evaluation": {"n_examples": FEW - 1}}, {"few held-out examples"}, f"on {FEW - 1} pairs"),
    ({"evaluation": {"n_examples": FEW}}, set(), ""),
    ({"evaluation": {"faithfulness": 1.11, "faithfulness_ci": (1.02, 1.3)}}, {"overshoot"}, "1.11 [1.02, 1.30]"),
    (
        {"evaluation": {"faithfulness": 1.1, "faithfulness_ci": (1.0, 1.2)}},
        {"not faithful beyond doubt"},
        "leaves [0.9, 1.1]",
    ),
    ({"evaluation": {"faithfulness_ci": (0.89, 0.99)}}, {"not faithful beyond doubt"}, "0.96 [0.89, 0.99]"),
    ({"evaluation": {"faithfulness_ci": (0.9, 1.1)}}, set(), ""),
    ({"evaluation": {"n_edges_graph": 2 * N - 1}}, {"large circuit"}, "more than half"),
    ({"evaluation": {"n_edges_graph": 2 * N}}, set(), ""),
    ({"stability": {"jaccard": 0.79}}, {"unstable circuit"}, "share 79% of their edges (mean of 100)"),
    ({"stability": {"jaccard": 0.8}}, set(), ""),
    ({"stability": {"n_core": int(0.6 * N) - 1}}, {"small core"}, f"only {int(0.6 * N) - 1} of {N} edges"),
    ({"stability": {"n_core": int(0.6 * N) + 1}}, set(), ""),
    ({"size": {"spread": (50, 73)}}, {"uncertain size"}, "from 50 to 73 edges"),
    ({"size": {"spread": (50, 72)}}, set(), ""),
    ({"size": {"spread": None}}, {"uncertain size"}, "choose no size at all"),
]


@pytest.mark.parametrize(("changes", "names", "words"), CASES, ids=[str(changes) for changes, _, _ in CASES])
def test_a_doubt_is_there_exactly_when_its_number_says_so(
    changes: dict[str, dict[str, Any]], names: set[str], words: str
) -> None:
    found = doubts(document(**changes))
    assert {doubt.name for doubt in found} == names and len(found) == len(names)
    assert all(words in doubt.text for doubt in found)
    assert set(found) <= set(stated_warnings(document(**changes)))


def test_of_a_circuit_of_nodes_nodes_are_counted() -> None:
    edges = document(stability={"jaccard": 0.7, "n_core": 1})
    graph = edges.graph.model_copy(update={"granularity": "node"})
    this = edges.model_copy(update={"graph": graph})
    n = len(set(this.nodes) - {"logits"})
    unstable, core = (doubt.text for doubt in doubts(this) if doubt.name in ("unstable circuit", "small core"))
    assert "share 70% of their nodes" in unstable and core.startswith(f"only 1 of {n} nodes are in 90%")
    assert f"1 of {n} nodes ({1 / n:.0%})" in steadiness(this)[1]


def test_a_size_that_was_given_need_not_be_faithful() -> None:
    """Only one that the rule chose promises to be."""
    this = document(evaluation={"faithfulness": 0.4, "faithfulness_ci": (0.3, 0.5)})
    assert [doubt.name for doubt in doubts(this)] == ["not faithful beyond doubt"]
    given = this.model_copy(update={"selection": this.selection.model_copy(update={"size": None})})
    assert doubts(given) == ()


def test_of_a_given_size_it_is_said_whether_the_rule_lets_it_pass() -> None:
    this = document()
    selection = this.selection.model_copy(update={"size": None, "parameters": {"rule": "top", "edges": 12}})
    point = {"n_selected": 12, "n_edges": N, "faithfulness": 0.97, "faithfulness_ci": (0.9, 1.0)}
    curve: dict[str, Any] = {
        "pairs": "validation", "metric": "logit_diff", "replacement": "corrupt", "seed": 0, "kl_empty": 1.25,
        "points": ({**point, "kl": 0.75, "passing": 0.04}, {**point, "n_selected": 24, "kl": 0.1, "passing": 1.0}),
    }  # fmt: skip
    measured = this.model_copy(update={"selection": selection, "curve": CurveRecord.model_validate(curve)})
    assert steadiness(measured)[0] == (
        "size: given (12 edges); the rule that chooses sizes lets it pass on 4% of resamples of the validation pairs "
        "(faithfulness 0.97 [0.90, 1.00], KL divergence 60% of the empty circuit's)"
    )
    plain = {**curve, "kl_empty": None, "points": (point,)}
    for other in (None, CurveRecord.model_validate(plain)):
        lines = steadiness(measured.model_copy(update={"curve": other}))
        assert len(lines) == 1 and lines[0].startswith("stability")


def test_the_size_and_the_stability_in_sentences() -> None:
    size, stability = steadiness(document(stability={"n_core": 30}))
    assert "the smallest whose interval lies in [0.9, 1.1] on 90% of resamples of the validation pairs" in size
    assert size.endswith("other examples would choose 50 to 70")
    assert stability.startswith(f"stability: 30 of {N} edges ({30 / N:.0%}) are in at least 90% of 100 circuits")
    assert "share 85% of their edges (by chance 10%)" in stability
    assert steadiness(toy_document(CIRCUIT)) == []
