"""Feature bases in the hook manager: recorded, edited, differentiated, and otherwise as if they were not there."""

from __future__ import annotations

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError, SiteNotReached, UnsupportedError
from mechinterp.features.dictionary import cross_layer_transcoder, crosscoder, sae, transcoder
from mechinterp.features.neurons import neuron_basis
from mechinterp.models.interventions import Intervention
from tests.support.models_tiny import D_MODEL, SHAPES, tiny, tokens

F = 30
TOKENS = tokens()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def an_sae(site: str, width: int = D_MODEL, seed: int = 0):
    return sae(site, drawn(width, F, seed=seed), drawn(F, width, seed=seed + 1), b_enc=drawn(F), b_dec=drawn(width))


def a_transcoder(layer: int = 1):
    return transcoder(f"mlp_in.{layer}", f"mlp_out.{layer}", drawn(D_MODEL, F), drawn(F, D_MODEL, seed=1))


def a_cross_layer_transcoder():
    layers = range(3)
    reads, writes = [f"mlp_in.{i}" for i in layers], [f"mlp_out.{i}" for i in layers]
    return cross_layer_transcoder(reads, writes, drawn(3, D_MODEL, F), [drawn(F, 3 - i, D_MODEL) for i in layers])


def bases(model) -> list:
    sites = ["resid_pre.1", "resid_mid.1", "attn_out.0", "mlp_out.2", "resid_post.1", "resid_final"]
    found = [an_sae(site) for site in sites if model.has(site)]
    found.append(an_sae("z.1", model.dims.n_heads * model.dims.d_head))
    n_neurons = len(model.layout.neurons(1).W_out)
    return [*found, a_transcoder(), *a_cross_layer_transcoder(), neuron_basis("mlp_post.1", n_neurons)]


