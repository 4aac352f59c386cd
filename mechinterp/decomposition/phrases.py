"""Local interpretation: the relevance of words and phrases of one text for a class or a next token.

Source: Hsu et al. 2024 (arXiv 2407.00886) for transformers, after Murdoch et al. 2018 (contextual decomposition of
LSTMs, ICLR 2018): a phrase is decomposed as one source, so its relevance has what its words do together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.analysis.directions import DirectionLike
from mechinterp.decomposition.contextual import contextual_decomposition
from mechinterp.decomposition.encoder import Encoder
from mechinterp.decomposition.rules import Preset
from mechinterp.errors import InputError
from mechinterp.hooks import HookManager

Span = tuple[int, int]
"""Tokens from the first number up to, not including, the second."""


@dataclass(frozen=True, eq=False)
class PhraseRelevance:
    """The relevance of spans of one text, in logits: positive = the span raises the target."""

    pieces: tuple[str, ...]
    """The text of every token."""
    words: tuple[Span, ...]
    spans: tuple[Span, ...]
    values: Float[Tensor, " span"]
    total: float
    """The target of the whole text; all tokens together do not sum to it where a rule leaves biases or is no sum."""
    target: str
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def text(self, span: Span) -> str:
        """The text of a span."""
        return "".join(self.pieces[span[0] : span[1]]).strip()

    def value(self, start: int, stop: int) -> float:
        """The relevance of one span. Raises InputError when it was not decomposed."""
        if (start, stop) not in self.spans:
            raise InputError(f"The span {start}:{stop} was not decomposed; give it in `spans`.")
        return float(self.values[self.spans.index((start, stop))])

    def interaction(self, span: Span) -> float:
        """What a span has beyond the sum of its words; NaN where a word of it was not decomposed by itself."""
        inside = [word for word in self.words if span[0] <= word[0] and word[1] <= span[1]]
        covered = sum(stop - start for start, stop in inside) == span[1] - span[0]
        if not covered or not all(word in self.spans for word in inside):
            return float("nan")
        return self.value(*span) - sum(self.value(*word) for word in inside)

    def to_frame(self) -> pd.DataFrame:
        """A tidy table in the order of the text: start, stop, text, relevance, interaction."""
        rows = [
            (start, stop, self.text((start, stop)), float(value), self.interaction((start, stop)))
            for (start, stop), value in zip(self.spans, self.values, strict=True)
        ]
        return pd.DataFrame(rows, columns=["start", "stop", "text", "relevance", "interaction"])


def phrase_relevance(
    model: HookManager | Encoder,
    prompt: str | Int[Tensor, " pos"],
    target: str | DirectionLike,
    *,
    against: str | int | None = None,
    max_words: int = 1,
    spans: Sequence[Span] = (),
    preset: str | Preset = "authors-bert",
) -> PhraseRelevance:
    """The relevance of every word, of every phrase of up to `max_words` words, and of `spans`, for a target.

    `prompt` is a text, or token ids (then each token is a word). `target` is a token, by its text or id, whose logit
    after the prompt is decomposed (less that of `against`, if given); for an encoder classifier a class, by its label
    or number; or another direction (see `contextual_decomposition`). A masked-language-model encoder is read at its
    mask token. Special tokens that the tokenizer adds count as words.

    Preset `authors-bert` is the published one for this use. Its rules are no sum: the relevance of a phrase is not
    that of its words together, and the difference is the `interaction` in the table.

    Cost: two forwards, and for every span the share of a forward from its first token on (all of one in an encoder).
    Raises InputError for a text without a tokenizer, a target that is no single token, and spans outside the text.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> text = "When Mary and John went to the store, John gave a drink to"
    >>> found = mi.phrase_relevance(model, text, " Mary", against=" John", max_words=2)
    >>> found.to_frame().columns.tolist()
    ['start', 'stop', 'text', 'relevance', 'interaction']
    """
    ids, words = _words(model, prompt)
    if max_words < 1:
        raise InputError(f"max_words must be at least 1; got {max_words}.")
    chosen = [(words[i][0], words[i + n][1]) for n in range(max_words) for i in range(len(words) - n)]
    for start, stop in spans:
        if not 0 <= start < stop <= len(ids):
            raise InputError(f"The span {start}:{stop} is not in the text, which has tokens 0 to {len(ids) - 1}.")
    chosen = list(dict.fromkeys([*chosen, *((int(start), int(stop)) for start, stop in spans)]))
    direction, name = _direction(model, target, against)
    found = contextual_decomposition(
        model,
        ids[None],
        ["input"],
        positions=[tuple(range(*span)) for span in chosen],
        targets=direction,
        preset=preset,
        position=_mask_position(model, ids),
    )
    (values,) = found.relevant.values()
    (total,) = found.total.values()
    pieces = _pieces(model, ids)
    about = {**found.about, "target": name, "prompt": "".join(pieces)}
    return PhraseRelevance(pieces, tuple(words), tuple(chosen), values[0, :, 0].cpu(), float(total[0]), name, about)


def _words(model: HookManager | Encoder, prompt: str | Tensor) -> tuple[Int[Tensor, " pos"], list[Span]]:
    """The token ids and the words as spans of tokens."""
    if isinstance(prompt, Tensor):
        if prompt.ndim != 1 or not len(prompt) or prompt.is_floating_point():
            raise InputError(f"A prompt is a text, or token ids [pos]; got {prompt.dtype} {list(prompt.shape)}.")
        return prompt.long(), [(i, i + 1) for i in range(len(prompt))]
    tokenizer = _tokenizer(model)
    encoding = tokenizer(prompt)
    ids = torch.tensor(encoding["input_ids"], dtype=torch.long)
    if not len(ids):
        raise InputError("The prompt is empty.")
    _check_known(tokenizer, prompt, encoding)
    words: list[Span] = []
    previous: int | None = None
    for i, word in enumerate(encoding.word_ids()):
        if words and word is not None and word == previous:
            words[-1] = (words[-1][0], i + 1)
        else:
            words.append((i, i + 1))
        previous = word
    return ids, words


def _check_known(tokenizer: Any, text: str, encoding: Any) -> None:
    """Return None when the vocabulary has every word. Raises InputError for one that would be read as unknown."""
    unknown = tokenizer.unk_token_id
    for i, token in enumerate(encoding["input_ids"]):
        if token == unknown and tokenizer.unk_token not in text:
            start, stop = encoding.token_to_chars(i)
            raise InputError(
                f"{text[start:stop].strip()!r} is not in the vocabulary; the model would not see the word."
            )


def _tokenizer(model: HookManager | Encoder) -> Any:
    if model.tokenizer is None:
        raise InputError("The model has no tokenizer, so no texts; give token ids.")
    return model.tokenizer


def _pieces(model: HookManager | Encoder, ids: Int[Tensor, " pos"]) -> tuple[str, ...]:
    """The text of every token; a word piece that begins a word has a space before it."""
    if model.tokenizer is None:
        return tuple(f" {int(i)}" for i in ids)
    tokenizer = model.tokenizer
    pieces = [str(tokenizer.decode([int(i)])) for i in ids]
    if any(piece.startswith(" ") for piece in pieces):  # byte-level tokenizers keep their spaces
        return tuple(pieces)
    return tuple(piece[2:] if piece.startswith("##") else f" {piece}" for piece in pieces)


def _direction(
    model: HookManager | Encoder, target: str | DirectionLike, against: str | int | None
) -> tuple[DirectionLike, str]:
    """The direction of logits, and its name."""
    one = _logit(model, target) if isinstance(target, (str, int)) else target
    if against is None:
        return one, str(target).strip() if isinstance(target, (str, int)) else "a direction"
    if not isinstance(one, int):
        raise InputError("`against` goes with a target that is one token or class.")
    return (one, _logit(model, against)), f"{str(target).strip()} rather than {str(against).strip()}"


def _logit(model: HookManager | Encoder, target: str | int) -> int:
    if isinstance(target, int):
        return target
    if isinstance(model, Encoder) and model.classifies:
        labels: dict[str, int] = {str(k): int(v) for k, v in dict(model.module.config.label2id).items()}
        if target not in labels:
            raise InputError(f"There is no class {target!r}; known: {', '.join(labels)}.")
        return labels[target]
    tokenizer = _tokenizer(model)
    encoding = tokenizer(target, add_special_tokens=False)
    if len(encoding["input_ids"]) != 1:
        raise InputError(
            f"{target!r} is {len(encoding['input_ids'])} tokens; a target is one. Mind the space before a word."
        )
    _check_known(tokenizer, target, encoding)
    return int(encoding["input_ids"][0])


def _mask_position(model: HookManager | Encoder, ids: Int[Tensor, " pos"]) -> int | None:
    if not isinstance(model, Encoder) or model.classifies or model.tokenizer is None:
        return None
    at = (ids == model.tokenizer.mask_token_id).nonzero().flatten()
    if len(at) != 1:
        raise InputError(f"A masked prompt has one mask token; this one has {len(at)}.")
    return int(at[0])
