"""Which words of a task's lists a tokenizer can use: each must be one token where the task uses it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mechinterp.base.errors import InputError
from mechinterp.tasks.check import answer_of, templates_of, texts_of, words_of, wrong_of
from mechinterp.tasks.generators import GENERATORS
from mechinterp.tasks.schema import checked
from mechinterp.tasks.source import Dropped
from mechinterp.tasks.spec import NumberAnswers, TaskSpec
from mechinterp.tasks.template import fill, occurrence, slots_in, with_parts
from mechinterp.tasks.tokenization import Encoder


class UnusableWords(InputError):
    """A tokenizer can use too few words of a task."""


@dataclass(frozen=True)
class Vocabulary:
    """The usable words by (slot, list); a generator's lists and sets of numbers have the slot ``""``."""

    words: Mapping[tuple[str, str], tuple[str, ...]]
    dropped: tuple[Dropped, ...]

    def lists(self) -> dict[str, tuple[str, ...]]:
        """The lists that are used without a slot, by name."""
        return {name: words for (slot, name), words in self.words.items() if not slot}


def usable_words(spec: TaskSpec, lists: Mapping[str, Sequence[str]], encoder: Encoder) -> Vocabulary:
    """The words of each slot that are one token (or one token per part) wherever the task uses them.

    A space before a word that is taken in parts may be a token of its own (" 1732" as " ", "1", "7", "3", "2").

    Raises UnusableWords when fewer words are left for a slot than one example draws.
    """
    needed = _needed(spec)
    words: dict[tuple[str, str], tuple[str, ...]] = {}
    dropped: dict[Dropped, None] = {}
    spaces = _spaces(spec)
    for (slot, name), count in needed.items():
        uses = {word: list(_uses(spec, slot, spaces, word)) for word in lists[name]}
        reasons = _reasons(uses, encoder, any(part.slot == slot for part in spec.parts.values()))
        kept = tuple(word for word in lists[name] if word not in reasons)
        dropped |= {Dropped(f"word {word!r} of the list {name!r}", why): None for word, why in reasons.items()}
        if len(kept) < count:
            word, why = next(iter(reasons.items()), ("", ""))
            raise UnusableWords(
                f"Task {spec.name!r}: an example needs {count} words of the list {name!r}; this tokenizer "
                f"can use {len(kept)} of its {len(lists[name])} ({word!r}: {why}). Use another model, "
                "or a task with other words."
            )
        words[slot, name] = kept
    return Vocabulary(words, tuple(dropped))


def needs_of(spec: TaskSpec) -> str:
    """What a task needs of a tokenizer, in words: `words of one token (names, objects, places)`."""
    whole, in_parts = set[str](), dict[str, set[str]]()
    for slot, name in _needed(spec):
        cuts = sorted(part.characters for part in spec.parts.values() if part.slot == slot)
        if cuts:
            in_parts.setdefault(" + ".join(str(stop - start) for start, stop in cuts), set()).add(name)
        else:
            whole.add(name)
    needs = [f"words of one token ({', '.join(sorted(whole))})"] if whole else []
    needs += [f"words split into tokens of {cut} characters ({', '.join(sorted(n))})" for cut, n in in_parts.items()]
    return " and ".join(needs)


def _needed(spec: TaskSpec) -> dict[tuple[str, str], int]:
    """(slot, list) -> how many different words of that list one example draws."""
    needed: dict[tuple[str, str], int] = {}
    if spec.generator is not None:
        generator = GENERATORS.get(spec.generator)
        parameters = checked(generator.parameters, spec.parameters, "parameters")
        needed |= {("", name): count for name, count in generator.needs(parameters).items()}
    for template in templates_of(spec):
        drawn = list(words_of(spec, template).values())
        for slot, name in words_of(spec, template).items():
            needed[slot, name] = max(needed.get((slot, name), 0), drawn.count(name))
    for template in templates_of(spec):
        for answer in (answer_of(spec, template), wrong_of(spec, template)):
            if isinstance(answer, NumberAnswers):
                needed["", answer.words] = 1
    return needed


def _uses(
    spec: TaskSpec, slot: str, spaces: Mapping[str, Sequence[str]], word: str
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every text in which the task uses a word, with the tokens that it must consist of."""
    if not slot:
        yield (f" {word}" if spec.generator is not None else word), (word,)
        return
    parts = {name: part for name, part in spec.parts.items() if part.slot == slot}
    cuts = sorted(part.characters for part in parts.values())
    for space in spaces.get(slot, [" "]):
        yield space + word, _cut(word, cuts)
        for name, given in (spec.corruption.slots if spec.corruption else {}).items():
            if name == slot and "{" in given and set(slots_in(given)) <= {slot, *parts}:
                replaced = fill(given, with_parts({slot: word}, parts))
                yield space + replaced, _cut(replaced, cuts)
    for name, part in parts.items():
        piece = word[slice(*part.characters)]
        yield from ((space + piece, (piece,)) for space in spaces.get(name, []))


def _cut(word: str, cuts: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    return tuple(word[start:stop] for start, stop in cuts) or (word,)


def _spaces(spec: TaskSpec) -> dict[str, list[str]]:
    """Slot or part -> what precedes it in the task's texts: a space, nothing, or both in different texts."""
    found: dict[str, set[str]] = {}
    for template in templates_of(spec):
        answers = texts_of(answer_of(spec, template)) + texts_of(wrong_of(spec, template))
        for text in (template.text, *answers):
            for slot in slots_in(text):
                before = text.split(f"{{{slot}}}")[:-1]
                found.setdefault(slot, set()).update(" " if part.endswith(" ") else "" for part in before)
        # A slot that only the corrupt text uses is where the slot that it replaces is.
        for name, given in (spec.corruption.slots if spec.corruption else {}).items():
            replaced, _ = occurrence(name, template.text)
            if "{" not in given:
                found.setdefault(given, set()).update(found[replaced])
    return {slot: sorted(spaces) for slot, spaces in found.items()}


def _reasons(
    uses: Mapping[str, Sequence[tuple[str, tuple[str, ...]]]], encoder: Encoder, in_parts: bool
) -> dict[str, str]:
    """word -> the reason, for words that cannot be used; words `in_parts` may have a space as a token before them."""
    flat = [(word, text, wanted) for word, texts in uses.items() for text, wanted in texts]
    reasons: dict[str, str] = {}
    for (word, text, wanted), (ids, got) in zip(flat, encoder.pieces([text for _, text, _ in flat]), strict=True):
        if encoder.unknown(ids):
            reasons.setdefault(word, "not in the vocabulary")
        elif got != wanted and not (in_parts and got == ("", *wanted)):
            reasons.setdefault(word, f"{len(ids)} tokens as {text!r}, not {len(wanted)}")
    return reasons
