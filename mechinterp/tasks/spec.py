"""The schema of a task file (YAML)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mechinterp.tasks.schema import Strict

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=64)]
Text = Annotated[str, Field(min_length=1, max_length=10_000)]


class NumberAnswers(Strict):
    """The entries of a list of numbers above the number of a part, or those that are not above it."""

    words: Name = Field(alias="list")
    greater_than: Name | None = None
    at_most: Name | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> NumberAnswers:
        if (self.greater_than is None) == (self.at_most is None):
            raise ValueError("give exactly one of greater_than and at_most")
        return self

    @property
    def part(self) -> str:
        """The part (or slot) whose number is the bound."""
        return self.greater_than or self.at_most or ""


def _kind_of_answer(given: object) -> str:
    """Which of the three kinds an answer is meant to be, so that an error is about that kind only."""
    if isinstance(given, (dict, NumberAnswers)):
        return "set"
    return "texts" if isinstance(given, (list, tuple)) else "text"


Answer = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[tuple[Text, ...], Field(min_length=1), Tag("texts")]
    | Annotated[NumberAnswers, Tag("set")],
    Discriminator(_kind_of_answer),
]
"""A text with slots, several texts, or a set of numbers. Texts include their leading space."""


class Part(Strict):
    """Some characters of a slot's word; each part must be one token."""

    slot: Name
    characters: tuple[int, int]

    @model_validator(mode="after")
    def _not_empty(self) -> Part:
        start, stop = self.characters
        if not 0 <= start < stop:
            raise ValueError(f"characters must be [start, stop) with 0 <= start < stop; got [{start}, {stop}]")
        return self


class Corruption(Strict):
    """The words of the corrupt text: occurrence of a slot -> another slot, or a text made of parts.

    `abc`: the answer's slots are replaced everywhere, so that the corrupt text does not contain the answer
    (Wang et al. 2022 replace all three names). `replace` does not guarantee that.
    """

    scheme: Literal["abc", "replace"]
    slots: dict[Name, Text] = Field(min_length=1)


class PairSplit(Strict):
    """The slots whose words, as an unordered combination, belong to one split only."""

    slots: tuple[Name, ...] = Field(min_length=1)
    test_fraction: float = Field(gt=0, lt=1, allow_inf_nan=False)


class Template(Strict):
    """One sentence with slots; its own entries override those of the task."""

    text: Text
    order: str | None = None
    answer: Answer | None = None
    wrong: Answer | None = None
    words: dict[Name, Name] = Field(default_factory=dict)


class SplitTemplates(Strict):
    """The templates of one split; empty for a generator."""

    templates: tuple[Template, ...] = ()


class Splits(Strict):
    """Both splits. Their templates are disjoint."""

    train: SplitTemplates
    test: SplitTemplates


class TaskSpec(Strict):
    """A task file."""

    name: Name
    version: int = Field(ge=1, le=10**6)
    title: Text
    source: Text
    metric: Name
    answer: Answer | None = None
    wrong: Answer | None = None
    positions: tuple[Text, ...] = ()
    words: dict[Name, Name] = Field(default_factory=dict)
    lists: dict[Name, tuple[Text, ...]] = Field(default_factory=dict)
    """The task's own word lists; other names are looked up in words.yaml."""
    parts: dict[Name, Part] = Field(default_factory=dict)
    corruption: Corruption | None = None
    pair_split: PairSplit
    splits: Splits
    generator: Name | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _templates_or_generator(self) -> TaskSpec:
        train = {template.text for template in self.splits.train.templates}
        test = {template.text for template in self.splits.test.templates}
        if self.generator is not None and (train or test):
            raise ValueError("a task has templates or a generator, not both")
        if self.generator is None and not (train and test):
            raise ValueError("give templates for train and for test, or a generator")
        if self.generator is None and self.corruption is None:
            raise ValueError("templates need a corruption")
        if train & test:
            raise ValueError(f"this template is in both splits: {min(train & test)!r}")
        return self
