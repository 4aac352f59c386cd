"""Distance to the nearest reference states: by brute force, each reference state left out of its own neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.knn_deviation import neighbour_distances
from mechinterp.base.errors import InputError
from tests.support.models_tiny import pairs, tiny


def test_distances_are_those_of_the_nearest_others() -> None:
    generator = torch.Generator().manual_seed(0)
    states, reference = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (4, 9))
    found, baseline = neighbour_distances(states, reference, 3)
    for i in range(4):
        own = sorted(float((states[i] - other).norm()) for other in reference)[:3]
        assert float(found[i]) == pytest.approx(sum(own) / 3)
    for i in range(9):
        own = sorted(float((reference[i] - other).norm()) for j, other in enumerate(reference) if j != i)[:3]
        assert float(baseline[i]) == pytest.approx(sum(own) / 3)
    # A state of the reference is its own neighbour: without leaving it out the baseline would be lower.
    twice, _ = neighbour_distances(reference, reference, 3)
    assert bool((twice < baseline).all())


def test_a_shifted_cloud_deviates_and_one_drawn_alike_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, alike = (torch.randn(n, 6, generator=generator) for n in (200, 200))
    far, baseline = neighbour_distances(alike + 4.0, reference, 5)
    near, _ = neighbour_distances(alike, reference, 5)
    z = (far - baseline.mean()) / baseline.std()
    assert float(z.min()) > 3 and abs(float(((near - baseline.mean()) / baseline.std()).mean())) < 0.2
    share = (baseline[None] >= near[:, None]).double().mean(1)
    assert abs(float(share.mean()) - 0.5) < 0.05


@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_grid_is_of_the_states_at_the_position(batch_size: int | None) -> None:
    model, p, reference = tiny("gpt2"), pairs(5, 6, padded=True), pairs(9, 6, seed=30)
    grid = mi.knn_deviation(model, p, reference, "resid_pre", k=2, prompt="corrupt", batch_size=batch_size)
    assert grid.values.shape == (3, 3, 5)
    states = model.run(p.corrupt, p.mask, record=["resid_pre.2"]).values["resid_pre.2"][torch.arange(5), p.lengths - 1]
    own = model.run(reference.clean, record=["resid_pre.2"]).values["resid_pre.2"][:, -1]
    distances, baseline = neighbour_distances(states, own, 2)
    torch.testing.assert_close(grid.at(site="resid_pre.2", measure="distance").values, distances)
    expected = (distances - baseline.mean()) / baseline.std()
    torch.testing.assert_close(grid.at(site="resid_pre.2", measure="deviation").values, expected)


def test_what_is_refused() -> None:
    model, p = tiny("gpt2"), pairs(6, 6)
    cases: list[tuple[Any, str]] = [
        (lambda: mi.knn_deviation(model, p, p, k=2), "6 of the 6 prompts are also in the reference"),
        (lambda: mi.knn_deviation(model, p, pairs(4, 6, seed=9), k=5), "at least 7 reference prompts"),
        (lambda: mi.knn_deviation(model, p, pairs(9, 6, seed=9), "z.1", k=2), "not one vector per token"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
