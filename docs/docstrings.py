"""A griffe extension: docstrings as Markdown, in which doctests are code and `<` is a letter."""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)
STARRED = re.compile(r"^ +(?:\\\*){1,2}(?=\w+:)", re.MULTILINE)
"""What stands for the name of a parameter `*interventions` or `**options` in a block of arguments, once escaped."""
LETTERS = {"<": "&lt;", "*": r"\*", "[": r"\[", "|": r"\|"}


def as_markdown(text: str) -> str:
    """The docstring with doctests in fences, lists set off, and nothing outside of code that Markdown would read."""
    out: list[str] = []
    prose: list[str] = []
    inside = False

    def flush() -> None:
        if prose:
            parts = CODE.split("\n".join(prose))
            out.extend("".join(part if i % 2 else _plain(part) for i, part in enumerate(parts)).split("\n"))
            prose.clear()

    for line in text.splitlines():
        starts = line.lstrip().startswith(">>>")
        if starts and not inside:
            flush()
            out.extend(["", "```pycon"])
        if inside and not line.strip():
            out.append("```")
        inside = starts or (inside and bool(line.strip()))
        if inside:
            out.append(line)
            continue
        before = prose[-1] if prose else ""
        if line.startswith("- ") and before.strip() and not before.startswith(("- ", "  ")):
            prose.append("")
        prose.append(line)
    flush()
    return "\n".join([*out, "```"] if inside else out)


def _plain(text: str) -> str:
    escaped = "".join(LETTERS.get(letter, letter) for letter in text)
    return STARRED.sub(lambda name: name[0].replace("\\", ""), escaped)


class Markdown(griffe.Extension):
    """Changes every docstring of the package as it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
