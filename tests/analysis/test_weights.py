"""Weights in the vocabulary basis and composition scores, against the running model and against whole matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mechinterp as mi
from mechinterp.analysis import weights as weights_module
from mechinterp.analysis.composition import composition_scores
from mechinterp.analysis.weights import (
    embedded,
    head_writes_of,
    neuron_tokens,
    ov_circuit,
    qk_circuit,
    top_tokens,
    unembedding,
)
from mechinterp.base.errors import InputError, MechInterpError, UnsupportedError
from mechinterp.models.hook_manager import HookManager, Intervention, load_model
from mechinterp.models.sites import Site
from tests.support.models_tiny import (
    ALL_FLOAT64,
    D_VOCAB,
    EVERY,
    N_HEADS,
    N_LAYERS,
    SHAPES,
    as_installed,
    build,
    randomized,
    tiny,
)

IDS = torch.tensor([3, 17, 44, 8])


def close(name: str) -> dict[str, float]:
    """Hugging Face's RMSNorm and rotary cosines are float32 inside, whatever the dtype of the weights."""
    size = 1e-9 if name in ALL_FLOAT64 else 2e-5
    return {"rtol": size, "atol": size}


def entered(model: HookManager, layer: int, ids: Tensor, **run: Any) -> Any:
    """The model run with each token's embedding alone as the stream that enters a layer, one position a prompt."""
    return model.run(ids[:, None], start=(layer, embedded(model, ids)[:, None].to(model.dtype)), **run)


@pytest.mark.parametrize("name", EVERY)
def test_embedding_is_what_enters_the_first_layer_less_the_position(name: str):
    model = tiny(name)
    record = [Site("resid_pre", 0)] + [Site("pos_embed")] * model.has(Site("pos_embed"))
    values = model.run(IDS[None], record=record).values
    expected = values[Site("resid_pre", 0)][0] - (values[Site("pos_embed")][0] if len(record) > 1 else 0)
    torch.testing.assert_close(embedded(model, IDS), expected, rtol=1e-12, atol=1e-12)
    every = embedded(model)
    assert every.shape == (D_VOCAB, 16)
    torch.testing.assert_close(every[IDS], expected, rtol=1e-12, atol=1e-12)


def test_embedding_of_gemma_is_scaled():
    model = tiny("gemma2")
    table = model.bridge.original_model.get_input_embeddings().weight.detach()
    # Gemma multiplies by sqrt(d_model) = 4.
    torch.testing.assert_close(embedded(model, IDS), 4 * table[IDS])


@pytest.mark.parametrize("name", EVERY)
def test_ov_circuit_is_the_change_of_the_logits_when_the_source_changes(name: str):
    model, layer, head = tiny(name), N_LAYERS - 1, 2
    found = ov_circuit(model, f"a{layer}.h{head}", IDS, torch.arange(D_VOCAB)).values
    norm, final = model.layout.attention[layer].norm, model.layout.final_norm
    # By the running model: a single position attends to itself, so z is the value of the token.
    run = entered(model, layer, IDS, record=[Site("z", layer)], stop=Site("z", layer))
    z = run.values[Site("z", layer)][:, 0, head]
    if model.layout.attention[layer].b["v"] is not None or norm.bias is not None:
        nothing = torch.zeros_like(embedded(model, IDS[:1]))
        constant = model.run(
            IDS[:1, None], start=(layer, nothing[:, None].to(model.dtype)), record=[Site("z", layer)]
        ).values[Site("z", layer)][:, 0, head]
        z = z - constant  # the bias, for a norm makes 0 of 0
    z = z * norm.scale(embedded(model, IDS))
    writes = model.layout.attention[layer].post.project(z @ model.layout.attention[layer].W_O[head])
    expected = final.project(writes) @ model.layout.W_U
    torch.testing.assert_close(found, expected, **close(name))


