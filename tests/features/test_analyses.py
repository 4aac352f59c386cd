"""Features in the analyses: patched, attributed, read through the unembedding; sums are those of the whole site."""

from __future__ import annotations

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.features.dictionary import cross_layer_transcoder, sae, transcoder
from mechinterp.models.interventions import Intervention
from tests.support.models_tiny import D_MODEL, SHAPES, pairs, tiny

F = 12
PAIRS = pairs(4, positions={"third": torch.full((4,), 2)})


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def an_sae(site: str, seed: int = 0, **more):
    W_enc, W_dec = drawn(D_MODEL, F, seed=seed), drawn(F, D_MODEL, seed=seed + 1)
    return sae(site, W_enc, W_dec, b_enc=drawn(F), b_dec=drawn(D_MODEL), **more)


def a_transcoder(layer: int = 1, **more):
    W_enc, W_dec = drawn(D_MODEL, F, seed=7), drawn(F, D_MODEL, seed=8)
    return transcoder(f"mlp_in.{layer}", f"mlp_out.{layer}", W_enc, W_dec, b_dec=drawn(D_MODEL), **more)


def bases() -> list:
    skip = a_transcoder(W_skip=drawn(D_MODEL, D_MODEL, seed=9))
    return [
        an_sae("resid_pre.1"),
        an_sae("attn_out.1"),
        a_transcoder(),
        skip,
        an_sae("resid_pre.2", normalize="layer_norm"),
    ]


