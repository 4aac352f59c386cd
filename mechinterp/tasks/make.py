"""From a task and a tokenizer to `Pairs`: draw examples as text, encode them, keep the well-formed ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast
from weakref import WeakKeyDictionary

from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.tasks.capacity import TooManyExamples, most_if_fewer
from mechinterp.tasks.check import answer_of, words_of, wrong_of
from mechinterp.tasks.draw import Draw
from mechinterp.tasks.generators import GENERATORS
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.schema import checked
from mechinterp.tasks.source import Dropped, Report, TaskSource
from mechinterp.tasks.spec import Answer, NumberAnswers, TaskSpec, Template
from mechinterp.tasks.split import Split, split_of
from mechinterp.tasks.template import Draft, fill, prompt, replacements, with_parts
from mechinterp.tasks.tokenization import Encoder, encoder_of
from mechinterp.tasks.vocabulary import Vocabulary, needs_of, usable_words

log = logging.getLogger(__name__)

MAX_EXAMPLES = 1_000_000
MAX_TRIES = 1000
SPLITS = ("train", "test")

_SAID: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
"""The tasks (digests) of which each tokenizer's usable words were logged; only what is logged depends on it."""

Writer: TypeAlias = Callable[[Draw], Draft | None]
"""Draws one example; None if the drawn words do not allow one (no year is later than 99)."""


@dataclass(frozen=True)
class Request:
    """Which pairs of a task to make: its content with its digest, the split, how many, and the seed."""

    spec: TaskSpec
    lists: Mapping[str, Sequence[str]]
    """The word lists that the task draws from, by name."""
    digest: str
    split: str
    n: int
    seed: int
    skip: int = 0
    """Examples that come before the wanted ones."""


@dataclass(frozen=True)
class _Row:
    draft: Draft
    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    positions: Mapping[str, int]


def make_pairs(wanted: Request, model_or_tokenizer: Any, prepend_bos: bool | None) -> Pairs:
    """The pairs of a request; `Task.pairs` describes them."""
    spec, seed = wanted.spec, wanted.seed
    if wanted.split not in SPLITS:
        raise unknown("split", wanted.split, SPLITS)
    split: Split = wanted.split
    n = wanted.skip + wanted.n
    if wanted.n < 2 or wanted.skip < 0 or n > MAX_EXAMPLES:
        raise InputError(f"n must be between 2 and {MAX_EXAMPLES} examples; got {n}.")
    encoder = encoder_of(model_or_tokenizer, prepend_bos)
    vocabulary = usable_words(spec, wanted.lists, encoder)
    _say_once(wanted, vocabulary, encoder)
    if (most := _most_if_fewer(spec, split, vocabulary, f"{seed}/{split}", n)) is not None:
        raise TooManyExamples(spec.name, split, n, most, " with this tokenizer")
    writers = _writers(spec, split, vocabulary, f"{seed}/{split}")
    dropped: dict[Dropped, None] = dict.fromkeys(vocabulary.dropped)
    rows: list[_Row] = []
    seen: set[tuple[str, str]] = set()
    for index in range(n):
        draw = Draw(f"{seed}/{split}/{index}")
        row = _first_usable(spec, split, writers[index % len(writers)], draw, encoder, seen, dropped)
        if row is None:
            raise InputError(
                f"Task {spec.name!r} has too few different {split} examples for n={n} with this tokenizer "
                f"(found {index}). Choose a smaller n." + _last_reason(dropped)
            )
        seen.add((row.draft.clean.text, row.draft.corrupt.text))
        rows.append(row)
    source = TaskSource(
        task=spec.name,
        version=spec.version,
        digest=wanted.digest,
        split=split,
        n=wanted.n,
        seed=seed,
        skip=wanted.skip,
        prepend_bos=encoder.prepend_bos,
    )
    pairs = _assemble(rows[wanted.skip :], source, Report(tuple(dropped)))
    check_against(pairs, model_or_tokenizer)
    return pairs


