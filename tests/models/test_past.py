"""Runs that begin later, and an MLP by itself, are the whole run's values."""

from __future__ import annotations

import pytest
import torch

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.models.hook_manager import Intervention
from mechinterp.models.sites import Site
from tests.support.models_tiny import ALL_FLOAT64, EVERY, NATIVE, SHAPES, build, snapshot, tiny, tokens

X = tokens(3, 9)


def tolerance(name: str) -> float:
    # Rotations and RMS norms of the other shapes run in float32.
    return 1e-9 if name in ALL_FLOAT64 else 1e-5


@pytest.mark.parametrize("cut", [1, 4, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_a_run_after_a_past_is_the_rest_of_the_whole_run(name: str, cut: int) -> None:
    model = tiny(name)
    before = snapshot(model.bridge)
    sites = [site for site in model.sites() if site.kind not in ("pattern", "scores")]
    whole = model.run(X, record=sites, keep_past=True)
    assert whole.past is not None and whole.past.n_pos == 9
    rest = model.run(X[:, cut:], record=sites, past=whole.past.upto(cut))
    for site in sites:
        torch.testing.assert_close(rest.values[site], whole.values[site][:, cut:], rtol=0, atol=tolerance(name))
    assert rest.logits is not None and whole.logits is not None
    torch.testing.assert_close(rest.logits, whole.logits[:, cut:], rtol=0, atol=tolerance(name))
    patterns = [
        model.run(X, record=["pattern.2"]),
        model.run(X[:, cut:], record=["pattern.2"], past=whole.past.upto(cut)),
    ]
    full, part = (run.values["pattern.2"] for run in patterns)
    torch.testing.assert_close(part, full[:, :, cut:], rtol=0, atol=tolerance(name))
    assert snapshot(model.bridge) == before


@pytest.mark.parametrize("name", SHAPES)
def test_it_can_start_at_a_layer_and_be_repeated(name: str) -> None:
    model = tiny(name)
    whole = model.run(X, record=["resid_pre.1"], keep_past=True)
    assert whole.past is not None and whole.logits is not None
    resid = whole.values["resid_pre.1"][:, 5:].repeat(2, 1, 1)
    rest = model.run(X[:, 5:].repeat(2, 1), past=whole.past.upto(5).repeated(2, 1), start=(1, resid))
    assert rest.logits is not None
    for rows in (slice(0, 3), slice(3, 6)):
        torch.testing.assert_close(rest.logits[rows], whole.logits[:, 5:], rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", NATIVE)
def test_models_that_keep_no_keys_say_so(name: str) -> None:
    model = tiny(name)
    assert not model.keeps_past
    assert model.run(X, keep_past=True).past is None


def test_a_past_that_does_not_fit_is_refused() -> None:
    model = tiny("gpt2")
    past = model.run(X, keep_past=True).past
    assert past is not None
    with pytest.raises(InputError, match="3 prompts and 3 layers; the run has 2"):
        model.run(X[:2, 4:], past=past.upto(4))
    with pytest.raises(InputError, match="the model reads 32"):
        model.run(tokens(3, 28), past=past)
    mask = torch.ones_like(X[:, 4:], dtype=torch.bool)
    mask[0, 0] = False
    with pytest.raises(InputError, match="padding on the left"):
        model.run(X[:, 4:], mask, past=past.upto(4))
    with model.intervene(Intervention("z.0", lambda z: z)):
        assert model.run(X, keep_past=True).past is None
        with pytest.raises(InputError, match="inside `intervene`"):
            model.run(X[:, 4:], past=past.upto(4))


@pytest.mark.parametrize("name", [name for name in EVERY if name != "attention-only"])
def test_an_mlp_by_itself_writes_what_it_writes_in_the_run(name: str) -> None:
    model = tiny(name)
    sites = [Site(kind, layer) for layer in range(3) for kind in ("mlp_in", "mlp_out")]
    values = model.run(X, record=sites).values
    for layer in range(3):
        given = values[Site("mlp_in", layer)]
        alone = model.mlp(layer, given[:, 2:5, None])
        torch.testing.assert_close(alone[:, :, 0], values[Site("mlp_out", layer)][:, 2:5], rtol=0, atol=tolerance(name))
    with (
        model.intervene(Intervention("mlp_out.0", lambda out: out)),
        pytest.raises(InputError, match="would not be applied"),
    ):
        model.mlp(0, values[Site("mlp_in", 0)])


def test_an_mlp_that_computes_something_else_by_itself_is_refused() -> None:
    model = build("gpt2")
    model.bound_mlps = {1: "it adds the residual stream"}
    with pytest.raises(UnsupportedError, match="layer 1 cannot be run by itself: it adds"):
        model.mlp(1, torch.zeros(2, 16, dtype=torch.float64))


def test_outer_edits_in_skipped_layers_do_not_fire_again() -> None:
    model = tiny("gpt2")
    doubled = Intervention("mlp_out.0", lambda value: 2 * value)
    with model.intervene(doubled):
        whole = model.run(X, record=["resid_pre.1"])
        rest = model.run(X, start=(1, whole.values["resid_pre.1"]))
    assert rest.logits is not None and whole.logits is not None
    torch.testing.assert_close(rest.logits, whole.logits, rtol=0, atol=1e-12)
