"""Weights between features without a prompt, and attention scores split over pairs of parts."""

from __future__ import annotations

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.features.dictionary import sae, transcoder
from tests.analysis.test_attribution_graph import D_MODEL, PROMPT, F, a_cross_layer_transcoder, a_set, drawn
from tests.support.models_tiny import SHAPES, tiny


@pytest.mark.parametrize("shape", ("gpt2", "neox", "gemma2"))
def test_edges_are_weights_times_activations_over_scales(shape):
    """Neighbouring layers without attention in between: the direct edge of the graph, at one position."""
    model, bases = tiny(shape), a_set()
    for basis, layer in ((bases[0], 0), (bases[1], 1)):
        later = bases[layer + 1]
        weights = mi.feature_weights(model, basis, later).values
        site = f"{'resid_pre' if model.dims.parallel else 'resid_mid'}.{layer + 1}"
        stream = model.run(PROMPT[None], record=[site]).values[site][0, 4].double()
        norm, rows = model.layout.mlp_norm[layer + 1], basis.writes().double()
        expected = norm.project(rows) / norm.scale(stream) @ later.W_enc[0]
        torch.testing.assert_close(weights.double() / norm.scale(stream), expected, rtol=1e-6, atol=1e-8)


def test_the_graph_of_one_token_is_direct_weights_and_heads():
    """On one token, a head's value path and the direct path together are the edge of the attribution graph."""
    model, bases = tiny("gpt2"), a_set()
    graph = mi.attribution_graph(model, PROMPT[:1], bases, targets=[3])
    run = model.run(PROMPT[None, :1], record=["resid_pre.1", "resid_mid.1"])
    before = model.layout.attention[1].norm.scale(run.values["resid_pre.1"][0, 0])
    after = model.layout.mlp_norm[1].scale(run.values["resid_mid.1"][0, 0])
    total = mi.feature_weights(model, bases[0], bases[1]).values / after
    for head in range(4):  # a token alone attends to itself with weight 1
        total = total + mi.feature_weights(model, bases[0], bases[1], via=f"a1.h{head}").values / before / after
    readers = [node for node in graph.readers if node.layer == 1]
    writers = [node for node in graph.features if node.layer == 0]
    assert readers and writers
    for reader in readers:
        for writer in writers:
            edge = float(graph.weights[graph.index[reader.name] - graph.n_leaves, graph.index[writer.name]])
            assert edge == pytest.approx(writer.value * float(total[writer.feature, reader.feature]), rel=1e-7)


def test_a_cross_layer_transcoder_sums_what_is_written_before():
    model = tiny("gpt2")
    first, _, last = a_cross_layer_transcoder()
    found = mi.feature_weights(model, first, last, sources=[3], targets=[5])
    rows = first.writes([3])[0][:2].sum(0)
    expected = model.layout.mlp_norm[2].project(rows) @ last.W_enc[0, :, 5]
    assert float(found.values) == pytest.approx(float(expected))
    assert found.labels["target"] == (last.address(5),)


@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_of_parts_add_up_to_the_score(shape):
    model = tiny(shape)
    for layer, query, key in ((0, 3, 1), (1, -1, 2), (2, 5, 5)):
        for bases in ((), a_set(W_skip=0.1 * drawn(D_MODEL, D_MODEL, seed=50)), list(a_cross_layer_transcoder())):
            grid = mi.qk_attribution(model, PROMPT, f"a{layer}.h3", query, key, bases)
            own = model.run(PROMPT[None], record=[f"scores.{layer}"]).values[f"scores.{layer}"][0, 3, query, key]
            cap = getattr(model.bridge.blocks[layer].attn.original_component, "attn_logit_softcapping", None)
            total = grid.values.double().sum()
            assert float(cap * torch.tanh(total / cap) if cap else total) == pytest.approx(
                float(own), rel=2e-4, abs=2e-4
            )
            assert grid.about["gap"] < 1e-5
            n_features = sum(".f" in name for name in grid.labels["query_part"])
            assert (n_features > 0) == (bool(bases) and layer > 0)


def test_taking_a_feature_out_of_the_stream_takes_its_row_out_of_the_score():
    """With the norm's scale held, by hand from the weights of the model."""
    model, bases = tiny("gpt2"), a_set()
    grid = mi.qk_attribution(model, PROMPT, "a2.h1", 5, 2, bases)
    name = next(name for name in grid.labels["query_part"] if name.startswith("m1.f"))
    number = int(name.split(".f")[1])
    run = model.run(PROMPT[None], record=[bases[1], "resid_pre.2", "q.2", "k.2"])
    write = run.values[bases[1]][0, 5, number] * bases[1].writes([number])[0]
    maps = model.layout.attention[2]
    moved = maps.norm.project(write) / maps.norm.scale(run.values["resid_pre.2"][0, 5]) @ maps.W["q"][1]
    expected = moved @ run.values["k.2"][0, 2, 1] / 2  # sqrt(d_head) = 2
    row = grid.values[grid.labels["query_part"].index(name)].sum()
    assert float(row) == pytest.approx(float(expected))


def test_bad_input_is_one_line():
    model, (first, second, _) = tiny("gpt2"), a_set()
    after = sae("resid_pre.1", drawn(D_MODEL, F), drawn(F, D_MODEL))
    for call, said in (
        (lambda: mi.feature_weights(model, second, first), "which is earlier"),
        (lambda: mi.feature_weights(model, second, after), "which is earlier"),
        (lambda: mi.feature_weights(model, first, second, via="a0.h1"), "which is earlier"),
        (lambda: mi.feature_weights(model, first, second, via="a2.h1"), "before the head"),
        (lambda: mi.feature_weights(model, first, second, via="m1"), "not a head"),
        (lambda: mi.feature_weights(model, first, second, sources=[99]), "features 0 to 11"),
        (lambda: mi.qk_attribution(model, PROMPT, "a1.h0", 2, 5), "none after it"),
        (lambda: mi.qk_attribution(model, PROMPT, "a1.h0", 99, 1), "positions 0 to 6"),
        (lambda: mi.qk_attribution(model, PROMPT, "m1", 2, 1), "not a head"),
    ):
        with pytest.raises(InputError, match=said):
            call()
    reads_z = transcoder("z.1", "mlp_out.1", drawn(D_MODEL, F), drawn(F, D_MODEL))
    with pytest.raises(UnsupportedError):
        mi.feature_weights(model, first, reads_z)
