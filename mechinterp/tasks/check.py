"""Checks beyond the schema: whether a task's templates, slots, lists and positions fit together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from mechinterp.base.errors import FormatError, InputError, wrong_file
from mechinterp.base.registry import unknown
from mechinterp.tasks.generators import GENERATORS
from mechinterp.tasks.schema import checked
from mechinterp.tasks.spec import Answer, NumberAnswers, TaskSpec, Template
from mechinterp.tasks.template import occurrence, prompt, slots_in


def lists_used(spec: TaskSpec) -> tuple[str, ...]:
    """The names of the word lists that a task draws from, sorted."""
    used = set(spec.words.values())
    for template in templates_of(spec):
        used |= set(template.words.values())
        for answer in (answer_of(spec, template), wrong_of(spec, template)):
            if isinstance(answer, NumberAnswers):
                used.add(answer.words)
    if spec.generator is not None:
        generator = GENERATORS.get(spec.generator)
        used |= set(generator.needs(checked(generator.parameters, spec.parameters, "parameters")))
    return tuple(sorted(used))


def templates_of(spec: TaskSpec) -> tuple[Template, ...]:
    """The templates of both splits."""
    return spec.splits.train.templates + spec.splits.test.templates


def words_of(spec: TaskSpec, template: Template) -> dict[str, str]:
    """Slot -> list of one template: the task's, overridden by the template's own."""
    return {**spec.words, **template.words}


def answer_of(spec: TaskSpec, template: Template) -> Answer | None:
    """The right answer of one template: its own, or else the task's."""
    return template.answer if template.answer is not None else spec.answer


def wrong_of(spec: TaskSpec, template: Template) -> Answer | None:
    """The wrong answer of one template: its own, or else the task's."""
    return template.wrong if template.wrong is not None else spec.wrong


def texts_of(answer: Answer | None) -> tuple[str, ...]:
    """The answer's texts; none for a set of numbers."""
    if answer is None or isinstance(answer, NumberAnswers):
        return ()
    return (answer,) if isinstance(answer, str) else answer


def check_task(spec: TaskSpec, lists: Mapping[str, Sequence[str]], where: str) -> None:
    """Return None when the parts of a task fit together. Raises FormatError with all that does not fit otherwise."""
    checks: list[Callable[[], None]] = [partial(_check_list, name, words) for name, words in lists.items()]
    if spec.generator is not None:
        checks.append(partial(_check_generator, spec, lists))
    checks += [partial(_check_template, spec, template, lists) for template in templates_of(spec)]
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise wrong_file(where, list(dict.fromkeys(problems)))


def _known(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)


def _check_list(name: str, words: Sequence[str]) -> None:
    if not words:
        raise FormatError(f"The word list {name!r} is empty.")
    seen: set[str] = set()
    for word in words:
        if word in seen:
            raise FormatError(f"The word list {name!r} holds {word!r} twice.")
        if not word or word != word.strip() or "{" in word or "}" in word:
            raise FormatError(f"The word list {name!r} holds {word!r}; a word has no space around it and no braces.")
        seen.add(word)


def _check_generator(spec: TaskSpec, lists: Mapping[str, Sequence[str]]) -> None:
    generator = GENERATORS.get(spec.generator or "")
    parameters = checked(generator.parameters, spec.parameters, "parameters")
    _known("position of the generator", spec.positions, generator.positions)
    _known("slot of the generator", spec.pair_split.slots, generator.slots)
    for name, needed in generator.needs(parameters).items():
        if len(lists[name]) < needed:
            raise FormatError(f"The generator needs {needed} words of {name!r}; the list has {len(lists[name])}.")
    if spec.answer is not None or spec.wrong is not None or spec.corruption is not None or spec.words:
        raise FormatError(
            "A generator makes its own answers and corrupt texts; remove answer, wrong, corruption and words."
        )


def _check_template(spec: TaskSpec, template: Template, lists: Mapping[str, Sequence[str]]) -> None:
    slots = words_of(spec, template)
    _known("slot", (part.slot for part in spec.parts.values()), slots)
    known = [*slots, *spec.parts]
    _known("slot", slots_in(template.text), known)
    _known("slot of pair_split", spec.pair_split.slots, slots)
    prompt(template.text, dict.fromkeys(known, "x"), spec.positions, {})
    if spec.corruption is not None:
        for name, given in spec.corruption.slots.items():
            occurrence(name, template.text)
            _known("slot of the corruption", slots_in(given) if "{" in given else [given], known)
    right, wrong = answer_of(spec, template), wrong_of(spec, template)
    if wrong is not None and right is None:
        raise FormatError(f"The template {template.text!r} has a wrong answer but no right one.")
    for answer in (right, wrong):
        for text in texts_of(answer):
            _known("slot of an answer", slots_in(text), known)
        if isinstance(answer, NumberAnswers):
            _known("part of an answer", [answer.part], known)
            _check_numbers(answer.words, lists[answer.words])
    if spec.corruption is not None and spec.corruption.scheme == "abc":
        _check_answer_replaced(template, texts_of(right), spec.corruption.slots)


def _check_numbers(name: str, words: Sequence[str]) -> None:
    for word in words:
        if not (word.isascii() and word.isdigit()):
            raise FormatError(f"The list {name!r} is compared as numbers, but holds {word!r}.")


def _check_answer_replaced(template: Template, answers: Iterable[str], replaced: Iterable[str]) -> None:
    places = {occurrence(name, template.text) for name in replaced}
    for answer in answers:
        for slot in set(slots_in(answer)):
            for index in range(slots_in(template.text).count(slot)):
                if (slot, index) not in places and (slot, None) not in places:
                    raise FormatError(
                        f"The corruption 'abc' must replace the answer {slot} everywhere, but leaves one in "
                        f"{template.text!r}; use the scheme 'replace' if that is meant."
                    )
