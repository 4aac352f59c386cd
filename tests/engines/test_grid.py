"""Grids: what stands at a label, in the mean and in the table is the number that was put there."""

from __future__ import annotations

from typing import Any

import numpy as np
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


def test_arithmetic_is_by_label() -> None:
    one = grid()
    assert torch.equal((one + one).values.nan_to_num(), (2 * one).values.nan_to_num())
    assert torch.equal((one - one.mean()).values.nan_to_num(), (one.values - one.values.nanmean(2, True)).nan_to_num())
    turned = Grid(
        one.values.permute(2, 0, 1), {axis: one.labels[axis] for axis in ("example", "layer", "node")}, "b", "logits"
    )
    assert bool(((one - turned).values.nan_to_num() == 0).all()) and (one - turned).axes == one.axes
    assert (one / one).unit == "" and (one / one).name == "effect" and (one * one).unit == "logits * logits"
    assert (1 - one).at(layer=5, node="a", example=0).values == -11 and (-one)["5", "a"].values[0] == -12
    assert (np.float64(2) * one).values.nansum() == 2 * one.values.nansum()
    with pytest.raises(InputError, match="labels of 'node' differ"):
        one + one.at(node=["a", "b"])
    with pytest.raises(InputError, match="one is in 'logits', the other in 'nats'"):
        one - Grid(one.values, one.labels, "kl", "nats")
    with pytest.raises(TypeError):
        one + "a"  # type: ignore[operator]


def test_spread_is_of_what_is_there() -> None:
    values = grid().values
    expected = [float(values[0, 0].std()), float(values[1, 2, :3].std())]
    std = grid().std()
    assert [float(std.at(layer=3, node="a")), float(std.at(layer=5, node="c"))] == pytest.approx(expected)
    assert float(grid().sem()["5", "c"]) == pytest.approx(expected[1] / 3**0.5)
    assert bool(grid().std().at(layer=3, node="b").values.isnan())
    assert bool(Grid(torch.ones(1), {"example": ("0",)}, "x").std().values.isnan())


def test_labels_are_found_by_name() -> None:
    axes = {"layer": numbered(2), "head": numbered(2), "pos": ("S2", "end", "x")}
    heads = Grid(torch.arange(12.0).reshape(2, 2, 3), axes, "e")
    assert float(heads["L1H0", "end"]) == 7 and float(heads["1.1"]["x"]) == 11 and heads["a0.h1"].axes == ("pos",)
    parts = Grid(torch.tensor([1.0, 2.0]), {"node": ("a9.h9", "m3")}, "e")
    assert float(parts["L9H9"]) == float(parts.at(node="9.9")) == 1
    with pytest.raises(InputError, match=r"'1' is a label of layer and head; write \.at\(layer='1'\)"):
        heads[1]
    with pytest.raises(InputError, match=r"Unknown label 'ende'\. Did you mean 'end'"):
        heads["ende"]
    with pytest.raises(InputError, match="is not a list"):
        list(heads)


def test_a_grid_shows_and_draws_itself() -> None:
    html = grid()._repr_html_()
    assert "Grid(effect [logits]: layer 2, node 3, example 4)" in html and "the first 10 of 19 rows" in html
    assert grid().plot().data[0].type == "heatmap"
    bars = grid().at(layer=5).plot(title="layer 5").data[0]
    assert bars.type == "bar" and list(bars.y) == pytest.approx([13.5, 17.5, 21.0])
    assert bars.error_y.array[0] == pytest.approx(float(grid().sem()["5", "a"]))
    with pytest.raises(InputError, match="two axes"):
        Grid(torch.zeros(2, 2, 2), {"a": numbered(2), "b": numbered(2), "c": numbered(2)}, "x").plot()
