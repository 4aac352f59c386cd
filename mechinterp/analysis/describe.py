"""`describe`: what a feature, neuron or head reads and writes, as tokens and examples; evidence, without a language
model.

- `vocab`: the tokens whose logits its direction raises and lowers most, through the final norm's weight.
- `change`: the mean change of every logit when it is amplified in the model, which also counts indirect effects.
- `examples`: where in a corpus it is strongest, with the token on which it fires.
- `input-gradient`: the tokens whose embedding at the firing token would raise it most, by the gradient there.

Sources: Gur-Arieh et al. 2025 (arXiv 2501.08319) for `vocab` and `change`. Deviation: their amplification is scaled to
a divergence of the output; here `strength` is given, by default the strongest activation in the texts.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.analysis.corpus_state import CorpusReader, Reached, reading_of
from mechinterp.analysis.describe_subject import Subject, subject_of
from mechinterp.analysis.texts import Texts, padded
from mechinterp.analysis.weights import embedded, top_tokens
from mechinterp.base.checkpoint import UNSAVED
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.registry import unknown
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.modes import Gradients
from mechinterp.models.sites import Site

EVIDENCE = ("vocab", "change", "examples", "input-gradient")
CHANGED = 16
"""Texts on which a subject is amplified."""


@dataclass(frozen=True, order=True)
class Example:
    """A token on which a subject fires.

    Args:
        value: The activation there.
        text: The number of the text.
        ids: The token ids of the text up to that token, and a few after it.
        position: The position of that token in `ids`.
        words: The text of every token.
    """

    value: float
    text: int
    ids: tuple[int, ...]
    position: int
    words: tuple[str, ...] = field(default=(), compare=False)

    def marked(self, before: int = 12) -> str:
        """The text around the token, which is between `>>` and `<<`."""
        first = max(0, self.position - before)
        words = [f" >>{w.strip()}<<" if i == self.position else w for i, w in enumerate(self.words)]
        return ("... " if first else "") + "".join(words[first:]).strip()


@dataclass(frozen=True)
class Examples:
    """The strongest examples of a subject in the texts that were read so far, one per text at most.

    Args:
        name: The subject.
        strongest: The examples, the strongest first.
        read: How many texts were read.
        fired: On how many of their tokens it was not 0.
        tokens: How many tokens were looked at.
        skip: How many tokens at the beginning of every text were not.
    """

    name: str
    strongest: tuple[Example, ...] = ()
    read: int = 0
    fired: int = 0
    tokens: int = 0
    skip: int = 0

    @property
    def only_first(self) -> bool:
        """Whether every example is the first token of its text, so that they say nothing of what else it fires on."""
        return len(self.strongest) > 1 and all(one.position == 0 for one in self.strongest)

    def to_frame(self) -> pd.DataFrame:
        """A row per example: value, token, example (the token marked)."""
        rows = [
            {"value": one.value, "token": one.words[one.position], "example": one.marked()} for one in self.strongest
        ]
        return pd.DataFrame(rows, columns=["value", "token", "example"])


@dataclass(frozen=True)
class Description:
    """The evidence about a subject.

    Args:
        name: Its name.
        vocab: Tokens and the logits that one unit of it adds: side (`top`, `bottom`), token, text, value; None: not
            asked.
        change: The same of the mean change of logits when it is amplified.
        examples: Its strongest examples.
        input_gradient: Tokens and what their embedding would add to the pre-activation at the firing token.
        strength: By how much it was amplified.
        words: What a language model said of this evidence, if one was asked.
    """

    name: str
    vocab: pd.DataFrame | None = None
    change: pd.DataFrame | None = None
    examples: Examples | None = None
    input_gradient: pd.DataFrame | None = None
    strength: float | None = None
    words: str = ""

    def __repr__(self) -> str:
        return f"Description of {self.evidence()}"

    def evidence(self) -> str:
        """All of it as text, a line each: what a language model may be asked to put into words."""
        lines = [self.name + (f": {self.words}" if self.words else "")]
        for about, table in (
            ("raises", _some(self.vocab, "top")),
            ("lowers", _some(self.vocab, "bottom")),
            ("amplified, raises", _some(self.change, "top")),
            ("amplified, lowers", _some(self.change, "bottom")),
            ("would fire on", _some(self.input_gradient, "top")),
        ):
            if table:
                lines.append(f"{about}: {', '.join(map(repr, table))}")
        if self.examples is not None:
            share = self.examples.fired / max(1, self.examples.tokens)
            lines.append(f"fires on {share:.2%} of {self.examples.tokens:,} tokens; strongest:")
            lines += [f"  {one.value:.3g}  {one.marked()}" for one in self.examples.strongest]
            if self.examples.only_first:
                lines.append("  all of these are the first token of their text; with skip=1 it is left out")
        return "\n".join(lines)

    def top_words(self, n: int = 5) -> str:
        """The first tokens that it raises, as a short label for a figure."""
        table = self.vocab if self.vocab is not None else self.change
        return ", ".join(text.strip() for text in _some(table, "top")[:n])


def _some(table: pd.DataFrame | None, side: str) -> list[str]:
    return [] if table is None else [str(text) for text in table.loc[table["side"] == side, "text"]]


def describe(
    model: HookManager,
    subject: FeatureBasis | str,
    feature: int | None = None,
    *,
    by: Sequence[str] = ("vocab",),
    texts: Texts | None = None,
    n: int = 10,
    strength: float | None = None,
    skip: int = 0,
    batch_size: int = 16,
    words: Callable[[str], str] | None = None,
) -> Description:
    """What a feature, neuron or head reads and writes.

    Args:
        model: The model.
        subject: A feature basis, or the name of a neuron (`m3.n17`) or head (`a9.h9`). A direction of your own is a
            basis: `mi.concept_basis("resid_pre.3", direction[None])`.
        feature: The number of the feature.
        by: Which evidence: `vocab`, `change`, `examples`, `input-gradient`.
        texts: The corpus, for all but `vocab`: texts or token ids, one after the other, of any number; pairs, or token
            ids `[text, pos]`. It is read once.
        n: Tokens per table, and examples.
        strength: How much is added to the activation at every token for `change` (heads: that share of their output).
            By default the strongest activation in the texts (heads: 1).
        skip: So many tokens at the beginning of every text are not looked at: as examples, for the strongest
            activation, in the mean write of a head. In most models the first token has a state that no other has, on
            which many features are strongest.
        batch_size: Texts per run.
        words: Called with the evidence as text; what it returns is kept in `words`. This is where a language model
            goes: none is ever called otherwise.

    Cost: `vocab` none; `examples` one forward per text; `change` two forwards of the first 16 texts; `input-gradient` a
    forward and a backward of each example.

    Of a feature that writes to several sites, `vocab` reads the sum of its directions. A head has no direction of its
    own: `vocab` is of its mean write over the texts, its activation is the length of its write.

    Raises InputError for unknown evidence and missing texts, UnsupportedError for evidence that the subject does not
    have, such as the vocabulary of a feature that does not write to the residual stream.

    >>> import mechinterp as mi
    >>> model, basis = mi.load_model("bundled"), mi.load_basis("bundled:m1")
    >>> mi.describe(model, basis, 100, n=3).vocab["side"].tolist()
    ['top', 'top', 'top', 'bottom', 'bottom', 'bottom']
    """
    for name in by:
        if name not in EVIDENCE:
            raise unknown("evidence", name, EVIDENCE)
    if isinstance(by, str) or not by:
        raise InputError(f"`by` is a list of evidence: {', '.join(EVIDENCE)}.")
    if n < 1:
        raise InputError(f"`n` must be at least 1; got {n}.")
    _check_skip(skip)
    found = subject_of(model, subject, feature)
    needs_texts = [name for name in by if name != "vocab"] + ["vocab"] * (found.direction is None and "vocab" in by)
    if needs_texts and texts is None:
        raise InputError(f"{' and '.join(map(repr, needs_texts))} of {found.name} need a corpus: give `texts`.")
    made = Description(found.name)
    examples, first, mean = None, [], None
    if texts is not None and needs_texts:
        with Gradients(False) as off, off:
            reader = CorpusReader(model, texts, batch_size, no_progress, UNSAVED)
            examples, first, mean = _read(model, found, reader, n, Examples(found.name, skip=skip))
    if "vocab" in by:
        made = replace(made, vocab=_vocab(model, found, mean, n))
    if "examples" in by:
        made = replace(made, examples=examples)
    if "change" in by:
        assert examples is not None
        if strength is None:
            most = examples.strongest[0].value if examples.strongest else 0.0
            strength = 1.0 if found.write is not None else most
            if not strength:
                raise InputError(f"{found.name} does not fire in the texts; give `strength`.")
        with Gradients(False) as off, off:
            made = replace(made, change=_change(model, found, first, strength, n), strength=strength)
    if "input-gradient" in by:
        assert examples is not None
        made = replace(made, input_gradient=_input_gradient(model, found, examples, n))
    return made if words is None else replace(made, words=str(words(made.evidence())))


def strongest_examples(
    model: HookManager,
    subject: FeatureBasis | str,
    feature: int | None = None,
    *,
    texts: Texts,
    n: int = 10,
    skip: int = 0,
    batch_size: int = 16,
    so_far: Examples | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress = no_progress,
) -> Examples:
    """Where in a corpus a feature, neuron or head is strongest, one token per text at most.

    Args:
        model: The model.
        subject: As in `describe`.
        feature: The number of the feature.
        texts: The corpus; it may be an iterator over any number of texts.
        n: Examples to keep; nothing else is kept in memory.
        skip: So many tokens at the beginning of every text are not looked at.
        batch_size: Texts per run.
        so_far: The examples of an earlier call on the same corpus, which was not finished: as many texts as it has read
            are skipped.
        resume: A file for the state of the reading, written every half minute and deleted at the end. A killed call
            goes on from it: the texts that were read are tokenised again, and must be the same ones.
        progress: Called with the texts that are read, and how many there are (for an iterator: those read so far).

    Cost: one forward per text, up to the layer that is read.

    Raises InputError for a state that is damaged, of another model, feature or `n`, or of another corpus.
    """
    if so_far is not None and resume is not None:
        raise InputError("Give `so_far` or `resume`, not both.")
    if n < 1:
        raise InputError(f"`n` must be at least 1; got {n}.")
    _check_skip(skip)
    found = subject_of(model, subject, feature)
    if so_far is not None and so_far.skip != skip:
        raise InputError(f"`so_far` was made with skip={so_far.skip}; give the same.")
    if so_far is not None and so_far.name != found.name:
        raise InputError(f"`so_far` has examples of {so_far.name}, not of {found.name}.")
    reader = CorpusReader(model, texts, batch_size, progress, reading_of(resume, model, [(subject, feature)], n, skip))
    before = reader.reached(1, n)
    if before is not None:
        kept = tuple(Example(*one) for one in before.kept[0])
        examples = Examples(found.name, kept, before.read, before.fired[0], before.tokens, skip)
        known = 0
    else:
        examples = so_far or Examples(found.name, skip=skip)
        known = examples.read
    with Gradients(False) as off, off:
        return _read(model, found, reader, n, examples, known)[0]


def _check_skip(skip: int) -> None:
    if skip < 0:
        raise InputError(f"`skip` is a number of tokens, at least 0; got {skip}.")


def _read(
    model: HookManager, subject: Subject, reader: CorpusReader, n: int, so_far: Examples, known: int = 0
) -> tuple[Examples, list[Tensor], Float[Tensor, " d_model"] | None]:
    """(the strongest examples, the first texts, the mean write of a head)."""
    best = [(one.value, -one.text, one) for one in so_far.strongest]  # of equal ones the first of the corpus stay
    heapq.heapify(best)
    read, fired, n_tokens = so_far.read, so_far.fired, so_far.tokens
    first: list[Tensor] = []
    total: Tensor | None = None
    for tokens, mask in reader.batches(known):
        counted = mask & (torch.arange(mask.shape[1], device=mask.device) >= so_far.skip)
        value = model.run(tokens, mask, record=[subject.site]).values[subject.site]
        activation = subject.activation(value).float().masked_fill(~counted, -torch.inf)
        if (writes := subject.write) is not None:
            write = writes(value)[counted].double().sum(0)
            total = write if total is None else total + write
        strongest = activation.max(1)
        for row, (most, position) in enumerate(zip(*(part.tolist() for part in strongest), strict=True)):
            ids = tokens[row, : int(mask[row].sum())].tolist()
            if most > 0:
                one = Example(most, read + row, tuple(ids[: position + 6]), position)
                heapq.heappush(best, (most, -one.text, one))
                if len(best) > n:
                    heapq.heappop(best)
            if len(first) < CHANGED:
                first.append(tokens[row, : len(ids)])
        read, n_tokens = read + len(tokens), n_tokens + int(counted.sum())
        fired += int(((activation != 0) & counted).sum())
        if reader.due:
            now = [(one.value, one.text, one.ids, one.position) for _, _, one in sorted(best, reverse=True)]
            reader.save(Reached(read, n_tokens, [fired], [now]))
    if not read:
        raise InputError("The corpus has no texts.")
    reader.clear()
    kept = [one for _, _, one in sorted(best, reverse=True)]
    named = [replace(one, words=words_of(model, one.ids)) for one in kept]
    return (
        Examples(subject.name, tuple(named), read, fired, n_tokens, so_far.skip),
        first,
        None if total is None else total / max(1, n_tokens),
    )


def _vocab(model: HookManager, subject: Subject, mean: Tensor | None, n: int) -> pd.DataFrame:
    direction = mean if subject.direction is None else subject.direction
    if direction is None:
        raise UnsupportedError(f"{subject.name} does not write to the residual stream, so it has no tokens of its own.")
    wide = torch.promote_types(model.dtype, torch.float32)
    table = top_tokens(model, torch.stack([direction, -direction]).to(wide), min(n, model.layout.W_U.shape[1]))
    table["value"] = table["value"].where(table["row"] == 0, -table["value"])
    table.insert(0, "side", table.pop("row").map({0: "top", 1: "bottom"}))
    return table


def _change(model: HookManager, subject: Subject, texts: list[Tensor], strength: float, n: int) -> pd.DataFrame:
    total: Tensor | None = None
    count = 0
    for text in texts:
        tokens, mask = padded([text], model.device)
        plain = model.run(tokens, mask).logits
        more = model.run(tokens, mask, interventions=[subject.amplified(strength)]).logits
        assert plain is not None and more is not None
        moved = (more.double() - plain.double()).sum((0, 1))
        total, count = moved if total is None else total + moved, count + len(text)
    assert total is not None
    return _table(model, total / count, n)


def _input_gradient(model: HookManager, subject: Subject, examples: Examples, n: int) -> pd.DataFrame:
    """The mean over the examples of the gradient at the firing token, times every embedding."""
    if subject.read_site is None:
        raise UnsupportedError(f"{subject.name} has no pre-activation that is read at one site, so no input gradient.")
    if not examples.strongest:
        raise InputError(f"{subject.name} does not fire in the texts, so there is no gradient to take.")
    site = Site("embed") if model.has(Site("pos_embed")) else Site("resid_pre", 0)
    total: Tensor | None = None
    for one in examples.strongest:
        tokens = torch.tensor(one.ids[: one.position + 1], device=model.device)[None]
        with Gradients(True) as on, on:
            if subject.read_site == site:
                gradient = torch.func.grad(lambda v: subject.pre(v).sum())(
                    torch.zeros(model.dims.d_model, dtype=model.dtype, device=model.device)
                )
            else:
                run = model.run(
                    tokens, grads=[site], loss=lambda value: subject.pre(value)[:, -1], stop=subject.read_site
                )
                gradient = run.grads[site][0, -1]
        gradient = gradient.detach().double()
        total = gradient if total is None else total + gradient
    assert total is not None
    return _table(model, embedded(model).double() @ (total / len(examples.strongest)), n)


def _table(model: HookManager, values: Float[Tensor, " token"], n: int) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for side, largest in (("top", True), ("bottom", False)):
        best = values.topk(min(n, len(values)), largest=largest)
        for rank, (token, value) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
            text = words_of(model, (token,))[0]
            rows.append({"side": side, "rank": rank, "token": token, "text": text, "value": value})
    return pd.DataFrame(rows)


def words_of(model: HookManager, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of every token; one after the other they read as a text, with spaces between words."""
    if model.tokenizer is None:
        return tuple(f" {i}" for i in ids)
    texts = [str(model.tokenizer.decode([i])) for i in ids]
    spaced = any(text.startswith(" ") for text in texts)
    return tuple(text if spaced else f" {text}" for text in texts)
