"""Sparse feature circuits: sums, brute-force Jacobians, known models, and the ablation that evaluates them."""

from __future__ import annotations

from math import isnan

import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.feature_circuit.evaluate import FeatureFaithfulness
from mechinterp.analysis.feature_circuit.places import place, reaches
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.features.activations import Identity
from mechinterp.features.controls import coordinates, random_dictionary, whole_state
from mechinterp.features.dictionary import crosscoder, sae, transcoder
from mechinterp.models.interventions import Intervention
from mechinterp.models.sites import Site
from tests.support.models_tiny import D_MODEL, pairs, tiny

F = 10
PAIRS = pairs(3, positions={"third": torch.full((3,), 2)})


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def an_sae(site: str, seed: int = 0, **more):
    W_enc, W_dec = drawn(D_MODEL, F, seed=seed), drawn(F, D_MODEL, seed=seed + 1)
    return sae(site, W_enc, W_dec, b_enc=drawn(F), b_dec=drawn(D_MODEL), **more)


def a_transcoder(layer: int, seed: int = 7):
    return transcoder(
        f"mlp_in.{layer}",
        f"mlp_out.{layer}",
        drawn(D_MODEL, F, seed=seed),
        drawn(F, D_MODEL, seed=seed + 1),
        W_skip=drawn(D_MODEL, D_MODEL, seed=seed + 2),
    )


def mixed():
    """An autoencoder, a skip transcoder, an attention output and a normalised residual stream."""
    return [
        an_sae("attn_out.1"),
        a_transcoder(1),
        an_sae("resid_pre.1", seed=3),
        an_sae("resid_post.1", seed=5, normalize="layer_norm"),
        an_sae("mlp_out.2", seed=9),
    ]


def test_effects_are_those_of_attribution_patching():
    model = tiny("gpt2")
    for method in ("atp", "eap-ig-activations"):
        bases = mixed()[1:3]
        found = mi.feature_effects(model, PAIRS, bases, method=method, steps=2, positions="third")
        for basis in bases:
            expected = mi.attribution_patching(model, PAIRS, basis, method=method, steps=2, positions="third")
            torch.testing.assert_close(found.values[basis.name], expected.values.mean(-1), rtol=1e-9, atol=1e-12)


def test_effects_add_up_to_replacing_the_site_and_the_gap_shrinks_with_the_steps():
    """Identity 3; the paper's rule (`right`: left ends, seen from the clean prompt) is far worse than midpoints."""
    model = tiny("gpt2")
    gaps = {
        rule: mi.feature_effects(model, PAIRS, mixed()[:2], steps=10, quadrature=rule).gap
        for rule in ("right", "midpoint", "gauss-legendre")
    }
    for name in gaps["right"]:
        assert gaps["midpoint"][name] < gaps["right"][name] / 5
        assert gaps["gauss-legendre"][name] < gaps["right"][name] / 20
    frame = mi.feature_effects(model, PAIRS, mixed()[:1], steps=16, quadrature="gauss-legendre").gaps()
    assert (frame["sum"] - frame["exact"]).abs().max() < 1e-3 * frame["exact"].abs().min()


def every_edge(model, bases, **settings):
    return mi.feature_circuit(model, PAIRS, bases, nodes=10**6, method="atp", **settings)


def test_edges_out_of_a_node_add_up_to_its_effect():
    """Conservation: what a node does to the metric it does directly, or through the nodes of the other sites."""
    model = tiny("gpt2")
    for positions in (None, "each"):
        found = every_edge(model, mixed(), positions=positions)
        out = found.edges.groupby("upstream")["weight"].sum()
        nodes = found.nodes().set_index("node")["effect"]
        nodes = nodes[nodes.abs() > 1e-12]
        assert len(nodes) > 30 and set(found.edges["downstream"]) - {"logits"} <= set(found.nodes()["node"])
        assert (out.reindex(nodes.index).fillna(0) - nodes).abs().max() < 1e-9


