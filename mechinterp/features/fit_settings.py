"""The fits of a direction by name, each with its parameters. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mechinterp.base.errors import InputError
from mechinterp.base.settings import Parameter, Setting, check_settings, unknown_setting

FIT_SETTINGS: Mapping[str, Mapping[str, Setting]] = {
    "mean-difference": {},
    "logistic": {"penalty": Setting(1e-2, "L2 on the weights of activations of unit variance", above=0)},
    "lda": {"shrinkage": Setting(1e-2, "of the covariance within the classes toward the identity", least=0, most=1)},
    "leace": {},
    "pca": {},
    "contrast-pairs": {},
}
"""The same names as `mechinterp.features.direction_fits.FITS`."""


def fit_parameters(method: str, settings: Sequence[str]) -> dict[str, Parameter]:
    """All parameters of a method, those that are set as `NAME=VALUE` and the defaults of the others.

    Raises InputError for a parameter that the method does not have, and for a value that it cannot have.
    """
    known, owner, given = FIT_SETTINGS[method], f"method {method!r}", dict[str, object]()
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"A setting is NAME=VALUE; got {setting!r}.")
        if name not in known:
            raise unknown_setting(owner, name, known)
        given[name] = known[name].parse(name, text)
    return check_settings(owner, known, given)
