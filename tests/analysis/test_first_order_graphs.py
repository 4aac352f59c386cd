"""Attribution graphs whose patterns and norms move: derivatives, against the closed form and real interventions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.attribution_graph.frozen_run import Seed, check_transcoders, freeze
from mechinterp.analysis.attribution_graph.held_run import HELD, backward_in_model
from mechinterp.analysis.attribution_graph.validate import _correlation
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.features.dictionary import transcoder
from tests.analysis.test_attribution_graph import PROMPT, a_cross_layer_transcoder, a_set, drawn, exact
from tests.support.models_tiny import D_MODEL, SHAPES, native, tiny


def columns(found: mi.GraphValidation, *names: str) -> list[torch.Tensor]:
    return [torch.tensor(found.frame[name].to_numpy()) for name in names]


@pytest.mark.parametrize("shape", (*SHAPES, "no-norm"))
def test_with_all_held_the_gradient_in_the_model_is_the_closed_form(shape):
    """Autograd through the edited model, which knows nothing of the closed form; several layers in one batch."""
    model = tiny(shape)
    bases = check_transcoders(model, a_set(W_skip=0.1 * drawn(D_MODEL, D_MODEL, seed=50)))
    run = freeze(model, PROMPT, bases)
    seeds = [Seed(row, layer, "mlp_in", 4 - row, drawn(D_MODEL, seed=row)) for row, layer in enumerate((0, 2, 1))]
    for some in (seeds, [Seed(0, model.dims.n_layers, "resid_final", len(PROMPT) - 1, drawn(D_MODEL))]):
        expected = {key: g.clone() for key, g in run.backward(some, len(some))}
        found = dict(backward_in_model(run, some, len(some), "norms"))
        assert found.keys() >= {key for key, g in expected.items() if g.any()}
        for key, g in found.items():
            torch.testing.assert_close(g, expected.get(key, torch.zeros_like(g)), rtol=1e-4, atol=10 * exact(shape))
    if shape not in ("attention-only", "no-norm"):  # the check can fail: what moves is something else
        moving = dict(backward_in_model(run, some, 1, "nothing"))
        assert not torch.allclose(moving["input", -1], expected["input", -1], rtol=1e-2)


def a_relu_model():
    """A model with layer norms whose MLPs are transcoders: nothing is missed, and ReLUs are far from switching."""
    bridge = native("no-norm", act_fn="relu", normalization_type="LN", scale=0.1, d_mlp=6)
    with torch.no_grad():
        for block in bridge.blocks:
            block.mlp.b_in.fill_(3.0)
    model = mi.load_model(bridge)
    return model, [
        transcoder(f"mlp_in.{i}", f"mlp_out.{i}", m.W_in, m.W_out, b_enc=m.b_in, b_dec=m.b_out)
        for i, m in enumerate(model.layout.mlp_maps)
    ]


@pytest.mark.slow
def test_weak_interventions_are_the_gradient_and_the_gradient_is_the_graph():
    """The limit of free interventions is the model's gradient, and that is all paths of a graph in which all moves."""
    model, bases = a_relu_model()
    graphs = {held: mi.attribution_graph(model, PROMPT[:5], bases, targets=[3, 4], held=held) for held in HELD}
    for held, graph in graphs.items():
        found = mi.validate_graph(model, graph, bases, n=6, held=held)
        predicted, gradient = columns(found, "predicted", "gradient")
        torch.testing.assert_close(predicted, gradient, rtol=1e-8, atol=1e-11)
        gaps = []
        for strength in (1e-2, 1e-3):
            weak = mi.validate_graph(model, graph, bases, n=6, held=held, strength=strength)
            predicted, measured = columns(weak, "predicted", "measured")
            gaps.append(float((measured - predicted).abs().max() / predicted.abs().max()))
        # The difference from the derivative is of the second order: ten times weaker, ten times smaller.
        assert gaps[1] < 2e-3 and (held == "norms" or gaps[0] > 5 * gaps[1])
    frozen = mi.validate_graph(model, graphs["norms"], bases, n=6, held="nothing", strength=1e-3)
    predicted, gradient = columns(frozen, "predicted", "gradient")
    assert not torch.allclose(predicted, gradient, rtol=0.1) and frozen.gradient > 1 - 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_first_order_edges_are_central_differences(shape):
    model = tiny(shape)
    sets = {"skip": a_set(W_skip=0.1 * drawn(D_MODEL, D_MODEL, seed=50)), "cross": list(a_cross_layer_transcoder())}
    if not model.dims.parallel:
        sets["before the norm"] = a_set(read="resid_mid", W_skip=0.1 * drawn(D_MODEL, D_MODEL, seed=53))
    name, bases = list(sets.items())[SHAPES.index(shape) % len(sets)]
    for held in ("patterns", "nothing"):
        graph = mi.attribution_graph(model, PROMPT, bases, targets=[3, 4], held=held)
        assert graph.about["held"] == held and "gap" not in graph.about
        assert mi.validate_edges(model, graph, bases, n=3).worst < 0.02, name  # second-order terms of a step of 1%
        assert graph.weights[-2:].abs().max() > 1e-3


