"""The names of features: `m3.f17`, `m3.err` (what the reconstruction misses), each with an optional `@S2` or `@4`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.registry import unknown
from mechinterp.features.basis import check_ids
from mechinterp.models.components import Position, as_number
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.sites import Address, not_a_name


@dataclass(frozen=True)
class FeaturePart:
    """One feature of a basis, or its error (None)."""

    basis: FeatureBasis
    feature: int | None
    position: Position | None = None


def is_feature(name: str) -> bool:
    """Whether a name has the form of a feature's or an error's."""
    try:
        return Address.parse(name).kind in ("feature", "error")
    except InputError:
        return False


def refuse_features(analysis: str, given: object, instead: str) -> None:
    """Return None if nothing of what is given is a basis or the name of a feature.

    Raises UnsupportedError otherwise, with what to use instead.
    """
    several = (
        [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(cast("Iterable[Any]", given))
    )
    for one in several:
        members = [one] if isinstance(one, str) or not isinstance(one, Iterable) else list(cast("Iterable[Any]", one))
        for member in members:
            if isinstance(member, FeatureBasis) or (isinstance(member, str) and is_feature(member)):
                raise UnsupportedError(f"{analysis} does not take features ('{member}'); {instead}.")


def parse_feature(text: str, bases: Sequence[FeatureBasis]) -> FeaturePart:
    """The feature (or error) of one of the bases that the text names.

    Raises InputError for another form, a basis that is not given, and a feature that it does not have.
    """
    found = Address.parse(text, "feature")
    if found.kind not in ("feature", "error") or found.channel:
        raise not_a_name(text, "feature")
    known = by_name(bases)
    if found.base not in known:
        raise unknown("feature basis", found.base, known)
    feature = found.number if found.kind == "feature" else None
    if feature is not None:
        check_ids(known[found.base], [feature])
    number = as_number(found.position)
    return FeaturePart(known[found.base], feature, (found.position or None) if number is None else number)


def by_name(bases: Sequence[FeatureBasis]) -> dict[str, FeatureBasis]:
    """The bases by name. Raises InputError for two of one name."""
    known: dict[str, FeatureBasis] = {}
    for basis in bases:
        if known.setdefault(basis.name, basis) is not basis:
            raise InputError(f"Two bases are named {basis.name!r}; give one of them another label.")
    return known


def parse_feature_sets(
    names: Sequence[str | Sequence[str]], bases: Sequence[FeatureBasis]
) -> tuple[tuple[str, ...], list[tuple[FeaturePart, ...]]]:
    """(the label of every set, the features of every set); a name alone is a set of one.

    Raises InputError for no set, an empty one, and a feature or a set that is given twice.
    """
    members = [[entry] if isinstance(entry, str) else list(entry) for entry in names]
    for several in members:
        if not several or len(set(several)) != len(several):
            raise InputError(f"A set of features is empty or names one twice: {several}.")
        if not all(map(is_feature, several)):
            raise InputError(f"{several} names parts that are not features; patch those in a call without `features`.")
    labels = tuple(" + ".join(several) for several in members)
    if not labels or len(set(labels)) != len(labels):
        raise InputError("Name at least one feature, and each set once.")
    return labels, [tuple(parse_feature(name, bases) for name in several) for several in members]
