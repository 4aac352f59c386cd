"""Predictions: each measure is the number of its analysis, controls can refute, and `verify` measures all again."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import mechinterp as mi
from mechinterp.base.errors import FormatError, InputError
from mechinterp.circuit_file.store import open_circuit_file
from mechinterp.engines.replacement import build_replacement
from mechinterp.evaluation.predictions import Control, Prediction
from tests.circuit_file.test_verify import edited, failed
from tests.support import models_tiny as tiny
from tests.support.models_tiny import SHAPES

EVERY_MEASURE = (
    mi.PartsReplaced(parts=("a1.h0", "m0")),
    mi.PartsReplaced(parts=("a1.h0<q>@here",), replacement="zero"),
    mi.EdgesCut(edges=("a0.h0->a1.h2<q>", "m0->logits")),
    mi.EdgesCut(edges=("a0.h0->a1.h2<q>",), replacement="mean", metric="kl_to_clean"),
    mi.Attention(head="a1.h2", query="here", key=1),
    mi.Attention(head="a1.h2", query=-1, key="here", prompt="corrupt"),
    mi.DirectEffect(node="a2.h1"),
    mi.DirectEffect(node="m1"),
    mi.DirectEffectChange(node="a2.h0", replaced=("a0.h1", "a1.h2"), replacement="zero"),
    mi.PathPatched(senders=("a0.h0",), receivers=("a1.h2<q>", "a2.h0<q>")),
)


def some_pairs() -> mi.Pairs:
    return tiny.pairs(4, positions={"here": torch.full((4,), 2)}, padded=True)


def predicted(measure: Any, value: float = 0.0, relation: str = ">=", **more: Any) -> Prediction:
    return Prediction.model_validate(
        {"name": str(measure), "measure": measure, "value": value, "relation": relation, **more}
    )


def measured(model: mi.HookManager, pairs: mi.Pairs | None, *measures: Any, **how: Any) -> list[float]:
    found = mi.check_predictions(model, [predicted(one) for one in measures], pairs, **how)
    return [entry.value for entry in found]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_every_measure_is_the_number_of_its_analysis(shape: str) -> None:
    model, pairs = tiny.tiny(shape), some_pairs()
    graph = mi.build_graph(model)
    cut = graph.mask_of(["a0.h0->a1.h2<q>", "m0->logits"])
    full = torch.zeros_like(cut)
    expected = [
        float(mi.activation_patching(model, pairs, [("a1.h0", "m0")]).mean().values),
        float(mi.activation_patching(model, pairs, ["a1.h0<q>@here"], replacement="zero").mean().values),
        float((mi.run_edges(model, graph, pairs, full) - mi.run_edges(model, graph, pairs, cut)).mean()),
    ]
    got = measured(model, pairs, *EVERY_MEASURE[:3])
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
    attention, back = measured(model, pairs, *EVERY_MEASURE[4:6])
    assert attention == pytest.approx(float(mi.attention_to(model, pairs, "here", 1).mean().at(layer=1, head=2)))
    assert back == pytest.approx(
        float(mi.attention_to(model, pairs, -1, "here", prompt="corrupt").mean().at(layer=1, head=2))
    )
    parts = mi.direct_logit_attribution(model, pairs)
    assert measured(model, pairs, *EVERY_MEASURE[6:8]) == pytest.approx(
        [float(parts.mean().at(node=node)) for node in ("a2.h1", "m1")]
    )
    rise = mi.compensation(model, pairs, ["a0.h1", "a1.h2"], replacement="zero").mean()
    paths = mi.path_patching(model, pairs, [("a0.h0",)], ["a1.h2<q>", "a2.h0<q>"]).mean()
    expected = [float(rise.at(node="a2.h0")), float(paths.values)]
    assert measured(model, pairs, *EVERY_MEASURE[8:]) == pytest.approx(expected, rel=1e-5)


def test_without_pairs(bundled_model: mi.HookManager) -> None:
    model = bundled_model
    detector, copying = mi.Detector(head="a0.h0", pattern="previous_token", n=4), mi.Copying(head="a3.h2")
    got = measured(model, None, detector, copying)
    scores = mi.head_scores(model, "previous_token", n=4).mean()
    assert got == pytest.approx(
        [float(scores.at(layer=0, head=0)), float(mi.copying_scores(model).at(layer=3, head=2))]
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gpt2", "gemma2"])
def test_a_number_does_not_depend_on_the_batch(shape: str) -> None:
    model = tiny.tiny(shape)
    whole = measured(model, some_pairs(), *EVERY_MEASURE, batch_size=4)
    # Some operations of gemma2 run in float32 even when the weights are float64.
    assert measured(model, some_pairs(), *EVERY_MEASURE, batch_size=3) == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_a_metric_that_is_better_when_lower_has_the_opposite_sign() -> None:
    """Cutting edges raises the KL from 0, so a positive number means that they help."""
    model, pairs = tiny.tiny("gpt2"), some_pairs()
    graph = mi.build_graph(model)
    means = build_replacement("mean", model, graph, pairs)
    cuts = torch.stack([graph.mask_of(EVERY_MEASURE[3].edges), *(graph.mask_of([e]) for e in graph.edge_names()[::40])])
    kl = mi.run_edges(model, graph, pairs, cuts, metric="kl_to_clean", replacement=means).mean(1).tolist()
    cut_alone = [
        mi.EdgesCut(edges=(edge,), replacement="mean", metric="kl_to_clean") for edge in graph.edge_names()[::40]
    ]
    # The KL of masks that run in different batches differs by rounding.
    assert measured(model, pairs, EVERY_MEASURE[3], *cut_alone) == pytest.approx(kl, rel=1e-6, abs=1e-9)
    assert all(value > 0 for value in kl)


@pytest.mark.parametrize("shape", ["gpt2", "gemma2"])
def test_attention_between_is_attention_to(shape: str) -> None:
    model, pairs = tiny.tiny(shape), some_pairs()
    both = mi.attention_between(model, pairs, ["here", 1, -1], batch_size=3)
    for query, key in (("here", "here"), ("here", 1), (1, -1), (-1, "here"), (-1, 1)):
        expected = mi.attention_to(model, pairs, query, key).values
        torch.testing.assert_close(both.at(query=str(query), key=str(key)).values, expected, check_dtype=False)


def test_which_side() -> None:
    at_least, at_most = predicted(EVERY_MEASURE[6], 1.0), predicted(EVERY_MEASURE[6], 1.0, "<=")
    assert at_least.holds(1.0) and at_least.refuted(0.999) and not at_least.refuted(1.0)
    assert at_most.holds(1.0) and at_most.refuted(1.001) and not at_most.refuted(1.0)
    for one in (at_least, at_most):
        assert not one.holds(math.nan) and not one.refuted(math.nan)


def test_a_prediction_is_ok_only_with_its_controls() -> None:
    model, pairs = tiny.tiny("gpt2"), some_pairs()
    low, high = sorted(
        (mi.DirectEffect(node="a2.h1"), mi.DirectEffect(node="a2.h2")), key=lambda m: measured(model, pairs, m)
    )
    middle = sum(measured(model, pairs, low, high)) / 2
    low_control = Control(measure=low)
    good = predicted(high, middle, controls=[low_control])
    assert mi.check_predictions(model, [good], pairs)[0].ok
    below = measured(model, pairs, low)[0] - 1  # so low that the control is on the same side
    for bad in (predicted(low, middle), predicted(high, middle, "<="), predicted(high, below, controls=[low_control])):
        assert not mi.check_predictions(model, [bad], pairs)[0].ok
    frame = mi.predictions_frame(mi.check_predictions(model, [good], pairs))
    assert frame["what"].tolist() == ["prediction", "control"] and frame["holds"].all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"measure": {"kind": "magic"}}, "magic"),
        ({"measure": {"kind": "attention", "head": "m3", "query": "a", "key": "b"}}, "'m3' is not a head"),
        ({"measure": {"kind": "edges cut", "edges": ["a0.h0->a1.h2<q>@S2"]}}, "at all positions"),
        ({"measure": {"kind": "edges cut", "edges": ["nonsense"]}}, "is not an edge"),
        ({"value": math.nan}, "finite"),
        ({"relation": "=="}, ">="),
        ({"surprise": 1}, "surprise"),
        ({"controls": [{"measure": {"kind": "copying", "head": "a0.h0"}}]}, "same kind"),
        ({"controls": [{"measure": {"kind": "direct effect", "node": "a2.h1"}}]}, "itself as a control"),
    ],
)
def test_an_invalid_prediction_is_refused(change: dict[str, Any], match: str) -> None:
    given = {"name": "x", "measure": {"kind": "direct effect", "node": "a2.h1"}, "relation": ">=", "value": 1.0}
    Prediction.model_validate(given)
    with pytest.raises(ValidationError, match=match):
        Prediction.model_validate({**given, **change})


def test_what_cannot_be_measured_is_an_input_error() -> None:
    model, pairs = tiny.tiny("gpt2"), some_pairs()
    for measure, match in (
        (mi.DirectEffect(node="a9.h9"), "a9.h9"),
        (mi.Attention(head="a9.h9", query=-1, key=0), "a9.h9"),
        (mi.Attention(head="a0.h0", query="nowhere", key=0), "nowhere"),
        (mi.PartsReplaced(parts=("a9.h9",)), "9"),
        (mi.DirectEffectChange(node="a9.h9", replaced=("a0.h0",)), "a9.h9"),
        (mi.DirectEffectChange(node="a1.h1", replaced=("a9.h9",)), "9"),
        (mi.PathPatched(senders=("a9.h9",), receivers=("a1.h0<q>",)), "9"),
        (mi.PathPatched(senders=("a0.h0",), receivers=("a9.h9<q>",)), "9"),
        (mi.EdgesCut(edges=("a1.h0->a0.h0<q>",)), "no edge"),
    ):
        with pytest.raises(InputError, match=match):
            measured(model, pairs, measure)
    with pytest.raises(InputError, match="needs pairs"):
        measured(model, None, mi.DirectEffect(node="m0"))
    with pytest.raises(InputError, match="a name of its own"):
        mi.check_predictions(model, [predicted(mi.DirectEffect(node="m0"))] * 2, pairs)


def test_a_name_and_a_number_that_look_alike_are_refused() -> None:
    pairs = tiny.pairs(3, positions={"1": torch.full((3,), 4)})
    both = [mi.Attention(head="a0.h0", query=-1, key=key) for key in ("1", 1)]
    for one in both:
        measured(tiny.tiny("gpt2"), pairs, one)
    predictions = [predicted(one, name=str(i)) for i, one in enumerate(both)]
    with pytest.raises(InputError, match="each position once"):
        mi.check_predictions(tiny.tiny("gpt2"), predictions, pairs)


@pytest.mark.parametrize("place", ["--5", "9" * 50, "-" + "9" * 30, "5-", "\u0661"])
def test_a_position_that_is_not_a_number_is_an_input_error(place: str) -> None:
    for measure in (mi.Attention(head="a0.h0", query=place, key=0), mi.PartsReplaced(parts=(f"a0.h0@{place}",))):
        with pytest.raises(InputError):
            measured(tiny.tiny("gpt2"), some_pairs(), measure)


@pytest.mark.parametrize("kind", ["previous_token", "duplicate_token", "induction"])
def test_detector_scores_do_not_depend_on_the_batch(kind: str, bundled_model: mi.HookManager) -> None:
    whole = mi.head_scores(bundled_model, kind, n=3).values
    torch.testing.assert_close(mi.head_scores(bundled_model, kind, n=3, batch_size=2).values, whole)


@pytest.mark.slow
def test_a_prediction_of_another_model_is_not_saved(tmp_path: Path) -> None:
    model, pairs, path = tiny.tiny("gpt2"), some_pairs(), tmp_path / "x.circuit.json"
    graph = mi.build_graph(model)
    circuit = mi.Circuit(graph, graph.possible, graph.n_edges)
    holds = predicted(mi.DirectEffect(node="m0"), -1e6)
    loaded_again, other = (mi.check_predictions(tiny.build("gpt2", seed=seed), [holds], pairs) for seed in (0, 1))
    mi.save_circuit(path, circuit, model=model, predictions=loaded_again)
    with pytest.raises(InputError, match="another model"):
        mi.save_circuit(path, circuit, model=model, predictions=other)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, bundled_model: mi.HookManager) -> Path:
    """A circuit file of the bundled model with two predictions, one of which needs no pairs."""
    model = bundled_model
    task = mi.load_task("ioi")
    train, test = (task.pairs(model, n=10, split=split, seed=0) for split in ("train", "test"))
    graph = mi.build_graph(model)
    circuit = mi.select(graph, mi.score_edges(model, graph, train, method="eap"), edges=60)
    wanted = [
        predicted(
            mi.Attention(head="a0.h0", query="S1+1", key="S1"),
            0.5,
            controls=[Control(measure=mi.Attention(head="a0.h1", query="S1+1", key="S1"))],
        ),
        predicted(mi.Detector(head="a0.h0", pattern="previous_token"), 0.5),
    ]
    path = tmp_path_factory.mktemp("stored") / "some.circuit.json"
    checked = mi.check_predictions(model, wanted, test)
    mi.save_circuit(path, circuit, model=model, task=task, predictions=checked)
    false = mi.check_predictions(model, [predicted(mi.Copying(head="a0.h0"), 2.0)])
    with pytest.raises(InputError, match="states predictions that hold"):
        mi.save_circuit(path.with_name("false.circuit.json"), circuit, model=model, task=task, predictions=false)
    assert not path.with_name("false.circuit.json").exists()
    return path


@pytest.mark.slow
def test_verify_measures_again(stored: Path) -> None:
    found = mi.verify(stored)  # loads the model again, as the file says
    names = [claim.name for claim in found.claims if claim.name.startswith(("prediction ", "control of "))]
    assert found.ok and len(names) == 6  # two predictions and a control, each with the number that was measured
    (text,) = (entry.text for entry in found.warnings if entry.name == "predictions without controls")
    assert text.startswith("without a negative control")
    held = open_circuit_file(stored).document.predictions
    assert held is not None and [entry.pairs is None for entry in held] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "claims"),
    [
        (lambda p: p.update(value=0.9999), {"prediction"}),
        (lambda p: p.update(measured=0.6), {"prediction, measured"}),
        (lambda p: p.update(relation="<="), {"prediction", "control"}),
        (lambda p: p["controls"][0]["measure"].update(head="a0.h0", key="S1+1"), {"control, measured"}),
        (lambda p: p["controls"][0]["measure"].update(head="a1.h3"), {"control", "control, measured"}),
        (lambda p: p["measure"].update(query="nowhere"), {"prediction"}),
        (lambda p: p["measure"].update(query="--5"), {"prediction"}),
    ],
)
def test_verify_says_which_does_not_hold(
    stored: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], claims: set[str]
) -> None:
    path = tmp_path / stored.name
    for one in stored.parent.glob("some.*"):
        (tmp_path / one.name).write_bytes(one.read_bytes())
    edited(path, lambda content: change(content["predictions"][0]))
    label = "a0.h0 attends from S1+1 to S1 with"
    expected = {c.replace("prediction", f"prediction {label}") for c in claims}
    assert failed(path) == {c.replace("control", f"control of {label}") for c in expected}


def test_a_file_with_nonsense_is_refused(stored: Path, tmp_path: Path) -> None:
    for change, match in (
        (lambda c: c["predictions"][0].update(pairs=None), "names its pairs"),
        (lambda c: c["predictions"][1].update(pairs="predictions"), "names its pairs"),
        (lambda c: c["predictions"].append(c["predictions"][0]), "same name"),
        (lambda c: c["predictions"][0].update(pairs="others"), "not described"),
    ):
        path = tmp_path / stored.name
        path.write_bytes(stored.read_bytes())
        with pytest.raises(FormatError, match=match):
            open_circuit_file(edited(path, change, sealed=False))
