"""Settings: what is taken is returned as it is, everything else gets one line that says what would be."""

from __future__ import annotations

import math

import pytest

from mechinterp.base.errors import InputError
from mechinterp.base.settings import Parameter, Setting, check_settings

COUNT, SHARE, FLAG = Setting(5, least=1, most=10), Setting(0.5, above=0, below=1), Setting(True)
WORD, SIZE = Setting("a", choices=("a", "b")), Setting(0, share=True)


@pytest.mark.parametrize(
    ("setting", "value"),
    [(COUNT, 1), (COUNT, 10), (SHARE, 0.25), (Setting(0.0), 3), (FLAG, False), (WORD, "b"), (SIZE, "5%"), (SIZE, 7)],
)
def test_what_fits_is_returned(setting: Setting, value: Parameter) -> None:
    assert setting.check("x", value) is value


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        (COUNT, 0, "x must be a whole number, at least 1 and at most 10; got 0."),
        (COUNT, 11, "at most 10"),
        (COUNT, 2.0, "whole number"),
        (COUNT, True, "whole number"),
        (COUNT, "2", "whole number"),
        (COUNT, None, "whole number"),
        (Setting(0), 2**63, "64 bits"),
        (Setting(0.0), -(2**64), "64 bits"),
        pytest.param(Setting(0), 10**5000, "64 bits; got a number of thousands of digits", id="5001 digits"),
        (SHARE, 0, "x must be a number, above 0 and below 1; got 0."),
        (SHARE, 1.0, "below 1"),
        (Setting(0.0), math.nan, "must be a number; got nan"),
        (Setting(0.0), math.inf, "must be a number"),
        (Setting(0.0), "1", "must be a number"),
        (Setting(0.0), False, "must be a number"),
        (FLAG, 1, "must be true or false"),
        (FLAG, "true", "must be true or false"),
        (WORD, "c", "Unknown x 'c'. .*Known: a, b."),
        (WORD, 1, "must be a text"),
        (Setting("a"), ["x" * 1000], "must be a text"),
        (SIZE, 0.5, "a whole number or a share such as '5%'"),
    ],
)
def test_everything_else_is_refused(setting: Setting, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        setting.check("x", value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("setting", "text", "value"), [(COUNT, "3", 3), (SHARE, "1e-3", 1e-3), (FLAG, "false", False), (WORD, "b", "b")]
)
def test_a_text_has_the_type_of_the_default(setting: Setting, text: str, value: Parameter) -> None:
    assert setting.parse("x", text) == value and type(setting.parse("x", text)) is type(value)


@pytest.mark.parametrize(
    ("setting", "text"), [(COUNT, "3.0"), (COUNT, "0"), (SHARE, "nan"), (SHARE, "x"), (FLAG, "True"), (WORD, "c")]
)
def test_a_text_that_means_nothing_is_refused(setting: Setting, text: str) -> None:
    with pytest.raises(InputError, match="x"):
        setting.parse("x", text)


def test_settings_have_defaults_and_unknown_ones_are_refused() -> None:
    known = {"steps": COUNT, "share": SHARE}
    assert check_settings("method 'm'", known, {"share": 0.1}) == {"steps": 5, "share": 0.1}
    with pytest.raises(InputError, match=r"Method 'm' has no parameter 'step'. Did you mean 'steps'. Known: share, st"):
        check_settings("method 'm'", known, {"step": 3})
    with pytest.raises(InputError, match="steps must be"):
        check_settings("method 'm'", known, {"steps": 0})
