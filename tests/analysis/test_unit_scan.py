"""Subset scanning: exact against all subsets by brute force, finds what was planted, and nothing where nothing is."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.unit_scan import berk_jones, best_units, p_values
from mechinterp.base.errors import InputError


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("level", [0.1, 0.3])
def test_the_best_units_are_the_best_of_all_subsets(level: float) -> None:
    small = p_values(draw(30, 9), draw(7, 9, seed=1) * 1.5) <= level
    score, chosen = best_units(small, level)
    every = [torch.tensor(bits) for bits in product([False, True], repeat=9) if any(bits)]
    scores = [float(berk_jones(7.0 * int(units.sum()), small[:, units].double().sum(), level)) for units in every]
    assert score == pytest.approx(max(scores), rel=1e-12) and score > 0
    assert float(berk_jones(7.0 * int(chosen.sum()), small[:, chosen].double().sum(), level)) == pytest.approx(score)


def test_p_values_are_shares_of_the_reference_on_both_sides() -> None:
    reference = torch.arange(9.0)[:, None]
    found = p_values(reference, torch.tensor([[-1.0], [0.0], [4.0], [7.5], [9.0]]))[:, 0]
    torch.testing.assert_close(found, torch.tensor([0.2, 0.4, 1.0, 0.4, 0.2], dtype=torch.float64))
    # Under the reference they are uniform: no share of small ones is larger than its level (up to ties and noise).
    p = p_values(draw(400, 50), draw(400, 50, seed=1))
    assert abs(float((p <= 0.1).double().mean()) - 0.1) < 0.01


def test_planted_units_and_examples_are_found() -> None:
    reference, other = draw(80, 40), draw(40, 40, seed=1)
    planted, rows = [4, 11, 30], list(range(15))
    for unit, push in zip(planted, (3.0, -3.0, 3.0), strict=True):
        other[:15, unit] += push
    found = mi.scan_units(reference, other, exchanges=9, restarts=1)
    assert found.units.tolist() == planted and found.p_value == 0.1
    assert len(set(rows) & set(found.examples.tolist())) >= 13 and len(found.examples) <= 20
    again = mi.scan_units(reference, other, exchanges=9, restarts=1)
    assert again.score == found.score and torch.equal(again.null, found.null)
    assert "3 units" in repr(found)


def test_nothing_is_found_where_nothing_is_planted() -> None:
    """The score of a search is always above 0; only the exchanges say that it is nothing."""
    values = [mi.scan_units(draw(40, 12, seed=s), draw(30, 12, seed=s + 50), exchanges=9, restarts=0) for s in range(6)]
    assert all(found.score > 0 for found in values)
    assert sum(found.p_value <= 0.1 for found in values) <= 3 and max(found.p_value for found in values) > 0.3


def test_what_is_refused() -> None:
    good = draw(5, 3)
    cases: list[tuple[Any, str]] = [
        (lambda: mi.scan_units(good, draw(5, 4)), "of the same units"),
        (lambda: mi.scan_units(good, good / 0), "not finite"),
        (lambda: mi.scan_units(good, good, levels=[1.0]), "between 0 and 1"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
