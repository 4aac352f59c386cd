"""Head detectors: against patterns set by hand, TransformerLens's detector, whole OV matrices, and known heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import head_detector

import mechinterp as mi
from mechinterp.analysis.head_detectors import (
    TARGETS,
    attention_to,
    copying_scores,
    head_scores,
    pattern_scores,
    repeated_tokens,
)
from mechinterp.analysis.weights import embedded, ov_circuit
from mechinterp.base.errors import MechInterpError, UnsupportedError
from mechinterp.models.hook_manager import Intervention
from mechinterp.models.sites import Site
from tests.support.known_circuits import NAMES, known
from tests.support.models_tiny import D_VOCAB, EVERY, N_HEADS, N_LAYERS, build, pairs, tiny


def by_offset(offset: int) -> Any:
    """An edit that makes head 2 attend `offset` back (to itself where there is nothing)."""

    def edit(pattern: Tensor) -> Tensor:
        pattern = pattern.clone()
        pattern[:, 2] = 0
        for query in range(pattern.shape[2]):
            pattern[:, 2, query, query - offset if query >= offset else query] = 1
        return pattern

    return edit


@pytest.mark.parametrize(("kind", "offset"), [("previous_token", 1), ("duplicate_token", 9), ("induction", 8)])
def test_a_head_set_by_hand_scores_1_and_another_kind_0(kind: str, offset: int):
    model = tiny("gpt2")  # without a tokenizer, so without BOS: a copy is 9 positions back
    with model.intervene(Intervention("pattern.1", by_offset(offset))):
        for other in TARGETS:
            score = head_scores(model, other, n=3, length=9).at(layer=1, head=2).values
            assert score.tolist() == [float(kind == other)] * 3


@pytest.mark.parametrize("name", EVERY)
def test_the_scores_are_transformer_lenss_but_for_queries_without_a_target(name: str):
    model = tiny(name)
    tokens = repeated_tokens(model, 3, 6, seed=1)
    sites = [Site("pattern", layer) for layer in range(N_LAYERS)]
    patterns = model.run(tokens, record=sites).values
    for kind, targets in TARGETS.items():
        found = pattern_scores(model, tokens, targets(tokens)).values
        detection = getattr(head_detector, f"get_{kind}_head_detection_pattern")
        for example in range(3):
            wanted = detection(tokens[example : example + 1])
            assert torch.equal(wanted.bool(), targets(tokens)[example])
            share = float(wanted.any(1).double().mean())
            for layer in range(N_LAYERS):
                for head in range(N_HEADS):
                    theirs = head_detector.compute_head_attention_similarity_score(
                        patterns[sites[layer]][example, head],
                        wanted,
                        exclude_bos=False,
                        exclude_current_token=False,
                        error_measure="mul",
                    )
                    # softmax rows sum to 1 in float32 where attention is computed in it
                    assert float(found[layer, head, example]) * share == pytest.approx(theirs, rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_the_known_heads_of_the_bundled_model_are_found():
    model = mi.load_model("bundled")
    best = {}
    for kind in TARGETS:
        row = head_scores(model, kind).mean().top(1).iloc[0]
        best[kind] = (int(row["layer"]), int(row["head"]))
    assert best == {"previous_token": (0, 0), "duplicate_token": (0, 1), "induction": (1, 0)}


@pytest.mark.slow
def test_attention_between_named_positions_is_that_of_the_model_card():
    model = mi.load_model("bundled")
    given = mi.load_task("ioi").pairs(model, n=200, split="test", seed=0)
    duplicate = attention_to(model, given, "S2", "S1").mean()
    assert float(duplicate.at(layer=0, head=1)) == pytest.approx(0.62, abs=0.05)  # the card's prompts are others
    run = model.run(given.clean, given.mask, record=[Site("pattern", 2)])
    rows = torch.arange(len(given))
    expected = run.values[Site("pattern", 2)][rows, 3, given.positions["end"], given.positions["IO"]]
    # float32, other batches
    torch.testing.assert_close(
        attention_to(model, given, "end", "IO", batch_size=64).at(layer=2, head=3).values, expected
    )


@pytest.mark.parametrize("name", EVERY)
def test_sets_of_positions_and_padding(name: str):
    model, given = tiny(name), pairs(7, padded=True)
    found = attention_to(model, given, [1, -1], [0, 1])
    for row in range(7):
        length = int(given.lengths[row])
        sites = [Site("pattern", layer) for layer in range(N_LAYERS)]
        values = model.run(given.clean[row : row + 1, :length], record=sites).values
        pattern = torch.stack([values[site][0] for site in sites])
        queries = sorted({1, length - 1})
        expected = pattern[:, :, queries][..., [0, 1]].sum(-1).mean(-1)
        torch.testing.assert_close(found.values[..., row], expected, rtol=1e-5, atol=1e-7)  # float32 softmax
    parted = attention_to(model, given, [1, -1], [0, 1], batch_size=3)
    torch.testing.assert_close(parted.values, found.values, rtol=1e-6, atol=1e-7)
    every = attention_to(model, given, -1, list(range(3))).values  # rows of three tokens have no other
    torch.testing.assert_close(every[..., -1], torch.ones_like(every[..., -1]), rtol=1e-5, atol=1e-5)
    clean, corrupt = (attention_to(model, given, -1, 0, prompt=prompt).values for prompt in ("clean", "corrupt"))
    assert not torch.allclose(clean, corrupt)


def test_random_sequences_are_seeded_without_doubles_and_begin_with_bos():
    model = mi.load_model("bundled")
    tokens = repeated_tokens(model, 5, 20, seed=3)
    assert torch.equal(tokens, repeated_tokens(model, 5, 20, seed=3))
    assert not torch.equal(tokens, repeated_tokens(model, 5, 20, seed=4))
    assert tokens.shape == (5, 41) and set(tokens[:, 0].tolist()) == {model.tokenizer.bos_token_id}
    assert torch.equal(tokens[:, 1:21], tokens[:, 21:])
    assert all(len(set(row)) == 20 for row in tokens[:, 1:21].tolist())
    many = repeated_tokens(model, 200, 25)[:, 1:]  # 5,000 of 808 tokens: a special one would be among them
    assert not set(many.flatten().tolist()) & set(model.tokenizer.all_special_ids)


@pytest.mark.parametrize("name", EVERY)
def test_copying_is_by_the_eigenvalues_of_the_whole_ov_circuit(name: str):
    model = tiny(name)
    found, ids = copying_scores(model), torch.arange(D_VOCAB)
    for layer, head in ((0, 0), (1, 3), (2, 1)):
        values = torch.linalg.eigvals(ov_circuit(model, f"a{layer}.h{head}", ids, ids).values)
        expected = float(values.sum().real / values.abs().sum())
        # the 42 eigenvalues that are 0 come out as rounding
        assert float(found.at(layer=layer, head=head)) == pytest.approx(expected, abs=1e-6)


def test_a_head_that_copies_scores_1_and_one_that_suppresses_minus_1():
    model = build("no-norm")
    attention = model.bridge.blocks[0].attn
    table, out = embedded(model), model.layout.W_U
    with torch.no_grad():
        # W_V W_O = +- (W_U W_E)' makes W_E W_V W_O W_U of the form M' M in the eigenvalues: all positive.
        between = out @ table
        for head, sign in ((0, 1.0), (1, -1.0)):
            model.layout.attention[0].W["v"][head] = torch.linalg.qr(torch.randn(16, 4, dtype=torch.float64)).Q
            model.layout.attention[0].W_O[head] = sign * (between @ model.layout.attention[0].W["v"][head]).T
    assert attention is not None
    scores = copying_scores(model).at(layer=0).values
    assert float(scores[0]) == pytest.approx(1) and float(scores[1]) == pytest.approx(-1)


def test_other_vocabularies_in_and_out_are_refused():
    name = next(n for n in NAMES if (k := known(n)).model.dims.d_vocab != k.model.dims.d_vocab_out)
    with pytest.raises(UnsupportedError, match="Copying compares a token's embedding with its logit"):
        copying_scores(known(name).model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: head_scores(m, "inductoin"), "Unknown detector 'inductoin'. Did you mean 'induction'"),
        (lambda m: head_scores(m, "induction"), "allow lengths 2 to 16"),
        (lambda m: head_scores(m, "induction", length=1), "allow lengths 2 to 16"),
        (lambda m: head_scores(m, "induction", n=0, length=5), "at least one sequence"),
        (lambda m: attention_to(m, pairs(2), 7, 0), "Position 7 is outside the prompt of row 0"),
        (lambda m: attention_to(m, pairs(2), "end", 0), "Unknown position 'end'"),
        (lambda m: attention_to(m, pairs(2), [], 0), "set of positions is empty"),
        (lambda m: attention_to(m, pairs(2), 1, 0, prompt="x"), "'clean' or 'corrupt'"),
        (lambda m: attention_to(m, pairs(2), 1, 0, batch_size=0), "batch_size must be at least 1"),
        (
            lambda m: pattern_scores(m, pairs(2).clean, torch.zeros(2, 7, 7, dtype=torch.bool)),
            "Example 0 has no target",
        ),
        (
            lambda m: pattern_scores(m, pairs(2).clean, torch.ones(2, 6, 6, dtype=torch.bool)),
            r"\[2, 7, 7\]; got \[2, 6, 6\]",
        ),
    ],
)
def test_bad_input_is_refused(call: Any, message: str):
    with pytest.raises(MechInterpError, match=message):
        call(tiny("gpt2"))