METHODS = ("atp", "relp", "eap-ig-inputs", "eap-ig-activations")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_features_and_error_add_up_to_the_site(method):
    """Identity 2 (refinement), per example and position, and identity 3 for integrated gradients."""
    model = tiny("gpt2")
    for basis in bases():
        site = basis.sites_out[0]
        found = mi.attribution_patching(model, PAIRS, basis, method=method, positions="each")
        whole = mi.attribution_patching(model, PAIRS, site.kind, layers=[site.layer], method=method, positions="each")
        assert found.labels["feature"][-1] == "err" and len(found.labels["feature"]) == F + 1
        torch.testing.assert_close(found.values.sum(0), whole.values[0], rtol=1e-9, atol=1e-11)
        assert int((found.values[:-1].abs() > 1e-9).sum()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_features_add_up_on_every_shape(shape):
    model, basis = tiny(shape), a_transcoder()
    found = mi.attribution_patching(model, PAIRS, basis)
    whole = mi.attribution_patching(model, PAIRS, "mlp_out", layers=[1])
    torch.testing.assert_close(found.values.sum(0), whole.values[0], rtol=1e-4, atol=1e-5)


def test_the_score_of_a_feature_is_its_change_times_the_gradient_along_its_direction():
    model, basis = tiny("gpt2"), an_sae("resid_pre.1")
    found = mi.attribution_patching(model, PAIRS, basis, positions="each", metric="logit_diff")

    def metric(logits):
        rows = torch.arange(len(PAIRS))
        return logits[rows, -1, PAIRS.right[:, 0]] - logits[rows, -1, PAIRS.wrong[:, 0]]

    clean = model.run(PAIRS.clean, record=[basis], grads=[basis], loss=metric)
    corrupt = model.run(PAIRS.corrupt, record=[basis])
    expected = (clean.values[basis] - corrupt.values[basis]) * clean.grads[basis]
    torch.testing.assert_close(found.values[:-1], expected.permute(2, 1, 0))


def test_attribution_is_the_derivative_of_patching():
    """Identity 4: patching a small step of the way changes the metric by the step times the score."""
    model, basis, step = tiny("gpt2"), an_sae("resid_pre.1"), 1e-5
    scores = mi.attribution_patching(model, PAIRS, basis).values[:, 0]
    clean, corrupt = (model.run(t, record=[basis]).values[basis] for t in (PAIRS.clean, PAIRS.corrupt))
    rows = torch.arange(len(PAIRS))
    for feature in range(F):
        change = step * (corrupt - clean) * (torch.arange(F) == feature)
        edits = [[Intervention(basis, clean + sign * change)] for sign in (1, -1)]
        logits = [model.run(PAIRS.clean, interventions=edit).logits[rows, -1] for edit in edits]
        values = [y[rows, PAIRS.right[:, 0]] - y[rows, PAIRS.wrong[:, 0]] for y in logits]
        torch.testing.assert_close((values[1] - values[0]) / (2 * step), scores[feature], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_patching_a_feature_adds_its_change_to_the_site(shape):
    model = tiny(shape)
    for basis in (an_sae("resid_pre.1"), a_transcoder(), an_sae("attn_out.2")):
        found = mi.activation_patching(model, PAIRS, [f"{basis.name}.f3", f"{basis.name}.err@third"], features=[basis])
        site = str(basis.sites_out[0])
        clean, corrupt = (model.run(t, record=[basis, site]) for t in (PAIRS.clean, PAIRS.corrupt))
        change = (corrupt.values[basis] - clean.values[basis])[..., 3:4] * basis.writes([3])[0]
        patched = mi.activation_patching(
            model, PAIRS, [site], replacement=lambda value, _, c=change: value + c.to(value.dtype)
        )
        torch.testing.assert_close(found.values[0], patched.values[0], rtol=1e-4, atol=1e-5)
        assert not found.values[0].eq(0).all()


def test_patching_everything_is_patching_the_site():
    model, basis = tiny("gpt2"), an_sae("resid_pre.1")
    every = [f"resid_pre.1.f{i}" for i in range(F)] + ["resid_pre.1.err"]
    for direction in ("noise", "denoise"):
        found = mi.activation_patching(model, PAIRS, [every], features=[basis], direction=direction)
        whole = mi.activation_patching(model, PAIRS, ["resid_pre.1"], direction=direction)
        torch.testing.assert_close(found.values, whole.values)
        torch.testing.assert_close(mi.fraction(found).values, mi.fraction(whole).values)


def test_a_set_over_several_layers_has_all_its_features_as_in_the_other_run():
    model = tiny("gpt2")
    several = [an_sae("resid_pre.1"), a_transcoder()]
    names = ["resid_pre.1.f3", "m1.f5"]
    found = mi.activation_patching(model, PAIRS, [names], features=several)
    values = model.run(PAIRS.corrupt, record=several).values

    def as_corrupt(basis, feature):
        def edit(features):
            new = features.clone()
            new[..., feature] = values[basis][..., feature]
            return new

        return Intervention(basis, edit)

    rows = torch.arange(len(PAIRS))
    edits = [as_corrupt(several[0], 3), as_corrupt(several[1], 5)]
    logits = [model.run(PAIRS.clean, interventions=e).logits[rows, -1] for e in ([], edits)]
    diffs = [y[rows, PAIRS.right[:, 0]] - y[rows, PAIRS.wrong[:, 0]] for y in logits]
    torch.testing.assert_close(found.values[0, 0], diffs[0] - diffs[1])


@pytest.mark.slow
def test_a_sweep_over_a_basis_is_its_features_one_by_one():
    model, basis = tiny("gpt2"), a_transcoder()
    found = mi.activation_patching(model, PAIRS, basis, units=[1, 4], positions=["third", -1])
    assert found.axes == ("feature", "pos", "example") and found.labels["feature"] == ("1", "4")
    for i in (1, 4):
        alone = mi.activation_patching(model, PAIRS, [f"m1.f{i}"], features=[basis], positions=["third", -1])
        torch.testing.assert_close(found.at(feature=i).values, alone.values[0])
    every = mi.activation_patching(model, PAIRS, basis, memory=1)
    values = torch.cat([model.run(t, record=[basis]).values[basis] for t in (PAIRS.clean, PAIRS.corrupt)])
    active = (values != 0).flatten(0, 1).any(0).nonzero()[:, 0].tolist()
    assert every.labels["feature"] == tuple(map(str, active))
    first = mi.activation_patching(model, PAIRS, basis, units=active[:1])
    torch.testing.assert_close(every.at(feature=active[0]).values, first.values[0])


def test_a_cross_layer_feature_is_patched_at_all_its_layers():
    model = tiny("gpt2")
    sites = [f"mlp_in.{i}" for i in range(3)], [f"mlp_out.{i}" for i in range(3)]
    basis = cross_layer_transcoder(*sites, drawn(3, D_MODEL, F), [drawn(F, 3 - i, D_MODEL) for i in range(3)])[0]
    found = mi.activation_patching(model, PAIRS, basis, units=[2])
    clean, corrupt = (model.run(t, record=[basis]).values[basis] for t in (PAIRS.clean, PAIRS.corrupt))
    change = (corrupt - clean)[..., 2:3]
    edits = {
        site: (lambda value, i=i: value + change * basis.writes([2])[0, i]) for i, site in enumerate(basis.sites_out)
    }
    rows = torch.arange(len(PAIRS))
    logits = [model.run(PAIRS.clean, interventions=e).logits[rows, -1] for e in ({}, edits)]
    diffs = [y[rows, PAIRS.right[:, 0]] - y[rows, PAIRS.wrong[:, 0]] for y in logits]
    torch.testing.assert_close(found.values[0, 0], diffs[0] - diffs[1])
    scores = mi.attribution_patching(model, PAIRS, basis)
    sums = [mi.attribution_patching(model, PAIRS, "mlp_out", layers=[i]).values[0] for i in range(3)]
    torch.testing.assert_close(scores.values.sum(0), sum(sums))


def test_zero_removes_a_feature():
    model, basis = tiny("gpt2"), an_sae("resid_pre.1")
    found = mi.activation_patching(model, PAIRS, basis, units=[3], replacement="zero")
    rows = torch.arange(len(PAIRS))
    logits = [model.run(PAIRS.clean, interventions=e).logits[rows, -1] for e in ([], [mi.ablate_features(basis, [3])])]
    diffs = [y[rows, PAIRS.right[:, 0]] - y[rows, PAIRS.wrong[:, 0]] for y in logits]
    torch.testing.assert_close(found.values[0, 0], diffs[0] - diffs[1])


def test_edits_of_features():
    model, basis = tiny("gpt2"), an_sae("resid_pre.1")
    plain = model.run(PAIRS.clean, record=[basis]).values[basis]
    edits = {
        "set": (mi.set_features(basis, {3: 2.0}), torch.full_like(plain[..., 3], 2.0)),
        "scale": (mi.scale_features(basis, {3: -1.5}), -1.5 * plain[..., 3]),
        "add": (mi.add_features(basis, {3: 4.0}), plain[..., 3] + 4),
        "ablate": (mi.ablate_features(basis, [3]), 0 * plain[..., 3]),
    }
    for edit, expected in edits.values():
        values = model.run(PAIRS.clean, record=[basis], interventions=[edit]).values[basis]
        torch.testing.assert_close(values[..., 3], expected)
        assert torch.equal(values[..., 4:], plain[..., 4:])
    at = mi.add_features(basis, {3: 4.0}, pairs=PAIRS, positions="third")
    values = model.run(PAIRS.clean, record=[basis], interventions=[at]).values[basis]
    assert (values - plain).nonzero()[:, 1:].unique(dim=0).tolist() == [[2, 3]]
    steered = model.run(PAIRS.clean, interventions=[mi.add_features(basis, {3: 4.0})]).logits
    by_hand = model.run(PAIRS.clean, interventions=[mi.add_direction("resid_pre.1", basis.writes([3])[0], 4.0)]).logits
    torch.testing.assert_close(steered, by_hand)
    for basis in (an_sae("resid_pre.1"), a_transcoder()):
        site = basis.sites_out[0]
        seen = model.run(PAIRS.clean, record=[basis.sites_in[0], site], interventions=mi.reconstructed(basis)).values
        read = model.run(PAIRS.clean, record=basis.sites_in).values[basis.sites_in[0]]
        torch.testing.assert_close(seen[site], basis.decode(basis.encode(read))[site])


@pytest.mark.parametrize("shape", SHAPES)
def test_direct_logit_attribution_of_features_sums_to_the_logit(shape):
    model = tiny(shape)
    several = [a_transcoder(1), an_sae("attn_out.2"), a_transcoder(2, W_skip=drawn(D_MODEL, D_MODEL))]
    found = mi.direct_logit_attribution(model, PAIRS, features=several)
    plain = mi.direct_logit_attribution(model, PAIRS)
    torch.testing.assert_close(found.values.sum(0), plain.values.sum(0), rtol=1e-5, atol=1e-5)
    names, parts = found.labels["node"], {"m1": [], "a2": [], "m2": []}
    assert not {"m1", "m2", "a2.h0"} & set(names) and {"m0", "a1.h0", "m1.f0", "a2.err", "m2.bias"} <= set(names)
    for i, name in enumerate(names):
        if (node := name.partition(".")[0]) in parts:
            parts[node].append(found.values[i])
    for node, values in parts.items():
        whole = [plain.values[i] for i, name in enumerate(plain.labels["node"]) if name.partition(".")[0] == node]
        torch.testing.assert_close(torch.stack(values).sum(0), torch.stack(whole).sum(0), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"writes to resid_pre.1; only what is written"):
        mi.direct_logit_attribution(model, PAIRS, features=[an_sae("resid_pre.1")])
    with pytest.raises(InputError, match="'m1' is split twice"):
        mi.direct_logit_attribution(model, PAIRS, features=[a_transcoder(1)], refine=["m1"])


@pytest.mark.slow
def test_the_tokens_of_a_feature_are_those_of_its_direction():
    model, basis = mi.load_model("bundled"), mi.load_basis("bundled:m1")
    table = mi.feature_tokens(model, basis, [3, 5], 4)
    by_hand = mi.top_tokens(model, basis.writes([3, 5]).float(), 4)
    assert table["feature"].tolist() == [3] * 4 + [5] * 4 and table["token"].tolist() == by_hand["token"].tolist()
    maps = model.layout.neurons(1)
    ours = mi.transcoder("mlp_in.1", "mlp_out.1", maps.W_in, maps.W_out)
    for side in ("in", "out"):
        neurons = mi.neuron_tokens(model, 1, [3, 5], 4, side=side)
        features = mi.feature_tokens(model, ours, [3, 5], 4, side=side)
        assert features.rename(columns={"feature": "neuron"}).equals(neurons)
    with pytest.raises(InputError, match="do not write to the residual stream"):
        mi.feature_tokens(model, mi.neuron_basis("mlp_post.1", 256), [3])


def test_an_interchange_of_features_is_a_subspace_interchange_where_they_are_orthonormal():
    model = tiny("gpt2")
    directions = torch.linalg.qr(drawn(D_MODEL, 3)).Q
    by_tensor = mi.subspace_interchange(model, PAIRS, "resid_pre.1", directions, placebos=2)
    basis = mi.subspace_basis("resid_pre.1", directions, mean=drawn(D_MODEL))
    by_basis = mi.subspace_interchange(model, PAIRS, "resid_pre.1", basis, placebos=2)
    torch.testing.assert_close(by_basis.values, by_tensor.values)
    dictionary = an_sae("resid_pre.1").keep([1, 3])
    found = mi.subspace_interchange(model, PAIRS, "resid_pre.1", dictionary, placebos=0)
    names = [["resid_pre.1.f0@-1", "resid_pre.1.f1@-1"]]
    patched = mi.activation_patching(model, PAIRS, names, features=[dictionary])
    torch.testing.assert_close(found.at(subspace="basis").values, patched.values[0, 0])
    with pytest.raises(InputError, match=r"is not at 'resid_pre.2'"):
        mi.subspace_interchange(model, PAIRS, "resid_pre.2", dictionary)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: mi.activation_patching(m, PAIRS, ["m1.f3"], features=[b]), "Unknown feature basis 'm1'"),
        (lambda m, b: mi.activation_patching(m, PAIRS, ["resid_pre.1.f12"], features=[b]), "features 0 to 11; got 12"),
        (lambda m, b: mi.activation_patching(m, PAIRS, ["a1.h1"], features=[b]), "not features"),
        (lambda m, b: mi.activation_patching(m, PAIRS, b, replacement="mean"), "'pair'"),
        (
            lambda m, b: mi.activation_patching(m, PAIRS, ["resid_pre.1.f1"], features=[b, an_sae("resid_pre.1", 5)]),
            "named",
        ),
        (lambda m, b: mi.attribution_patching(m, PAIRS, b, replacement="zero"), "replacement='pair'"),
        (lambda m, b: mi.attribution_patching(m, PAIRS, b, layers=[1]), "has its own sites"),
        (lambda m, b: mi.set_features(b, {99: 1.0}), "got 99"),
        (lambda m, b: mi.add_features(b, {1: float("nan")}), "finite"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call(tiny("gpt2"), an_sae("resid_pre.1"))
    assert "\n" not in str(caught.value)


def test_node_attribution_splits_mlps_into_features_and_error() -> None:
    model, bases = tiny("gpt2"), [a_transcoder(1), an_sae("mlp_out.2")]
    plain = mi.node_attribution(model, PAIRS, method="eap-ig-inputs", steps=2)
    split = mi.node_attribution(model, PAIRS, method="eap-ig-inputs", steps=2, features=bases)
    of = dict(zip(split.labels["node"], split.values, strict=True))
    for name, value in zip(plain.labels["node"], plain.values, strict=True):
        if name in ("m1", "m2"):
            parts = [of[f"{name}.f{i}"] for i in range(F)] + [of[f"{name}.err"]]
            torch.testing.assert_close(torch.stack(parts).sum(0), value, rtol=1e-9, atol=1e-9)
        else:
            assert torch.equal(of.pop(name), value)
    assert len(of) == 2 * (F + 1) and split.cost["backwards"] == 3 * plain.cost["backwards"]
    for wrong in ([an_sae("attn_out.1")], [a_transcoder(1), an_sae("mlp_out.1", label="o.1")]):
        with pytest.raises(InputError, match="must write to the output of another MLP"):
            mi.node_attribution(model, PAIRS, features=wrong)


@pytest.mark.parametrize("given", [["m1.f3"], [("a0.h1", "m1.err")], "m1.f3", [a_transcoder()]], ids=str)
def test_analyses_without_features_say_what_to_use(given: object) -> None:
    model = tiny("gpt2")
    with pytest.raises(UnsupportedError, match=r"Contextual decomposition does not take features.*method='relp'"):
        mi.contextual_decomposition(model, PAIRS, given)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"Path patching does not take features.*edge of a graph"):
        mi.path_patching(model, PAIRS, given, "logits")  # type: ignore[arg-type]
    if isinstance(given, list) and isinstance(given[0], str):
        with pytest.raises(UnsupportedError, match="Path patching does not take features"):
            mi.path_patching(model, PAIRS, "heads", [f"{given[0]}<in>"])
