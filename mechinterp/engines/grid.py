"""`Grid`: what an analysis returns. A tensor with named axes and labels, and the tidy table of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown


@dataclass(frozen=True, eq=False)
class Grid:
    """Numbers with named axes. NaN marks missing entries: a position that an example does not have.

    >>> grid = Grid(torch.tensor([[1.0, -3.0], [2.0, 0.0]]), {"layer": ("0", "1"), "head": ("0", "1")}, "effect")
    >>> grid.at(layer=1).values.tolist(), float(grid.at(layer=0, head=1))
    ([2.0, 0.0], -3.0)
    >>> grid.to_frame().to_dict("records")[1]
    {'layer': 0, 'head': 1, 'effect': -3.0}
    """

    values: Tensor
    labels: Mapping[str, tuple[str, ...]]
    """Per axis, in order, the label of every entry."""
    name: str
    """What a number is; the column of the table."""
    unit: str = ""
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """How the numbers were made: metric, direction, replacement, examples, ..."""
    cost: Mapping[str, float] = field(default_factory=dict[str, float])
    """The cost, in forwards and backwards of all examples."""

    def __post_init__(self) -> None:
        expected = tuple(len(labels) for labels in self.labels.values())
        if tuple(self.values.shape) != expected:
            raise InputError(
                f"The values have shape {list(self.values.shape)}, the labels of {self.axes} {list(expected)}."
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes."""
        return tuple(self.labels)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis} {len(labels)}" for axis, labels in self.labels.items())
        return f"Grid({self.name}{f' [{self.unit}]' if self.unit else ''}: {sizes or 'one number'})"

    def __float__(self) -> float:
        if self.values.numel() != 1:
            raise InputError(f"{self!r} is not one number; select one with .at(...) or average with .mean(...).")
        return float(self.values)

    def at(self, **chosen: str | int | Sequence[str | int]) -> Grid:
        """The part at the given labels, by axis: one label removes the axis, a list of labels keeps it.

        Raises InputError for an axis or a label that does not exist.
        """
        values, labels = self.values, dict(self.labels)
        for axis, wanted in chosen.items():
            if axis not in labels:
                raise unknown("axis", axis, labels)
            names = [wanted] if isinstance(wanted, (str, int)) else list(wanted)
            for name in names:
                if str(name) not in labels[axis]:
                    raise unknown(axis, str(name), labels[axis])
            index = [labels[axis].index(str(name)) for name in names]
            dim = list(labels).index(axis)
            if isinstance(wanted, (str, int)):
                values = values.select(dim, index[0])
                del labels[axis]
            else:
                values = values.index_select(dim, torch.tensor(index, device=values.device))
                labels[axis] = tuple(str(name) for name in names)
        return replace(self, values=values, labels=labels)

    def mean(self, axis: str = "example") -> Grid:
        """The mean along an axis, without missing entries (NaN where all are missing)."""
        if axis not in self.labels:
            raise unknown("axis", axis, self.labels)
        rest = {name: labels for name, labels in self.labels.items() if name != axis}
        return replace(self, values=self.values.nanmean(list(self.labels).index(axis)), labels=rest)

    def to_frame(self) -> pd.DataFrame:
        """The tidy table: a row per number, a column per axis, and the number in a column of this grid's name.

        Missing entries (NaN) are left out.
        """
        index = pd.MultiIndex.from_product(list(self.labels.values()), names=list(self.axes)) if self.labels else None
        frame = pd.DataFrame({self.name: self.values.detach().double().cpu().flatten().numpy()}, index=index)
        frame = frame.dropna().reset_index() if self.labels else frame
        for axis, labels in self.labels.items():
            if all(label.isdecimal() for label in labels):
                frame[axis] = frame[axis].astype(int)
        return frame

    def top(self, n: int = 10) -> pd.DataFrame:
        """The `n` rows of the table with the largest magnitudes; of the mean over examples, if there is that axis."""
        grid = self.mean("example") if "example" in self.labels else self
        frame = grid.to_frame().sort_values(self.name, key=abs, ascending=False, kind="stable", ignore_index=True)
        return frame.head(n)


def numbered(count: int) -> tuple[str, ...]:
    """The labels 0, 1, ... of an axis."""
    return tuple(str(i) for i in range(count))
