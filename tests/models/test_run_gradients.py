"""Gradients of a run, and edits of gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mechinterp.base.errors import InputError
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.interventions import Intervention
from mechinterp.models.sites import Site
from tests.support.models_tiny import ALL_FLOAT64, EVERY, as_installed, build, tiny, tokens

X = tokens(3, 7)
ROUND_TRIP = 1e-12  # the same numbers through the same code, but batched otherwise: float64 rounding only


def run(model: HookManager, *args: Any, **keywords: Any) -> Any:
    """`model.run` as an installed package has it."""
    return as_installed(HookManager.run)(model, *args, **keywords)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """At every site, in a random direction: the slope of the loss when the value moves there."""
    model = tiny(name)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(model.run(X).logits.shape, generator=generator, dtype=model.dtype)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return (weights * logits).sum((1, 2))

    sites = model.sites()
    result = model.run(X, record=sites, grads=sites, loss=loss)
    assert torch.equal(result.loss, loss(result.logits))
    # Central differences; where Hugging Face computes in float32, noise 1e-7/eps asks for a larger step.
    eps, tolerance = (1e-5, 1e-6) if name in ALL_FLOAT64 else (3e-3, 2e-3)
    for site in sites:
        direction = torch.randn(result.values[site].shape, generator=generator, dtype=model.dtype)
        direction = direction.masked_fill(result.values[site] == -torch.inf, 0)  # masked scores stay masked
        direction /= direction.norm()
        direction[result.values[site] < -1e30] = 0  # as above, where the mask is the lowest number instead

        def at(step: float, site: Site = site, direction: torch.Tensor = direction) -> torch.Tensor:
            edited = model.run(X, interventions={site: lambda value: value + step * direction})
            return loss(edited.logits).sum()

        slope = (at(eps) - at(-eps)) / (2 * eps)
        expected = (result.grads[site] * direction).sum()
        assert float(slope - expected) == pytest.approx(0, abs=tolerance * (1 + float(result.grads[site].norm()))), site


def test_gradients_need_no_trainable_weights_and_leave_none() -> None:
    model = build("gpt2")
    for parameter in model.bridge.parameters():
        parameter.requires_grad_(True)
    trained = model.run(X, grads=["z.0"], loss=lambda logits: logits.sum()).grads["z.0"]
    assert all(parameter.grad is None for parameter in model.bridge.parameters())
    frozen = tiny("gpt2").run(X, grads=["z.0"], loss=lambda logits: logits.sum()).grads["z.0"]
    torch.testing.assert_close(trained, frozen)
    with torch.no_grad():
        inside = model.run(X, grads=["z.0"], loss=lambda logits: logits.sum()).grads["z.0"]
    torch.testing.assert_close(inside, frozen)


def test_an_edited_gradient_flows_on_edited() -> None:
    """Zeroing the gradient at z of layer 2 takes away what went through its attention, and nothing else."""
    model = tiny("gpt2")
    sites = ["q.2", "mlp_in.2", "z.2"]
    keywords: dict[str, Any] = {"grads": sites, "loss": lambda logits: logits[..., 3].sum()}
    plain = model.run(X, **keywords).grads
    stopped = model.run(X, interventions=[Intervention("z.2", grad=torch.zeros_like)], **keywords).grads
    assert float(plain["q.2"].abs().sum()) > 0
    assert float(stopped["q.2"].abs().sum()) == 0
    assert torch.equal(stopped["mlp_in.2"], plain["mlp_in.2"])
    doubled = model.run(X, interventions=[Intervention("z.2", grad=lambda g: 2 * g)], **keywords).grads
    torch.testing.assert_close(doubled["q.2"], 2 * plain["q.2"])
    assert torch.equal(doubled["z.2"], 2 * plain["z.2"])  # edited before it is recorded, like a value
    with pytest.raises(InputError, match="keep shape"):
        model.run(X, interventions=[Intervention("z.2", grad=lambda g: g[:1])], **keywords)


def test_gradient_edits_run_outer_first_also_at_the_stop_site() -> None:
    model = tiny("gpt2")
    keywords: dict[str, Any] = {"grads": ["z.1"], "stop": "z.1", "loss": lambda z: z.sum()}
    with model.intervene(Intervention("z.1", grad=lambda g: g + 1)):
        found = model.run(X, interventions=[Intervention("z.1", grad=lambda g: g * 3)], **keywords).grads["z.1"]
    assert torch.equal(found, torch.full_like(found, 6.0))  # (1 + 1) * 3


def test_the_loss_may_be_of_the_value_at_the_stop_site() -> None:
    model = tiny("gpt2")
    result = model.run(X, grads=["z.1"], stop="resid_final", loss=lambda resid: model.layout.unembed(resid).sum())
    full = model.run(X, grads=["z.1"], loss=lambda logits: logits.sum())
    torch.testing.assert_close(result.grads["z.1"], full.grads["z.1"])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"loss": lambda logits: logits.sum()}, "only one of them"),
        ({"grads": ["z.0"]}, "only one of them"),
        ({"grads": ["z.0"], "loss": lambda logits: 1.0}, "must return a tensor; got float"),
        ({"grads": ["z.0"], "loss": lambda logits: torch.zeros(3)}, "does not depend"),
        ({"grads": "z.0", "loss": lambda logits: logits.sum()}, "a list of sites"),
    ],
)
def test_gradients_that_make_no_sense_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tiny("gpt2"), X, **keywords)


def test_inference_mode_is_named_as_the_reason() -> None:
    model = tiny("gpt2")
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        model.run(X, grads=["z.0"], loss=lambda logits: logits.sum())