def test_edges_are_brute_force_products_of_jacobians():
    """m/d x d/u x change, by a Jacobian of the run from the upstream site on, with the sites between held."""
    model, bases = tiny("gpt2"), [an_sae("attn_out.1"), a_transcoder(1), an_sae("resid_pre.2", seed=5)]
    found = every_edge(model, bases)
    rows = torch.arange(len(PAIRS))

    def metric(logits):
        return logits[rows, -1, PAIRS.right[:, 0]] - logits[rows, -1, PAIRS.wrong[:, 0]]

    attention, mlp, stream = bases
    plain = model.run(PAIRS.clean, record=["mlp_out.1", *bases], grads=bases, loss=metric)
    other = model.run(PAIRS.corrupt, record=bases)
    held = Intervention("mlp_out.1", plain.values["mlp_out.1"])
    change = plain.values[attention] - other.values[attention]
    names = {"m1": (mlp, []), "resid_pre.2": (stream, [held])}
    weights = found.edges.set_index(["upstream", "downstream"])["weight"]
    checked = 0
    for name, (basis, hold) in names.items():
        for feature in range(F):

            def moved(sign, feature=feature, hold=hold, basis=basis):
                step = 1e-6 * sign * change * (torch.arange(F) == feature)
                push = Intervention("attn_out.1", lambda value: value + step @ attention.writes())
                return model.run(PAIRS.clean, interventions=[push, *hold], record=[basis]).values[basis]

            slope = (moved(1) - moved(-1)) / 2e-6
            expected = (slope * plain.grads[basis]).sum((0, 1)) / len(PAIRS)
            for target in range(F):
                if (key := (f"a1.f{feature}", f"{name}.f{target}")) in weights.index:
                    assert abs(weights[key] - expected[target]) < 1e-6
                    checked += 1
                else:
                    assert abs(expected[target]) < 1e-6
    assert checked > 50


def test_an_identity_dictionary_is_the_coordinates_and_a_rotation_keeps_the_sums():
    model, site = tiny("gpt2"), "resid_pre.1"
    eye, Q = torch.eye(D_MODEL, dtype=torch.float64), torch.linalg.qr(drawn(D_MODEL, D_MODEL)).Q
    kinds = [coordinates(site, D_MODEL), *(sae(site, M.T, M, activation=Identity()) for M in (eye, Q))]
    neurons, same, rotated = (mi.feature_effects(model, PAIRS, basis, steps=2).values[site] for basis in kinds)
    torch.testing.assert_close(neurons, same)
    assert same[-1].abs().max() < 1e-12 and rotated[-1].abs().max() < 1e-12
    torch.testing.assert_close(rotated.sum(), neurons.sum())
    assert (rotated - neurons).abs().max() > 1e-3


def test_a_whole_state_is_one_node():
    model = tiny("gpt2")
    state = mi.feature_effects(model, PAIRS, whole_state("resid_pre.1", D_MODEL).to(dtype=torch.float64), steps=2)
    parts = mi.feature_effects(model, PAIRS, an_sae("resid_pre.1"), steps=2)
    torch.testing.assert_close(state.values["resid_pre.1"][-1].sum(), parts.values["resid_pre.1"].sum())
    assert state.strongest(5)["resid_pre.1"].sum() == 1


def test_a_linear_model_has_exact_effects():
    """No norm, attention patterns aside: behind the last attention an SAE's node effects are those of patching."""
    model = tiny("no-norm")
    basis = an_sae("resid_final")
    found = mi.feature_effects(model, PAIRS, basis, method="atp")
    exact = mi.activation_patching(model, PAIRS, basis).mean()
    values = found.values["resid_final"][:-1, 0]
    active = [int(i) for i in exact.labels["feature"]]
    torch.testing.assert_close(values[active], exact.values[:, 0], rtol=1e-6, atol=1e-9)
    assert found.gap["resid_final"] < 1e-9


def test_zero_replaces_a_missing_pair():
    model, basis = tiny("gpt2"), an_sae("resid_pre.1")
    found = mi.feature_effects(model, PAIRS, basis, replacement="zero", steps=12, quadrature="gauss-legendre")
    b_dec = basis.decode(basis.encode(drawn(1, D_MODEL)).with_values(torch.zeros(1, F, dtype=torch.float64)))
    whole = mi.activation_patching(
        model, PAIRS, ["resid_pre.1"], replacement=lambda v, _: next(iter(b_dec.values())).expand_as(v)
    )
    assert abs(found.exact["resid_pre.1"] - float(whole.mean())) < 1e-9
    assert found.gap["resid_pre.1"] < 0.05 * abs(found.exact["resid_pre.1"])


