"""Reading a YAML file into a checked model: bounded, plain values only, unknown keys refused by name."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import LiteralString, Self

from mechinterp.base.errors import FormatError, clip, wrong_file
from mechinterp.base.registry import unknown

MOST_STRANGE = 20
"""Unknown keys of one mapping that are named."""
MAX_BYTES = 2**18
"""The largest file of a task or word lists; a YAML parser in Python needs a second for 100 kB."""


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=False)

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_unknown_keys(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Errors about unknown keys, by name, come before those about the others."""
        if not isinstance(given, dict):
            return handler(given)
        keys, known = cast(dict[Any, Any], given), {field.alias or name for name, field in cls.model_fields.items()}
        strange = [key for key in keys if key not in known]
        if not strange:
            return handler(given)
        said = [str(unknown("key", str(key), known)) for key in strange[:MOST_STRANGE]]
        if (left := len(strange) - MOST_STRANGE) > 0:
            said.append(f"{left} more unknown keys")
        errors = [_error_of("unknown_key", text, ()) for text in said]
        try:
            handler({key: value for key, value in keys.items() if key in known})
        except ValidationError as error:
            for found in error.errors(include_url=False, include_input=False):
                errors.append(_error_of("wrong", found["msg"], found["loc"]))
        raise ValidationError.from_exception_data(cls.__name__, errors)


def _error_of(kind: LiteralString, text: str, place: tuple[int | str, ...]) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError(kind, "{text}", {"text": text}), loc=place, input=None)


Model = TypeVar("Model", bound=Strict)


class _PlainLoader(yaml.BaseLoader):
    """Strings, lists and mappings only: `No`, `1e3` and `2020-01-01` stay text.

    Aliases are refused (a few of them can expand to gigabytes), and so are duplicate keys.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"aliases (*name) are not allowed (line {mark.line + 1})")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        made: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key must be plain text (line {line})")
            key = str(key_node.value)
            if key in made:
                raise yaml.YAMLError(f"the key {key!r} is given twice (line {line})")
            made[key] = self.construct_object(value_node, deep=True)
        return made


def parse_yaml(content: bytes, where: str) -> dict[str, Any]:
    """The mapping in a YAML text, every scalar as a string.

    Raises FormatError for broken YAML, aliases, duplicate keys, nesting that is too deep, and anything but a mapping.
    """
    try:
        given = yaml.load(content.decode("utf-8"), Loader=_PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = clip(" ".join(str(error).split()), 300)
        raise FormatError(f"{where} is not valid YAML: {reason}") from error
    except ValueError as error:  # from PyYAML, for an escape such as "\\UFFFFFFFF"
        raise FormatError(f"{where} is not valid YAML: {clip(str(error), 300)}") from error
    except RecursionError as error:
        raise FormatError(f"{where} is nested too deeply.") from error
    if given is None and not content.strip():
        raise FormatError(f"{where} is empty; it must hold a mapping (`key: value`).")
    if not isinstance(given, dict):
        raise FormatError(f"{where} must hold a mapping (`key: value`); got {type(given).__name__}.")
    return cast(dict[str, Any], given)


def checked(model: type[Model], given: object, where: str) -> Model:
    """`given` as a `model`. Raises FormatError with the place and the reason of the first error."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise FormatError(f"{where}: {problems_of(error)[0]}") from error


def wholly_checked(model: type[Model], given: object, where: str) -> Model:
    """`given` as a `model`. Raises FormatError with all errors, a line each."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise wrong_file(where, problems_of(error)) from error


def problems_of(error: ValidationError) -> list[str]:
    """The place and the reason of every error, each in one line of bounded length."""
    found: list[str] = []
    for one in error.errors(include_url=False, include_input=False):
        place = clip(".".join(clip(str(part), 60) for part in one["loc"]), 200)
        reason = clip(one["msg"].removeprefix("Value error, "), 300)
        found.append(f"{place + ': ' if place else ''}{reason}")
    return found