def _say_once(wanted: Request, vocabulary: Vocabulary, encoder: Encoder) -> None:
    """Logs what the task needs of a tokenizer and how many words this one cannot use, once for each tokenizer."""
    said = _SAID.setdefault(encoder.tokenizer, set())
    if wanted.digest in said:
        return
    said.add(wanted.digest)
    total, left_out = sum(map(len, wanted.lists.values())), {entry.what: entry for entry in vocabulary.dropped}
    needs = f"task {wanted.spec.name} needs {needs_of(wanted.spec)}"
    if not left_out:
        log.info("%s; this tokenizer can use all %d words", needs, total)
        return
    first = next(iter(left_out.values()))
    example = f"{first.what}: {first.why}"
    log.warning("%s; %d of %d are left out with this tokenizer (%s)", needs, len(left_out), total, example)


def check_against(pairs: Pairs, model_or_tokenizer: Any) -> None:
    """Return None when the ids are valid for the tokenizer, and for the model if there is one. Raises InputError."""
    tokenizer: Any = getattr(model_or_tokenizer, "tokenizer", model_or_tokenizer)
    bos: int | None = getattr(tokenizer, "bos_token_id", None)
    if bos is not None:
        pairs.check_bos(bos)
    dims: Any = getattr(model_or_tokenizer, "dims", None)
    if dims is not None:
        pairs.check_vocabulary(int(dims.d_vocab))
    elif tokenizer is not None:
        pairs.check_vocabulary(len(tokenizer))


def _assemble(rows: Sequence[_Row], source: TaskSource, report: Report) -> Pairs:
    return Pairs(
        clean=[row.clean for row in rows],
        corrupt=[row.corrupt for row in rows],
        right=[row.right for row in rows] if rows[0].right else None,
        wrong=[row.wrong for row in rows] if rows[0].wrong else None,
        positions={name: [row.positions[name] for row in rows] for name in rows[0].positions},
        clean_text=[row.draft.clean.text for row in rows],
        corrupt_text=[row.draft.corrupt.text for row in rows],
        source=source,
        report=report,
    )


def _last_reason(dropped: Mapping[Dropped, None]) -> str:
    return f" The last one dropped: {list(dropped)[-1].why}." if dropped else ""


def _first_usable(
    spec: TaskSpec,
    split: str,
    writer: Writer,
    draw: Draw,
    encoder: Encoder,
    seen: set[tuple[str, str]],
    dropped: dict[Dropped, None],
) -> _Row | None:
    """The first well-formed example of the split that is new, or None after MAX_TRIES."""
    rule = spec.pair_split
    for _ in range(MAX_TRIES):
        draft = writer(draw)
        if draft is None or (draft.clean.text, draft.corrupt.text) in seen:
            continue
        if split_of([draft.words[slot] for slot in rule.slots], rule.test_fraction) != split:
            continue
        row = _encode(spec, draft, encoder)
        if isinstance(row, _Row):
            return row
        dropped[Dropped(f"example {draft.clean.text!r}", row)] = None
    return None


def _encode(spec: TaskSpec, draft: Draft, encoder: Encoder) -> _Row | str:
    """The example as token ids, or why it is not well formed."""
    clean, corrupt = encoder.encode([draft.clean.text, draft.corrupt.text])
    if encoder.unknown(clean.ids) or encoder.unknown(corrupt.ids):
        raise InputError(
            f"Task {spec.name!r}: the tokenizer does not know some word of {draft.clean.text!r}. The task's "
            "templates need a tokenizer that knows their words."
        )
    if len(clean.ids) != len(corrupt.ids):
        return f"{len(clean.ids)} tokens clean, {len(corrupt.ids)} corrupt"
    positions: dict[str, int] = {}
    for name in spec.positions:
        at = clean.token_at(draft.clean.marks[name])
        if at is None or at != corrupt.token_at(draft.corrupt.marks[name]):
            return f"the position {name!r} is not at the same token in clean and corrupt"
        positions[name] = at
    right, wrong = (_answer_ids(texts, encoder) for texts in (draft.right, draft.wrong))
    if isinstance(right, str) or isinstance(wrong, str):
        return right if isinstance(right, str) else cast(str, wrong)
    return _Row(draft, clean.ids, corrupt.ids, right, wrong, positions)


