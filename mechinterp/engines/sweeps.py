"""Which parts a sweep goes over, and where: what a user writes, turned into sets of parts with their positions."""

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
from mechinterp.models.sites import LAYER_SITES, Site
from mechinterp.tasks.pairs import Pairs

Nodes: TypeAlias = "Sequence[str | Sequence[str]]"
"""Parts (`a9.h9`, `m3.n17@S2`) and sets of parts that go together."""


def swept_parts(
    model: HasSites, what: str | Nodes, layers: Sequence[int] | None, units: Sequence[int] | None
) -> tuple[dict[str, tuple[str, ...]], list[tuple[Part, ...]]]:
    """(the labels of the axes before the position, the set of parts of every entry in order)."""
    if isinstance(what, str) and what in LAYER_SITES:
        chosen = layer_range(model, what, layers)
        labels = {"layer": tuple(map(str, chosen))}
        axis = unit_axis(model, what)
        if axis is None:
            if units is not None:
                raise InputError(f"Site {what!r} has no heads or neurons, so `units` chooses nothing; leave it out.")
            return labels, [(Part(Site(what, layer)),) for layer in chosen]
        wanted = unit_range(model, Site(what, chosen[0]), units)
        every = [(Part(Site(what, layer), unit),) for layer in chosen for unit in wanted]
        return {**labels, axis: tuple(map(str, wanted))}, every
    if layers is not None or units is not None:
        raise InputError(
            "`layers` and `units` restrict a sweep over a kind of site; a list of parts is taken as it is."
        )
    nodes = [what] if isinstance(what, str) else list(what)
    if not nodes:
        raise InputError("No part is given to patch; name some, such as 'a9.h9', or a kind of site, such as 'z'.")
    names: list[str] = []
    sets: list[tuple[Part, ...]] = []
    for node in nodes:
        members = [node] if isinstance(node, str) else list(node)
        if not members or len(set(members)) != len(members):
            raise InputError(f"A set of parts is empty or names one twice: {members}.")
        names.append(" + ".join(members))
        sets.append(tuple(parse_part(model, member) for member in members))
    if len(set(names)) != len(names):
        raise InputError(f"The part {next(n for n in names if names.count(n) > 1)!r} is given twice.")
    return {"node": tuple(names)}, sets


def placed_parts(
    pairs: Pairs, parts: Sequence[tuple[Part, ...]], positions: Positions
) -> tuple[list[tuple[tuple[Part, ...], tuple[Tensor, ...]]], tuple[str, ...]]:
    """(each entry's parts with their masks, position by position; the labels of the positions)."""
    if positions is not None and any(part.position is not None for several in parts for part in several):
        raise InputError("Positions are given twice: behind an '@' and as `positions`; use one of the two.")
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
