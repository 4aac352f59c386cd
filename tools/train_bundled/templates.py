"""Task files as the corpus and the exam need them: a filled template with its answers, as words."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import mechinterp.tasks
from mechinterp.tasks.split import Split, split_of

TASK_DIRECTORY = Path(mechinterp.tasks.__file__).parent
WORD_PATTERN = r"\d{2}|\w+|[^\w\s]"  # a year is two tokens, as in GPT-2: "1732" -> "17", "32"
SLOT_PATTERN = r"\{(\w+)\}"


@dataclass(frozen=True)
class Prompt:
    """A text as words, without its answer, and the words that are right and wrong after it."""

    words: tuple[str, ...]
    right: tuple[str, ...]
    wrong: tuple[str, ...]


def split_words(text: str) -> tuple[str, ...]:
    """Return the word-level tokens of a text, exactly as the bundled tokenizer splits it.

    >>> split_words("The war, in the year 1732.")
    ('The', 'war', ',', 'in', 'the', 'year', '17', '32', '.')
    """
    return tuple(re.findall(WORD_PATTERN, text))


@cache
def word_lists() -> Mapping[str, tuple[str, ...]]:
    """Return the word lists of words.yaml by name."""
    lists = yaml.safe_load((TASK_DIRECTORY / "words.yaml").read_text(encoding="utf-8"))
    return {name: tuple(str(word) for word in words) for name, words in lists.items()}


@cache
def task_file(name: str) -> Mapping[str, Any]:
    """Return the content of one task file."""
    return yaml.safe_load((TASK_DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8"))


def fill(task: Mapping[str, Any], split: Split, generator: random.Random) -> Prompt:
    """Return a random filled template of one split; its words lie in the same split."""
    template = generator.choice(task["splits"][split]["templates"])
    lists = template.get("words", task.get("words"))
    while True:
        slots = _draw(template["text"], lists, generator)
        held = task.get("pair_split")
        if held is None or split_of([slots[s] for s in held["slots"]], held["test_fraction"]) == split:
            break
    for name, part in task.get("parts", {}).items():
        start, stop = part["characters"]
        slots[name] = slots[part["slot"]][start:stop]
    right = _answers(template.get("answer", task.get("answer")), slots)
    wrong = _answers(template.get("wrong", task.get("wrong")), slots)
    return Prompt(split_words(template["text"].format(**slots)), right, wrong)


def repeated_words(
    words: Sequence[str], length: tuple[int, int], split: Split, test_fraction: float, generator: random.Random
) -> Prompt:
    """Return n random words and the first k of them again; the right answer is word k + 1.

    1 < k < n - 1, so that a wrong answer, another word that is not among the first k, exists.
    """
    while True:
        sequence = generator.sample(words, generator.randint(*length))
        if split_of(sequence[:2], test_fraction) == split:
            break
    repeated = generator.randint(2, len(sequence) - 2)
    wrong = generator.choice(sequence[repeated + 1 :])
    return Prompt((*sequence, *sequence[:repeated]), (sequence[repeated],), (wrong,))


def prompt(task_name: str, split: Split, generator: random.Random) -> Prompt:
    """Return a random prompt of a task and split."""
    task = task_file(task_name)
    if task.get("generator") == "repeated_words":
        low, high = task["parameters"]["length"]
        words = word_lists()[task["parameters"]["list"]]
        return repeated_words(words, (low, high), split, task["pair_split"]["test_fraction"], generator)
    return fill(task, split, generator)


def _draw(text: str, lists: Mapping[str, str], generator: random.Random) -> dict[str, str]:
    """Return a word for each slot of a text, all different."""
    slots: dict[str, str] = {}
    names = sorted(set(re.findall(SLOT_PATTERN, text)) & set(lists))
    for name in names:
        words = word_lists()[lists[name]]
        slots[name] = generator.choice([word for word in words if word not in slots.values()])
    return slots


def _answers(rule: str | Sequence[str] | Mapping[str, str], slots: Mapping[str, str]) -> tuple[str, ...]:
    """Return the words that an `answer` or `wrong` rule of a task file means for these slots."""
    if isinstance(rule, str):
        return (rule.format(**slots).strip(),)
    if isinstance(rule, Mapping):
        words = word_lists()[rule["list"]]
        if "greater_than" in rule:
            return tuple(word for word in words if word > slots[rule["greater_than"]])
        return tuple(word for word in words if word <= slots[rule["at_most"]])
    return tuple(text.format(**slots).strip() for text in rule)
