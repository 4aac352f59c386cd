"""Generation: the cache changes nothing, edits act where they say, and draws do not depend on the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.models.interventions import Intervention
from tests.support.models_tiny import pairs, tiny, tokens

VECTOR = torch.randn(16, generator=torch.Generator().manual_seed(5))
NAMED = {"S": [1, 2, 0]}


def by_hand(model: Any, row: list[int], n: int, edit: Any) -> list[int]:
    """The whole text run again for every token; `edit(value)` sees all of it."""
    for _ in range(n):
        run = model.run([row], interventions={"resid_pre.1": edit})
        row = [*row, int(run.logits[0, -1].argmax())]
    return row[-n:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "gemma2"])
def test_greedy_with_the_cache_is_without_and_by_hand(name: str) -> None:
    model, prompts = tiny(name), pairs(3, 6, padded=True, positions=NAMED)
    everywhere = mi.add_direction("resid_pre.1", VECTOR, 9.0)
    at_s = mi.add_direction("resid_pre.1", VECTOR, 9.0, pairs=prompts, positions="S")
    rows = [row[:n] for row, n in zip(prompts.clean.tolist(), prompts.lengths.tolist(), strict=True)]
    plain = model.generate(prompts.clean, 5, mask=prompts.mask)
    for edit in (everywhere, at_s):
        with model.intervene(edit):
            found = [model.generate(prompts.clean, 5, mask=prompts.mask, cache=cache) for cache in (True, False)]
        assert found[0].cache and not found[1].cache
        assert torch.equal(found[0].tokens, found[1].tokens)
        given = model.generate(prompts.clean, 5, mask=prompts.mask, interventions=[edit])
        assert torch.equal(given.tokens, found[0].tokens)
        for i, row in enumerate(rows):

            def change(value: torch.Tensor, i: int = i, edit: Any = edit) -> torch.Tensor:
                new = value.clone()
                own = slice(None) if edit is everywhere else slice(NAMED["S"][i], NAMED["S"][i] + 1)
                new[:, own] += 9.0 * VECTOR.to(value)
                return new

            assert found[0].tokens[i].tolist() == by_hand(model, row, 5, change)
    assert not torch.equal(plain.tokens, found[0].tokens)  # an edit at prompt positions only acts on what follows


def test_edits_of_features_and_affine_maps_go_on_from_the_cache() -> None:
    model = tiny("gpt2")
    basis = mi.concept_basis("resid_pre.1", VECTOR[None].double())
    for edit in (
        mi.set_features(basis, {0: 2.0}),
        mi.scale_features(basis, {0: -3.0}),
        mi.ablate_direction("mlp_out.1", VECTOR),
        Intervention("mlp_out.1", lambda value: 2 * value),
    ):
        found = [model.generate(tokens(2, 4), 6, interventions=[edit], cache=cache).tokens for cache in (True, False)]
        assert torch.equal(found[0], found[1])


def test_draws_depend_on_the_seed_and_the_row_only() -> None:
    model, prompts = tiny("gpt2"), tokens(3, 4).tolist()
    drawn = [model.generate(prompts, 6, temperature=1.5, seed=s).tokens for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    longer = [prompts[0], [*prompts[1], 7], prompts[2]]  # another length: another group
    again = model.generate(longer, 6, temperature=1.5, seed=0).tokens
    assert torch.equal(again[[0, 2]], drawn[0][[0, 2]])
    greedy = model.generate(prompts, 6).tokens
    assert torch.equal(model.generate(prompts, 6, temperature=1.5, top_k=1, seed=3).tokens, greedy)
    first = model.generate(prompts[:1] * 300, 1, temperature=1.0).tokens[:, 0]
    expected = model.run(prompts[:1]).logits[0, -1].softmax(-1)  # type: ignore[index]
    share = torch.bincount(first, minlength=50) / 300
    assert float((share - expected).abs().max()) < 4 * (0.25 / 300) ** 0.5  # four standard errors at most


def test_tokens_are_streamed_and_a_stop_token_ends_its_prompt() -> None:
    model, prompts = tiny("gpt2"), tokens(2, 4)
    seen: list[tuple[int, int]] = []
    plain = model.generate(prompts, 5, on_token=lambda row, token: seen.append((row, token)))
    assert [token for row, token in seen if row == 1] == plain.tokens[1].tolist() and seen[0][0] == 0
    stop = int(plain.tokens[0, 1])
    ended = model.generate(prompts, 5, stop=[stop]).tokens
    assert ended[0].tolist() == [*plain.tokens[0, :2].tolist(), -1, -1, -1]


def test_text_goes_in_and_out() -> None:
    model = mi.load_model("bundled")
    found = model.generate("Then, Mary and John went to the", 3)
    ids = model.tokenizer("Then, Mary and John went to the")["input_ids"]
    assert found.text == (model.tokenizer.decode(model.generate([ids], 3).tokens[0].tolist()),)


def test_what_is_refused() -> None:
    model, prompts = tiny("gpt2"), pairs(3, 6, padded=True, positions=NAMED)
    looks_back = Intervention("resid_pre.1", lambda value: value - value.mean(1, keepdim=True))
    third = Intervention("resid_pre.1", lambda value: value.index_fill(1, torch.tensor([3]), 0.0))
    at_s = mi.add_direction("resid_pre.1", VECTOR, 9.0, pairs=prompts, positions="S")
    cases: list[tuple[Any, str]] = [
        (lambda: model.generate(tokens(1, 4), 3, interventions=[looks_back]), "every token by itself"),
        (lambda: model.generate(tokens(1, 4), 3, interventions=[third]), "every token by itself"),
        (lambda: model.generate(tokens(5, 6), 3, interventions=[at_s]), "for 3 prompts of 6 tokens"),
        (lambda: model.generate(tokens(1, 4), 30), "more than the model reads"),
        (lambda: model.generate(tokens(1, 4), 0), "at least 1"),
        (lambda: model.generate("text", 3), "no tokenizer"),
        (lambda: model.generate(tokens(2, 4), 3, mask=torch.tensor([[0, 1, 1, 1]] * 2).bool()), "padded on the right"),
        (
            lambda: model.generate(tokens(1, 4), 3, interventions=[Intervention("resid_pre.1", torch.zeros(1, 4, 16))]),
            "for one run",
        ),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
    model.generate(tokens(1, 4), 3, interventions=[looks_back], cache=False)
    # On a prompt of one token the edit cannot be tested: it goes without the cache, or is refused.
    alone = model.generate([[5]], 4, interventions=[looks_back])
    assert not alone.cache
    assert torch.equal(alone.tokens, model.generate([[5]], 4, interventions=[looks_back], cache=False).tokens)
    assert model.generate([[5]], 4).cache
    with pytest.raises(InputError, match="cannot be tested on a prompt of one token"):
        model.generate([[5]], 4, interventions=[looks_back], cache=True)
