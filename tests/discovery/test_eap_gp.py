"""`eap-gp`: the path and the scores against plain autograd; where it is `eap`; what the path itself does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.engines.gradient_path import gradient_path
from mechinterp.engines.readout import FINAL, metric_readout
from mechinterp.models.hook_manager import Intervention, load_model
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import get_metric
from tests.support.models_tiny import SHAPES, huggingface, native, pairs, tiny

START = Site("resid_pre", 0)


def test_on_a_linear_model_it_is_eap() -> None:
    """Without norms, with patterns that depend on nothing, the gradient is the same everywhere."""
    bridge = native("attention-only", normalization_type=None)
    with torch.no_grad():
        for name, parameter in bridge.named_parameters():
            if any(part in name for part in (".q.", ".k.", "W_Q", "W_K", "b_Q", "b_K")):
                parameter.zero_()
    model, some = load_model(bridge), pairs(4, padded=True)
    graph = mi.build_graph(model)
    eap = mi.score_edges(model, graph, some, method="eap").values
    exact = mi.score_edges(model, graph, some, method="exact").values
    found = mi.score_edges(model, graph, some, method="eap-gp", steps=3).values
    assert float(eap.abs().max()) > 0.1
    torch.testing.assert_close(eap, exact, rtol=1e-9, atol=1e-9)  # it is linear
    torch.testing.assert_close(found, eap, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_the_edges_out_of_the_input_sum_to_plain_autograd(name: str) -> None:
    """The path and the mean gradient by Hugging Face's own model, one prompt at a time."""
    module, some, steps, length = huggingface(name), pairs(3, 6), 3, 0.7
    assert some.right is not None and some.wrong is not None

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        return module.get_input_embeddings()(tokens).detach()

    def logits(resid: torch.Tensor) -> torch.Tensor:
        return module(inputs_embeds=resid).logits[:, -1]

    expected = 0.0
    for row in range(len(some)):
        point, corrupt = embed(some.clean[row : row + 1]), embed(some.corrupt[row : row + 1])
        clean, total = point, torch.zeros_like(point)
        target = logits(corrupt).detach()
        for _ in range(steps):
            point = point.detach().requires_grad_()
            (slope,) = torch.autograd.grad((logits(point) - target).square().sum(), point)
            point = (point - length * slope / slope.norm()).detach().requires_grad_()
            out = logits(point)[0]
            total += torch.autograd.grad(out[some.right[row, 0]] - out[some.wrong[row, 0]], point)[0] / steps
        expected += float((total * (clean - corrupt)).sum()) / len(some)
    model = mi.load_model(module)
    found = mi.score_edges(model, mi.build_graph(model), some, method="eap-gp", steps=steps, length=length)
    assert float(found.values[:, 0].sum()) == pytest.approx(expected, rel=1e-4, abs=1e-5)  # norms in float32
    straight = mi.score_edges(model, mi.build_graph(model), some, method="eap-ig", steps=steps)
    assert abs(float(straight.values[:, 0].sum()) - expected) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_along_the_path_the_gradient_is_complete(name: str) -> None:
    """What the small steps add up to is the change of the metric from the clean input to the path's end."""
    model, some, metric = tiny(name), pairs(3, 6), get_metric("logit_diff")
    graph = mi.build_graph(model)
    points = gradient_path(model, graph, some, steps=40, length=0.02)
    readout = metric_readout(model, some, metric)

    def at(point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        run = model.run(
            some.clean,
            some.mask,
            interventions=[Intervention(START, point)],
            grads=[START],
            loss=readout.of_resid,
            stop=FINAL,
        )
        assert run.loss is not None
        return run.loss, run.grads[START]

    clean = model.run(some.clean, some.mask, record=[START], stop=START).values[START]
    way = [clean, *(point[START] for point in points)]
    values, slopes = zip(*(at(point) for point in way), strict=True)
    moved = sum(
        ((after - before) * (one + other) / 2).flatten(1).sum(1)
        for (before, after), (one, other) in zip(pairwise(way), pairwise(slopes), strict=True)
    )
    torch.testing.assert_close(moved, values[-1] - values[0], rtol=2e-2, atol=2e-3)  # the trapezoidal rule
    lengths = [(after - before).flatten(1).norm(dim=1) for before, after in pairwise(way)]
    torch.testing.assert_close(torch.stack(lengths), torch.full((40, 3), 0.02, dtype=lengths[0].dtype))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("metric", ["logit_diff", "kl_to_clean"])
def test_batches_and_padding_change_nothing(name: str, metric: str) -> None:
    """The paper's step is of unit length for each example, whatever the others are."""
    model, some = tiny(name), pairs(5, padded=True)
    graph = mi.build_graph(model)
    keywords: dict[str, Any] = {"method": "eap-gp", "metric": metric, "steps": 2}
    whole = mi.score_edges(model, graph, some, batch_size=5, **keywords)
    parts = mi.score_edges(model, graph, some, batch_size=2, **keywords)
    torch.testing.assert_close(parts.values, whole.values, rtol=1e-4, atol=1e-5)
    assert bool((whole.values != 0).any())


def test_without_a_difference_nothing_moves() -> None:
    model, some = tiny("gpt2"), pairs(3)
    same = mi.Pairs(clean=some.clean, corrupt=some.clean, right=some.right, wrong=some.wrong)
    graph = mi.build_graph(model)
    (point,) = gradient_path(model, graph, same, steps=1)
    clean = model.run(same.clean, record=[START], stop=START).values[START]
    assert torch.equal(point[START], clean)
    assert float(mi.score_edges(model, graph, same, method="eap-gp").values.abs().max()) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be"),
        ({"length": 0.0}, "length must be"),
        ({"metric": "accuracy"}, "no gradient"),
    ],
)
def test_bad_settings_get_one_clear_line(settings: dict[str, Any], message: str) -> None:
    model = tiny("gpt2")
    with pytest.raises(mi.InputError, match=message):
        mi.score_edges(model, mi.build_graph(model), pairs(2), method="eap-gp", **settings)
