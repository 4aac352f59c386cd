"""A function of logits and pairs is a metric wherever the name of one is taken, and what is wrong with it is said."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.tasks.own_metric import FunctionMetric, as_metric, metric
from tests.support.models_tiny import pairs, tiny

ONLY_NAMES = {"RunSpec", "measured_roles", "PartsReplaced", "EdgesCut", "PathPatched", "reevaluate", "register_metric"}
"""They write the metric into a file, by its name; `RunSpec` is also a command line."""
MADE_BY_OTHERS = {"Completeness", "Evaluation", "HypothesisTest", "Minimality", "Scores", "TaskCheck"}
"""Results, which hold the name."""


def own_logit_diff(logits: Any, pairs: Any) -> Any:
    """The logit difference of one right and one wrong answer, written by hand."""
    last = logits[:, -1]
    return last.gather(1, pairs.right)[:, 0] - last.gather(1, pairs.wrong)[:, 0]


def test_a_function_gives_the_numbers_of_the_metric_that_it_writes_out() -> None:
    model, some = tiny("gpt2"), pairs()
    graph = mi.build_graph(model)

    def measure(how: Any) -> list[torch.Tensor]:
        scores = mi.score_edges(model, graph, some, method="eap", metric=how)
        circuit = mi.select(graph, scores, edges=40)
        return [
            scores.values,
            torch.tensor(mi.evaluate(model, circuit, some, metric=how).faithfulness),
            mi.activation_patching(model, some, "z", metric=how).values,
            mi.attribution_patching(model, some, "z", metric=how).values,
            mi.path_patching(model, some, ["L0H1", "0.2"], ["logits"], metric=how).values,
            mi.run_edges(model, graph, some, graph.possible[None], metric=how),
        ]

    for ours, theirs in zip(measure(own_logit_diff), measure("logit_diff"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)  # the same sums in another order, float64


def test_answers_of_several_positions_are_averaged_over_those_that_exist() -> None:
    some = mi.Pairs(
        clean=[[5, 6, 7], [5, 8, 6]],
        corrupt=[[5, 9, 7], [5, 9, 6]],
        right=[6, 8],
        wrong=[9, 9],
        answer_pos=[[2, 1], [2, -1]],
    )
    logits = torch.arange(2 * 2 * 11.0).reshape(2, 2, 11)
    found = as_metric(lambda logits, pairs: logits[:, :, 0])(logits, some)
    assert found.tolist() == [5.5, 22.0]
    assert as_metric(lambda logits, pairs: logits[:, 0, 0])(logits, some).tolist() == [0.0, 22.0]
    with pytest.raises(InputError, match="reads an answer position that some examples do not have"):
        as_metric(own_logit_diff)(logits, some)
    assert as_metric(own_logit_diff)(logits[:1], some[:1]).tolist() == [-3.0]


def test_the_decorator_says_which_way_is_better() -> None:
    @metric(direction="lower", unit="nats")
    def surprise(logits: Any, pairs: Any) -> Any:
        return -logits[:, -1].log_softmax(-1).gather(1, pairs.right).mean(1)

    assert (surprise.name, surprise.direction, surprise.unit) == ("surprise", -1, "nats")
    model, some = tiny("gpt2"), pairs()
    graph = mi.build_graph(model)
    lower = mi.score_edges(model, graph, some, method="eap", metric=surprise)
    higher = mi.score_edges(model, graph, some, method="eap", metric="log_prob")
    torch.testing.assert_close(lower.values, higher.values, rtol=0, atol=1e-10)  # one is minus the other; turned
    assert isinstance(metric(lambda logits, pairs: logits[:, 0, 0]), FunctionMetric)
    assert as_metric(surprise) is surprise and as_metric("prob").name == "prob"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda logits, pairs: logits[:, -1, 0].mean(), r"one number per example, \[4\] .* got shape \[\]"),
        (lambda logits, pairs: logits[:, -1], r"got shape \[4, 50\]"),
        (lambda logits, pairs: 1.0, "got float"),
        (lambda logits: logits, r"must take two arguments, \(logits, pairs\)"),
        (3, "A metric is a name, a Metric, or a function"),
        ("logitdiff", "Did you mean 'logit_diff'"),
    ],
)
def test_a_wrong_metric_is_one_line(function: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        # Past the checks of the annotations, as an installed package is.
        as_metric(function)(torch.zeros(4, 1, 50, dtype=torch.float64), pairs(4))


def test_a_metric_without_gradient_is_refused_where_one_is_needed() -> None:
    model, some = tiny("gpt2"), pairs()
    graph = mi.build_graph(model)

    def best(logits: Any, pairs: Any) -> Any:
        return (logits[:, -1].argmax(-1) == pairs.right[:, 0]).double()

    with pytest.raises(InputError, match="No gradient goes through the metric 'best'"):
        mi.score_edges(model, graph, some, method="eap", metric=best)
    with pytest.raises(InputError, match="best"):
        mi.score_edges(model, graph, some, method="eap", metric=metric(best, differentiable=False))
    assert mi.activation_patching(model, some, "z", metric=best).values.shape[0] == 3


def test_names_are_not_taken_twice_and_files_and_states_need_registered_ones(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="'accuracy' is registered already"):
        metric(own_logit_diff, name="accuracy")
    with pytest.raises(InputError, match="Unknown direction 'up'"):
        metric(direction="up")
    model, some = tiny("gpt2"), pairs()
    graph = mi.build_graph(model)
    with pytest.raises(InputError, match=r"is not registered; call mi\.register_metric first"):
        mi.score_edges(model, graph, some, method="exact", metric=own_logit_diff, resume=tmp_path / "state")
    circuit = mi.select(graph, mi.score_edges(model, graph, some, method="eap", metric=own_logit_diff), edges=40)
    with pytest.raises(InputError, match="'own_logit_diff' is not registered, so a circuit file cannot state it"):
        mi.save_circuit(tmp_path / "x.circuit.json", circuit, model=model)


def test_every_function_that_takes_the_name_of_a_metric_takes_a_function() -> None:
    taking = set[str]()
    for name in mi.__all__:
        value = getattr(mi, name)
        if callable(value) and "metric" in (parameters := _parameters(value)):
            if "MetricLike" in str(parameters["metric"].annotation):
                taking.add(name)
            else:
                assert name in ONLY_NAMES | MADE_BY_OTHERS, name
    assert {
        "score_edges",
        "evaluate",
        "activation_patching",
        "path_patching",
        "compare_methods",
        "top_neurons",
    } <= taking


def _parameters(value: Any) -> Any:
    try:
        return inspect.signature(value).parameters
    except ValueError:
        return {}
