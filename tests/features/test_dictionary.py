"""Feature bases in memory: the formulas of every kind, and the identities that hold between kinds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechinterp.base.errors import InputError
from mechinterp.features.activations import Gated, GroupMax, JumpRelu, TopK
from mechinterp.features.dictionary import (
    cross_layer_transcoder,
    crosscoder,
    relative_norms,
    sae,
    transcoder,
)
from mechinterp.features.matching_pursuit import MatchingPursuit
from mechinterp.features.neurons import neuron_basis
from mechinterp.features.subspaces import concept_basis, leace_basis, subspace_basis, svd_basis
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.sites import Site
from tests.support.models_tiny import as_installed, build, tokens

D, F = 16, 40
SITE = Site("resid_pre", 1)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, W_ENC, W_DEC, B_ENC, B_DEC = (
    drawn(5, D),
    drawn(D, F, seed=1),
    drawn(F, D, seed=2),
    drawn(F, seed=3),
    drawn(D, seed=4),
)
THETA = drawn(F, seed=5).abs()


def a_sae(**more):
    return sae(SITE, W_ENC, W_DEC, b_enc=B_ENC, b_dec=B_DEC, **more)


def by_hand(pre: torch.Tensor, rule: str) -> torch.Tensor:
    """Every activation function in plain Python, number by number."""
    out = torch.zeros_like(pre)
    for i, row in enumerate(pre.tolist()):
        best = sorted(range(F), key=lambda j: -row[j])[:7]
        for j, p in enumerate(row):
            group = range(j // 5 * 5, j // 5 * 5 + 5)
            chosen = {
                "relu": True,
                "jumprelu": p > float(THETA[j]),
                "batchtopk": p > 0.7,
                "topk": j in best,
                "groupmax": p == max(row[k] for k in group),
            }[rule]
            out[i, j] = max(p, 0.0) if chosen else 0.0
    return out


RULES = {
    "relu": None,
    "jumprelu": JumpRelu(THETA),
    "batchtopk": JumpRelu(torch.tensor(0.7, dtype=torch.float64)),
    "topk": TopK(7),
    "groupmax": GroupMax(8),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("subtract", [False, True])
def test_encoding_is_the_formula(rule, subtract):
    basis = a_sae(activation=RULES[rule], subtract_b_dec=subtract)
    values = basis.encode(X).values
    torch.testing.assert_close(values, by_hand((X - subtract * B_DEC) @ W_ENC + B_ENC, rule))
    torch.testing.assert_close(basis.decode(basis.encode(X))[SITE], values @ W_DEC + B_DEC)
    assert 0 < int((values > 0).sum()) < values.numel()


def test_a_gated_dictionary_has_a_gate_and_a_magnitude():
    b_gate, b_mag, r_mag = drawn(F, seed=6), drawn(F, seed=7), drawn(F, seed=8) / 2
    basis = sae(SITE, W_ENC, W_DEC, b_dec=B_DEC, activation=Gated(b_gate, b_mag, r_mag), subtract_b_dec=True)
    pre = (X - B_DEC) @ W_ENC
    expected = (pre + b_gate > 0) * (pre * r_mag.exp() + b_mag).clamp(min=0)
    torch.testing.assert_close(basis.encode(X).values, expected)


@pytest.mark.parametrize("how", ["none", "layer_norm", "constant_norm"])
def test_reconstruction_plus_error_is_the_value(how):
    basis = a_sae(normalize=how)
    torch.testing.assert_close(basis.decode(basis.encode(X))[SITE] + basis.error(X), X)


def test_normalisations_are_undone():
    wide = 3 + 5 * X
    mean, std = wide.mean(-1, keepdim=True), wide.std(-1, keepdim=True)
    normed = a_sae(normalize="layer_norm")
    plain = a_sae().decode(a_sae().encode((wide - mean) / (std + 1e-5)))[SITE]
    torch.testing.assert_close(normed.decode(normed.encode(wide))[SITE], plain * std + mean)
    length = wide.norm(dim=-1, keepdim=True) / D**0.5
    scaled = a_sae(normalize="constant_norm")
    plain = a_sae().decode(a_sae().encode(wide / length))[SITE]
    torch.testing.assert_close(scaled.decode(scaled.encode(wide))[SITE], plain * length)


def test_matching_pursuit_takes_the_best_direction_and_subtracts_it():
    directions = torch.nn.functional.normalize(W_DEC, dim=1)
    basis = MatchingPursuit((SITE,), (SITE,), directions, B_DEC, residual_threshold=0.0, steps=6, stop_at_old=False)
    expected, lengths = torch.zeros(len(X), F, dtype=torch.float64), []
    for i, x in enumerate(X):
        rest = x - B_DEC
        for _ in range(6):
            lengths.append(float(rest.norm()))
            products = [float(rest @ d) for d in directions]
            j = max(range(F), key=lambda k: products[k])
            expected[i, j] += products[j]
            rest = rest - products[j] * directions[j]
            assert rest.norm() < lengths[-1]
    torch.testing.assert_close(basis.encode(X).values, expected)
    assert basis.reads() is None
    # What it has reconstructed needs no further step.
    once = MatchingPursuit((SITE,), (SITE,), torch.eye(D, dtype=torch.float64), 0 * B_DEC, residual_threshold=1e-9)
    torch.testing.assert_close(once.decode(once.encode(X.abs()))[SITE], X.abs())


def test_a_crosscoder_with_one_site_is_an_autoencoder():
    one = crosscoder([SITE], W_ENC[None], W_DEC[:, None], b_enc=B_ENC, b_dec=B_DEC[None])
    assert torch.equal(one.encode(X).values, a_sae().encode(X).values)
    assert torch.equal(one.decode(one.encode(X))[SITE], a_sae().decode(a_sae().encode(X))[SITE])


def test_a_crosscoder_sums_what_it_reads_at_its_sites():
    sites, W, V, b = ["resid_pre.0", "resid_pre.2"], drawn(2, D, F, seed=9), drawn(F, 2, D, seed=10), drawn(2, D)
    basis = crosscoder(sites, W, V, b_enc=B_ENC, b_dec=b)
    other = drawn(5, D, seed=11)
    code = basis.encode({"resid_pre.0": X, "resid_pre.2": other})
    torch.testing.assert_close(code.values, (X @ W[0] + other @ W[1] + B_ENC).relu())
    decoded = basis.decode(code)
    for i, site in enumerate(map(Site.parse, sites)):
        torch.testing.assert_close(decoded[site], code.values @ V[:, i] + b[i])
    with pytest.raises(InputError, match=r"resid_pre.0, resid_pre.2; give the values by site"):
        basis.encode(X)


def test_a_crosscoder_over_models_goes_by_their_names():
    V = torch.stack([torch.zeros(F, D), torch.ones(F, D)], 1).double()
    basis = crosscoder([SITE, SITE], drawn(2, D, F), V, models=["base", "chat"])
    code = basis.encode({"base": X, "chat": X})
    assert set(basis.decode(code)) == {"base", "chat"} and basis.kind == "crosscoder"
    assert torch.equal(relative_norms(basis), torch.ones(F).double())
    with pytest.raises(InputError, match="named twice"):
        crosscoder([SITE, SITE], drawn(2, D, F), V)


def test_a_cross_layer_transcoder_without_later_outputs_is_one_transcoder_per_layer():
    reads, writes = [f"mlp_in.{i}" for i in range(3)], [f"mlp_out.{i}" for i in range(3)]
    W, b_enc, b_dec = drawn(3, D, F), drawn(3, F, seed=12), drawn(3, D, seed=13)
    own = drawn(3, F, D, seed=14)
    V = [torch.cat([own[i][:, None], torch.zeros(F, 2 - i, D).double()], 1) for i in range(3)]
    bases = cross_layer_transcoder(reads, writes, W, V, b_enc=b_enc, b_dec=b_dec)
    assert [len(basis.sites_out) for basis in bases] == [3, 2, 1]
    codes = [basis.encode(X) for basis in bases]
    for i in range(3):
        plain = transcoder(reads[i], writes[i], W[i], own[i], b_enc=b_enc[i], b_dec=b_dec[i])
        total = sum(basis.decode(code)[Site("mlp_out", i)] for basis, code in zip(bases[: i + 1], codes, strict=False))
        torch.testing.assert_close(total, plain.decode(plain.encode(X))[Site("mlp_out", i)])


def test_a_cross_layer_transcoder_sums_over_earlier_layers():
    W, V = drawn(2, D, F), [drawn(F, 2, D, seed=1), drawn(F, 1, D, seed=2)]
    bases = cross_layer_transcoder(["mlp_in.0", "mlp_in.1"], ["mlp_out.0", "mlp_out.1"], W, V)
    total = sum(b.decode(b.encode(X))[Site("mlp_out", 1)] for b in bases)
    torch.testing.assert_close(total, (X @ W[0]).relu() @ V[0][:, 1] + (X @ W[1]).relu() @ V[1][:, 0])


def test_a_skip_of_zero_is_no_skip():
    plain = transcoder("mlp_in.1", "mlp_out.1", W_ENC, W_DEC, b_enc=B_ENC)
    skip = drawn(D, D, seed=15)
    with_skip = replace(plain, W_skip=skip)
    out = Site("mlp_out", 1)
    assert torch.equal(
        replace(plain, W_skip=0 * skip).decode(plain.encode(X).__class__(plain.encode(X).values, {"input": X}))[out],
        plain.decode(plain.encode(X))[out],
    )
    torch.testing.assert_close(
        with_skip.decode(with_skip.encode(X))[out], plain.decode(plain.encode(X))[out] + X @ skip
    )


def test_folding_lengths_and_scales_leaves_reconstruction_and_ablation():
    basis = a_sae()
    unit = basis.with_unit_decoder()
    torch.testing.assert_close(unit.decoder_norms(), torch.ones(F, 1).double())
    code, folded = basis.encode(X), unit.encode(X)
    torch.testing.assert_close(unit.decode(folded)[SITE], basis.decode(code)[SITE])
    torch.testing.assert_close(folded.values[:, 3:4] * unit.writes([3]), code.values[:, 3:4] * basis.writes([3]))
    scaled = basis.with_input_scale(4.0)
    torch.testing.assert_close(scaled.encode(X).values, basis.encode(4 * X).values)
    torch.testing.assert_close(scaled.decode(scaled.encode(X))[SITE], basis.decode(basis.encode(4 * X))[SITE] / 4)
    with pytest.raises(InputError, match="not for top 7"):
        a_sae(activation=TopK(7)).with_unit_decoder()


def test_a_prefix_of_a_matryoshka_dictionary_is_its_first_features():
    basis = a_sae(activation=JumpRelu(torch.tensor(0.7).double()), prefixes=(10, 20, F))
    inner = basis.prefix(10)
    code = basis.encode(X)
    cut = code.with_values(code.values * (torch.arange(F) < 10))
    torch.testing.assert_close(inner.decode(inner.encode(X))[SITE], basis.decode(cut)[SITE])
    with pytest.raises(InputError, match=r"have \[10, 20, 40\] features; got 11"):
        basis.prefix(11)
    with pytest.raises(InputError, match="compete"):
        a_sae(activation=TopK(3)).keep([0, 1])


def test_a_full_orthonormal_subspace_reconstructs_everything_whatever_its_rotation():
    rotation = torch.linalg.qr(drawn(D, D, seed=16)).Q
    basis = subspace_basis(SITE, rotation)
    torch.testing.assert_close(basis.decode(basis.encode(X))[SITE], X)
    assert float(basis.error(X).abs().max()) < 1e-12
    grad = drawn(5, D, seed=17)
    torch.testing.assert_close((basis.encode(X).values * (grad @ basis.writes().T)).sum(-1), (X * grad).sum(-1))
    with pytest.raises(InputError, match="not orthonormal"):
        subspace_basis(SITE, rotation * 2)


def test_the_svd_subspace_leaves_the_least_error():
    basis = svd_basis(SITE, X, 2)
    singular = torch.linalg.svdvals(X - X.mean(0))
    torch.testing.assert_close(basis.error(X).square().sum(), singular[2:].square().sum())


def test_erasing_a_leace_subspace_leaves_no_covariance_with_the_labels():
    values, labels = drawn(60, D, seed=18), torch.arange(60) % 3
    values = values @ drawn(D, D, seed=20) + labels[:, None] * drawn(D, seed=19)
    basis = leace_basis(SITE, values, labels)
    code = basis.encode(values)
    erased = values + basis.decode(code.with_values(0 * code.values))[SITE] - basis.decode(code)[SITE]
    hot = torch.nn.functional.one_hot(labels).double()
    before = (values - values.mean(0)).T @ hot
    assert float(((erased - erased.mean(0)).T @ hot).abs().max()) < 1e-9 * float(before.abs().max())
    assert basis.n_features == 2  # three classes: their means span two directions
    torch.testing.assert_close(basis.writes() @ basis.reads().T, torch.eye(2).double())
    torch.testing.assert_close(erased.mean(0), values.mean(0))


def test_concepts_are_least_squares_coordinates():
    directions = drawn(3, D, seed=21)
    basis = concept_basis(SITE, directions)
    expected = torch.linalg.lstsq(directions.T, X.T).solution.T
    torch.testing.assert_close(basis.encode(X).values, expected)
    with pytest.raises(InputError, match="combination of the others"):
        concept_basis(SITE, directions[[0, 0]])


def test_the_identity_has_no_error_and_one_number_per_feature():
    basis = neuron_basis("mlp_post.1", D)
    assert torch.equal(basis.encode(X).values, X) and not basis.error(X).any()
    assert torch.equal(basis.writes([3]), torch.eye(D)[3:4])
    heads = neuron_basis("z.1", D)
    value = X.unflatten(-1, (4, 4))
    assert torch.equal(heads.decode(heads.encode(value))[Site("z", 1)], value)


def test_bases_are_equal_by_content():
    assert a_sae() == a_sae(label="other") and hash(a_sae()) == hash(a_sae())
    other = W_DEC.clone()
    other[0, 0] += 1e-12
    unequal = [sae(SITE, W_ENC, other, b_enc=B_ENC, b_dec=B_DEC), a_sae(subtract_b_dec=True), a_sae(activation=TopK(3))]
    assert len({a_sae(), a_sae(activation=TopK(4)), *unequal}) == 5
    assert isinstance(a_sae(), FeatureBasis) and not isinstance("resid_pre.1", FeatureBasis)
    assert a_sae().address(3) == "resid_pre.1.f3"
    assert transcoder("mlp_in.2", "mlp_out.2", W_ENC, W_DEC).address(0) == "m2.f0"
    assert "sae at resid_pre.1, 40 features, ReLU" in repr(a_sae())
    assert a_sae().to_frame().at[0, "sha256"] == a_sae().sha256


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_installed(transcoder)(SITE, SITE, W_ENC, W_DEC[1:]), "W_dec of a dictionary of 40"),
        (lambda: sae(SITE, W_ENC * float("nan"), W_DEC), "finite"),
        (lambda: a_sae(normalize="batch"), "Unknown normalisation"),
        (lambda: a_sae(activation=JumpRelu(THETA[:3])), "threshold of a dictionary of 40 features"),
        (lambda: a_sae().encode(X[:, :4]), "reads vectors of 16 numbers at 'resid_pre.1'; got 4"),
        (lambda: a_sae().writes([F]), "features 0 to 39; got 40"),
        (lambda: transcoder("mlp_in.1", "mlp_out.1", W_ENC, W_DEC).error(X), "give the value there"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_dictionary_with_the_weights_of_a_relu_mlp_is_that_mlp():
    """Identity 10: no error, and a feature is a neuron."""
    model = build("gpt2", activation_function="relu")
    maps = model.layout.neurons(1)
    basis = transcoder("mlp_in.1", "mlp_out.1", maps.W_in, maps.W_out, b_enc=maps.b_in, b_dec=maps.b_out)
    run = model.run(tokens(), record=["mlp_in.1", "mlp_out.1", "mlp_post.1", basis])
    torch.testing.assert_close(run.values[basis], run.values["mlp_post.1"])
    assert float(basis.error(run.values["mlp_in.1"], run.values["mlp_out.1"]).abs().max()) < 1e-12
    keep = torch.arange(basis.n_features) != 17
    by_feature = model.run(tokens(), interventions={basis: lambda f: f * keep})
    by_neuron = model.run(tokens(), interventions={"mlp_post.1": lambda value: value * keep})
    torch.testing.assert_close(by_feature.logits, by_neuron.logits)
    assert not torch.allclose(by_neuron.logits, model.run(tokens()).logits)
