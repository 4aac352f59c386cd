"""`Grid`: what an analysis returns. A tensor with named axes and labels, and the tidy table of it."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import pandas as pd
import torch
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.pictures import PICTURES
from mechinterp.base.registry import unknown
from mechinterp.models.sites import canonical

SHOWN = 10
"""Rows of its table that a notebook shows of a grid."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Numbers with named axes. NaN marks missing entries: a position that an example does not have.

    >>> grid = Grid(torch.tensor([[1.0, -3.0], [2.0, 0.0]]), {"layer": ("0", "1"), "head": ("0", "1")}, "effect")
    >>> grid.at(layer=1).values.tolist(), float(grid.at(layer=0, head=1))
    ([2.0, 0.0], -3.0)
    >>> grid.to_frame().to_dict("records")[1]
    {'layer': 0, 'head': 1, 'effect': -3.0}
    >>> float(grid["L0H1"]), (grid - grid.at(layer=1)).at(head=0).values.tolist()
    (-3.0, [-1.0, 0.0])
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

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        rows = f"<p>the first {SHOWN} of {len(frame):,} rows</p>" if len(frame) > SHOWN else ""
        return f"<p><b>{html.escape(repr(self))}</b></p>{frame.head(SHOWN).to_html(index=False, border=0)}{rows}"

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
                if str(name) not in labels[axis] and canonical(str(name)) not in labels[axis]:
                    raise unknown(axis, str(name), labels[axis])
            names = [str(name) if str(name) in labels[axis] else canonical(str(name)) for name in names]
            index = [labels[axis].index(name) for name in names]
            dim = list(labels).index(axis)
            if isinstance(wanted, (str, int)):
                values = values.select(dim, index[0])
                del labels[axis]
            else:
                values = values.index_select(dim, torch.tensor(index, device=values.device))
                labels[axis] = tuple(names)
        return replace(self, values=values, labels=labels)

    def __getitem__(self, names: str | int | tuple[str | int, ...]) -> Grid:
        """The part at these labels, whose axes are found: `grid["L9H9", "end"]`, `grid["a9.h9"]`.

        Args:
            names: Labels, each of another axis. The name of a head stands for its layer and its number where those are
                the axes.

        Raises InputError for a label that no axis has, or more than one: then say which with `.at(layer=...)`.
        """
        found = self
        for name in names if isinstance(names, tuple) else (names,):
            found = found._named(str(name))
        return found

    def __iter__(self) -> NoReturn:
        raise InputError(f"{self!r} is not a list; take .values, .to_frame() or .at(...).")

    def _named(self, name: str) -> Grid:
        axes = [axis for axis, labels in self.labels.items() if name in labels or canonical(name) in labels]
        if len(axes) == 1:
            return self.at(**{axes[0]: name})
        if axes:
            raise InputError(f"{name!r} is a label of {' and '.join(axes)}; write .at({axes[0]}={name!r}).")
        head = re.fullmatch(r"a([0-9]+)\.h([0-9]+)", canonical(name))
        if head is not None and {"layer", "head"} <= self.labels.keys():
            return self.at(layer=head[1], head=head[2])
        raise unknown("label", name, [label for labels in self.labels.values() for label in labels])

    def mean(self, axis: str = "example") -> Grid:
        """The mean along an axis, without missing entries (NaN where all are missing)."""
        return self._reduced(axis, self.values.nanmean(self._dim(axis)))

    def std(self, axis: str = "example") -> Grid:
        """The sample standard deviation (n - 1) along an axis, without missing entries; NaN of fewer than two."""
        dim, there = self._dim(axis), ~self.values.isnan()
        squares = (self.values - self.values.nanmean(dim, keepdim=True)).square().nansum(dim)
        n = there.sum(dim)
        return self._reduced(axis, torch.where(n > 1, squares / (n - 1).clamp(min=1), torch.nan).sqrt())

    def sem(self, axis: str = "example") -> Grid:
        """The standard error of the mean along an axis: `std` over the root of the number of entries."""
        n = (~self.values.isnan()).sum(self._dim(axis))
        return self._reduced(axis, self.std(axis).values / n.clamp(min=1).sqrt())

    def plot(self, **how: Any) -> Any:
        """A figure: a heatmap of two axes, bars of one; the mean over examples. Arguments as of `heatmap` and `bars`.

        Raises InputError for more axes: choose with `.at(...)`.
        """
        one = len([axis for axis in self.labels if axis != "example"]) == 1
        return PICTURES.get("bars" if one else "heatmap")(self, **how)

    def __add__(self, other: Grid | float) -> Grid:
        return self._with(other, "+", torch.add)

    def __sub__(self, other: Grid | float) -> Grid:
        return self._with(other, "-", torch.sub)

    def __mul__(self, other: Grid | float) -> Grid:
        return self._with(other, "*", torch.mul)

    def __truediv__(self, other: Grid | float) -> Grid:
        return self._with(other, "/", torch.div)

    def __radd__(self, other: float) -> Grid:
        return self + other

    def __rmul__(self, other: float) -> Grid:
        return self * other

    def __rsub__(self, other: float) -> Grid:
        return -self + other

    def __neg__(self) -> Grid:
        return replace(self, values=-self.values)

    def __abs__(self) -> Grid:
        return replace(self, values=self.values.abs())

    __array_ufunc__ = None  # so that a numpy number times a grid is a grid

    def _with(self, other: Any, sign: str, operation: Callable[[Tensor, Tensor], Tensor]) -> Grid:
        """The result by entry. Axes are matched by name; one that a grid lacks counts as the same everywhere.

        Raises InputError for other labels on an axis of both, and for a sum or difference of two units.
        """
        if isinstance(other, (int, float)) and not isinstance(other, bool):
            return replace(self, values=operation(self.values, torch.as_tensor(other, dtype=self.values.dtype)))
        if not isinstance(other, Grid):
            return NotImplemented
        for axis in self.labels.keys() & other.labels.keys():
            if self.labels[axis] != other.labels[axis]:
                raise InputError(
                    f"{self!r} {sign} {other!r}: the labels of {axis!r} differ; choose the same with .at()."
                )
        if sign in "+-" and self.unit != other.unit:
            raise InputError(f"{self!r} {sign} {other!r}: one is in {self.unit!r}, the other in {other.unit!r}.")
        labels = {**self.labels, **other.labels}
        values = operation(self._over(labels), other._over(labels))
        unit = self.unit
        if sign == "*":
            unit = " * ".join(filter(None, (self.unit, other.unit)))
        elif sign == "/" and other.unit:
            unit = "" if self.unit == other.unit else f"{self.unit or 1} / {other.unit}"
        names = self.name if self.name == other.name else f"{self.name} {sign} {other.name}"
        about = {key: value for key, value in self.about.items() if repr(other.about.get(key, self)) == repr(value)}
        cost = {key: self.cost.get(key, 0) + other.cost.get(key, 0) for key in {*self.cost, *other.cost}}
        return Grid(values, labels, names, unit, about, cost)

    def _over(self, labels: Mapping[str, tuple[str, ...]]) -> Tensor:
        """The values with these axes in this order; those that it lacks are repeated."""
        order = [self._dim(axis) for axis in labels if axis in self.labels]
        values = self.values.permute(order)
        for dim, axis in enumerate(labels):
            values = values if axis in self.labels else values.unsqueeze(dim)
        return values.expand([len(own) for own in labels.values()])

    def _dim(self, axis: str) -> int:
        if axis not in self.labels:
            raise unknown("axis", axis, self.labels)
        return list(self.labels).index(axis)

    def _reduced(self, axis: str, values: Tensor) -> Grid:
        return replace(self, values=values, labels={name: own for name, own in self.labels.items() if name != axis})

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
