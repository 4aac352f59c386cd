"""`feature_notes`: what many features write and where they fire, from one reading of a corpus for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp.analysis.corpus_state import CorpusReader, Reached, reading_of
from mechinterp.analysis.describe import Example, words_of
from mechinterp.analysis.describe_subject import subject_of
from mechinterp.analysis.texts import Texts
from mechinterp.analysis.weights import top_tokens
from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.registry import unknown
from mechinterp.features.basis import Basis
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.modes import Gradients


@dataclass(frozen=True)
class FeatureNote:
    """What a feature writes and where it fires.

    Args:
        raises: The tokens whose logits its direction raises most, the strongest first.
        lowers: Those that it lowers most.
        examples: Its strongest examples in the corpus, one per text at most.
        fired: On how many tokens of the corpus it was not 0.
        tokens: How many tokens the corpus has; 0: none was given.
    """

    raises: tuple[str, ...] = ()
    lowers: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()
    fired: int = 0
    tokens: int = 0


def feature_notes(
    model: HookManager,
    bases: Sequence[Basis],
    features: Iterable[tuple[str, int]],
    *,
    texts: Texts | None = None,
    n_tokens: int = 6,
    n_examples: int = 4,
    skip: int = 0,
    batch_size: int = 32,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress = no_progress,
) -> Mapping[str, FeatureNote]:
    """What features write, and with a corpus where they fire, by names as in `m1.f17`.

    Args:
        model: The model.
        bases: The bases that they are of.
        features: The name of the basis and the number of each.
        texts: The corpus, read once for all features; None: no examples.
        n_tokens: Tokens that are raised and lowered.
        n_examples: Examples of each.
        skip: So many tokens at the beginning of every text are not looked at; give 1 for a model whose first token has
            a state that no other has, on which many features are strongest.
        batch_size: Texts per run.
        resume: A file for the state of the reading, as in `strongest_examples`.
        progress: Called with the texts that are read, and how many there are (for an iterator: those read so far).

    The same as `describe(by=("vocab", "examples"))` of each. A feature that does not write to the residual stream has
    no tokens. Cost: one unembedding per feature; with a corpus one forward per text. Memory: the activations of all
    features of the bases on a batch.
    """
    by_name, wanted = {basis.name: basis for basis in bases}, list(dict.fromkeys(features))
    for name, _ in wanted:
        if name not in by_name:
            raise unknown("feature basis", name, by_name)
    if n_tokens < 1 or n_examples < 1:
        raise InputError("`n_tokens` and `n_examples` are at least 1.")
    if skip < 0:
        raise InputError(f"`skip` is a number of tokens, at least 0; got {skip}.")
    with Gradients(False) as off, off:
        written = _written(model, by_name, wanted, min(n_tokens, model.layout.W_U.shape[1]))
        found = {key: _Strongest(n_examples) for key in wanted}
        n_read = 0
        if texts is not None:
            checkpoint = reading_of(resume, model, [(by_name[name], i) for name, i in wanted], n_examples, skip)
            reader = CorpusReader(model, texts, batch_size, progress, checkpoint)
            n_read = _read(model, by_name, wanted, found, reader, skip)
    return {
        f"{name}.f{i}": FeatureNote(
            *written[name, i], found[name, i].examples(model), found[name, i].fired, n_read
        )
        for name, i in wanted
    }  # fmt: skip


def _written(
    model: HookManager, bases: Mapping[str, Basis], wanted: Sequence[tuple[str, int]], n: int
) -> dict[tuple[str, int], tuple[tuple[str, ...], tuple[str, ...]]]:
    """The tokens that every feature raises and lowers."""
    directions = {key: subject_of(model, bases[key[0]], key[1]).direction for key in wanted}
    found: dict[tuple[str, int], tuple[tuple[str, ...], tuple[str, ...]]] = dict.fromkeys(wanted, ((), ()))
    known = {key: direction for key, direction in directions.items() if direction is not None}
    if known:
        rows = torch.stack(list(known.values()))
        table = top_tokens(model, torch.cat([rows, -rows]), n)
        words = [tuple(map(str, part["text"])) for _, part in table.groupby("row", sort=True)]
        found |= {key: (words[i], words[len(rows) + i]) for i, key in enumerate(known)}
    return found


class _Strongest:
    """The strongest examples of one feature so far."""

    def __init__(self, n: int) -> None:
        self.n, self.best, self.fired = n, list[Example](), 0

    def see(self, values: Sequence[float], positions: Sequence[int], ids: Sequence[list[int]], first: int) -> None:
        """The largest value in every text of a batch, and where it is."""
        floor = self.best[-1].value if len(self.best) == self.n else 0.0
        new = [
            Example(value, first + row, tuple(ids[row][: position + 6]), position)
            for row, (value, position) in enumerate(zip(values, positions, strict=True))
            if value > floor
        ]
        self.best = sorted([*self.best, *new], key=lambda one: -one.value)[: self.n]

    def examples(self, model: HookManager) -> tuple[Example, ...]:
        """The examples, with the text of their tokens."""
        return tuple(Example(one.value, one.text, one.ids, one.position, words_of(model, one.ids)) for one in self.best)


def _read(
    model: HookManager,
    bases: Mapping[str, Basis],
    wanted: Sequence[tuple[str, int]],
    found: Mapping[tuple[str, int], _Strongest],
    reader: CorpusReader,
    skip: int,
) -> int:
    """Reads the corpus into `found`; how many tokens it has."""
    used = {name: [i for one, i in wanted if one == name] for name, _ in wanted}
    n_read = n_tokens = 0
    before = reader.reached(len(wanted), found[wanted[0]].n) if wanted else None
    if before is not None:
        n_read, n_tokens = before.read, before.tokens
        for key, fired, kept in zip(wanted, before.fired, before.kept, strict=True):
            found[key].fired, found[key].best = fired, [Example(*one) for one in kept]
    for tokens, mask in reader.batches():
        run = model.run(tokens, mask, record=[bases[name] for name in used])
        ids = [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
        mask = mask & (torch.arange(mask.shape[1], device=mask.device) >= skip)
        for name, numbers in used.items():
            active: Tensor = run.values[bases[name]][..., numbers].float()
            largest = active.masked_fill(~mask[..., None], -torch.inf).max(1)
            fired = ((active != 0) & mask[..., None]).sum((0, 1)).tolist()
            values, positions = largest.values.T.tolist(), largest.indices.T.tolist()
            for k, i in enumerate(numbers):
                found[name, i].see(values[k], positions[k], ids, n_read)
                found[name, i].fired += fired[k]
        n_read, n_tokens = n_read + len(tokens), n_tokens + int(mask.sum())
        if reader.due:
            reader.save(_reached(n_read, n_tokens, [found[key] for key in wanted]))
    if not n_read:
        raise InputError("The corpus has no texts.")
    reader.clear()
    return n_tokens


def _reached(read: int, tokens: int, found: Sequence[_Strongest]) -> Reached:
    kept = [[(one.value, one.text, one.ids, one.position) for one in each.best] for each in found]
    return Reached(read, tokens, [each.fired for each in found], kept)
