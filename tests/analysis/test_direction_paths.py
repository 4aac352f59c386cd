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


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("patching", ["noise", "denoise"])
def test_all_senders_into_a_subspace_are_the_subspace_patched(name: str, patching: Any) -> None:
    """Path patching through a node of two dimensions, split over its writers and over its readers."""
    model, p = tiny(name), pairs(4, 6, padded=True, positions=NAMED)
    basis = mi.subspace_basis("resid_pre.1", torch.linalg.qr(torch.randn(16, 2, dtype=torch.float64)).Q)
    readers = [reader for reader in mi.build_graph(model).readers if not reader.startswith(("a0", "m0"))]
    heads = [f"a0.h{head}" for head in range(4)]
    everything = ["input", *heads, *(["m0"] if model.dims.has_mlp else [])]
    two: list[Any] = [readers, readers[:2]]
    how: dict[str, Any] = dict(patching=patching, batch_size=3)
    through = mi.direction_paths(model, p, basis, [everything, ["a0.h1"]], two, position="S", **how)
    whole = mi.direction_readers(model, p, basis, two, positions="S", **how)
    torch.testing.assert_close(through.values[0], whole.values, rtol=1e-4, atol=1e-6)
    assert (through.values[1] - through.values[0]).abs().max() > 1e-4
    # What the parts write along both coordinates adds up to them.
    written = mi.direction_writers(model, p, basis, "S")
    at = model.run(p.clean, p.mask, record=["resid_pre.1"]).values["resid_pre.1"][torch.arange(4), p.positions["S"]]
    expected = basis.encode(at).values.T
    torch.testing.assert_close(written.values.sum(0), expected.to(written.values), rtol=1e-5, atol=1e-6)


def test_one_path_through_the_final_stream_is_the_head_s_write_projected() -> None:
    model, p = tiny("gpt2"), pairs(4, 6)
    direction = mi.find_direction(model, p, "resid_final")
    found = mi.direction_paths(model, p, direction, ["a1.h2"], ["logits"]).values[0, 0]
    clean, corrupt = (model.run(ids, record=["z.1", "resid_final"]).values for ids in (p.clean, p.corrupt))
    change = (corrupt["z.1"][:, -1, 2] - clean["z.1"][:, -1, 2]) @ model.layout.attention[1].W_O[2]
    moved = clean["resid_final"][:, -1] + (change @ direction.read)[:, None] * direction.write
    before, after = (model.layout.unembed(x) for x in (clean["resid_final"][:, -1], moved))
    difference = [(own.gather(1, p.right) - own.gather(1, p.wrong))[:, 0] for own in (before, after)]  # type: ignore[arg-type]
    torch.testing.assert_close(found, (difference[0] - difference[1]).to(found), rtol=1e-6, atol=1e-8)


def test_what_is_refused() -> None:
    model, p = tiny("gpt2"), pairs(4, 6)
    direction = mi.find_direction(model, p, "resid_pre.1")
    cases: list[tuple[Any, str]] = [
        (lambda: mi.direction_readers(model, p, direction, ["m0"]), "before the direction's site"),
        (lambda: mi.direction_readers(model, p, direction, ["a1.h0"]), "not a reader"),
        (lambda: mi.direction_readers(model, p, direction, ["m1@2"]), "as `positions`"),
        (lambda: mi.direction_readers(model, p, direction, []), "at least one reader"),
        (lambda: mi.direction_readers(model, p, mi.find_direction(model, p, "mlp_out.1")), "not a residual stream"),
        (lambda: mi.direction_paths(model, p, direction, "heads"), "got 'heads'"),
        (lambda: mi.direction_readers(model, p, mi.load_basis("bundled:m1")), "linear subspace of one site"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
