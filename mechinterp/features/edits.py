"""Edits of features: set, scaled, added to, ablated; and a site replaced by its reconstruction.

Each is an intervention at the basis: what the reconstruction misses stays as it is in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.features.basis import Basis, check_ids
from mechinterp.models.components import Positions, position_sets
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.interventions import EditAt, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs


def set_features(
    basis: Basis, values: Mapping[int, float], *, pairs: Pairs | None = None, positions: Positions = None
) -> Intervention:
    """The intervention that gives features these activations, everywhere or at `positions` of `pairs`.

    Args:
        basis: The basis.
        values: The activation of each feature, by its number.
        pairs: The pairs whose prompts (clean or corrupt) will be run, if `positions` are given.
        positions: One set of positions; by default all.

    Raises InputError for features that the basis does not have, and positions without pairs.

    >>> import mechinterp as mi
    >>> model, basis = mi.load_model("bundled"), mi.load_basis("bundled:m1")
    >>> run = model.run([[2, 5, 6]], record=[basis], interventions=[mi.set_features(basis, {17: 3.0})])
    >>> run.values[basis][0, :, 17].tolist()
    [3.0, 3.0, 3.0]
    """
    return _edited(basis, values, lambda old, new: new.expand_as(old), pairs, positions)


def scale_features(
    basis: Basis, factors: Mapping[int, float], *, pairs: Pairs | None = None, positions: Positions = None
) -> Intervention:
    """The intervention that multiplies the activations of features.

    Args:
        basis: The basis.
        factors: The factor of each feature, by its number.
        pairs: The pairs whose prompts will be run, if `positions` are given.
        positions: One set of positions; by default all.
    """
    return _edited(basis, factors, lambda old, new: old * new, pairs, positions)


def add_features(
    basis: Basis, amounts: Mapping[int, float], *, pairs: Pairs | None = None, positions: Positions = None
) -> Intervention:
    """The intervention that adds to the activations of features: steering along the directions that they write.

    Args:
        basis: The basis.
        amounts: What is added to each feature, by its number.
        pairs: The pairs whose prompts will be run, if `positions` are given.
        positions: One set of positions; by default all.
    """
    return _edited(basis, amounts, lambda old, new: old + new, pairs, positions)


def ablate_features(
    basis: Basis, ids: Sequence[int] | None = None, *, pairs: Pairs | None = None, positions: Positions = None
) -> Intervention:
    """The intervention that sets the activations of features to 0.

    Args:
        basis: The basis.
        ids: The features; by default all of them.
        pairs: The pairs whose prompts will be run, if `positions` are given.
        positions: One set of positions; by default all.
    """
    chosen = check_ids(basis, ids).tolist()
    return set_features(basis, dict.fromkeys(chosen, 0.0), pairs=pairs, positions=positions)


def reconstructed(basis: FeatureBasis) -> list[Intervention]:
    """The interventions that replace each output site by its reconstruction, so that the error is lost.

    How much of what the model does survives this says how good a dictionary is (loss recovered). Give the list to one
    run at a time.

    Args:
        basis: The basis.

    >>> import mechinterp as mi
    >>> model, basis = mi.load_model("bundled"), mi.load_basis("bundled:a2")
    >>> run = model.run([[2, 5, 6]], record=["attn_out.2"], interventions=mi.reconstructed(basis))
    """
    seen: dict[Site, Tensor] = {}
    decoded: dict[Any, Tensor] = {}

    def read(site: Site) -> Intervention:
        def note(value: Tensor) -> Tensor:
            seen[site] = value
            return value

        return Intervention(site, note)

    def write(site: Site) -> Intervention:
        def replaced(value: Tensor) -> Tensor:
            if site == basis.sites_out[0]:
                decoded.clear()
                read_now = next(iter(seen.values())) if len(basis.sites_in) == 1 else dict(seen)
                decoded.update(basis.decode(basis.encode(read_now)))
            return decoded[site].to(value.dtype)

        return Intervention(site, replaced)

    return [read(site) for site in basis.sites_in] + [write(site) for site in basis.sites_out]


def edit_at(
    site: Site | FeatureBasis, change: Callable[[Tensor], Tensor], pairs: Pairs | None, positions: Positions
) -> Intervention:
    """The intervention `change` at a site or basis, everywhere or at one set of positions of the pairs' prompts.

    Raises InputError for positions without pairs and for several sets; in the run, for prompts of another shape.
    """
    if positions is not None and pairs is None:
        raise InputError("`positions` need the prompts; give `pairs` as well.")
    where = None if positions is None or pairs is None else position_sets(pairs, positions)
    if where is not None and len(where.labels) != 1:
        raise InputError(f"`positions` must be one set here; write [({', '.join(map(repr, where.labels))})].")

    return Intervention(site, EditAt(site, change, None if where is None else where.masks[0]))


def _edited(
    basis: Basis,
    amounts: Mapping[int, float],
    combine: Callable[[Tensor, Tensor], Tensor],
    pairs: Pairs | None,
    positions: Positions,
) -> Intervention:
    ids = check_ids(basis, list(amounts))
    numbers = torch.tensor([float(amount) for amount in amounts.values()], dtype=torch.float64)
    if not bool(numbers.isfinite().all()):
        raise InputError("Activations of features must be finite numbers.")

    def change(value: Tensor) -> Tensor:
        new = value.clone()
        new[..., ids.to(value.device)] = combine(value[..., ids.to(value.device)], numbers.to(value))
        return new

    return edit_at(basis, change, pairs, positions)
