"""The number of examples a task can make at most is that of all examples written out."""

from __future__ import annotations

import time
from itertools import permutations
from pathlib import Path

import pytest

from mechinterp.base.errors import InputError
from mechinterp.tasks.capacity import most_if_fewer
from mechinterp.tasks.check import words_of
from mechinterp.tasks.split import split_of
from mechinterp.tasks.task import load_task
from mechinterp.tasks.template import prompt, replacements

TASK = """
name: colours
version: 1
title: t
source: s
metric: logit_diff
answer: " {A}"
wrong: " {B}"
lists: {colours: [red, green, blue, black, white], things: [cup, hat, red]}
words: {A: colours, B: colours, C: colours, D: things}
corruption: {scheme: replace, slots: {A: C}}
pair_split: {slots: [A, B], test_fraction: 0.4}
splits:
  train: {templates: [{text: "the {A} {D} and {B} and {B}"}, {text: "a {A} one and {B} and"}]}
  test: {templates: [{text: "We saw {A} and {B} and"}]}
"""


@pytest.mark.parametrize("split", ["train", "test"])
def test_it_is_the_number_of_all_examples_written_out(split: str, tmp_path: Path) -> None:
    """Exact where no two lists share a word that could meet; here `red` is in both, so the first template has fewer."""
    path = tmp_path / "colours.yaml"
    path.write_text(TASK)
    task = load_task(path)
    templates = (task.spec.splits.train if split == "train" else task.spec.splits.test).templates
    counts: list[int] = []
    for template in templates:
        slots = words_of(task.spec, template)
        found = set[tuple[str, str]]()
        for drawn in permutations({word for words in task.lists.values() for word in words}, len(slots)):
            words = dict(zip(slots, drawn, strict=True))
            usable = all(words[slot] in task.lists[slots[slot]] for slot in slots)
            if usable and split_of([words["A"], words["B"]], 0.4) == split:
                replaced = replacements(task.spec, template, words)
                texts = (prompt(template.text, words, (), {}).text, prompt(template.text, words, (), replaced).text)
                found.add(texts)
        counts.append(len(found))
    truth = min(count * len(counts) + turn for turn, count in enumerate(counts))
    said = most_if_fewer(task.spec, templates, split, lambda _, name: task.lists[name], 10_000)
    assert said is not None and truth <= said <= truth * 5 / 4
    if split == "test":  # no second list
        assert said == truth
    assert most_if_fewer(task.spec, templates, split, lambda _, name: task.lists[name], truth) is None


def test_too_many_are_refused_at_once() -> None:
    start = time.process_time()
    with pytest.raises(InputError, match=r"at most 20,848 different test examples; got 1,000,000\. Ask for fewer"):
        load_task("greater_than").check_number(10**6, "test")
    load_task("ioi").check_number(10**6, "train")
    load_task("induction").check_number(10**6, "train")
    assert time.process_time() - start < 3
