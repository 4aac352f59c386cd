"""Reading a YAML file into a checked model: bounded, plain values only, unknown keys refused by name."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mechinterp.base.errors import FormatError, clip
from mechinterp.base.registry import unknown

MAX_BYTES = 2**18
"""The largest file of a task or word lists; a YAML parser in Python needs a second for 100 kB."""


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, given: Any) -> Any:
        if isinstance(given, dict):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for key in cast(dict[Any, Any], given):
                if key not in known:
                    raise ValueError(str(unknown("key", str(key), known)))
        return given


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
    if not isinstance(given, dict):
        raise FormatError(f"{where} must hold a mapping (`key: value`); got {type(given).__name__}.")
    return cast(dict[str, Any], given)


def checked(model: type[Model], given: object, where: str) -> Model:
    """`given` as a `model`. Raises FormatError with the place and the reason of the first error."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = clip(".".join(clip(str(part), 60) for part in first["loc"]), 200)
        reason = clip(first["msg"].removeprefix("Value error, "), 300)
        raise FormatError(f"{where}: {place + ': ' if place else ''}{reason}") from error
