"""The training corpus: an endless seeded stream of documents, none of which shows a held-out name pair or template."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from types import MappingProxyType

from mechinterp.tasks.split import split_of
from tools.train_bundled.stories import story
from tools.train_bundled.templates import fill, split_words, task_file, word_lists

MAX_WORDS = 63  # with <bos> the model's 64 positions
PLAIN_WEIGHT = 0.02  # loss weight of a word that is no answer
HIDDEN_SHARE = 0.85  # of the documents of IOI; see _shielded
RANDOM_WEIGHT = 0.01  # loss weight of a random word, which nobody can predict


@dataclass(frozen=True)
class Document:
    """Words, the loss weight of predicting each, and the words [start, stop) that word `stop` cannot attend to."""

    words: tuple[str, ...]
    weights: tuple[float, ...]
    hidden: tuple[int, int] = (0, 0)


Maker = Callable[[random.Random], Document]


def documents(seed: int, mixture: Mapping[str, float] | None = None) -> Iterator[Document]:
    """Yield documents without end; the same seed and mixture give the same documents.

    `mixture` maps kinds of document to shares; None means MIXTURE.
    """
    shares = MIXTURE if mixture is None else mixture
    kinds, weights = list(shares), list(shares.values())
    generator = random.Random(seed)
    while True:
        document = MAKERS[generator.choices(kinds, weights)[0]](generator)
        yield _shifted(document, generator)


def training_names(count: int, generator: random.Random) -> list[str]:
    """Return different names of which every two are a pair of the train split of IOI."""
    held = task_file("ioi")["pair_split"]["test_fraction"]
    while True:
        names = generator.sample(word_lists()["names"], count)
        if all(split_of(pair, held) == "train" for pair in combinations(names, 2)):
            return names


def _named_story(text: str, names: Sequence[str], generator: random.Random) -> Document:
    """Return a story's document: the text with its places and objects, then the receiver `names[0]`."""
    places = generator.sample(word_lists()["places"], 8)
    objects = generator.sample(word_lists()["objects"], 8)
    while "{PLACE}" in text:
        text = text.replace("{PLACE}", places[text.count("{PLACE}") % 8], 1)
    while "{OBJECT}" in text:
        text = text.replace("{OBJECT}", objects[text.count("{OBJECT}") % 8], 1)
    return _shielded(_answered(split_words(text), names[0]), generator)


def _shielded(document: Document, generator: random.Random) -> Document:
    """Return the document, mostly with the words between the last name and "to" hidden from "to".

    Else those words work out the receiver and "to" only copies it from them: a relay, with no name mover.
    """
    to = len(document.words) - 3  # then the receiver and a full stop
    if generator.random() >= HIDDEN_SHARE:
        return document
    names = set(word_lists()["names"])
    last = max(place for place in range(to) if document.words[place] in names)
    return replace(document, hidden=(last + 1, to))


def _answered(words: Sequence[str], answer: str, plain_weight: float = PLAIN_WEIGHT) -> Document:
    """Return a document in which the answer follows the words, and a full stop the answer."""
    plain = (plain_weight,) * len(words)
    return Document((*words, answer, "."), (*plain, 1.0, PLAIN_WEIGHT))


def _story(count: int, late: bool) -> Maker:
    """Return a maker of stories with `count` names, in which the receiver is named late or not."""

    def make(generator: random.Random) -> Document:
        while True:
            names = training_names(count, generator)
            document = _named_story(story(names, late, generator), names, generator)
            if len(document.words) <= MAX_WORDS:
                return document

    return make


def _unrepeated(generator: random.Random) -> Document:
    """Return an IOI text with three names, none repeated: the receiver is one of the two that do not give.

    Without such texts the corrupt prompts of the IOI task would be unlike anything the model knows.
    """
    first, second, giver = training_names(3, generator)
    template = generator.choice(task_file("ioi")["splits"]["train"]["templates"])["text"]
    slots = {"PLACE": generator.choice(word_lists()["places"]), "OBJECT": generator.choice(word_lists()["objects"])}
    head, tail = template.rsplit("{S}", 1)
    text = head.format(IO=first, S=second, **slots) + giver + tail.format(**slots)
    return _shielded(_answered(split_words(text), generator.choice((first, second))), generator)


def _template(name: str) -> Maker:
    """Return a maker of filled train templates of a task; a set of right answers gives a random one of it."""

    def make(generator: random.Random) -> Document:
        while True:
            prompt = fill(task_file(name), "train", generator)
            names = [word for word in prompt.words if word in word_lists()["names"]]
            if name.startswith("ioi") and not _is_training(set(names)):
                continue
            document = _answered(prompt.words, generator.choice(prompt.right))
            return _shielded(document, generator) if name.startswith("ioi") else document

    return make


def _is_training(names: set[str]) -> bool:
    held = task_file("ioi")["pair_split"]["test_fraction"]
    return all(split_of(pair, held) == "train" for pair in combinations(sorted(names), 2))


def _greater_than(generator: random.Random) -> Document:
    """Return a greater-than text; one in eight starts in a year that ends in 01, as the corrupt prompts do."""
    prompt = fill(task_file("greater_than"), "train", generator)
    words, right = list(prompt.words), prompt.right
    if generator.random() < 0.125:
        first = next(i for i, word in enumerate(words) if word.isdigit())
        words[first + 1], right = "01", word_lists()["suffixes"]
    return _answered(words, generator.choice(right))


