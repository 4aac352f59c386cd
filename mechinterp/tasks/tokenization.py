"""Texts to token ids with character offsets, and one policy for the BOS token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mechinterp.base.errors import InputError
from mechinterp.tasks.template import Mark

# Answers and words are encoded after a line break: byte-level tokenizers do not merge it with a leading space, and
# tokenizers that put a space before every text put it before the break, not before the word.
_ANCHOR = "\n"


@dataclass(frozen=True)
class Encoded:
    """Token ids of one text (including a prepended BOS) and each token's characters [start, stop)."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    def token_at(self, mark: Mark) -> int | None:
        """The index of the token at a mark, or None if it is outside the text."""
        last = len(self.ids) - 1
        found = last if mark.character is None else self._covering(mark.character)
        if found is None or not 0 <= found + mark.offset <= last:
            return None
        return found + mark.offset

    def _covering(self, character: int) -> int | None:
        for index, (start, stop) in enumerate(self.spans):
            if start <= character < stop:
                return index
        return None


@dataclass(frozen=True)
class Encoder:
    """A fast tokenizer, and whether BOS is prepended to every prompt."""

    tokenizer: Any
    prepend_bos: bool

    @property
    def bos(self) -> int | None:
        """The id of the tokenizer's BOS token, whether it is used or not."""
        return self.tokenizer.bos_token_id

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """The token ids and spans of each text; no special token is added, except BOS if it is prepended."""
        if not texts:
            return []
        made = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        first: tuple[int, ...] = (self.bos,) if self.prepend_bos and self.bos is not None else ()
        blank = ((0, 0),) * len(first)
        return [
            Encoded(first + tuple(ids), blank + tuple((start, stop) for start, stop in spans))
            for ids, spans in zip(made["input_ids"], made["offset_mapping"], strict=True)
        ]

    def pieces(self, texts: Sequence[str]) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
        """For each text the tokens that it adds to a prompt: their ids, and their characters without spaces."""
        found: list[tuple[tuple[int, ...], tuple[str, ...]]] = []
        for text, encoded in zip(texts, self.encode([_ANCHOR + text for text in texts]), strict=True):
            own = [
                (token, (_ANCHOR + text)[start:stop].strip(" "))
                for token, (start, stop) in zip(encoded.ids, encoded.spans, strict=True)
                if stop > len(_ANCHOR)
            ]
            found.append((tuple(token for token, _ in own), tuple(piece for _, piece in own)))
        return found

    def unknown(self, ids: Sequence[int]) -> bool:
        """True when the tokenizer did not know some of the text."""
        # GPT-2 declares its BOS as the unknown token, too, but never uses it so.
        unk = self.tokenizer.unk_token_id
        return unk not in (None, self.bos) and unk in ids


def encoder_of(model_or_tokenizer: Any, prepend_bos: bool | None) -> Encoder:
    """The encoder of a tokenizer, or of a model that has one.

    `prepend_bos=None` does what the tokenizer does. Raises InputError without a tokenizer, for one without character
    offsets, and for `prepend_bos=True` if it has no BOS.
    """
    tokenizer: Any = getattr(model_or_tokenizer, "tokenizer", model_or_tokenizer)
    if tokenizer is None:
        raise InputError("The model has no tokenizer; give one to load_model, or build Pairs from token ids.")
    if not hasattr(tokenizer, "bos_token_id"):
        raise InputError(
            "A Hugging Face tokenizer, or a model that has one, is needed to make pairs from text; got "
            f"{type(model_or_tokenizer).__name__}."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} has no character offsets, which the named positions need; load "
            "the fast version of the tokenizer (PreTrainedTokenizerFast)."
        )
    return Encoder(tokenizer, prepends_bos(tokenizer, prepend_bos))


def prepends_bos(tokenizer: Any, wanted: bool | None) -> bool:
    """Whether prompts begin with the BOS token; None does what the tokenizer itself does.

    Raises InputError for True if the tokenizer has no BOS.
    """
    if wanted is None:
        own: list[int] = list(tokenizer("a")["input_ids"])
        return tokenizer.bos_token_id is not None and own[:1] == [tokenizer.bos_token_id]
    if wanted and tokenizer.bos_token_id is None:
        raise InputError("`prepend_bos` is True, but the tokenizer has no BOS token.")
    return wanted
