"""A direction split by what reads it, and the controls of a search for subspaces."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.subspace_controls import _accuracy, chance_limit
from mechinterp.base.errors import InputError, UnsupportedError
from tests.support.models_tiny import build, pairs, tiny

PAIRS = pairs(4)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(v: torch.Tensor) -> torch.Tensor:
    return v / v.norm(dim=0)


def test_the_parts_add_up_and_nothing_reads_the_null_part():
    readers, directions = drawn(12, 5), drawn(12, 3, seed=1)
    parts = mi.split_subspace(directions, readers)
    torch.testing.assert_close(parts.row + parts.null, directions)
    assert (readers.T @ parts.null).abs().max() < 1e-12 and (parts.row.T @ parts.null).abs().max() < 1e-12
    torch.testing.assert_close(parts.null_share, (parts.null.norm(dim=0) / directions.norm(dim=0)) ** 2)
    low_rank = drawn(12, 2) @ drawn(2, 5)
    assert (low_rank.T @ mi.split_subspace(directions, low_rank).null).abs().max() < 1e-12


def test_a_patch_of_the_null_part_changes_nothing():
    model = tiny("gpt2")
    grid = mi.split_effects(model, PAIRS, "mlp_post.1", unit(drawn(64, 1)), position=-1)
    values = dict(zip(grid.labels["subspace"], grid.values, strict=True))
    assert values["null"].abs().max() < 1e-10 < values["row"].abs().max() and values["basis"].abs().max() > 1e-6
    assert 0 < grid.about["null_share"][0] < 1


def test_an_illusion_needs_its_dormant_part_and_a_read_direction_does_not():
    """Half of the direction varies between prompts but is not read; the other half is read but does not vary."""
    model, pair = tiny("gpt2"), PAIRS[:1]
    run = [model.run(t, record=["mlp_post.1"]).values["mlp_post.1"][0, -1] for t in (pair.clean, pair.corrupt)]
    change, readers = (run[1] - run[0])[:, None], model.layout.neurons(1).W_out
    parts = mi.split_subspace(change, readers)
    still = mi.split_subspace(drawn(64, 1, seed=2), readers).row
    still = still - parts.row * (still.T @ change) / (parts.row.T @ change)
    assert abs(float(still.T @ change)) < 1e-10
    illusion = mi.split_effects(model, pair, "mlp_post.1", unit(unit(parts.null) + unit(still)))
    values = dict(zip(illusion.labels["subspace"], illusion.values[:, 0].tolist(), strict=True))
    assert abs(values["basis"]) > 1e-4 and max(abs(values["null"]), abs(values["row"])) < 1e-10
    read = mi.split_effects(model, PAIRS, "mlp_post.1", unit(parts.row))
    torch.testing.assert_close(read.at(subspace="row").values, read.at(subspace="basis").values)
    assert bool(read.at(subspace="null").values.isnan().all()) and read.values[0].abs().min() > 1e-6
    with pytest.raises(UnsupportedError, match="give `readers`"):
        mi.split_effects(model, PAIRS, "resid_pre.1", unit(drawn(16, 1)))


@pytest.mark.slow
def test_the_warning_fires_on_a_search_that_fits_anything():
    """Few pairs and many directions: arbitrary labels, and a model that has learned nothing, are fitted perfectly."""
    model = build("gpt2", dtype=torch.float32)
    few, others = pairs(8), pairs(12, seed=3)
    search = {"epochs": 20, "batch_size": 8, "learning_rate": 0.05}
    found = mi.alignment_controls(model, few, others, "resid_pre.1", 12, random_model=model, **search)
    rows = found.frame.set_index("search")
    assert rows.loc["arbitrary labels", "train"] > found.limit and "arbitrary labels reach" in found.warning
    assert found.parameters == 16 * 12 and "Warning" in repr(found)


def test_the_limit_of_chance_is_that_of_the_binomial():
    """Above it is less than a twentieth of all labellings, at it more; below five pairs nothing could be above."""
    for n in (5, 8, 11):
        right = torch.tensor([bin(labels).count("1") for labels in range(2**n)]) / n
        limit = chance_limit(n)
        assert (right > limit).double().mean() <= 0.05 < (right >= limit).double().mean() and limit < 1
    assert chance_limit(4) == 1
    with pytest.raises(InputError, match="at least 5 of each"):
        mi.alignment_controls(tiny("gpt2"), pairs(4), pairs(12, seed=3), "resid_pre.1", 2)


def test_the_accuracy_does_not_depend_on_the_batch_size():
    model, basis = tiny("gpt2"), torch.eye(16, 3, dtype=torch.float64)
    whole, parts = (_accuracy(model, pairs(7), "resid_pre.1", basis, -1, size) for size in (7, 3))
    assert whole == parts and 0 < whole[1] < 1


def test_no_warning_at_chance():
    frame = pd.DataFrame(
        {
            "search": ["model", "arbitrary labels", "random weights"],
            "train": [1.0, 0.55, 0.5],
            "test": [1.0, 0.5, 0.4],
        }
    )
    assert mi.AlignmentControls(frame, 0.6, 0.6, 1, 64).warning == ""


@pytest.mark.slow
def test_random_weights_are_those_of_the_seed():
    model = build("llama", dtype=torch.float32)
    first, same, other = (mi.with_random_weights(model, seed=seed).W_Q[1] for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other) and not torch.equal(first, model.W_Q[1])
    with pytest.raises(UnsupportedError, match="not a model of Hugging Face"):
        mi.with_random_weights(tiny("attention-only"))
