"""Local interpretation: the relevance of words and phrases of one text for a class or a next token.

Source: Hsu et al. 2024 (arXiv 2407.00886) for transformers, after Murdoch et al. 2018 (contextual decomposition of
LSTMs, ICLR 2018): a phrase is decomposed as one source, so its relevance includes what its words do together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.analysis.contextual import contextual_decomposition
from mechinterp.base.errors import InputError
from mechinterp.engines.decomposition.encoder import Encoder
from mechinterp.engines.decomposition.rules import Preset
from mechinterp.engines.logit_directions import DirectionLike
from mechinterp.models.hook_manager import HookManager

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
    """The target of the whole text; the tokens do not sum to it where a rule leaves out biases or is not additive."""
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
        """The relevance of a span minus the sum of its words'; NaN where one of its words was not decomposed alone."""
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

    Preset `authors-bert` is the published one for this use. Its rules are not additive: the relevance of a phrase is
    not the sum of its words', and the difference is the `interaction` in the table.

    Args:
        model: The model, or an encoder. A masked-language-model encoder is read at its mask token.
        prompt: A text, or token ids (then each token is a word). Special tokens that the tokenizer adds are words.
        target: A token, by its text or id, whose logit after the prompt is decomposed; for an encoder classifier a
            class, by its label or number; or another direction (see `contextual_decomposition`).
        against: A token or class whose logit is subtracted.
        max_words: The longest phrases.
        spans: Further spans of tokens, as (first, one after the last).
        preset: The rules, as in `contextual_decomposition`.

    Cost: one forward (with its check), and for every span the share of a forward from its first token on (a whole one
    in an encoder).

    Raises InputError for a text without a tokenizer, a target that is not a single token, and spans outside the text.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> text = "When Mary and John went to the store, John gave a drink to"
    >>> found = mi.phrase_relevance(model, text, " Mary", against=" John", max_words=2)
    >>> found.to_frame().columns.tolist()
    ['start', 'stop', 'text', 'relevance', 'interaction']
    """
    ids, words, pieces = read_prompt(model, prompt)
    if type(max_words) is not int or max_words < 1:
        raise InputError(f"`max_words` must be a whole number, at least 1; got {max_words!r}.")
    chosen = [(words[i][0], words[i + n][1]) for n in range(max_words) for i in range(len(words) - n)]
    chosen = list(dict.fromkeys([*chosen, *(_checked(span, len(ids)) for span in spans)]))
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
    about = {**found.about, "target": name, "prompt": "".join(pieces)}
    return PhraseRelevance(pieces, tuple(words), tuple(chosen), values[0, :, 0].cpu(), float(total[0]), name, about)


def _checked(span: object, length: int) -> Span:
    if not isinstance(span, (tuple, list)) or len(span) != 2 or not all(type(end) is int for end in span):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        raise InputError(f"A span is (first token, one after its last); got {span!r}.")
    start, stop = int(span[0]), int(span[1])  # pyright: ignore[reportUnknownArgumentType]
    if not 0 <= start < stop <= length:
        raise InputError(f"The span {start}:{stop} is not in the text, which has tokens 0 to {length - 1}.")
    return start, stop


def read_prompt(
    model: HookManager | Encoder, prompt: object
) -> tuple[Int[Tensor, " pos"], list[Span], tuple[str, ...]]:
    """The token ids, the words as spans of tokens, and the text of every token, a space before each word."""
    if isinstance(prompt, Tensor):
        ids = _checked_ids(prompt)
        return ids, [(i, i + 1) for i in range(len(ids))], _pieces(model, ids)
    if not isinstance(prompt, str):
        raise InputError(f"`prompt` must be a text or token ids as a tensor [pos]; got {type(prompt).__name__}.")
    tokenizer, encoding = _tokenizer(model), _encoded(model, prompt)
    ids = torch.tensor(encoding["input_ids"], dtype=torch.long)
    # Special tokens that the tokenizer adds have no characters.
    places = [
        place if place and place[1] > place[0] else None for place in map(encoding.token_to_chars, range(len(ids)))
    ]
    words: list[Span] = []
    pieces: list[str] = []
    for i, place in enumerate(places):
        before = places[i - 1] if i else None
        begins = place is None or before is None or _begins(encoding, prompt, before, place, i)
        words = [*words, (i, i + 1)] if begins else [*words[:-1], (words[-1][0], i + 1)]
        text = str(tokenizer.decode([int(ids[i])])) if place is None else prompt[place[0] : place[1]]
        pieces.append(f" {text.strip()}" if begins else text)
    return ids, words, tuple(pieces)


def prompt_ids(model: HookManager | Encoder, prompt: object) -> Int[Tensor, " pos"]:
    """The token ids of a text or of token ids `[pos]`. Raises InputError as `read_prompt` does."""
    if isinstance(prompt, Tensor):
        return _checked_ids(prompt)
    if not isinstance(prompt, str):
        raise InputError(f"`texts` must be texts or token ids as tensors [pos]; got {type(prompt).__name__}.")
    return torch.tensor(_encoded(model, prompt)["input_ids"], dtype=torch.long)


def _checked_ids(prompt: Tensor) -> Int[Tensor, " pos"]:
    if prompt.ndim != 1 or not len(prompt) or prompt.is_floating_point():
        raise InputError(f"`prompt` must be a text or token ids [pos]; got {prompt.dtype} {list(prompt.shape)}.")
    return prompt.long()


def _encoded(model: HookManager | Encoder, prompt: str) -> Any:
    """What the tokenizer makes of a text."""
    tokenizer = _tokenizer(model)
    if not tokenizer.is_fast:
        raise InputError("A text needs a fast tokenizer, which knows each token's characters; give token ids instead.")
    encoding = tokenizer(prompt)
    if not len(encoding["input_ids"]):
        raise InputError("The prompt is empty.")
    _check_known(tokenizer, prompt, encoding)
    return encoding


def _begins(encoding: Any, text: str, before: Any, place: Any, i: int) -> bool:
    """Whether a token begins a word: after a space, or where the tokenizer splits words (at punctuation)."""
    if text[before[0] : before[1]].isspace():
        return False  # the space is a token of its own, and begins the word
    spaced = text[place[0] : place[0] + 1].isspace() or text[place[0] - 1 : place[0]].isspace()
    return spaced or encoding.word_ids()[i] != encoding.word_ids()[i - 1]


def _check_known(tokenizer: Any, text: str, encoding: Any) -> None:
    """Return None when the vocabulary has every word. Raises InputError for a word that would become unknown."""
    unknown = tokenizer.unk_token_id
    if unknown in (None, tokenizer.bos_token_id):
        return  # some byte-level tokenizers use one token for all of these, and have no unknown words
    for i, token in enumerate(encoding["input_ids"]):
        place = encoding.token_to_chars(i)
        word = "" if place is None else text[place[0] : place[1]].strip()
        if token == unknown and word and word != tokenizer.unk_token:
            raise InputError(f"{word!r} is not in the vocabulary; the model would not see the word.")


def _tokenizer(model: HookManager | Encoder) -> Any:
    if model.tokenizer is None:
        raise InputError("The model has no tokenizer, so it cannot read a text; give token ids.")
    return model.tokenizer


def _pieces(model: HookManager | Encoder, ids: Int[Tensor, " pos"]) -> tuple[str, ...]:
    """The text of every token of a prompt of ids."""
    if model.tokenizer is None:
        return tuple(f" {int(i)}" for i in ids)
    return tuple(f" {str(model.tokenizer.decode([int(i)])).strip()}" for i in ids)


def _direction(
    model: HookManager | Encoder, target: str | DirectionLike, against: str | int | None
) -> tuple[DirectionLike, str]:
    """The direction of logits, and its name."""
    one = token_of(model, target) if isinstance(target, (str, int)) else target
    if against is None:
        return one, str(target).strip() if isinstance(target, (str, int)) else "a direction"
    if not isinstance(one, int) or not isinstance(against, (str, int)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError("`against` needs a target that is one token or class.")
    return (one, token_of(model, against)), f"{str(target).strip()} rather than {str(against).strip()}"


def token_of(model: HookManager | Encoder, target: str | int) -> int:
    """The id of a target: of one token, or of a class of a classifier."""
    if isinstance(target, int):
        return target
    if isinstance(model, Encoder) and model.classifies:
        labels: dict[str, int] = {str(k): int(v) for k, v in dict(model.module.config.label2id).items()}
        if target not in labels:
            raise InputError(f"Unknown class {target!r}; known: {', '.join(labels)}.")
        return labels[target]
    tokenizer = _tokenizer(model)
    encoding = tokenizer(target, add_special_tokens=False)
    if len(encoding["input_ids"]) != 1:
        raise InputError(
            f"{target!r} is {len(encoding['input_ids'])} tokens; a target must be one. "
            "Most tokenizers need the space before a word."
        )
    _check_known(tokenizer, target, encoding)
    return int(encoding["input_ids"][0])


def _mask_position(model: HookManager | Encoder, ids: Int[Tensor, " pos"]) -> int | None:
    if not isinstance(model, Encoder) or model.classifies:
        return None
    if model.tokenizer is None:
        raise InputError(
            "A masked-language-model encoder is read at its mask token, which is unknown without a tokenizer."
        )
    at = (ids == model.tokenizer.mask_token_id).nonzero().flatten()
    if len(at) != 1:
        raise InputError(f"The prompt must have one mask token; it has {len(at)}.")
    return int(at[0])