def test_keeping_everything_is_the_model_and_nothing_the_means():
    model, bases = tiny("gpt2"), mixed()
    circuit = mi.feature_circuit(model, PAIRS, bases, nodes=12, method="atp")
    whole = {name: torch.ones_like(mask) for name, mask in circuit.kept.items()}
    found = mi.evaluate_feature_circuit(model, PAIRS, circuit, kept=whole, batch_size=2)
    torch.testing.assert_close(found.circuit, found.clean)  # several runs in one batch sum in another order
    torch.testing.assert_close(found.complement, found.empty)
    assert abs(found.faithfulness - 1) < 1e-9 and abs(found.completeness) < 1e-9
    means = {site: model.run(PAIRS.corrupt, record=[site]).values[site].mean((0, 1)) for site in ("resid_post.1",)}
    last = mi.feature_circuit(model, PAIRS, [an_sae("resid_post.1")], nodes=3, method="atp")
    empty = mi.evaluate_feature_circuit(model, PAIRS, last).empty
    logits = model.run(
        PAIRS.clean, interventions=[Intervention("resid_post.1", lambda v: means["resid_post.1"].expand_as(v))]
    ).logits
    rows = torch.arange(len(PAIRS))
    expected = logits[rows, -1, PAIRS.right[:, 0]] - logits[rows, -1, PAIRS.wrong[:, 0]]
    torch.testing.assert_close(empty, expected)


@pytest.mark.parametrize("ablation", ["mean", "mean-positional"])
def test_the_first_token_can_be_left_out_of_means_and_ablation(ablation):
    """`skip=1`: the mean is that of the later tokens, and the first one keeps its own state."""
    model, basis, rows = tiny("gpt2"), an_sae("resid_post.1"), torch.arange(len(PAIRS))
    circuit = mi.feature_circuit(model, PAIRS, [basis], nodes=3, method="atp")
    found = mi.evaluate_feature_circuit(model, PAIRS, circuit, ablation=ablation, skip=1, batch_size=2)
    state = model.run(PAIRS.corrupt, record=["resid_post.1"]).values["resid_post.1"][:, 1:]
    mean = state.mean((0, 1)) if ablation == "mean" else state.mean(0)

    def emptied(value):
        return torch.cat([value[:, :1], mean.expand_as(value[:, 1:])], 1)

    logits = model.run(PAIRS.clean, interventions=[Intervention("resid_post.1", emptied)]).logits
    expected = logits[rows, -1, PAIRS.right[:, 0]] - logits[rows, -1, PAIRS.wrong[:, 0]]
    torch.testing.assert_close(found.empty, expected)
    assert found.about["skip"] == 1
    whole = mi.evaluate_feature_circuit(model, PAIRS, circuit, ablation=ablation).empty
    assert ablation == "mean-positional" or (whole - expected).abs().max() > 1e-6
    for wrong in (-1, PAIRS.clean.shape[1]):
        with pytest.raises(InputError, match="skip"):
            mi.evaluate_feature_circuit(model, PAIRS, circuit, skip=wrong)


def test_faithfulness_has_an_interval_and_none_where_nothing_is_to_be_explained():
    model = tiny("gpt2")
    circuit = mi.feature_circuit(model, PAIRS, [an_sae("resid_post.1")], nodes=4, method="atp")
    found = mi.evaluate_feature_circuit(model, PAIRS, circuit)
    (low, high), again = found.faithfulness_interval, found.completeness_interval
    assert low <= found.faithfulness <= high and again[0] <= found.completeness <= again[1]
    same = FeatureFaithfulness(found.clean, found.clean + 1e-9, found.circuit, found.complement, 4)
    assert all(isnan(value) for value in (same.faithfulness, *same.faithfulness_interval))
    assert "nothing to explain" in repr(same)