def test_ov_circuit_without_norms_is_exact_in_logits():
    model, layer, head = tiny("no-norm"), N_LAYERS - 1, 1
    found = ov_circuit(model, f"a{layer}.h{head}", IDS, torch.arange(D_VOCAB)).values
    logits = []
    for token in IDS:
        # One prompt; only what this head carries is exchanged, and the MLP behind it is held.
        base = entered(model, layer, IDS[:1], record=[Site("mlp_out", layer)])
        z = entered(model, layer, token[None], record=[Site("z", layer)]).values[Site("z", layer)]

        def carry(value: Tensor, z: Tensor = z) -> Tensor:
            value = value.clone()
            value[:, :, head] = z[:, :, head]
            return value

        edits = [
            Intervention(Site("z", layer), carry),
            Intervention(Site("mlp_out", layer), base.values[Site("mlp_out", layer)]),
        ]
        logits.append(entered(model, layer, IDS[:1], interventions=edits).logits[0, 0])
    expected = torch.stack(logits) - logits[0]
    torch.testing.assert_close(found - found[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_qk_circuit_is_the_score_of_the_running_model(name: str):
    model, layer, head = tiny(name), 1, 3
    found = qk_circuit(model, f"a{layer}.h{head}", IDS, IDS)
    norm = model.layout.attention[layer].norm
    scale = norm.scale(embedded(model, IDS))
    sites = [Site("q", layer), Site("k", layer)]
    zero = torch.zeros(4, 1, 16, dtype=model.dtype)
    with_token, without = (
        model.run(IDS[:, None], start=(layer, resid), record=sites).values
        for resid in (embedded(model, IDS)[:, None].to(model.dtype), zero)
    )
    q, k = ((with_token[site] - without[site])[:, 0] * scale[:, None] for site in sites)
    k = k.repeat_interleave(N_HEADS // k.shape[1], 1)
    torch.testing.assert_close(found.values, q[:, head] @ k[:, head].T, **close(name))
    absolute = name in ("gpt2", "attention-only", "no-norm")
    assert ("relative position 0" in found.about["positions"]) == (not absolute)


def test_rotary_scores_at_relative_position_0_are_the_circuit():
    model = tiny("llama")
    found = qk_circuit(model, "a0.h1", IDS, IDS).values.diagonal()
    run = model.run(IDS[None], record=[Site("scores", 0)])
    scores = run.values[Site("scores", 0)][0, 1].diagonal()
    scale = model.layout.attention[0].norm.scale(embedded(model, IDS))[:, 0]
    # 1 / sqrt(d_head) = 1 / 2; cosines are float32
    torch.testing.assert_close(found / scale**2 / 2, scores, rtol=1e-5, atol=1e-6)


def test_norms_on_queries_and_keys_are_refused():
    config = transformers.Qwen3Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    model = load_model(randomized(transformers.Qwen3ForCausalLM(config)))
    with pytest.raises(UnsupportedError, match="not linear in q"):
        qk_circuit(model, "a0.h0", IDS, IDS)
    assert ov_circuit(model, "a0.h0", IDS, IDS).values.shape == (4, 4)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_top_tokens_are_those_of_the_whole_table(name: str, monkeypatch: pytest.MonkeyPatch):
    model = tiny(name)
    vectors = head_writes_of(model, "a1.h0", IDS)
    table = vectors @ unembedding(model, torch.arange(D_VOCAB)).T
    values, ids = table.topk(4)
    for chunk in (7, 4096):
        monkeypatch.setattr(
            weights_module, "_vocabulary", lambda size, device, chunk=chunk: iter(torch.arange(size).split(chunk))
        )
        frame = top_tokens(model, vectors, 4)
        assert frame["token"].tolist() == ids.flatten().tolist()
        assert frame["value"].tolist() == pytest.approx(values.flatten().tolist())
    read = top_tokens(model, vectors, D_VOCAB, through="embedding")
    assert sorted(read[read["row"] == 2]["token"]) == list(range(D_VOCAB))
    assert read[read["row"] == 2]["value"].is_monotonic_decreasing


GATED = ("llama", "gemma2", "qwen2")


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in GATED])
def test_a_plain_mlp_has_no_gate_to_read(name: str):
    with pytest.raises(UnsupportedError, match="not gated"):
        neuron_tokens(tiny(name), 1, [5], side="gate")


@pytest.mark.parametrize("name", SHAPES)
def test_what_a_neuron_reads_is_its_preactivation_on_the_embedding(name: str):
    model, layer, neuron = tiny(name), 1, 5
    norm = model.layout.mlp_norm[layer]
    assert norm is not None
    site = Site("mlp_in", layer)
    maps = model.layout.neurons(layer)
    for side, weight in (("in", maps.W_in), ("gate", maps.W_gate))[: 2 if name in GATED else 1]:
        frame = neuron_tokens(model, layer, [neuron], D_VOCAB, side=side)
        stream = embedded(model)
        entering = norm(stream) - (0 if norm.bias is None else norm.bias)
        expected = (entering @ weight[:, neuron]) * norm.scale(stream)[:, 0]
        found = torch.tensor(frame.sort_values("token")["value"].tolist(), dtype=torch.float64)
        torch.testing.assert_close(found, expected, **close(name))
    assert model.has(site)


def test_what_a_neuron_writes_is_what_one_unit_more_of_it_adds():
    model, layer, neuron = tiny("no-norm"), N_LAYERS - 1, 11
    frame = neuron_tokens(model, layer, [3, neuron], D_VOCAB)
    tokens = IDS[None]

    def more(value: Tensor) -> Tensor:
        value = value.clone()
        value[..., neuron] += 1
        return value

    plain, changed = (
        model.run(tokens, interventions=edits).logits for edits in ([], [Intervention(Site("mlp_post", layer), more)])
    )
    assert plain is not None and changed is not None
    own = frame[frame["neuron"] == neuron].sort_values("token")["value"].tolist()
    torch.testing.assert_close(torch.tensor(own, dtype=torch.float64), (changed - plain)[0, -1], rtol=1e-9, atol=1e-9)


def whole(model: HookManager, layer: int, head: int, kind: str) -> tuple[Tensor, Tensor]:
    """(what the head writes of what it attends to, what it reads through `kind`) as [d_model, d_model] matrices."""
    maps = model.layout.attention[layer]
    eye = torch.eye(16, dtype=torch.float64)
    group = N_HEADS // model.dims.n_kv_heads
    q = maps.norm.project(eye) @ maps.W["q"][head]
    k = maps.norm.project(eye) @ maps.W["k"][head // group]
    ov = maps.norm.project(eye) @ maps.W["v"][head // group] @ maps.post.project(maps.W_O[head])
    return ov, {"q": q @ k.T, "k": k @ q.T, "v": ov}[kind]


@pytest.mark.parametrize("kind", ["q", "k", "v"])
@pytest.mark.parametrize("name", EVERY)
def test_composition_is_the_ratio_of_norms_of_whole_matrices(name: str, kind: str):
    model = tiny(name)
    found = composition_scores(model, kind)
    norm = torch.linalg.matrix_norm
    for sender in range(N_LAYERS):
        for receiver in range(N_LAYERS):
            cell = found.at(sender_layer=sender, receiver_layer=receiver).values
            if sender >= receiver:
                assert bool(cell.isnan().all())
                continue
            for head, other in ((0, 0), (1, 3), (3, 2)):
                a, b = whole(model, sender, head, kind)[0], whole(model, receiver, other, kind)[1]
                expected = norm(a @ b) / (norm(a) * norm(b))
                torch.testing.assert_close(cell[head, other], expected, rtol=1e-9, atol=1e-12)


def test_the_baseline_is_the_mean_square_over_random_orientations():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(12, 12, generator=generator, dtype=torch.float64) ** 3 for _ in range(2))
    squares = []
    for _ in range(4000):
        turn = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
        squares.append(float((torch.linalg.matrix_norm(a @ turn @ b) / a.norm() / b.norm()) ** 2))
    # standard error below 1 %
    assert sum(squares) / len(squares) == pytest.approx(1 / 12, rel=0.03)
    assert composition_scores(tiny("gpt2"), "q").about["baseline"] == 0.25  # d_model 16


@pytest.mark.slow
def test_the_induction_head_of_the_bundled_model_composes_with_the_previous_token_head():
    scores = composition_scores(mi.load_model("bundled"), "k").at(receiver_layer=1, receiver_head=0, sender_layer=0)
    assert int(scores.values.argmax()) == 0
    assert float(scores.values[0]) > 1.5 * scores.about["baseline"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ov_circuit(m, "a3.h0", IDS, IDS), "'a3.h0' is not a head of the model, which has 3 layers"),
        (lambda m: ov_circuit(m, "m0", IDS, IDS), "'m0' is not a head"),
        (lambda m: ov_circuit(m, "a0.h0", IDS + 40, IDS), "Token id 84 is outside the vocabulary of 50"),
        (lambda m: ov_circuit(m, "a0.h0", IDS, -IDS), "Token id -44"),
        (lambda m: ov_circuit(m, "a0.h0", IDS[:0], IDS), "at least one"),
        (lambda m: ov_circuit(m, "a0.h0", torch.ones(2, 5), IDS), r"\[n, 16\]; got \[2, 5\]"),
        (lambda m: top_tokens(m, torch.ones(2, 5)), r"\[rows, 16\]; got \[2, 5\]"),
        (lambda m: top_tokens(m, torch.ones(2, 16), 51), "from 1 to 50; got 51"),
        (lambda m: top_tokens(m, torch.ones(2, 16), through="unembed"), "Did you mean 'unembedding'"),
        (lambda m: neuron_tokens(m, 0, [64]), "numbered 0 to 63; got"),
        (lambda m: neuron_tokens(m, 0, []), "numbered 0 to 63"),
        (lambda m: neuron_tokens(m, 3, [0]), "Layer 3 does not exist"),
        (lambda m: neuron_tokens(m, 0, [0], side="inn"), "Did you mean 'in'"),
        (lambda m: composition_scores(m, "o"), "Unknown composition 'o'"),
        (lambda m: as_installed(embedded)(m, torch.ones(3)), "whole numbers"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str):
    with pytest.raises(MechInterpError, match=message):
        call(tiny("gpt2"))


def test_tables_too_large_and_edits_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights_module, "LARGEST_TABLE", 15)
    with pytest.raises(InputError, match="A table of 4 x 4 tokens is too large"):
        ov_circuit(tiny("gpt2"), "a0.h0", IDS, IDS)
    model = build("gpt2")
    with (
        model.intervene(Intervention("resid_pre.0", lambda value: value * 2)),
        pytest.raises(InputError, match="outside `intervene`"),
    ):
        embedded(model, IDS)


def test_an_mlp_free_model_has_no_neurons():
    with pytest.raises(UnsupportedError, match="has no MLP"):
        neuron_tokens(tiny("attention-only"), 0, [0])