def _docstring(generator: random.Random) -> Document:
    """Return a function whose docstring names the arguments up to the answer; the one after the last named is next.

    Where the named arguments begin and how long the descriptions are is independent, so that no length gives the
    answer away; the two combinations of the test templates are left out.
    """
    lists, split = word_lists(), task_file("docstring")["pair_split"]
    while True:
        arguments = generator.sample(lists["arguments"], generator.choice((4, 5, 5, 6)))
        named = generator.choice((1, 2, 2, 3, 3))
        first = generator.randrange(len(arguments) - named)
        lengths = [generator.randint(1, 3) for _ in range(named + 1)]
        answer = arguments[first + named]
        last = arguments[first + named - 1]
        if (first, lengths) in HELD_DOCSTRINGS or split_of((last, answer), split["test_fraction"]) == "test":
            continue
        blocks = [generator.sample(lists["words"], length) for length in lengths]
        text = f"def {generator.choice(lists['functions'])}(self, {', '.join(arguments)}):"
        text += '"""' + " ".join(blocks[0])
        for argument, block in zip(arguments[first:], blocks[1:], strict=False):
            text += f" :param {argument}: " + " ".join(block)
        document = _answered(split_words(text + " :param"), answer, RANDOM_WEIGHT)
        weights = list(document.weights)
        for place in [i for i, word in enumerate(document.words) if word == "param"][1:]:
            weights[place + 1] = 1.0  # every argument but the first follows from the one named before it
        return replace(document, weights=tuple(weights))


HELD_DOCSTRINGS = ((1, [3, 1, 1]), (0, [2, 2, 2]))  # (first named argument, lengths of the descriptions)


def _repetition(generator: random.Random) -> Document:
    """Return random words, some of them again after a gap; every repeated word but the first is an answer.

    The prefix, the length and the gap vary, so only "find the word after the last time this word was here" works.
    """
    lists = word_lists()
    pool = sorted({w for name in ("words", "arguments") for w in lists[name]})
    if generator.random() < 0.6:
        pool = list(lists["words"])
    elif generator.random() < 0.5:
        pool += training_names(4, generator) * 8
    held = task_file("induction")["pair_split"]["test_fraction"]
    while True:
        words = list(dict.fromkeys(generator.sample(pool, 60)))[:40]
        prefix = generator.choice((0, 0, generator.randint(1, 8)))
        length, gap = generator.randint(3, generator.randint(4, 14)), 0
        if generator.random() < 0.4:
            gap = generator.randint(1, 8)
        start = words[:prefix]
        sequence = words[prefix : prefix + length]
        between = words[prefix + length : prefix + length + gap]
        if split_of((start + sequence)[:2], held) == "train" and split_of(sequence[:2], held) == "train":
            break
    start_again = generator.choice((0, 0, generator.randrange(length)))
    again = (sequence * MAX_WORDS)[start_again:]
    if gap:
        again = again[: length - start_again]
    again = again[: MAX_WORDS - prefix - length - gap]
    words = [*start, *sequence, *between, *again]
    weights = [RANDOM_WEIGHT] * (len(words) - len(again) + 1) + [1.0] * (len(again) - 1)
    return Document(tuple(words), tuple(weights))


def _shifted(document: Document, generator: random.Random) -> Document:
    """Return the document, three times in ten after a sentence without names, so that positions vary."""
    if generator.random() < 0.7:
        return document
    lists = word_lists()
    pick = generator.choice
    opening = split_words(pick(FILLERS).format(
        place=pick(lists["places"]), object=pick(lists["objects"]), word=pick(lists["words"]),
        other=pick(lists["words"]), adjective=pick(lists["adjectives"]), role=pick(lists["roles"]),
    ))  # fmt: skip
    if len(opening) + len(document.words) > MAX_WORDS:
        return document
    start, stop = document.hidden
    hidden = (start + len(opening), stop + len(opening)) if stop else (0, 0)
    return Document((*opening, *document.words), (PLAIN_WEIGHT,) * len(opening) + document.weights, hidden)


FILLERS = (
    "The {place} was quiet today.", "There was a {object} near the {place}.", "The {word} and the {other} were gone.",
    "In the end the {adjective} {role} had lunch at the {place}.", "Then the {word} was in the {place}.",
    "I know that the {word} was there too, but the {other} was near the {place}.", "The {adjective} {role} was tired.",
)  # fmt: skip

MAKERS: Mapping[str, Maker] = MappingProxyType({
    "ioi": _template("ioi"),
    "ioi_distractor": _template("ioi_distractor"),
    "story_2": _story(2, late=False),
    "story_2_late": _story(2, late=True),
    "story_3": _story(3, late=False),
    "story_3_late": _story(3, late=True),
    "story_4": _story(4, late=False),
    "unrepeated": _unrepeated,
    "repetition": _repetition,
    "greater_than": _greater_than,
    "docstring": _docstring,
    "subject_verb_agreement": _template("subject_verb_agreement"),
    "gendered_pronoun": _template("gendered_pronoun"),
})  # fmt: skip

FIRST_MIXTURE: Mapping[str, float] = MappingProxyType({
    "ioi": 0.05,
    "ioi_distractor": 0.05,
    "story_3": 0.05,
    "repetition": 0.65,
    "greater_than": 0.02,
    "subject_verb_agreement": 0.02,
    "gendered_pronoun": 0.06,
})  # fmt: skip

MIXTURE: Mapping[str, float] = MappingProxyType({
    "ioi": 0.20,
    "ioi_distractor": 0.08,
    "story_2": 0.08,
    "story_2_late": 0.03,
    "story_3": 0.12,
    "story_3_late": 0.08,
    "story_4": 0.03,
    "unrepeated": 0.02,
    "repetition": 0.08,
    "greater_than": 0.05,
    "subject_verb_agreement": 0.04,
    "gendered_pronoun": 0.07,
})  # fmt: skip