def _answer_ids(texts: Sequence[str], encoder: Encoder) -> tuple[int, ...] | str:
    ids: list[int] = []
    for text, (found, _) in zip(texts, encoder.pieces(texts), strict=True):
        if len(found) != 1 or encoder.unknown(found):
            return f"the answer {text!r} is not one token"
        ids.append(found[0])
    return tuple(ids)


def _writers(spec: TaskSpec, split: str, vocabulary: Vocabulary, key: str) -> list[Writer]:
    """One writer per template, in the order in which they alternate; one for a generator."""
    if spec.generator is not None:
        generator = GENERATORS.get(spec.generator)
        parameters = checked(generator.parameters, spec.parameters, "parameters")
        lists = vocabulary.lists()
        return [lambda draw: generator.write(draw, lists, parameters)]
    chosen = spec.splits.train if split == "train" else spec.splits.test
    return [_template_writer(spec, template, vocabulary) for template in _turns(chosen.templates, key)]


def _most_if_fewer(spec: TaskSpec, split: Split, vocabulary: Vocabulary, key: str, n: int) -> int | None:
    if spec.generator is not None:
        return None
    templates = spec.splits.train.templates if split == "train" else spec.splits.test.templates
    turns = tuple(_turns(templates, key))
    return most_if_fewer(spec, turns, split, lambda slot, name: vocabulary.words[slot, name], n)


def row_templates(spec: TaskSpec, split: str, seed: int, n: int) -> tuple[str, ...]:
    """The template of each of the first examples of a split: templates take turns. A generator counts as one."""
    if spec.generator is not None:
        return (spec.generator,) * n
    chosen = spec.splits.train if split == "train" else spec.splits.test
    turns = [template.text for template in _turns(chosen.templates, f"{seed}/{split}")]
    return tuple(turns[i % len(turns)] for i in range(n))


def _turns(templates: Sequence[Template], key: str) -> Iterator[Template]:
    """All templates in random order, the orders (ABBA, BABA) and stated answers alternating."""
    groups: dict[tuple[str | None, str], list[Template]] = {}
    for template in Draw(f"{key}/templates").sample(templates, len(templates)):
        groups.setdefault((template.order, str(template.answer)), []).append(template)
    for place in range(max(len(group) for group in groups.values())):
        yield from (group[place] for group in groups.values() if place < len(group))


def _template_writer(spec: TaskSpec, template: Template, vocabulary: Vocabulary) -> Writer:
    # Sorted, so that the order of keys in the file does not change the draws.
    slots = {slot: vocabulary.words[slot, name] for slot, name in sorted(words_of(spec, template).items())}
    numbers = {name: {word: int(word) for word in words} for name, words in vocabulary.lists().items()}

    def write(draw: Draw) -> Draft | None:
        drawn: dict[str, str] = {}
        for slot, words in slots.items():
            # No word occurs twice in an example, not even from two lists.
            used = set(drawn.values())
            left = [word for word in words if word not in used]
            if not left:
                return None
            drawn[slot] = draw.choice(left)
        words = with_parts(drawn, spec.parts)
        right = _answer_texts(answer_of(spec, template), words, numbers)
        wrong = _answer_texts(wrong_of(spec, template), words, numbers)
        if right == () or wrong == ():
            return None
        replaced = replacements(spec, template, words)
        return Draft(
            clean=prompt(template.text, words, spec.positions, {}),
            corrupt=prompt(template.text, words, spec.positions, replaced),
            right=right or (),
            wrong=wrong or (),
            words=drawn,
        )

    return write


def _answer_texts(
    answer: Answer | None, words: Mapping[str, str], numbers: Mapping[str, Mapping[str, int]]
) -> tuple[str, ...] | None:
    """The answer's texts; None if the task has none; empty if no number is in the set."""
    if answer is None:
        return None
    if isinstance(answer, NumberAnswers):
        bound = int(words[answer.part])
        above = answer.greater_than is not None
        return tuple(text for text, number in numbers[answer.words].items() if (number > bound) == above)
    return tuple(fill(text, words) for text in ((answer,) if isinstance(answer, str) else answer))
