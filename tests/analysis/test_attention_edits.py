"""Knockout equals minus infinity before the softmax; pattern edits write what they say and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mechinterp.analysis.activation_patching import activation_patching
from mechinterp.analysis.attention_edits import edit_pattern, knock_out_attention
from mechinterp.base.errors import InputError
from mechinterp.models.hook_manager import Intervention
from tests.support.models_tiny import ALL_FLOAT64, EVERY, SHAPES, as_installed, pairs, snapshot, tiny

NAMED = {"S": [1, 2, 0], "end": [5, 4, 3]}


def examples() -> Any:
    return pairs(3, 6, padded=True, positions=NAMED)


@pytest.mark.parametrize("name", SHAPES)
def test_knockout_is_minus_infinity_before_the_softmax(name: str) -> None:
    model, prompts = tiny(name), examples()
    blind = knock_out_attention(model, prompts, "end", [("S", 3)], heads=["a1.h1", "a1.h2", "a2.h0"])
    before = snapshot(model.bridge)
    got = model.run(prompts.clean, prompts.mask, interventions=blind).logits

    def block(heads: list[int]):
        def edit(scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            for row in range(3):
                for key in {int(prompts.positions["S"][row]), 3}:
                    if key <= int(prompts.positions["end"][row]):
                        scores[row, heads, prompts.positions["end"][row], key] = torch.finfo(scores.dtype).min
            return scores

        return edit

    expected = model.run(
        prompts.clean, prompts.mask, interventions={"scores.1": block([1, 2]), "scores.2": block([0])}
    ).logits
    assert got is not None and expected is not None
    tolerance = 1e-9 if name in ALL_FLOAT64 else 1e-5  # the softmax of the other shapes runs in float32
    real = prompts.mask
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=tolerance)
    assert snapshot(model.bridge) == before
    plain = model.run(prompts.clean, prompts.mask).logits
    assert plain is not None and not torch.allclose(got[real], plain[real])


@pytest.mark.parametrize("name", EVERY)
def test_only_the_chosen_entries_go_and_rows_sum_to_one(name: str) -> None:
    model, prompts = tiny(name), examples()
    blind = knock_out_attention(model, prompts, "end", "S", layers=[1])
    plain = model.run(prompts.clean, prompts.mask, record=["pattern.1"]).values["pattern.1"]
    got = model.run(prompts.clean, prompts.mask, interventions=blind, record=["pattern.1"]).values["pattern.1"]
    for row in range(3):
        end, key = NAMED["end"][row], NAMED["S"][row]
        for query in range(int(prompts.lengths[row])):
            expected = plain[row, :, query].clone()
            if query == end:
                expected[:, key] = 0
                expected = expected / expected.sum(-1, keepdim=True)
            torch.testing.assert_close(got[row, :, query], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_entries_are_set_added_to_and_scaled(name: str) -> None:
    model, prompts = tiny(name), examples()
    plain = model.run(prompts.clean, prompts.mask, record=["pattern.0"]).values["pattern.0"]
    for keywords, change in (
        ({"set": 0.5}, lambda value: torch.full_like(value, 0.5)),
        ({"add": -0.25}, lambda value: value - 0.25),
        ({"scale": 3.0}, lambda value: value * 3),
    ):
        for renormalize in (False, True):
            edits = edit_pattern(model, prompts, "end", "S", heads=["a0.h3"], renormalize=renormalize, **keywords)
            got = model.run(prompts.clean, prompts.mask, interventions=edits, record=["pattern.0"]).values["pattern.0"]
            expected = plain.clone()
            for row in range(3):
                end, key = NAMED["end"][row], NAMED["S"][row]
                expected[row, 3, end, key] = change(plain[row, 3, end, key])
                if renormalize:
                    expected[row, 3, end] /= expected[row, 3, end].sum()
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_edits_compose_with_sweeps_that_repeat_the_prompts() -> None:
    model, prompts = tiny("gpt2"), examples()
    blind = knock_out_attention(model, prompts, "end", "S", layers=[2])
    with model.intervene(*blind):
        grid = activation_patching(model, prompts, ["a1.h0", "a1.h1"])
    wrong = [Intervention("pattern.2", lambda pattern: pattern)]
    with model.intervene(*wrong):
        other = activation_patching(model, prompts, ["a1.h0", "a1.h1"])
    assert not torch.allclose(grid.values, other.values)


BAD: list[tuple[Any, Any, dict[str, Any], str]] = [
    ("T", "S", {}, "Unknown position 'T'"),
    (["S", "end"], "S", {}, "one set of positions"),
    ("S", "end", {}, "nothing can be edited"),
    ([0], [0], {}, "no key left"),
    (None, None, {}, "no key left"),
    ("end", "S", {"heads": []}, "at least one head"),
    ("end", "S", {"heads": ["a9.h1"]}, "layers 0 to 2"),
    ("end", "S", {"heads": ["a1.h1<q>"]}, "is not a head"),
    ("end", "S", {"heads": ["a1.h1"], "layers": [0]}, "not both"),
    ("end", "S", {"layers": [7]}, "0 to 2"),
]


@pytest.mark.parametrize(("queries", "keys", "keywords", "message"), BAD)
def test_bad_input_gets_one_clear_line(queries: Any, keys: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_installed(knock_out_attention)(tiny("gpt2"), examples(), queries, keys, **keywords)


def test_what_an_edit_cannot_know_is_refused() -> None:
    model, prompts = tiny("gpt2"), examples()
    with pytest.raises(InputError, match="got none"):
        edit_pattern(model, prompts, "end", "S")
    with pytest.raises(InputError, match="got set, scale"):
        edit_pattern(model, prompts, "end", "S", set=1.0, scale=1.0)
    blind = knock_out_attention(model, prompts, "end", "S")
    with pytest.raises(InputError, match="is for 3 prompts of 6 tokens"):
        model.run(prompts.clean[:2], interventions=blind)
    sharp = Intervention("scores.0", lambda scores: torch.where(torch.arange(6) == 0, 1e4, scores))
    only = knock_out_attention(model, prompts, "end", [0], layers=[0])
    with pytest.raises(InputError, match="attends to nothing but"):
        model.run(prompts.clean, prompts.mask, interventions=[sharp, *only])
