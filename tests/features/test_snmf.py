"""Semi-nonnegative factorisation: its error never rises, vanishes at the true rank, and encoding is least squares."""

from __future__ import annotations

import itertools

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.models.sites import Site
from tests.support.models_tiny import tiny, tokens

SITE = Site("mlp_post", 1)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_error_never_rises():
    losses = mi.snmf_basis(SITE, drawn(60, 12), 7, steps=60).losses
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_a_planted_factorisation_is_found_at_its_rank_and_not_below():
    """Its features are not unique (any nonnegative mixture of amounts does as well), its error is."""
    amounts = drawn(80, 5, seed=1).abs() * (drawn(80, 5, seed=2) > 0.6)
    amounts[torch.arange(80), torch.arange(80) % 5] += 1
    values = amounts @ drawn(5, 12)
    size = float(values.square().sum())
    found = mi.snmf_basis(SITE, values, 5, steps=2000)
    assert found.losses[-1] < 1e-3 * size and not bool((found.amounts < 0).any())
    assert float(found.basis.error(values).square().sum()) <= found.losses[-1] * (1 + 1e-9)
    least = float(torch.linalg.svdvals(values)[4:].square().sum())
    assert mi.snmf_basis(SITE, values, 4, steps=300).losses[-1] > least > 0.01 * size


def test_winners_are_kept():
    found = mi.snmf_basis(SITE, drawn(60, 50), 4, steps=10, winners=0.1)
    assert (found.basis.writes() != 0).sum(1).tolist() == [5] * 4


def test_encoding_is_nonnegative_least_squares():
    """The conditions of Karush, Kuhn and Tucker: no amount is negative, and no change of one helps."""
    basis = mi.snmf_basis(SITE, drawn(60, 12), 20, steps=20).basis
    x = drawn(9, 12, seed=5)
    amounts = basis.encode(x).values
    slope = (basis.decode(basis.encode(x))[SITE] - x) @ basis.writes().T
    assert bool((amounts >= 0).all()) and bool((slope > -1e-9).all())
    assert float((slope * amounts).abs().max()) < 1e-9 and bool((amounts > 0).any())
    torch.testing.assert_close(basis.decode(basis.encode(x))[SITE] + basis.error(x), x)


def test_it_is_a_basis_like_the_others(tmp_path):
    model = tiny("gpt2")
    values = model.run(tokens(), record=[SITE]).values[SITE].flatten(0, 1)
    basis = mi.snmf_basis(SITE, values, 6, steps=30).basis
    mi.save_basis(tmp_path, basis)
    assert mi.load_basis(tmp_path, model=model, check=tokens()) == basis
    plain = model.run(tokens(), record=[basis])
    spliced = model.run(tokens(), interventions={basis: lambda features: features * 1.0})
    assert torch.equal(plain.logits, spliced.logits)
    edited = model.run(tokens(), interventions=[mi.ablate_features(basis, [2])])
    change = plain.values[basis][..., 2:3] * basis.writes([2])[0]
    by_hand = model.run(tokens(), interventions={SITE: lambda value: value - change})
    torch.testing.assert_close(edited.logits, by_hand.logits)


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        (drawn(5, 3), {"n_features": 6}, "1 to 5 features; got 6"),
        (drawn(5, 3), {"n_features": 2, "winners": 0.0}, "a share above 0"),
        (0 * drawn(5, 3), {"n_features": 2}, "not all 0"),
    ],
)
def test_what_does_not_fit_is_refused(values, settings, message):
    with pytest.raises(InputError, match=message):
        mi.snmf_basis(SITE, values, **settings)