def test_a_circuit_without_errors_is_the_reconstruction():
    """All features kept, the error at its mean: decode(features) + mean error, at every site in the same run."""
    model, basis = tiny("gpt2"), an_sae("resid_pre.1")
    circuit = mi.feature_circuit(model, PAIRS, [basis], nodes=3, method="atp")
    whole = {"resid_pre.1": torch.ones_like(circuit.kept["resid_pre.1"])}
    found = mi.evaluate_feature_circuit(model, PAIRS, circuit, kept=whole, errors="none", ablation="zero")
    logits = model.run(PAIRS.clean, interventions=mi.reconstructed(basis)).logits
    rows = torch.arange(len(PAIRS))
    expected = logits[rows, -1, PAIRS.right[:, 0]] - logits[rows, -1, PAIRS.wrong[:, 0]]
    torch.testing.assert_close(found.circuit, expected)
    assert (found.circuit - found.clean).abs().min() > 1e-6


def test_free_layers_are_left_alone():
    model = tiny("gpt2")
    circuit = mi.feature_circuit(model, PAIRS, [an_sae("resid_pre.1"), an_sae("mlp_out.2")], nodes=4, method="atp")
    free = mi.evaluate_feature_circuit(model, PAIRS, circuit, free_layers=2)
    alone = mi.feature_circuit(model, PAIRS, [an_sae("mlp_out.2")], nodes=4, method="atp")
    torch.testing.assert_close(free.empty, mi.evaluate_feature_circuit(model, PAIRS, alone).empty)
    with pytest.raises(InputError, match="no dictionary is left"):
        mi.evaluate_feature_circuit(model, PAIRS, circuit, free_layers=3)


def test_curves_show_every_control_beside_the_dictionaries():
    model, bases = tiny("gpt2"), [an_sae("resid_pre.1"), a_transcoder(1)]
    found = mi.feature_circuit_curves(model, PAIRS, PAIRS, bases, sizes=(1, 4, 1000), method="atp")
    rows = found.frame.set_index(["kind", "errors"])
    assert set(rows.index) == {
        ("dictionaries", "circuit"),
        ("dictionaries", "none"),
        ("neurons", "circuit"),
        ("random", "circuit"),
        ("random", "none"),
        ("state", "circuit"),
    }
    for row in found.frame.itertuples():
        assert row.faithfulness_low <= row.faithfulness + 1e-9 and row.faithfulness <= row.faithfulness_high + 1e-9
    whole = found.frame[found.frame["errors"] == "circuit"].groupby("kind")["faithfulness"].last()
    assert (whole - 1).abs().max() < 1e-6  # every node kept: the model
    assert found.frame[found.frame["kind"] == "state"]["nodes"].max() == 2


def test_random_dictionaries_have_the_size_and_the_sparsity_that_were_asked_for():
    values = drawn(50, D_MODEL) + 3
    basis = random_dictionary("resid_pre.1", values, 40, 5, seed=1)
    active = (basis.encode(values).values != 0).sum(1)
    assert basis.n_features == 40 and active.max() == 5
    # More directions never reconstruct worse, and always better than the mean.
    left = [
        values - many.decode(many.encode(values))[many.sites_out[0]]
        for many in (random_dictionary("resid_pre.1", values, 400, l0) for l0 in (1, 5, 30))
    ]
    unexplained = [float(rest.square().sum() / (values - values.mean(0)).square().sum()) for rest in left]
    assert 1 > unexplained[0] > unexplained[1] > unexplained[2] > 0 and unexplained[2] < 0.1
    torch.testing.assert_close(basis.writes().norm(dim=1), torch.ones(40, dtype=torch.float64))
    assert basis == random_dictionary("resid_pre.1", values, 40, 5, seed=1)
    assert basis != random_dictionary("resid_pre.1", values, 40, 5, seed=2)


