"""Grids: what stands at a label, in the mean and in the table is the number that was put there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mechinterp.base.errors import InputError
from mechinterp.engines.grid import Grid, numbered
from tests.support.models_tiny import as_installed


def grid() -> Grid:
    values = torch.arange(24.0).reshape(2, 3, 4)
    values[1, 2, 3] = torch.nan
    values[0, 1] = torch.nan
    labels = {"layer": ("3", "5"), "node": ("a", "b", "c"), "example": numbered(4)}
    return Grid(values, labels, "effect", "logits")


def test_at_chooses_by_label_not_by_place() -> None:
    assert grid().at(layer=5, node="a").values.tolist() == [12.0, 13.0, 14.0, 15.0]
    part = grid().at(node=["c", "a"], example=1)
    assert part.labels == {"layer": ("3", "5"), "node": ("c", "a")}
    assert part.values.tolist() == [[9.0, 1.0], [21.0, 13.0]]
    assert float(grid().at(layer=3, node="c", example=0)) == 8.0


def test_the_mean_is_over_what_is_there() -> None:
    mean = grid().mean()
    assert mean.axes == ("layer", "node")
    assert float(mean.at(layer=5, node="c")) == pytest.approx((20 + 21 + 22) / 3)
    assert bool(mean.at(layer=3, node="b").values.isnan())


def test_the_table_has_a_row_per_number_that_is_there() -> None:
    frame = grid().to_frame()
    assert list(frame.columns) == ["layer", "node", "example", "effect"]
    assert len(frame) == 24 - 5
    row = frame[(frame.layer == 5) & (frame.node == "b") & (frame.example == 2)]
    assert row.effect.tolist() == [18.0]
    assert grid().mean().to_frame().shape == (5, 3)
    top = Grid(torch.tensor([1.0, -9.0, 3.0]), {"head": numbered(3)}, "score").top(2)
    assert top["head"].tolist() == [1, 2] and top["score"].tolist() == [-9.0, 3.0]


def test_one_number_is_a_table_too() -> None:
    one = Grid(torch.tensor(2.5), {}, "effect")
    assert one.to_frame()["effect"].tolist() == [2.5]
    assert repr(one) == "Grid(effect: one number)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.at(layr=3), "Did you mean 'layer'"),
        (lambda g: g.at(layer=4), "Unknown layer '4'"),
        (lambda g: g.at(node=["a", "z"]), "Unknown node 'z'"),
        (lambda g: g.mean("pos"), "Unknown axis 'pos'"),
        (float, "is not one number"),
        (lambda g: Grid(g.values, {"x": ("0",)}, "effect"), "the labels of"),
    ],
)
def test_what_is_not_there_is_refused(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_installed(call)(grid())
