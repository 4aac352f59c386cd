"""Concepts of a feature: a planted one on two words is split in two, one on one word is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.features.dictionary import Dictionary, sae
from tests.support.models_tiny import D_MODEL, tiny

SITE = "resid_pre.0"
USED = torch.tensor([3, 7, 11, 20, 21, 22, 23, 24, 25, 26])
"""The tokens of the texts: few, so that a feature can tell any of them apart exactly."""


def texts(firing: list[int], n: int = 16) -> list[torch.Tensor]:
    """Texts of other tokens with one of `firing` in each, in turn, anywhere."""
    draw = torch.Generator().manual_seed(0)
    rows = [USED[torch.randint(3, len(USED), (7,), generator=draw)] for _ in range(n)]
    for i, row in enumerate(rows):
        row[int(torch.randint(0, 7, (1,), generator=draw))] = firing[i % len(firing)]
    return rows


def planted(model: mi.HookManager, firing: list[int]) -> Dictionary:
    """An SAE whose feature 0 is 1 on those tokens and 0 on the others of the texts."""
    held = model.run(USED[None], record=[SITE]).values[SITE][0]
    wanted = torch.tensor([1.0 if int(token) in firing else -1.0 for token in USED]).to(held)
    read = torch.linalg.lstsq(held, wanted[:, None]).solution
    assert torch.allclose(held @ read, wanted[:, None], atol=1e-8)
    return sae(SITE, read, torch.ones(1, D_MODEL, dtype=held.dtype), b_enc=torch.zeros(1, dtype=held.dtype))


def test_a_feature_on_two_words_has_two_concepts_and_one_on_one_word_has_one():
    model = tiny("llama")
    both = mi.feature_concepts(model, planted(model, [7, 11]), 0, texts=texts([7, 11]), batch_size=5)
    assert both.examples.fired == len(both.examples.strongest) == 16
    assert {one.tokens for one in both.concepts} == {("7",), ("11",)}
    assert [len(one.examples) for one in both.concepts] == [8, 8]
    assert float(both.similarity.diagonal().min()) > 0.9 and float(both.similarity[0, 1]) < 0.5
    assert both.to_frame()["examples"].tolist() == [8, 8] and "2 in 16" in repr(both)
    one = mi.feature_concepts(model, planted(model, [7]), 0, texts=texts([7]))
    assert [found.tokens for found in one.concepts] == [("7",)] and len(one.concepts[0].examples) == 16
    three = mi.feature_concepts(model, planted(model, [3, 7, 11]), 0, texts=texts([3, 7, 11]), concepts=2)
    assert len(three.concepts) == 2 and sum(len(found.examples) for found in three.concepts) == 16


def test_groups_are_those_of_the_given_vectors():
    """Average linkage by hand: the cosines are 0.8 between the first two, 0 and 0.6 to the third: 0.3 on average."""
    model, given = tiny("llama"), torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    keywords: dict[str, Any] = {"texts": texts([7], 3), "embed": lambda some: 5 * given[: len(some)]}
    basis, asked = planted(model, [7]), list[str]()
    found = mi.feature_concepts(model, basis, 0, **keywords, words=lambda text: asked.append(text) or "seven")
    assert [len(one.examples) for one in found.concepts] == [2, 1] and found.concepts[0].words == "seven"
    torch.testing.assert_close(found.similarity, torch.tensor([[0.8, 0.3], [0.3, 1.0]]).double())
    assert len(asked) == 2 and ">>7<<" in asked[0]
    for cut, number in ((0.31, 2), (0.29, 1), (0.81, 3)):
        assert len(mi.feature_concepts(model, basis, 0, **keywords, similarity=cut).concepts) == number
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"embed": lambda some: given[:2]}, "a finite vector"),
        ({"texts": texts([3])}, "does not fire"),
        ({"similarity": 2.0}, "a cosine"),
        ({"concepts": 0}, "at least 1"),
    ]
    for wrong, said in mistakes:
        with pytest.raises(InputError, match=said):
            mi.feature_concepts(model, basis, 0, **(keywords | wrong))
