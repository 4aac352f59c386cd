"""The sets of parts that an analysis goes over, with their positions, from the names that a user writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.models.components import (
    HasSites,
    Part,
    Positions,
    PositionSets,
    layer_range,
    parse_part,
    position_sets,
    unit_axis,
    unit_range,
)
from mechinterp.models.layout import Dims
from mechinterp.models.sites import LAYER_SITES, Site, canonical
from mechinterp.tasks.pairs import Pairs

Nodes: TypeAlias = "Sequence[str | Sequence[str]]"
"""Parts (`a9.h9`, `m3.n17@S2`) and sets of parts that go together."""


def swept_parts(
    model: HasSites, what: str | Nodes, layers: Sequence[int] | None, units: Sequence[int] | None
) -> tuple[dict[str, tuple[str, ...]], list[tuple[Part, ...]]]:
    """(the labels of the axes before the position, the set of parts of every entry in order).

    Args:
        model: Says which sites, layers and units exist.
        what: A kind of site, swept over its layers and units, or a list of parts and sets of parts.
        layers: Of a kind of site, the layers to sweep; None: all.
        units: Of a kind of site, its heads or neurons; None: all.
    """
    if isinstance(what, str) and what in LAYER_SITES:
        chosen = layer_range(model, what, layers)
        labels = {"layer": tuple(map(str, chosen))}
        axis = unit_axis(model, what)
        if axis is None:
            if units is not None:
                raise InputError(f"Site {what!r} has no heads or neurons, so leave out `units`.")
            return labels, [(Part(Site(what, layer)),) for layer in chosen]
        wanted = unit_range(model, Site(what, chosen[0]), units)
        every = [(Part(Site(what, layer), unit),) for layer in chosen for unit in wanted]
        return {**labels, axis: tuple(map(str, wanted))}, every
    if layers is not None or units is not None:
        raise InputError(
            "`layers` and `units` restrict a sweep over a kind of site; a list of parts is taken as it is, so leave "
            "them out."
        )
    names, sets = parse_sets(model, what)
    return {"node": names}, sets


def parse_sets(
    model: HasSites, nodes: str | Nodes, noun: str = "part"
) -> tuple[tuple[str, ...], list[tuple[Part, ...]]]:
    """(the label of every set, the parts of every set); a name alone is a set of one.

    Raises InputError, calling them by `noun`, for no set, an empty one, and a part or a set that is given twice.
    """
    entries = [nodes] if isinstance(nodes, str) else list(nodes)
    if not entries:
        raise InputError(_NOTHING[noun])
    members = [[canonical(name) for name in ([entry] if isinstance(entry, str) else entry)] for entry in entries]
    for several in members:
        if not several or len(set(several)) != len(several):
            raise InputError(f"A set of {noun}s is empty or names one twice: {several}.")
    sets = [tuple(parse_part(model, member) for member in several) for several in members]
    names = tuple(" + ".join(several) for several in members)
    if len(set(names)) != len(names):
        raise InputError(f"The {noun} {next(n for n in names if names.count(n) > 1)!r} is given twice.")
    return names, sets


_NOTHING = {
    "part": "No part is given to patch; name some, such as 'a9.h9', or a kind of site, such as 'z'.",
    "sender": "No sender is given; name some, such as 'a9.h9', or write 'heads' or 'nodes'.",
}


def every_node(dims: Dims) -> list[str]:
    """The names of the input, every head (or what takes their place) and every MLP, in the order of the model."""
    names = ["input"]
    for layer in range(dims.n_layers):
        own = dims.layer(layer)
        names += (
            [f"a{layer}.h{head}" for head in range(own.n_heads)] + [f"a{layer}"] * own.mixer + [f"m{layer}"] * own.mlp
        )
    return names


def placed_parts(
    pairs: Pairs, parts: Sequence[tuple[Part, ...]], positions: Positions
) -> tuple[list[tuple[tuple[Part, ...], tuple[Tensor, ...]]], tuple[str, ...]]:
    """(each entry's parts with their masks, position by position; the labels of the positions)."""
    if positions is not None and any(part.position is not None for several in parts for part in several):
        raise InputError("Positions are given twice: after an '@' and as `positions`; use one of the two.")
    chosen = position_sets(pairs, positions)
    own: dict[object, PositionSets] = {}
    found: list[tuple[tuple[Part, ...], tuple[Tensor, ...]]] = []
    for several in parts:
        for mask in chosen.masks:
            masks: list[Tensor] = []
            for part in several:
                if part.position is None:
                    masks.append(mask)
                    continue
                if part.position not in own:
                    own[part.position] = position_sets(pairs, [part.position])
                masks.append(own[part.position].masks[0])
            found.append((several, tuple(masks)))
    return found, chosen.labels
