"""`Setting`: a parameter of a method with its type, default and bounds, all checked in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mechinterp.base.errors import InputError, clip
from mechinterp.base.registry import suggestion, unknown

Parameter = bool | int | float | str
Number = int | float
MOST_LETTERS = 60
"""Letters of a value in a message."""


@dataclass(frozen=True)
class Setting:
    """One parameter. Its type is that of the default; whole numbers have 64 bits, other numbers are finite.

    Args:
        default: The value if none is given.
        about: One line about it.
        choices: The texts that are allowed; by default any.
        least: The smallest number.
        most: The largest number.
        above: The number must be larger than this.
        below: The number must be smaller than this.
        share: Whether a text that is a share, such as "5%", may stand for the number.
    """

    default: Parameter
    about: str = ""
    choices: tuple[str, ...] = ()
    least: Number = -math.inf
    most: Number = math.inf
    above: Number = -math.inf
    below: Number = math.inf
    share: bool = False

    def check(self, name: str, value: object) -> Parameter:
        """The value, as it was given. Raises InputError for another type, and for a number outside the bounds."""
        kind = type(self.default)
        if isinstance(value, bool) and kind is bool:
            return value
        if isinstance(value, str) and (kind is str or self.share):
            if self.choices and value not in self.choices:
                raise unknown(name, value, self.choices)
            return value
        if kind is bool or kind is str or isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refused(name, value)
        if isinstance(value, float) and (kind is int or not math.isfinite(value)):
            raise self._refused(name, value)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InputError(f"{name} must be a number of at most 64 bits; got {_shown(value)}.")
        if not (self.least <= value <= self.most and self.above < value < self.below):
            raise self._refused(name, value)
        return value

    def parse(self, name: str, text: str) -> Parameter:
        """The value that a text on the command line means. Raises InputError as `check` does."""
        kind = type(self.default)
        if kind is bool:
            if text not in ("true", "false"):
                raise self._refused(name, text)
            return text == "true"
        try:
            value = kind(text)
        except ValueError:
            raise self._refused(name, text) from None
        return self.check(name, value)

    def _refused(self, name: str, value: object) -> InputError:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        share = " or a share such as '5%'" if self.share else ""
        return InputError(f"{name} must be {words[type(self.default)]}{share}{self._bounds()}; got {_shown(value)}.")

    def _bounds(self) -> str:
        bounds = ((self.least, "at least"), (self.above, "above"), (self.most, "at most"), (self.below, "below"))
        said = [f"{word} {bound:.15g}" for bound, word in bounds if math.isfinite(bound)]
        return f", {' and '.join(said)}" if said else ""


def check_settings(owner: str, known: Mapping[str, Setting], given: Mapping[str, object]) -> dict[str, Parameter]:
    """Every parameter with its default, or with what was given.

    Raises InputError for a parameter that `owner` does not have, and for a value of another type or out of bounds.

    >>> print(check_settings("method 'eap-ig'", {"steps": Setting(5, least=1), "seed": Setting(0)}, {"steps": 3}))
    {'steps': 3, 'seed': 0}

    Args:
        owner: What has the parameters, for messages.
        known: The parameters that it has.
        given: Values by name.
    """
    for name in given:
        if name not in known:
            raise unknown_setting(owner, name, known)
    return {name: setting.check(name, given.get(name, setting.default)) for name, setting in known.items()}


def unknown_setting(owner: str, name: str, known: Mapping[str, Setting]) -> InputError:
    """The error for a parameter that `owner` does not have."""
    shown = clip(name, MOST_LETTERS)
    return InputError(f"{owner[:1].upper()}{owner[1:]} has no parameter {shown!r}.{suggestion(name, known)}")


def _shown(value: object) -> str:
    try:
        return clip(repr(value), MOST_LETTERS)
    except ValueError:  # Python does not write numbers of more than 4300 digits
        return "a number of thousands of digits"
