"""`Task`: a checked task file with its word lists, which makes pairs for any tokenizer. Does not import torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from mechinterp.base.errors import FormatError, InputError, wrong_file
from mechinterp.base.plain_files import read_bounded
from mechinterp.base.registry import unknown
from mechinterp.base.shown import Shown
from mechinterp.tasks.capacity import TooManyExamples, most_if_fewer
from mechinterp.tasks.check import check_task, lists_used
from mechinterp.tasks.schema import MAX_BYTES, parse_yaml, wholly_checked
from mechinterp.tasks.spec import TaskSpec
from mechinterp.tasks.vocabulary import UnusableWords, needs_of, usable_words

if TYPE_CHECKING:
    from mechinterp.tasks.pairs import Pairs
    from mechinterp.tasks.split import Split

_FOLDER = Path(__file__).parent
_WORDS = _FOLDER / "words.yaml"


@dataclass(frozen=True, repr=False)
class Task(Shown):
    """A task: a kind of question to a model, from which `pairs` draws any number of examples.

    Made by `load_task`.

    Args:
        spec: The content of the task file.
        lists: The word lists that the task draws from, by name.
    """

    spec: TaskSpec
    lists: Mapping[str, tuple[str, ...]]
    """The word lists that the task draws from, by name."""

    def _facts(self) -> list[tuple[str, object]]:
        positions = ", ".join(self.positions) or "none"
        return [
            ("", f"{self.name}: {self.title}"),
            ("metric", self.metric),
            ("positions", positions),
            ("source", self.source),
        ]

    @property
    def name(self) -> str:
        """The task's name, as `load_task` takes it for the tasks of the package."""
        return self.spec.name

    @property
    def version(self) -> int:
        """The version of the task's content; `digest` changes with any change of it."""
        return self.spec.version

    @property
    def title(self) -> str:
        """A one-line description."""
        return self.spec.title

    @property
    def source(self) -> str:
        """The paper that the task comes from."""
        return self.spec.source

    @property
    def metric(self) -> str:
        """The name of the metric that suits the task; any other may be used."""
        return self.spec.metric

    @property
    def positions(self) -> tuple[str, ...]:
        """The names of the positions that every pair of the task has."""
        return self.spec.positions

    @property
    def needs(self) -> str:
        """What the task needs of a tokenizer, in words.

        >>> load_task("greater_than_digits").needs
        'words of one token (digits, nouns) and words split into tokens of 1 + 1 + 1 + 1 characters (years_by_digit)'
        """
        return needs_of(self.spec)

    def digest(self) -> str:
        """SHA-256 (hex) of everything that determines the pairs: the task and the lists it draws from.

        Comments, line breaks and the order of keys in the file do not matter, nor do values equal to their
        defaults, so that the schema can grow.
        """
        content = {
            "task": self.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True),
            "lists": {name: list(words) for name, words in self.lists.items()},
        }
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(b"mechinterp.task.1\n" + canonical.encode("ascii")).hexdigest()

    def pairs(
        self,
        model: Any,
        n: int,
        split: str = "train",
        seed: int = 0,
        *,
        prepend_bos: bool | None = None,
        skip: int = 0,
    ) -> Pairs:
        """`n` clean and corrupt examples for a model's tokenizer, on the CPU.

        The same task, tokenizer, split and seed give the same examples on every machine; a smaller `n` gives the
        first of them. Templates and word orders alternate, so that all are equally frequent. No example of `train`
        shares its template or its pair of words with one of `test`. `Pairs.report` lists the words that the tokenizer
        could not use; their number is logged, once for each tokenizer.

        Args:
            model: A model with a tokenizer, or a Hugging Face tokenizer.
            n: The number of examples, at least 2.
            split: `train` or `test`.
            seed: The seed of the random choices.
            prepend_bos: Whether prompts begin with the BOS token; by default as the tokenizer does it.
            skip: How many examples to leave out before the first: with `skip=n`, none of the first `n` comes again.

        Raises InputError when the tokenizer has no character offsets, or too few words or examples are left.

        >>> import mechinterp as mi
        >>> len(mi.load_task("ioi").pairs(mi.load_model("bundled"), n=4))
        4
        """
        from mechinterp.tasks.make import Request, make_pairs

        wanted = Request(self.spec, self.lists, self.digest(), split, n, seed, skip)
        try:
            return make_pairs(wanted, model, prepend_bos)
        except UnusableWords as error:
            siblings = [name for name in task_names() if name.startswith(f"{self.name}_") and can_use(name, model)]
            if not siblings:
                raise
            raise UnusableWords(f"{error} This tokenizer can use the task {siblings[0]!r}.") from error

    def check_number(self, n: int, split: Split) -> None:
        """Return None if a split may have `n` different examples. Raises InputError if it has fewer at any rate.

        It takes no tokenizer, which may leave fewer words; `pairs` counts those.
        """
        chosen = self.spec.splits.train if split == "train" else self.spec.splits.test
        most = most_if_fewer(self.spec, chosen.templates, split, lambda _, name: self.lists[name], n)
        if most is not None:
            raise TooManyExamples(self.name, split, n, most)

    def row_templates(self, split: str, seed: int, n: int) -> tuple[str, ...]:
        """The template of each of the first `n` examples that `pairs` makes with this split and seed."""
        from mechinterp.tasks.make import row_templates

        return row_templates(self.spec, split, seed, n)


def task_names() -> tuple[str, ...]:
    """The names of the tasks in the package, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml") if path != _WORDS))


def can_use(name: str, model: Any) -> bool:
    """Whether a model's tokenizer has enough words for a task of the package."""
    from mechinterp.tasks.tokenization import encoder_of

    task = load_task(name)
    try:
        usable_words(task.spec, task.lists, encoder_of(model, False))
    except UnusableWords:
        return False
    return True


def load_task(name_or_path: str | Path) -> Task:
    """A task of the package, or of a YAML file.

    Args:
        name_or_path: A name from `task_names()`, or a path; a text that ends in `.yaml` or `.yml` is a path.

    Raises InputError for an unknown name, FormatError, with all that is wrong, for a file that is not a task.

    >>> load_task("ioi").metric
    'logit_diff'
    """
    given = str(name_or_path)
    if isinstance(name_or_path, Path) or given.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
    elif given in task_names():
        path = _FOLDER / f"{given}.yaml"
    else:
        raise unknown("task", given, task_names())
    spec = wholly_checked(TaskSpec, parse_yaml(read_bounded(path, MAX_BYTES), str(path)), str(path))
    lists = _lists_for(spec, str(path))
    check_task(spec, lists, str(path))
    return Task(spec, MappingProxyType(lists))


def _lists_for(spec: TaskSpec, where: str) -> dict[str, tuple[str, ...]]:
    try:
        used = lists_used(spec)
    except InputError as error:
        raise FormatError(f"{where}: {error}") from error
    known = {**_word_lists(read_bounded(_WORDS, MAX_BYTES)), **spec.lists}
    if missing := [str(unknown("word list", name, known)) for name in used if name not in known]:
        raise wrong_file(where, missing)
    return {name: known[name] for name in used}


@lru_cache(maxsize=1)
def _word_lists(content: bytes) -> Mapping[str, tuple[str, ...]]:
    """The lists of words.yaml, cached by content: parsing is slow, and an edited file must not give old words."""
    lists: dict[str, tuple[str, ...]] = {}
    for name, words in parse_yaml(content, str(_WORDS)).items():
        if not isinstance(words, list):
            raise FormatError(f"{_WORDS}: {name} must be a list of words.")
        lists[name] = tuple(str(word) for word in cast(list[object], words))
    return MappingProxyType(lists)
