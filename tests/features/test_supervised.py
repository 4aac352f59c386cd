"""A dictionary of known attributes: additive data are recovered; an attribute is edited by swapping its features."""

from __future__ import annotations

import itertools

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.models.feature_basis import Features
from mechinterp.models.sites import Site

SITE = Site("resid_pre", 1)
VALUES = {"S": ("Mary", "John", "Bob"), "IO": ("Ann", "Tom"), "order": ("ABB", "BAB")}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def additive(*, keep: int = 12) -> tuple[torch.Tensor, dict[str, list[str]], dict[tuple[str, str], torch.Tensor]]:
    """Activations that are a mean plus a direction per attribute, for some combinations; labels; directions."""
    rows = list(itertools.product(*VALUES.values()))[:keep]
    labels = {name: [row[i] for row in rows] for i, name in enumerate(VALUES)}
    names = [(name, value) for name, values in VALUES.items() for value in values]
    directions = dict(zip(names, drawn(len(names), 20), strict=True))
    x = drawn(20, seed=5) + sum(torch.stack([directions[name, v] for v in labels[name]]) for name in VALUES)
    return x, labels, directions


@pytest.mark.parametrize("keep", [12, 11, 9])
def test_additive_activations_are_recovered(keep):
    """Also where the combinations are not balanced, so that attributes are correlated."""
    x, labels, directions = additive(keep=keep)
    basis = mi.supervised_basis(SITE, x, labels)
    assert float(basis.error(x).abs().max()) < 1e-10
    torch.testing.assert_close(basis.encode(x).values, basis.code(labels))
    # Directions are defined up to a constant per attribute: differences are not free.
    for name, (first, second, *_) in VALUES.items():
        ids = [basis.feature(name, value) for value in (first, second)]
        ours = basis.writes(ids)
        torch.testing.assert_close(ours[0] - ours[1], directions[name, first] - directions[name, second])
    for name in VALUES:
        share = torch.stack([basis.writes([basis.feature(name, v)])[0] for v in labels[name]])
        torch.testing.assert_close(share.mean(0), torch.zeros(20).double(), atol=1e-12, rtol=0)


def test_means_are_least_squares_where_attributes_are_independent_only():
    x, labels, _ = additive()
    means, squares = (mi.supervised_basis(SITE, x, labels, fit=fit) for fit in ("means", "least squares"))
    torch.testing.assert_close(means.writes(), squares.writes())
    x, labels, _ = additive(keep=9)
    means, squares = (mi.supervised_basis(SITE, x, labels, fit=fit) for fit in ("means", "least squares"))
    errors = []
    for basis in (means, squares):
        errors.append(float((x - basis.decode(Features(basis.code(labels)))[SITE]).square().sum()))
    assert errors[1] < 1e-20 < 1e-3 < errors[0]


def test_an_attribute_is_edited_by_swapping_its_features():
    x, labels, directions = additive()
    basis = mi.supervised_basis(SITE, x, labels)
    code = basis.encode(x)
    swapped = code.values.clone()
    swapped[:, [basis.feature("S", v) for v in VALUES["S"]]] = 0
    swapped[:, basis.feature("S", "Bob")] = 1
    change = basis.decode(code.with_values(swapped))[SITE] - basis.decode(code)[SITE]
    expected = torch.stack([directions["S", "Bob"] - directions["S", v] for v in labels["S"]])
    torch.testing.assert_close(change, expected)


def test_it_is_saved_and_loaded(tmp_path):
    x, labels, _ = additive()
    basis = mi.supervised_basis(SITE, x, labels)
    mi.save_basis(tmp_path, basis)
    again = mi.load_basis(tmp_path)
    assert again == basis and again.attributes == basis.attributes
    assert "S (3), IO (2), order (2)" in repr(again)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, x: mi.supervised_basis(SITE, x, {"S": ["a"]}), "for each of the 12 rows"),
        (lambda b, x: mi.supervised_basis(SITE, x, {}), "at least one attribute"),
        (lambda b, x: mi.supervised_basis(SITE, x, {"S": ["a"] * 12}, fit="mean"), "Unknown fit 'mean'"),
        (lambda b, x: b.feature("S", "Marie"), "Unknown value of S 'Marie'. Did you mean 'Mary'"),
        (lambda b, x: b.feature("O", "Mary"), "Unknown attribute 'O'"),
        (lambda b, x: b.code({"S": ["Mary"]}), "Give the values of the attributes S, IO, order"),
        (lambda b, x: b.encode(x[:, :3]), "reads vectors of 20 numbers; got 3"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    x, labels, _ = additive()
    with pytest.raises(InputError, match=message):
        call(mi.supervised_basis(SITE, x, labels), x)