def same(features):
    """An edit that changes nothing, and of which the run cannot know that."""
    return features * 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_spliced_with_its_error_a_basis_changes_nothing_to_the_last_bit(shape):
    model = tiny(shape)
    plain = model.run(TOKENS, record=["resid_final"])
    every = bases(model)
    for several in [[basis] for basis in every] + [every]:
        run = model.run(TOKENS, record=["resid_final", *several], interventions={basis: same for basis in several})
        assert torch.equal(run.logits, plain.logits)
        assert torch.equal(run.values["resid_final"], plain.values["resid_final"])
        assert all(run.values[basis].shape == (3, 7, basis.n_features) for basis in several)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_edited_feature_adds_its_direction_to_the_site(shape):
    model = tiny(shape)
    for basis in (an_sae("resid_pre.1"), an_sae("resid_mid.1"), a_transcoder(), an_sae("attn_out.2")):
        if not model.has(basis):
            continue
        features = model.run(TOKENS, record=[basis]).values[basis]
        where = torch.arange(F) == 5

        def edit(value, where=where):
            return torch.where(where, 3.0, value)

        change = (3.0 - features[..., 5:6]).to(torch.float64) * basis.writes([5])[0]
        edited = model.run(TOKENS, interventions={basis: edit})
        by_hand = model.run(TOKENS, interventions={basis.sites_out[0]: lambda v, c=change: v + c.to(v.dtype)})
        torch.testing.assert_close(edited.logits, by_hand.logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(edited.logits, model.run(TOKENS).logits, atol=1e-3)


def test_a_cross_layer_feature_writes_to_every_later_layer():
    model, basis = tiny("gpt2"), a_cross_layer_transcoder()[0]
    features = model.run(TOKENS, record=[basis]).values[basis]
    edited = model.run(TOKENS, interventions={basis: lambda f: f * (torch.arange(F) != 2)})
    by_hand = {
        site: (lambda value, i=i: value - features[..., 2:3] * basis.writes([2])[0, i])
        for i, site in enumerate(basis.sites_out)
    }
    torch.testing.assert_close(edited.logits, model.run(TOKENS, interventions=by_hand).logits)


def test_a_run_may_stop_between_the_sites_that_a_cross_layer_feature_writes_to():
    """But not before the first: the edit would then do nothing."""
    model, basis = tiny("gpt2"), a_cross_layer_transcoder()[0]
    off = [mi.ablate_features(basis, [3])]
    whole = model.run(TOKENS, record=["resid_pre.2"], interventions=off).values["resid_pre.2"]
    part = model.run(TOKENS, record=["resid_pre.2"], interventions=off, stop="resid_pre.2").values["resid_pre.2"]
    assert torch.equal(part, whole)
    for stop, site in (("resid_mid.0", "mlp_in.0|m0"), ("mlp_in.0", "mlp_out.0")):
        with pytest.raises(SiteNotReached, match=f"({site}).*after the stop site"):
            model.run(TOKENS, interventions=off, stop=stop)
    with pytest.raises(SiteNotReached, match=r"mlp_out\.1"):  # asked for itself
        model.run(TOKENS, record=["mlp_out.1"], interventions=off, stop="resid_pre.1")


def test_edits_are_applied_in_the_order_in_which_they_are_given():
    model, basis = tiny("gpt2"), an_sae("resid_pre.1")
    site = Intervention("resid_pre.1", lambda value: 2 * value)
    double = Intervention(basis, lambda features: 2 * features)
    value = model.run(TOKENS, record=["resid_pre.1"]).values["resid_pre.1"]
    first = model.run(TOKENS, record=[basis, "resid_pre.1"], interventions=[site, double])
    code = basis.encode(2 * value)
    torch.testing.assert_close(first.values[basis], 2 * code.values)
    torch.testing.assert_close(first.values["resid_pre.1"], 2 * value + code.values @ basis.writes())
    last = model.run(TOKENS, record=[basis, "resid_pre.1"], interventions=[double, site])
    code = basis.encode(value)
    torch.testing.assert_close(last.values["resid_pre.1"], 2 * (value + code.values @ basis.writes()))


def test_recording_sees_the_edits_at_its_site():
    model, basis = tiny("gpt2"), an_sae("resid_pre.1")
    run = model.run(TOKENS, record=[basis, "resid_pre.1"], interventions={"resid_pre.1": lambda value: 2 * value})
    torch.testing.assert_close(run.values[basis], basis.encode(run.values["resid_pre.1"]).values)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_follow_the_live_error(shape):
    """At a feature: along its direction. Elsewhere: as if the basis were not there. Both while it is spliced."""
    model = tiny(shape)
    several = [b for b in (an_sae("resid_pre.1"), an_sae("attn_out.1", seed=5), a_transcoder()) if model.has(b)]
    sites = ["resid_pre.0", "resid_pre.1", "attn_out.1", "mlp_out.1", "mlp_in.1"]

    def loss(logits):
        return logits[:, -1, :5].square().sum(-1)

    plain = model.run(TOKENS, grads=sites, loss=loss).grads
    spliced = model.run(TOKENS, grads=[*sites, *several], loss=loss).grads
    for site in sites:
        torch.testing.assert_close(spliced[site], plain[site], rtol=0, atol=0)
    for basis in several:
        expected = plain[str(basis.sites_out[0])].to(torch.float64) @ basis.writes().T
        torch.testing.assert_close(spliced[basis].to(torch.float64), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_an_edited_run_is_its_derivative():
    """With edits the encoder counts: the doubled features are a function of what is upstream."""
    model, basis = tiny("gpt2"), an_sae("resid_pre.1")
    direction = drawn(3, 7, D_MODEL, seed=7)

    def metric(step: float) -> torch.Tensor:
        edits = [Intervention("resid_pre.0", lambda v: v + step * direction), Intervention(basis, lambda f: 2 * f)]
        return model.run(TOKENS, interventions=edits).logits[:, -1, 3].sum()

    doubled = {basis: lambda features: 2 * features}
    run = model.run(TOKENS, interventions=doubled, grads=["resid_pre.0", basis], loss=lambda logits: logits[:, -1, 3])
    slope = (metric(1e-6) - metric(-1e-6)) / 2e-6
    torch.testing.assert_close((run.grads["resid_pre.0"] * direction).sum(), slope, rtol=1e-5, atol=1e-5)


def test_a_basis_can_be_given_another_input_than_its_site_holds():
    """The site stays; the features that are taken away are those of what the basis is given."""
    model = tiny("gpt2")
    basis = transcoder("resid_mid.1", "mlp_out.1", drawn(D_MODEL, F), drawn(F, D_MODEL, seed=1))
    seen, wanted = drawn(3, 7, D_MODEL, seed=2), drawn(3, 7, F, seed=3)
    given = Intervention(basis, seen, reading=True)
    edits = [given, Intervention(basis, wanted)]
    run = model.run(TOKENS, record=["resid_mid.1", "mlp_out.1", basis], interventions=edits)
    plain = model.run(TOKENS, record=["resid_mid.1", "mlp_out.1"])
    assert torch.equal(run.values["resid_mid.1"], plain.values["resid_mid.1"])
    assert torch.equal(run.values[basis], wanted)
    change = (wanted - basis.encode(seen).values) @ basis.writes()
    torch.testing.assert_close(run.values["mlp_out.1"], plain.values["mlp_out.1"] + change)
    alone = model.run(TOKENS, record=[basis], interventions=[given])
    assert torch.equal(alone.values[basis], basis.encode(seen).values)
    assert torch.equal(alone.logits, plain.logits)
    across = crosscoder(["resid_pre.0", "resid_pre.2"], drawn(2, D_MODEL, F), drawn(F, 2, D_MODEL))
    for site in ("resid_mid.1", across):
        with pytest.raises(InputError, match="`reading` edits what a basis with one input site reads"):
            Intervention(site, seen, reading=True)
    with pytest.raises(InputError, match="must keep shape"):
        model.run(TOKENS, interventions=[Intervention(basis, seen[..., :3], reading=True)])


def test_a_block_and_a_start_know_bases():
    model, basis = tiny("gpt2"), an_sae("resid_pre.1")
    off = Intervention(basis, torch.zeros_like)
    alone = model.run(TOKENS, interventions=[off])
    with model.intervene(off):
        inside = model.run(TOKENS, record=["resid_pre.2"])
        later = model.run(TOKENS, start=(2, inside.values["resid_pre.2"]))
    assert torch.equal(inside.logits, alone.logits)
    torch.testing.assert_close(later.logits, alone.logits)


def test_what_a_run_cannot_do_with_a_basis_is_refused():
    model = tiny("gpt2")
    across = crosscoder(["resid_pre.0", "resid_pre.2"], drawn(2, D_MODEL, F), drawn(F, 2, D_MODEL))
    assert model.run(TOKENS, record=[across]).values[across].shape == (3, 7, F)
    with pytest.raises(UnsupportedError, match=r"writes to 'resid_pre.0' before it has read resid_pre.2"):
        model.run(TOKENS, interventions={across: same})
    models = crosscoder(["resid_pre.1"] * 2, drawn(2, D_MODEL, F), drawn(F, 2, D_MODEL), models=["a", "b"])
    with pytest.raises(InputError, match="several models"):
        model.run(TOKENS, record=[models])
    with pytest.raises(InputError, match=r"stops at a site, such as 'resid_pre.1'"):
        model.run(TOKENS, stop=an_sae("resid_pre.1"))
    with pytest.raises(InputError, match="layers 0 to 2"):
        model.run(TOKENS, record=[an_sae("resid_pre.9")])
    with pytest.raises(InputError, match="reads vectors of 8 numbers"):
        model.run(TOKENS, record=[an_sae("resid_pre.1", 8)])
    with pytest.raises(InputError, match="feature basis; got int"):
        model.resolve(3)
    with pytest.raises(InputError, match=r"edit at 'resid_pre.1' must keep shape"):
        model.run(TOKENS, interventions={an_sae("resid_pre.1"): lambda f: f[..., :3]})
    assert model.run(TOKENS).logits.shape[0] == 3 and not model.edited


def test_a_model_in_half_precision_keeps_its_bits():
    model = mi.load_model("bundled", dtype="bfloat16")
    basis = an_sae("resid_pre.1", 64).to(dtype=torch.float32)
    ids = torch.tensor([[2, 5, 6, 7]])
    run = model.run(ids, record=[basis], interventions={basis: same})
    assert torch.equal(run.logits, model.run(ids).logits) and run.values[basis].dtype == torch.float32
    assert not torch.equal(model.run(ids, interventions={basis: torch.zeros_like}).logits, run.logits)
