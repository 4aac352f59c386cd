"""Readers of a direction: all together are the direction patched at its site; one is its edge in the exact engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from tests.support.models_tiny import EVERY, pairs, tiny

NAMED = {"S": [1, 2, 0, 1]}


@pytest.mark.parametrize("name", EVERY)
def test_all_readers_together_are_the_direction_patched_at_its_site(name: str) -> None:
    model, p = tiny(name), pairs(4, 6, padded=True, positions=NAMED)
    direction = mi.find_direction(model, p, "resid_pre.1", "S")
    readers = [reader for reader in mi.build_graph(model).readers if not reader.startswith(("a0", "m0"))]
    found = mi.direction_readers(model, p, direction, [readers, *readers[:2]], positions="S", batch_size=3)
    site, rows = "resid_pre.1", torch.arange(4)
    values = [model.run(ids, p.mask, record=[site]).values[site] for ids in (p.clean, p.corrupt)]
    amount = (direction.reading(values[1]) - direction.reading(values[0]))[rows, p.positions["S"]]

    def patch(value: torch.Tensor) -> torch.Tensor:
        new = value.clone()
        new[rows, p.positions["S"]] += (amount[:, None] * direction.write).to(value)
        return new

    edit = mi.Intervention(site, patch)
    logits = [model.run(p.clean, p.mask, interventions=edits).logits for edits in ([], [edit])]
    last = [own[rows, p.lengths - 1] for own in logits]  # type: ignore[index]
    difference = [(own.gather(1, p.right) - own.gather(1, p.wrong))[:, 0] for own in last]  # type: ignore[arg-type]
    expected = difference[0] - difference[1]
    torch.testing.assert_close(found.values[0], expected.to(found.values), rtol=1e-5, atol=1e-6)
    assert found.values[1:].abs().max() > 0


def test_the_effect_through_the_logits_is_the_final_stream_moved() -> None:
    model, p = tiny("gpt2"), pairs(4, 6)
    direction = mi.find_direction(model, p, "resid_final")
    whole = mi.direction_readers(model, p, direction)
    assert whole.labels["reader"] == ("logits",)
    basis = (direction.write / direction.write.norm())[:, None]
    same = mi.subspace_interchange(model, p, "resid_final", basis, placebos=0).at(subspace="basis")
    torch.testing.assert_close(whole.values[0], same.values, rtol=1e-6, atol=1e-8)
    there = mi.direction_readers(model, p, direction, patching="denoise").values
    assert there.shape == (1, 4)


def test_what_is_refused() -> None:
    model, p = tiny("gpt2"), pairs(4, 6)
    direction = mi.find_direction(model, p, "resid_pre.1")
    cases: list[tuple[Any, str]] = [
        (lambda: mi.direction_readers(model, p, direction, ["m0"]), "before the direction's site"),
        (lambda: mi.direction_readers(model, p, direction, ["a1.h0"]), "not a reader"),
        (lambda: mi.direction_readers(model, p, direction, ["m1@2"]), "as `positions`"),
        (lambda: mi.direction_readers(model, p, direction, []), "at least one reader"),
        (lambda: mi.direction_readers(model, p, mi.find_direction(model, p, "mlp_out.1")), "not a residual stream"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
