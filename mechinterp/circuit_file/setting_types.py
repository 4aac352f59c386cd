"""Settings that a file states, checked for their types before they are passed on: a file may hold anything."""

from __future__ import annotations

from collections.abc import Mapping

from mechinterp.base.errors import InputError, clip

NUMBER = (int, float)
SELECTION: Mapping[str, tuple[type, ...]] = {
    "edges": (int, str),
    "nodes": (int, str),
    "threshold": NUMBER,
    "rule": (str,),
    "by": (str,),
    "ratio": NUMBER,
}
"""Parameters of `select` that a file can state."""
STABLE: Mapping[str, tuple[type, ...]] = {"resamples": (int,), "agreement": NUMBER, "seed": (int,)}
"""Settings of `stable_scores`."""
_WORDS = {int: "a whole number", float: "a number", str: "a text"}


def check_types(settings: Mapping[str, object], kinds: Mapping[str, tuple[type, ...]]) -> None:
    """Return None when every setting is of one of the types that its name has. Raises InputError otherwise."""
    for name, value in settings.items():
        known = kinds[name]
        if isinstance(value, bool) or not isinstance(value, known):
            wanted = " or ".join(_WORDS[kind] for kind in known if kind is not int or float not in known)
            raise InputError(f"{name} is {wanted}; got {clip(repr(value), 60)}.")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InputError(f"{name} is a number of 64 bits; got {value}.")
