"""Positions as users name them."""

from __future__ import annotations

import pytest

from mechinterp.models.components import position_index, position_sets
from tests.support.models_tiny import pairs

EXAMPLES = pairs(3, 6, padded=True, positions={"S": [1, 2, 0], "end": [5, 4, 3]})


def where(mask) -> list[list[int]]:  # type: ignore[no-untyped-def]
    return [row.nonzero()[:, 0].tolist() for row in mask]


def test_all_each_named_counted_and_sets() -> None:
    everything = position_sets(EXAMPLES, None)
    assert everything.labels == ("all",) and where(everything.masks[0]) == [[*range(6)], [*range(5)], [*range(4)]]
    each = position_sets(EXAMPLES, "each")
    assert each.labels == tuple("012345")
    assert where(each.masks[4]) == [[4], [4], []]
    assert each.present[5].tolist() == [True, False, False]
    chosen = position_sets(EXAMPLES, ["S", -1, ("S", 3), "2"])
    assert chosen.labels == ("S", "-1", "S,3", "2")
    assert where(chosen.masks[0]) == [[1], [2], [0]]
    assert where(chosen.masks[1]) == [[5], [4], [3]]
    assert where(chosen.masks[2]) == [[1, 3], [2, 3], [0, 3]]
    assert where(chosen.masks[3]) == [[2], [2], [2]]
    assert position_sets(EXAMPLES, "S").labels == ("S",)
    assert [everything.first(0), chosen.first(1)] == [0, 3]


@pytest.mark.parametrize("position", ["end", -1])
def test_the_index_of_one(position: str | int) -> None:
    assert position_index(EXAMPLES, position).tolist() == [5, 4, 3]
