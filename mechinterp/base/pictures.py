"""The pictures that results draw of themselves (`Grid.plot`, `Circuit.plot`); `views` is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mechinterp.base.registry import Entry, Registry

PICTURES: Registry[Callable[..., Any]] = Registry(
    "picture",
    {
        "heatmap": Entry("mechinterp.views.plots.grids:heatmap", "two axes of a grid"),
        "bars": Entry("mechinterp.views.plots.bars:bars", "one axis of a grid"),
        "circuit": Entry("mechinterp.views.plots.circuit:circuit_figure", "a circuit as a graph"),
    },
)
