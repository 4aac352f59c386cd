"""How many different examples a task can make at most, counted without drawing any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import product
from math import perm, prod

from mechinterp.base.errors import InputError
from mechinterp.tasks.check import words_of
from mechinterp.tasks.spec import TaskSpec, Template
from mechinterp.tasks.split import Split, split_of
from mechinterp.tasks.template import slots_in

Words = Callable[[str, str], Sequence[str]]
"""The words that may fill a slot, by the slot and its list."""
MOST_COMBINATIONS = 300_000
"""Combinations of words whose split is looked up; where there are more, those of both splits are counted."""


class TooManyExamples(InputError):
    """More different examples are wanted than a task can make."""

    def __init__(self, task: str, split: str, n: int, most: int, where: str = "") -> None:
        said = f"Task {task!r} can make at most {most:,} different {split} examples{where}; got {n:,}."
        super().__init__(f"{said} Ask for fewer: --examples, or n.")


def most_if_fewer(spec: TaskSpec, templates: Sequence[Template], split: Split, words: Words, n: int) -> int | None:
    """The most examples that a split can have if these are fewer than `n`; None if `n` may be possible.

    It is an upper bound: examples that the tokenizer makes unusable are counted. Templates take turns, so the one with
    the fewest examples decides. A task with a generator is not counted.

    Args:
        spec: The task.
        templates: Those of the split, in the order of their turns.
        split: Which combinations of words count.
        words: What may fill each slot.
        n: How many examples are wanted; counting stops there.
    """
    if spec.generator is not None:
        return None
    each = -(-n // len(templates))
    counts: dict[frozenset[tuple[str, tuple[str, ...]]], int] = {}
    most = n
    for turn, template in enumerate(templates):
        lists = words_of(spec, template)
        shown = {spec.parts[name].slot if name in spec.parts else name for name in _shown(spec, template)}
        slots = {slot: tuple(words(slot, lists[slot])) for slot in sorted(shown)}
        alike = frozenset(slots.items())
        if alike not in counts:
            counts[alike] = _count(spec, slots, split, each)
        most = min(most, counts[alike] * len(templates) + turn)
    return most if most < n else None


def _count(spec: TaskSpec, slots: Mapping[str, tuple[str, ...]], split: Split, enough: int) -> int:
    """The ways to fill the slots with different words of the split; counting stops at `enough`."""
    rule = [slot for slot in spec.pair_split.slots if slot in slots]
    if len(rule) < len(spec.pair_split.slots) or prod(len(slots[slot]) for slot in rule) > MOST_COMBINATIONS:
        return _ways(slots.values(), ())
    others = [frozenset(found) for slot, found in slots.items() if slot not in rule]
    count = 0
    for drawn in product(*(slots[slot] for slot in rule)):
        if len(set(drawn)) == len(drawn) and split_of(drawn, spec.pair_split.test_fraction) == split:
            count += _ways(others, drawn)
        if count >= enough:
            break
    return count


def _ways(slots: Iterable[Collection[str]], taken: Sequence[str]) -> int:
    """The ways to fill slots with words that are not taken; slots with the same words get different ones."""
    counted = Counter(frozenset(words) for words in slots)
    return prod(perm(len(words) - sum(word in words for word in taken), n) for words, n in counted.items())


def _shown(spec: TaskSpec, template: Template) -> set[str]:
    """The slots and parts that the clean or the corrupt text shows."""
    given = spec.corruption.slots.values() if spec.corruption else ()
    return {*slots_in(template.text)}.union(*(slots_in(text) if "{" in text else (text,) for text in given))
