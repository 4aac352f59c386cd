"""Clusters of features, what they look like in the plane, and superposition: shapes whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.features.dictionary import sae

N = 2000


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def turned(points: torch.Tensor, angle: float = 0.4) -> torch.Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return points @ torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def circle() -> torch.Tensor:
    angle = math.pi * uniform(N)
    return torch.stack([angle.cos(), angle.sin()], 1)


def two_lines() -> torch.Tensor:
    """Two features that are never active at once."""
    along, which = uniform(N), uniform(N, seed=1) > 0
    return torch.stack([along * which, along * ~which], 1)


def test_a_circle_is_irreducible():
    found = mi.irreducibility(turned(circle()))
    assert found.separability > 3 * found.independent and not found.separable
    assert found.mixture < 0.25


def test_a_product_of_independent_features_is_separable_whatever_its_rotation():
    circular = mi.irreducibility(circle())
    for angle in (0.0, 0.4):
        found = mi.irreducibility(turned(uniform(N, 2, seed=2), angle))
        assert found.separability < circular.separability / 5 and found.mixture < 0.15


def test_two_lines_are_a_mixture():
    found = mi.irreducibility(turned(two_lines()))
    assert 0.5 <= found.mixture < 0.65 and found.mixture > 2 * mi.irreducibility(circle()).mixture


def test_the_indices_do_not_depend_on_scale_or_place():
    points = turned(circle())
    found, moved = mi.irreducibility(points), mi.irreducibility(100 * points + 7)
    assert moved.separability == pytest.approx(found.separability, abs=1e-3)
    assert moved.mixture == pytest.approx(found.mixture, abs=1e-3)
    with pytest.raises(InputError, match="at least 50 points"):
        mi.irreducibility(points[:10])
    with pytest.raises(InputError, match="differ in both"):
        mi.irreducibility(torch.stack([points[:, 0], 0 * points[:, 0]], 1))


def test_clusters_of_planted_directions_are_found_and_the_circle_is_ranked_first():
    """Eight features on a circle in one plane, two neighbours active at a time; and two independent ones in another."""
    angles = torch.arange(8) * 2 * math.pi / 8
    W = torch.zeros(10, 4, dtype=torch.float64)
    W[:8, 0], W[:8, 1] = angles.cos(), angles.sin()
    W[8, 2], W[9, 2], W[8, 3], W[9, 3] = 1, 1, 0.3, -0.3
    basis = sae("resid_pre.1", W.T.contiguous(), W)
    values = torch.zeros(N, 10, dtype=torch.float64)
    where = torch.randint(8, (N,), generator=torch.Generator().manual_seed(1))
    share = uniform(N, seed=3) / 2 + 0.5
    values[torch.arange(N), where], values[torch.arange(N), (where + 1) % 8] = share, 1 - share
    values[:, 8:] = uniform(N, 2, seed=4) / 2 + 0.5
    found = mi.cluster_features(basis, 2)
    pairs = mi.cluster_features(torch.cat([W[:1], W[:1] + 0.1, W[8:9], W[8:9] + 0.1, 0 * W[:1]]), 2)
    assert pairs == [(0, 1), (2, 3)]
    assert (8, 9) in [group[-2:] for group in found]
    table = mi.clusters_table(basis, values, [tuple(range(8)), (8, 9), (0,)])
    assert table["cluster"].tolist()[0] == 0 and table["plane"].iloc[0] == pytest.approx(1)
    product = table[table["cluster"] == 1].iloc[0]
    assert product["separability"] < table["separability"].iloc[0] / 3
    assert bool(table[table["cluster"] == 2]["separability"].isna().all())


def test_dimensions_of_known_shapes():
    """Elhage et al. 2022: an antipodal pair has half a dimension each, a pentagon 2/5, a tetrahedron 3/4."""
    pentagon = torch.stack([torch.tensor([math.cos(a), math.sin(a)]) for a in torch.arange(5) * 2 * math.pi / 5])
    tetrahedron = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    torch.testing.assert_close(mi.feature_dimensions(pentagon), torch.full((5,), 0.4))
    torch.testing.assert_close(mi.feature_dimensions(tetrahedron), torch.full((4,), 0.75))
    torch.testing.assert_close(mi.feature_dimensions(torch.eye(3)), torch.ones(3))
    pair = torch.tensor([[1.0, 0], [-1, 0], [0, 0]])
    assert mi.feature_dimensions(pair).tolist() == [0.5, 0.5, 0.0]
    assert mi.feature_dimensions(uniform(30, 8)).sum() <= 8 + 1e-9


def test_dimensions_of_many_features_need_no_table_of_all_pairs():
    """A table of 300,000 features would take 360 GB."""
    found = mi.feature_dimensions(torch.ones(300_000, 2))
    torch.testing.assert_close(found, torch.full_like(found, 1 / 300_000), rtol=1e-3, atol=0)
