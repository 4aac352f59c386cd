"""Steering edits do what their formula says, where they say, and keep shape and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mechinterp.analysis.steering import ablate_direction, add_direction, affine, mean_difference
from mechinterp.base.errors import InputError
from mechinterp.models.sites import Site
from tests.support.models_tiny import EVERY, as_installed, build, pairs, tiny

NAMED = {"S": [1, 2, 0]}
GENERATOR = torch.Generator().manual_seed(0)
VECTOR, MATRIX = torch.randn(16, generator=GENERATOR), torch.randn(16, 16, generator=GENERATOR)


POSITIONS: list[Any] = [None, "S", [(0, -1)]]


@pytest.mark.parametrize(("name", "positions"), [(name, POSITIONS[i % 3]) for i, name in enumerate(EVERY)])
def test_the_value_becomes_what_the_formula_says(name: str, positions: Any) -> None:
    model, prompts = tiny(name), pairs(3, 6, padded=True, positions=NAMED)
    site = "resid_pre.1"
    plain = model.run(prompts.clean, prompts.mask, record=[site]).values[site]
    where = {"pairs": prompts, "positions": positions} if positions is not None else {}
    unit = VECTOR.to(plain) / VECTOR.to(plain).norm()
    cases = [
        (add_direction(site, VECTOR, -1.5, **where), lambda v: v - 1.5 * VECTOR.to(v)),
        (affine(site, MATRIX, VECTOR, **where), lambda v: v @ MATRIX.to(v) + VECTOR.to(v)),
        (ablate_direction(site, VECTOR, **where), lambda v: v - (v @ unit)[..., None] * unit),
    ]
    mask = torch.ones_like(prompts.mask)
    if positions is not None:
        mask[:] = False
        for row in range(3):
            at = {NAMED["S"][row]} if positions == "S" else {0, int(prompts.lengths[row]) - 1}
            mask[row, list(at)] = True
    for edit, formula in cases:
        got = model.run(prompts.clean, prompts.mask, interventions=[edit], record=[site]).values[site]
        expected = torch.where(mask[..., None], formula(plain), plain)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        assert got.dtype == plain.dtype


def test_an_ablated_direction_is_gone_and_the_identity_map_changes_nothing() -> None:
    model, prompts = tiny("gpt2"), pairs(3, 6)
    edit = ablate_direction("resid_pre.1", VECTOR)
    value = model.run(prompts.clean, interventions=[edit], record=["resid_pre.1"]).values["resid_pre.1"]
    assert float((value @ VECTOR.to(value)).abs().max()) < 1e-9
    same = model.run(prompts.clean, interventions=[affine("resid_pre.1", torch.eye(16))]).logits
    assert torch.equal(same, model.run(prompts.clean).logits)  # type: ignore[arg-type]


@pytest.mark.slow
def test_other_sites_and_precisions() -> None:
    model, prompts = build("gpt2", dtype=torch.bfloat16), pairs(3, 6)
    value = model.run(prompts.clean, interventions=[add_direction("z.0", torch.ones(4))], record=["z.0"]).values["z.0"]
    assert value.dtype == torch.bfloat16
    neurons = add_direction("mlp_post.0", torch.ones(64))
    model.run(prompts.clean, interventions=[neurons])


@pytest.mark.parametrize("site", ["resid_pre.1", "z.2", "mlp_post.0"])
def test_the_mean_difference_is_of_the_position_in_each_prompt(site: str) -> None:
    model, prompts = tiny("gpt2"), pairs(4, 6, padded=True)
    values = [model.run(ids, prompts.mask, record=[site]).values[site] for ids in (prompts.clean, prompts.corrupt)]
    for position in (-1, 1):
        at = prompts.lengths - 1 if position == -1 else torch.ones(4, dtype=torch.long)
        expected = values[0][torch.arange(4), at].mean(0) - values[1][torch.arange(4), at].mean(0)
        got = mean_difference(model, prompts.clean, prompts.corrupt, Site.parse(site), position, mask=prompts.mask)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    one = mean_difference(model, prompts.clean[:1], prompts.corrupt[:2], site)
    assert one.shape == values[0].shape[2:]


BAD: list[tuple[Any, str]] = [
    (lambda: add_direction("resid_pre.1", torch.zeros(16)), "finite and not 0"),
    (lambda: add_direction("resid_pre.1", torch.full((16,), torch.nan)), "finite and not 0"),
    (lambda: add_direction("resid_pre.1", VECTOR, positions="S"), "give `pairs` as well"),
    (lambda: add_direction("resid_pre.1", VECTOR, pairs=pairs(3, 6, positions=NAMED), positions=["S", 0]), "one set"),
    (lambda: add_direction("pattern.1", VECTOR), "edit_pattern"),
    (lambda: as_installed(affine)("resid_pre.1", torch.ones(3, 4)), r"must be \[d, d\]"),
    (
        lambda: mean_difference(tiny("gpt2"), pairs(3, 6).clean, pairs(3, 6).corrupt, "pattern.0"),
        "no vectors|direction",
    ),
    (lambda: mean_difference(tiny("gpt2"), pairs(3, 6).clean, pairs(3, 6).corrupt, "z.0", 8), "outside the prompt"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_gets_one_clear_line(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_an_edit_that_does_not_fit_the_run_is_refused() -> None:
    model, prompts = tiny("gpt2"), pairs(3, 6, positions=NAMED)
    with pytest.raises(InputError, match="of 16 numbers, the value of 4"):
        model.run(prompts.clean, interventions=[add_direction("z.0", VECTOR)])
    with pytest.raises(InputError, match="is for 3 prompts of 6 tokens"):
        model.run(prompts.clean[:2], interventions=[add_direction("resid_pre.0", VECTOR, pairs=prompts, positions="S")])
