"""Norm-based token attribution: contributions add up to the run's own vectors, in decoders and through BERT's norms."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

import mechinterp as mi
from mechinterp.analysis import token_norms
from mechinterp.analysis.token_norms import token_contributions
from mechinterp.base.errors import InputError
from tests.support.models_tiny import EVERY, pairs, randomized, tiny


@functools.cache
def bert() -> Any:
    sizes: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32)
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)
    return mi.load_encoder(randomized(transformers.BertForMaskedLM(config)))


@pytest.mark.parametrize("name", EVERY)
def test_the_contributions_in_a_decoder_add_up_to_the_stream_after_attention(name: str) -> None:
    model, p = tiny(name), pairs(3, 6, padded=True)
    run = model.run(p.clean, p.mask, record=["resid_pre.1", "attn_out.1"]).values
    found = token_contributions(model, p, 1)
    expected = (run["resid_pre.1"] + run["attn_out.1"]).to(found.whole)
    torch.testing.assert_close(found.parts.sum(2)[p.mask] + found.rest[p.mask], expected[p.mask], rtol=1e-5, atol=1e-6)
    # No token contributes to an earlier one.
    assert float(found.parts.norm(dim=-1).triu(1).abs().max()) < 1e-9


@pytest.mark.parametrize("layer", [0, 2])
def test_the_contributions_in_a_bert_add_up_to_the_module_s_own_output(layer: int) -> None:
    model, p = bert(), pairs(3, 6, padded=True)
    with torch.no_grad():
        own = model.module(p.clean, attention_mask=p.mask.long(), output_hidden_states=True).hidden_states
    found = token_contributions(model, p, layer)
    total = (found.parts.sum(2) + found.rest)[p.mask]
    torch.testing.assert_close(total, own[layer + 1][p.mask], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.whole[p.mask], own[layer + 1][p.mask], rtol=1e-6, atol=1e-8)
    before = token_contributions(model, p, layer, through_norms=False)
    assert float((before.parts - found.parts).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["norms", "residual-norms", "attention"])
def test_rows_are_distributions_and_rollout_is_the_product(kind: Any) -> None:
    for model in (tiny("llama"), bert()):
        p = pairs(3, 6, padded=True)
        single = mi.token_attribution(model, p, kind, rollout=False, batch_size=2).values
        rolled = mi.token_attribution(model, p, kind).values
        for i, length in enumerate(p.lengths.tolist()):
            rows = single[:, :length, :length, i]
            torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows.sum(-1)))
            expected = rows[2] @ rows[1] @ rows[0]
            torch.testing.assert_close(rolled[2, :length, :length, i], expected)
            assert bool(single[:, length:, :, i].isnan().all()) and bool(single[:, :, length:, i].isnan().all())


def test_attention_rollout_is_half_attention_half_itself() -> None:
    model, p = tiny("gpt2"), pairs(2, 5)
    pattern = model.run(p.clean, record=["pattern.0"]).values["pattern.0"].mean(1)
    expected = 0.5 * pattern + 0.5 * torch.eye(5)
    found = mi.token_attribution(model, p, "attention").values[0].permute(2, 0, 1)
    torch.testing.assert_close(found, expected.to(found))


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="kind of token attribution"):
        mi.token_attribution(tiny("gpt2"), pairs(2, 5), "rollout")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="layers 0 to 2"):
        token_contributions(tiny("gpt2"), pairs(2, 5), 3)


def test_what_is_not_a_number_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that overflows has no attribution; it is not one of 0."""
    model, p = tiny("gpt2"), pairs(2, 5)
    of_layer = token_norms._contributions

    def overflowing(*args: Any, **settings: Any) -> Any:
        found = of_layer(*args, **settings)
        return replace(found, parts=found.parts * torch.nan)

    monkeypatch.setattr(token_norms, "_contributions", overflowing)
    assert bool(mi.token_attribution(model, p).values.isnan().all())
