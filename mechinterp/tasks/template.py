"""Templates: texts with `{SLOT}`s, filled with words, and where the named positions are in the result.

A slot that occurs several times has numbered occurrences: `S1`, `S2` are the first and second `{S}` of the text, `IO`
alone is the only `{IO}`. `S1+1` is the token after the first token of S1, `end` the last token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mechinterp.base.errors import FormatError
from mechinterp.base.registry import unknown
from mechinterp.tasks.spec import Part, TaskSpec, Template

_SLOT = re.compile(r"\{([A-Za-z][A-Za-z0-9_]*)\}")
_POSITION = re.compile(r"^([A-Za-z][A-Za-z0-9_]*?)(?:([+-])([1-9][0-9]?))?$")
END = "end"


@dataclass(frozen=True)
class Mark:
    """A named position in a text: the token at `character` (None: the last one), then `offset` tokens on."""

    character: int | None
    offset: int = 0


@dataclass(frozen=True)
class Prompt:
    """A text and the marks of its named positions."""

    text: str
    marks: Mapping[str, Mark]


@dataclass(frozen=True)
class Draft:
    """One example as text, before it is tokenized. `words` are the words drawn, by slot."""

    clean: Prompt
    corrupt: Prompt
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    words: Mapping[str, str]


def slots_in(text: str) -> tuple[str, ...]:
    """The slots of a text in order, one entry per occurrence. Raises FormatError for a stray brace.

    >>> slots_in("When {IO} and {S} met, {S} gave")
    ('IO', 'S', 'S')
    """
    rest = _SLOT.sub("", text)
    if "{" in rest or "}" in rest:
        raise FormatError(f"A brace in {text!r} does not belong to a slot; a slot is written {{NAME}}.")
    return tuple(_SLOT.findall(text))


def occurrence(name: str, text: str) -> tuple[str, int | None]:
    """The slot, and the index of the occurrence, that a name refers to in a text; index None: all of them.

    Raises FormatError when the text has no such occurrence.

    >>> occurrence("S2", "{S} and {IO}, {S}"), occurrence("S", "{S} and {IO}, {S}")
    (('S', 1), ('S', None))
    """
    slots = slots_in(text)
    if name in slots:
        return name, None
    slot, number = re.fullmatch(r"(.*?)(\d*)", name).groups()  # pyright: ignore[reportOptionalMemberAccess]
    if not number or not 1 <= int(number) <= slots.count(slot):
        raise FormatError(f"{unknown('occurrence of a slot', name, set(slots))} In the template {text!r}.")
    return slot, int(number) - 1


def fill(text: str, words: Mapping[str, str]) -> str:
    """The text with every slot replaced by its word.

    >>> fill("{A} and {B}", {"A": "x", "B": "y"})
    'x and y'
    """
    return _SLOT.sub(lambda match: words[match.group(1)], text)


def with_parts(words: Mapping[str, str], parts: Mapping[str, Part]) -> dict[str, str]:
    """The words, together with the parts of words under the names of the parts."""
    cut = {name: words[part.slot][slice(*part.characters)] for name, part in parts.items()}
    return {**words, **cut}


def replacements(spec: TaskSpec, template: Template, words: Mapping[str, str]) -> dict[tuple[str, int | None], str]:
    """(slot, occurrence) -> its word in the corrupt text."""
    if spec.corruption is None:
        return {}
    made: dict[tuple[str, int | None], str] = {}
    for name, given in spec.corruption.slots.items():
        made[occurrence(name, template.text)] = fill(given, words) if "{" in given else words[given]
    return made


def prompt(
    text: str,
    words: Mapping[str, str],
    positions: tuple[str, ...],
    replaced: Mapping[tuple[str, int | None], str],
) -> Prompt:
    """The filled text with its marks; `replaced` overrides the word of an occurrence or of a whole slot."""
    written, starts, counts, before = "", {}, {}, 0
    for match in _SLOT.finditer(text):
        slot = match.group(1)
        index = counts.get(slot, 0)
        counts[slot] = index + 1
        written += text[before : match.start()]
        starts[slot, index] = len(written)
        written += replaced.get((slot, index), replaced.get((slot, None), words[slot]))
        before = match.end()
    written += text[before:]
    return Prompt(written, {name: _mark(name, text, starts) for name in positions})


def _mark(name: str, text: str, starts: Mapping[tuple[str, int], int]) -> Mark:
    base, offset = position_parts(name)
    if base == END:
        return Mark(None, offset)
    slot, index = occurrence(base, text)
    if index is None and slots_in(text).count(slot) > 1:
        raise FormatError(f"The position {name!r} is ambiguous: {slot} occurs more than once in {text!r}.")
    return Mark(starts[slot, index or 0], offset)


def position_parts(name: str) -> tuple[str, int]:
    """The occurrence and the token offset of a position's name. Raises FormatError for another form.

    >>> position_parts("S1+1"), position_parts("end")
    (('S1', 1), ('end', 0))
    """
    match = _POSITION.match(name)
    if match is None:
        raise FormatError(f"A position is written NAME, NAME+1 or NAME-1; got {name!r}.")
    base, sign, offset = match.groups()
    return base, int(f"{sign}{offset}") if offset else 0
