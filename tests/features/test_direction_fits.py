"""Fits of directions and affine maps: closed forms, optimality conditions, and identities between methods."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from mechinterp.base.errors import InputError
from mechinterp.features.affine_fits import fit_affine
from mechinterp.features.direction_fits import FITS, fit_direction
from mechinterp.features.fit_settings import FIT_SETTINGS, fit_parameters
from mechinterp.features.subspaces import direction_basis, leace_basis
from tests.support.models_tiny import as_installed

GENERATOR = torch.Generator().manual_seed(0)
MIX = torch.randn(6, 6, generator=GENERATOR, dtype=torch.float64)
A = torch.randn(40, 6, generator=GENERATOR, dtype=torch.float64) @ MIX + torch.arange(6.0)
B = torch.randn(40, 6, generator=GENERATOR, dtype=torch.float64) @ MIX
X, Z = torch.cat([A, B]), torch.cat([torch.ones(40), torch.zeros(40)]).long()


@pytest.mark.parametrize("method", FITS)
def test_the_means_of_the_fit_are_one_apart_and_writing_one_raises_the_reading_by_one(method: str) -> None:
    fit = fit_direction(A, B, method)
    assert float(fit.reading(A).mean() - fit.reading(B).mean()) == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(fit.reading(B + 3 * fit.write) - fit.reading(B), torch.full((40,), 3.0).double())
    if method != "logistic":  # which has a boundary of its own
        assert float(fit.reading(A).mean()) == pytest.approx(0.5, abs=1e-9)
    basis = direction_basis("resid_pre.1", fit.read, fit.write, fit.offset)
    torch.testing.assert_close(basis.encode(X).values[:, 0], fit.reading(X))
    turned = fit_direction(B, A, method)
    torch.testing.assert_close(turned.reading(X), -fit.reading(X), atol=1e-5, rtol=1e-4)


def test_the_mean_difference_and_the_pairs_have_closed_forms() -> None:
    fit = fit_direction(A, B, "mean-difference")
    delta = A.mean(0) - B.mean(0)
    torch.testing.assert_close(fit.write, delta)
    torch.testing.assert_close(fit.read, delta / delta.square().sum())
    pairs = fit_direction(A, B, "contrast-pairs")
    second_moments = (A - B).T @ (A - B)
    torch.testing.assert_close(
        second_moments @ pairs.read, torch.linalg.eigvalsh(second_moments)[-1] * pairs.read, atol=1e-9, rtol=1e-9
    )
    whole = torch.cov(X.T)
    first = fit_direction(A, B, "pca").read
    torch.testing.assert_close(whole @ first, torch.linalg.eigvalsh(whole)[-1] * first)


def test_a_logistic_probe_is_at_the_minimum_of_its_loss() -> None:
    """Its gradient is 0: with errors e = sigmoid - label, mean(e) = 0 and mean(e x) = -penalty w, in scaled x."""
    penalty = 0.05
    fit = fit_direction(A, B, "logistic", penalty=penalty)
    mean, scale = X.mean(0), (X - X.mean(0)).square().mean().sqrt()
    rows = (X - mean) / scale
    # The probe's logits are a multiple of the reading; the multiple follows from the condition on w.
    multiples = torch.linspace(0.2, 40, 200_000, dtype=torch.float64)
    reading = fit.reading(X)
    low, high = 0, len(multiples) - 1
    direction = fit.read * scale

    def slope(m: float) -> float:
        error = torch.sigmoid(m * reading) - Z
        return float((rows.T @ error / len(rows) + penalty * m * direction) @ direction)

    while high - low > 1:  # the loss is convex along the ray
        middle = (low + high) // 2
        low, high = (middle, high) if slope(float(multiples[middle])) < 0 else (low, middle)
    m = float(multiples[low])
    error = torch.sigmoid(m * reading) - Z
    assert abs(float(error.mean())) < 1e-4
    assert float((rows.T @ error / len(rows) + penalty * m * direction).abs().max()) < 1e-4
    found = torch.autograd.functional.jacobian(
        lambda v: (
            torch.nn.functional.binary_cross_entropy_with_logits(rows @ v[:-1] + v[-1], Z.double())
            + penalty / 2 * v[:-1].square().sum()
        ),
        torch.cat([m * direction, torch.tensor([m * float(mean @ fit.read - fit.offset)], dtype=torch.float64)]),
    )
    assert float(found.abs().max()) < 1e-4


def test_lda_and_leace_are_the_same_direction() -> None:
    """For two classes the total covariance is the covariance within plus a rank-one term along the mean difference."""
    lda, leace = fit_direction(A, B, "lda", shrinkage=0.0), fit_direction(A, B, "leace")
    torch.testing.assert_close(lda.read, leace.read)
    torch.testing.assert_close(lda.write, leace.write)
    within = (torch.cov(A.T, correction=0) + torch.cov(B.T, correction=0)) / 2
    delta = A.mean(0) - B.mean(0)
    expected = torch.linalg.solve(within, delta)
    torch.testing.assert_close(lda.read, expected / (expected @ delta))


def test_moments_after_an_affine_fit() -> None:
    own, target = X[Z == 0], X[Z == 1]
    mean = fit_affine(X, Z, "mean")(own)
    torch.testing.assert_close(mean.mean(0), target.mean(0))
    torch.testing.assert_close(torch.cov(mean.T), torch.cov(own.T))
    optimal = fit_affine(X, Z, "mimic")
    moved = optimal(own)
    torch.testing.assert_close(moved.mean(0), target.mean(0))
    torch.testing.assert_close(torch.cov(moved.T, correction=0), torch.cov(target.T, correction=0))
    torch.testing.assert_close(optimal.matrix, optimal.matrix.T)
    back = fit_affine(X, Z, "mimic", toward=0)
    torch.testing.assert_close(back(moved), own)
    # Another map with the same moments (through Cholesky factors) moves the values further.
    root, goal = (torch.linalg.cholesky(torch.cov(part.T, correction=0)) for part in (own, target))
    other = (own - own.mean(0)) @ torch.linalg.inv(root).T @ goal.T + target.mean(0)
    torch.testing.assert_close(torch.cov(other.T, correction=0), torch.cov(target.T, correction=0))
    assert float((moved - own).square().sum()) < float((other - own).square().sum())


def test_leace_as_a_map_is_leace_as_a_basis_and_nothing_linear_is_left() -> None:
    labels = torch.arange(80) % 3
    x = X + torch.nn.functional.one_hot(labels, 6).double() * 4
    erased = fit_affine(x, labels, "leace")(x)
    basis = leace_basis("resid_pre.0", x, labels)
    code = basis.encode(x)
    site = basis.sites_out[0]
    torch.testing.assert_close(
        erased, x - basis.decode(code)[site] + basis.decode(code.with_values(0 * code.values))[site]
    )
    means = torch.stack([erased[labels == k].mean(0) for k in range(3)])
    torch.testing.assert_close(means, erased.mean(0).expand(3, -1), atol=1e-9, rtol=0)
    # The best linear classifier is constant: least squares from the erased values to the labels explains nothing.
    onehot = torch.nn.functional.one_hot(labels, 3).double()
    onehot = onehot - onehot.mean(0)
    weights = torch.linalg.lstsq(erased - erased.mean(0), onehot, driver="gelsd").solution
    assert float(weights.abs().max()) < 1e-8


BAD: list[tuple[Any, str]] = [
    (lambda: fit_direction(A, B, "mean_diference"), "Did you mean 'mean-difference'"),
    (lambda: fit_direction(A, A, "mean-difference"), "same mean"),
    (lambda: fit_direction(A, B[:10], "contrast-pairs"), "needs pairs"),
    (lambda: fit_direction(A[:1], B, "lda"), "at least two"),
    (lambda: fit_direction(A, B, "lda", penalty=1.0), "does not take 'penalty'"),
    (lambda: fit_direction(A, B, "logistic", penalty=0.0), "must be positive"),
    (lambda: fit_direction(A, B, "lda", shrinkage=2.0), "from 0 to 1"),
    (lambda: as_installed(fit_affine)(X, Z[:3], "mean"), "one whole number per activation"),
    (lambda: fit_affine(X, Z, "mimick"), "Did you mean 'mimic'"),
    (lambda: fit_affine(X, Z, "mean", toward=5), "needs two activations"),
    (lambda: direction_basis("resid_pre.1", A[0], 2 * A[0]), "must be read as 1"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_refused(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_the_parameters_that_are_checked_are_those_of_the_fits() -> None:
    """Names, defaults and bounds: the list that needs no torch says what the functions say."""
    assert list(FIT_SETTINGS) == list(FITS)
    for name, fit in FITS.items():
        own = dict(list(inspect.signature(fit).parameters.items())[2:])
        assert {key: one.default for key, one in own.items()} == fit_parameters(name, ())
    assert fit_parameters("lda", ("shrinkage=0.5",)) == {"shrinkage": 0.5}
    for method, setting, words in (
        ("lda", "shrinkage=2", "at least 0 and at most 1; got"),
        ("lda", "shrinkag=1", "Did you mean 'shrinkage'?"),
        ("pca", "k=2", "has no parameter 'k'"),
        ("logistic", "penalty", "NAME=VALUE"),
        ("logistic", "penalty=0", "above 0"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            fit_parameters(method, (setting,))
