"""The trainer of the bundled dictionaries: it recovers a planted dictionary, and its recipe is seeded."""

from __future__ import annotations

import pytest
import torch

import mechinterp as mi
from mechinterp.features.load import bundled_names
from tools.train_dictionaries.train import Recipe, main, sites_of, train

SMALL = Recipe(features=24, k=2, steps=700, batch=256, dead_after=40)


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of two of 24 random directions in 16 dimensions, and the directions."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=1)
    chosen = torch.rand(6000, 24, generator=generator).topk(2, dim=1).indices
    amounts = 1 + torch.rand(6000, 2, generator=generator)
    return (directions[chosen] * amounts[..., None]).sum(1), directions


@pytest.mark.slow
def test_a_planted_dictionary_is_recovered():
    values, directions = planted()
    parts, threshold = train(values, values, SMALL)
    basis = mi.sae("resid_pre.1", **parts, activation=mi.JumpRelu(torch.tensor(threshold)))
    error = basis.error(values).square().sum() / (values - values.mean(0)).square().sum()
    found = torch.nn.functional.normalize(basis.writes(), dim=1)
    best = (directions @ found.T).max(1).values
    assert float(error) < 0.15 and int((best > 0.95).sum()) >= 12
    drawn = torch.nn.functional.normalize(torch.randn(24, 16, generator=torch.Generator().manual_seed(9)), dim=1)
    assert not bool(((directions @ drawn.T).max(1).values > 0.95).any())  # what chance gives
    again, same = train(values, values, SMALL)
    assert same == threshold and all(torch.equal(again[name], part) for name, part in parts.items())


@pytest.mark.slow
def test_the_bundled_dictionaries_are_those_of_the_recipe(tmp_path):
    assert set(sites_of(4)) == set(bundled_names())
    main(["--out", str(tmp_path), "--only", "m1", "--steps", "3", "--documents", "40"])
    made, bundled = mi.load_basis(tmp_path / "m1"), mi.load_basis("bundled:m1")
    assert made.sites_in == bundled.sites_in and made.n_features == bundled.n_features and made != bundled
    assert made.source.about["k"] == bundled.source.about["k"]
