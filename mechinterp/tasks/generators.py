"""Tasks that templates cannot express: functions that draw one example, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pydantic import Field, model_validator

from mechinterp.base.registry import Registry
from mechinterp.tasks.draw import Draw
from mechinterp.tasks.schema import Strict
from mechinterp.tasks.template import Draft, Mark, Prompt

Lists: TypeAlias = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Generator:
    """A generator's parameters, the number of words it needs of each list, its slots, positions and function."""

    parameters: type[Strict]
    needs: Callable[[Strict], Mapping[str, int]]
    slots: tuple[str, ...]
    positions: tuple[str, ...]
    write: Callable[[Draw, Lists, Strict], Draft]
    """Draws one example; every word follows a space and is one token together with it."""


GENERATORS: Registry[Generator] = Registry("generator")


class RepeatedWords(Strict):
    """`words` is the list, `length` the smallest and the largest number of words before the repetition."""

    words: str = Field(alias="list")
    length: tuple[int, int]

    @model_validator(mode="after")
    def _long_enough(self) -> RepeatedWords:
        low, high = self.length
        if not 4 <= low <= high <= 1000:
            raise ValueError(f"length must be [low, high] with 4 <= low <= high <= 1000; got [{low}, {high}]")
        return self


def repeated_words(draw: Draw, lists: Lists, parameters: Strict) -> Draft:
    """n different words, then the first k of them again (1 < k < n); the answer is word k + 1.

    The wrong answer is one of the n words that is not repeated. The corrupt text begins with n other words, so
    nothing is repeated. Positions: `prefix` (the last word's first occurrence), `answer` (the word after it).
    """
    if not isinstance(parameters, RepeatedWords):
        raise TypeError(f"repeated_words takes RepeatedWords; got {type(parameters).__name__}.")
    low, high = parameters.length
    n = low + draw.below(high - low + 1)
    # k is at most n - 2, so that a wrong answer is left besides the right one.
    k = 2 + draw.below(n - 3)
    drawn = draw.sample(lists[parameters.words], 2 * n)
    first, others = drawn[:n], drawn[n:]
    marks = ("prefix", k - 1), ("answer", k), ("end", None)
    return Draft(
        clean=_words(first, first[:k], marks),
        corrupt=_words(others, first[:k], marks),
        right=(f" {first[k]}",),
        wrong=(f" {draw.choice(first[k + 1 :])}",),
        words={"first": first[0], "second": first[1]},
    )


def _words(head: list[str], tail: list[str], marks: tuple[tuple[str, int | None], ...]) -> Prompt:
    starts: list[int] = []
    text = ""
    for word in head + tail:
        starts.append(len(text) + 1)
        text += f" {word}"
    return Prompt(text, {name: Mark(None if index is None else starts[index]) for name, index in marks})


def _needs(parameters: Strict) -> Mapping[str, int]:
    return {parameters.words: 2 * parameters.length[1]} if isinstance(parameters, RepeatedWords) else {}


GENERATORS.register(
    "repeated_words",
    Generator(
        parameters=RepeatedWords,
        needs=_needs,
        slots=("first", "second"),
        positions=("prefix", "answer", "end"),
        write=repeated_words,
    ),
)