@pytest.mark.slow
def test_the_bundled_model_behaves_as_its_first_order_graph_says():
    """What real ablations do: predicted where patterns and norms move, not predicted where they are held."""
    model = mi.load_model("bundled")
    bases = mi.load_bases("bundled:transcoders", model=model, check=False)
    pairs = mi.load_task("ioi").pairs(model, n=2, seed=0)
    right, wrong = int(pairs.right[0].flatten()[0]), int(pairs.wrong[0].flatten()[0])
    found = {}
    for held in ("norms", "nothing"):
        graph = mi.attribution_graph(
            model, pairs.clean[0, : int(pairs.lengths[0])], bases, targets={"d": {right: 1.0, wrong: -1.0}}, held=held
        )
        found[held] = mi.validate_graph(model, graph, bases)
    assert found["nothing"].pearson > 0.7 > found["norms"].pearson + 0.3
    assert found["nothing"].pearson > found["nothing"].shuffled + 0.2
    assert found["norms"].gradient > 0.7  # it is not that ablations are too strong for a derivative


def test_what_is_not_possible_is_refused():
    model, bases = tiny("gpt2"), a_set()
    with pytest.raises(InputError, match="Unknown part to hold"):
        mi.attribution_graph(model, PROMPT, bases, held="all")
    graph = mi.attribution_graph(model, PROMPT, bases, targets=[3])
    with pytest.raises(InputError, match="strength"):
        mi.validate_graph(model, graph, bases, strength=0.0)
    gemma = next(tiny(shape) for shape in SHAPES if tiny(shape).has("mlp_raw.0"))
    with pytest.raises(UnsupportedError, match="post-norm"):
        mi.attribution_graph(gemma, PROMPT, a_set(write="mlp_raw"), held="nothing")


def test_an_edge_that_is_not_finite_is_not_an_exact_edge():
    model, bases = tiny("gpt2"), a_set()
    graph = mi.attribution_graph(model, PROMPT, bases, targets=[3])
    weights = graph.weights.clone()
    weights[-1] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        mi.validate_edges(model, replace(graph, weights=weights), bases)
    for factor in (float("inf"), float("nan"), 1.0):
        with pytest.raises(InputError, match="finite number other than 1"):
            mi.validate_edges(model, graph, bases, factor=factor)
    assert mi.validate_edges(model, graph, bases, n=2, factor=0.0).factor == 0


def test_shuffled_predictions_are_of_whole_features():
    """A target named twice says nothing new: neither correlation nor its control changes."""
    model, bases = tiny("gpt2"), a_set()
    once, twice = (
        mi.validate_graph(model, mi.attribution_graph(model, PROMPT, bases, targets=targets), bases, n=12)
        for targets in ({"a": {3: 1.0}}, {"a": {3: 1.0}, "b": {3: 1.0}})
    )
    assert len(twice.frame) == 2 * len(once.frame)
    assert twice.pearson == pytest.approx(once.pearson) and twice.shuffled == pytest.approx(once.shuffled)


def test_what_does_not_vary_has_no_correlation() -> None:
    rising = torch.arange(4.0)
    assert bool(_correlation(torch.zeros(4), rising).isnan()) and float(
        _correlation(rising, 2 * rising)
    ) == pytest.approx(1)