def test_which_sites_reach_which():
    model = tiny("gpt2")
    sites = [Site.parse(s) for s in ("resid_pre.1", "attn_out.1", "mlp_out.1", "resid_post.1", "mlp_out.2")]
    pre, attention, mlp, post, later = sites
    reached = {(str(a), str(b)) for a in sites for b in sites if a != b and reaches(model, a, b, sites)}
    assert (str(pre), str(attention)) in reached and (str(attention), str(mlp)) in reached
    assert (str(pre), str(post)) in reached and (str(attention), str(later)) not in reached
    assert (str(post), str(later)) in reached and (str(mlp), str(attention)) not in reached
    assert not reaches(model, Site("z", 1), mlp, [Site("z", 1), attention, mlp])
    neox = tiny("neox")
    assert not reaches(neox, attention, mlp, sites) and place(Site("resid_post", 1), 3) == place(
        Site("resid_pre", 2), 3
    )


def test_parallel_blocks_conserve_effects_too():
    """NeoX: attention and MLP of a layer do not see each other; float32 rotary, so a looser tolerance."""
    model = tiny("neox")
    found = every_edge(model, [an_sae("attn_out.1"), an_sae("mlp_out.1", seed=4), an_sae("resid_pre.2", seed=8)])
    assert not len(
        found.edges[(found.edges["upstream"].str.startswith("a1")) & found.edges["downstream"].str.startswith("m1")]
    )
    out, nodes = found.edges.groupby("upstream")["weight"].sum(), found.nodes().set_index("node")["effect"]
    assert (out.reindex(nodes.index).fillna(0) - nodes).abs().max() < 1e-5


def test_what_does_not_fit_is_refused():
    model = tiny("gpt2")
    with pytest.raises(InputError, match="overlap"):
        mi.feature_effects(model, PAIRS, [an_sae("resid_post.1", label="x"), an_sae("resid_pre.2", label="y")])
    with pytest.raises(UnsupportedError, match="takes dictionaries of the sites"):
        mi.feature_effects(model, PAIRS, [an_sae("mlp_pre.1")])
    several = crosscoder(["resid_pre.1", "resid_pre.2"], drawn(2, D_MODEL, F), drawn(F, 2, D_MODEL))
    with pytest.raises(UnsupportedError, match="several sites"):
        mi.feature_effects(model, PAIRS, [several])
    with pytest.raises(InputError, match="No node is kept"):
        mi.feature_circuit(model, PAIRS, [an_sae("resid_pre.1")], nodes=0)
    with pytest.raises(InputError, match="one of the two"):
        mi.feature_effects(model, PAIRS, an_sae("resid_pre.1"), method="atp").strongest()
    with pytest.raises(InputError, match="Unknown method") as told:
        mi.feature_effects(model, PAIRS, an_sae("resid_pre.1"), method="atpp")
    assert "atp" in str(told.value)


def test_masks_and_references_that_do_not_fit_are_refused_in_a_line():
    model, bases = tiny("gpt2"), [an_sae("resid_pre.1"), an_sae("mlp_out.2")]
    circuit = mi.feature_circuit(model, PAIRS, bases, nodes=4, method="atp")
    whole = {name: torch.ones_like(mask) for name, mask in circuit.kept.items()}
    short = mi.Pairs(clean=PAIRS.clean[:, 2:], corrupt=PAIRS.corrupt[:, 2:], right=PAIRS.right, wrong=PAIRS.wrong)
    padded = mi.Pairs(
        clean=[row.tolist()[: 4 + i] for i, row in enumerate(PAIRS.clean)],
        corrupt=[row.tolist()[: 4 + i] for i, row in enumerate(PAIRS.corrupt)],
        right=PAIRS.right, wrong=PAIRS.wrong,
    )  # fmt: skip
    for settings, words in (
        ({"kept": {"m2": whole["m2"]}}, "resid_pre.1"),
        ({"kept": {**whole, "m2": whole["m2"][:-1]}}, r"\[11, 1\]"),
        ({"kept": {**whole, "m3": whole["m2"]}}, "m3"),
        ({"kept": {**whole, "m2": whole["m2"].float()}}, "boolean"),
        ({"ablation": "mean-positional", "reference": short}, "one length"),
    ):
        with pytest.raises(InputError, match=words):
            mi.evaluate_feature_circuit(model, PAIRS, circuit, **settings)
    with pytest.raises(InputError, match="one length"):
        mi.evaluate_feature_circuit(model, padded, circuit, ablation="mean-positional", reference=PAIRS)
