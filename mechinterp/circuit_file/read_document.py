"""The JSON of circuit and direction files, which are untrusted: strictly parsed, of a known kind and version."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from mechinterp.base.canonical_json import parse_json
from mechinterp.base.errors import FormatError, clip
from mechinterp.tasks.schema import Model, checked

MAX_JSON_BYTES = 64 * 2**20


def read_document(
    schema: type[Model], text: bytes, path: Path, kind: str, versions: tuple[int, ...]
) -> tuple[Model, dict[str, Any]]:
    """The document of a JSON text and the JSON as read, which the file's hash is over; hashes are not checked.

    Args:
        schema: What the document must follow.
        text: The content of the file.
        path: Where it is, or will be; for messages.
        kind: What `kind` must say.
        versions: What `schema_version` may say.

    Raises FormatError, in one line, for anything else.
    """
    content = parse_json(text, str(path))
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold a JSON object; got {type(content).__name__}.")
    content = cast(dict[str, Any], content)
    for name, known in (("kind", (kind,)), ("schema_version", versions)):
        got = content.get(name)
        if type(got) is not type(known[0]) or got not in known:
            shown = clip(repr(got), 60) if name in content else "nothing"
            raise FormatError(
                f"{path}: {name} is {shown}; this version of mechinterp reads {' and '.join(map(repr, known))}."
            )
    try:
        document = checked(schema, content, str(path))
    except FormatError as error:
        raise FormatError(clip(" ".join(str(error).split()), 580)) from error
    return document, content
