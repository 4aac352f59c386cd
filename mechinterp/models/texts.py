"""Texts to token ids and back, for prompts that a user types: one rule for the BOS token, padding with a mask.

Prompts of a task come from `Task.pairs`, which uses the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.base.errors import InputError, clip
from mechinterp.tasks.tokenization import prepends_bos


@dataclass(frozen=True, eq=False)
class Prompts:
    """Texts as a model reads them.

    Args:
        texts: The texts as they were given.
        tokens: Their token ids, padded on the right with 0.
        mask: True at real tokens.
        bos: The BOS token that was put before each text; "" if none was.
        str_tokens: The tokens of each text as texts.
    """

    texts: tuple[str, ...]
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    bos: str
    str_tokens: tuple[tuple[str, ...], ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        lengths = sorted({len(own) for own in self.str_tokens})
        tokens = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        bos = f"BOS {self.bos!r} before each" if self.bos else "no BOS token before them"
        return f"{len(self)} text{'s' * (len(self) != 1)} of {tokens} tokens, {bos}"


def is_text(given: object) -> TypeGuard[str | Sequence[str]]:
    """Whether it is a text or a list of texts.

    >>> is_text("a b"), is_text(["a", "b"]), is_text([[1, 2]]), is_text([])
    (True, True, False, False)
    """
    if isinstance(given, str):
        return True
    several = cast("Sequence[object]", given) if isinstance(given, (list, tuple)) else ()
    return len(several) > 0 and all(isinstance(one, str) for one in several)


class ReadsTexts:
    """What a model with a tokenizer does with texts; `HookManager` is one."""

    tokenizer: Any
    device: Any

    def _prompts_of(self, given: Any, mask: Any, prepend_bos: bool | None) -> Prompts | None:
        """The prompts of a run of texts; None for token ids."""
        if not isinstance(given, Prompts) and not is_text(given):
            if prepend_bos is not None:
                raise InputError("`prepend_bos` is for texts; these are token ids.")
            return None
        if mask is not None or (isinstance(given, Prompts) and prepend_bos is not None):
            raise InputError("Prompts have their own mask and BOS token; leave out `mask` and `prepend_bos`.")
        return given if isinstance(given, Prompts) else self.prompts(given, prepend_bos)

    def prompts(self, texts: str | Sequence[str], prepend_bos: bool | None = None) -> Prompts:
        """The texts as the model reads them: token ids, mask, and what was put before them.

        Args:
            texts: A text or several. No special token is added to them but the BOS token.
            prepend_bos: Whether each begins with the BOS token; by default as the tokenizer does it (GPT-2's does not,
                while TransformerLens prepends it to every model).

        Raises InputError without a tokenizer, for a text without tokens, and for one that begins with the BOS token
        already if it is prepended.

        >>> import mechinterp as mi
        >>> mi.load_model("bundled").prompts(["When Mary and John", "When John"])
        2 texts of 3 to 5 tokens, BOS '<bos>' before each
        """
        several = (texts,) if isinstance(texts, str) else tuple(texts)
        if not is_text(list(several)):
            raise InputError(f"Give a text, or a list of texts; got {clip(repr(texts), 100)}.")
        tokenizer = self._need_tokenizer()
        with_bos = prepends_bos(tokenizer, prepend_bos)
        bos: int = tokenizer.bos_token_id
        own: list[list[int]] = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in several]
        for text, ids in zip(several, own, strict=True):
            if with_bos and ids[:1] == [bos]:
                raise InputError(
                    f"{clip(text, 60)!r} begins with the BOS token already, and it would be put before it again; give "
                    "prepend_bos=False."
                )
            if not ids and not with_bos:
                raise InputError(f"The text {text!r} has no tokens; give some text, or prepend_bos=True.")
        rows = [[bos, *ids] if with_bos else ids for ids in own]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        words = tuple(tuple(self._words(row)) for row in rows)
        before = str(tokenizer.bos_token) if with_bos else ""
        return Prompts(several, tokens.to(self.device), mask.to(self.device), before, words)

    def to_tokens(self, texts: str | Sequence[str], prepend_bos: bool | None = None) -> Int[Tensor, "batch pos"]:
        """The token ids of a text, or of several of one length (in tokens).

        Args:
            texts: A text or several.
            prepend_bos: Whether each begins with the BOS token; by default as the tokenizer does it.

        Raises InputError as `prompts` does, and for texts of different lengths, which need a mask.

        >>> import mechinterp as mi
        >>> model = mi.load_model("bundled")
        >>> model.to_string(model.to_tokens("When Mary and John went", prepend_bos=False)[0])
        'When Mary and John went'
        """
        made = self.prompts(texts, prepend_bos)
        if not bool(made.mask.all()):
            raise InputError(
                f"{made} do not form a rectangle. Give the texts to model.run or model.cache, which pad and mask them; "
                "or take both from model.prompts(texts): .tokens and .mask."
            )
        return made.tokens

    def to_string(self, tokens: Int[Tensor, "*axes"] | Sequence[Any] | int) -> str | list[str]:
        """The text of token ids; a list of texts for ids `[batch, pos]`.

        Raises InputError without a tokenizer, and for anything but token ids.
        """
        ids = _ids(tokens)
        if ids.ndim == 2:
            return [str(self.to_string(row)) for row in ids]
        return str(self._need_tokenizer().decode(ids.reshape(-1).tolist(), clean_up_tokenization_spaces=False))

    def to_str_tokens(
        self, given: str | Sequence[str] | Int[Tensor, "*axes"] | Sequence[Any], prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """Each token as a text: of one text or row of ids a list, of several a list of lists.

        Args:
            given: A text, a list of texts, or token ids `[pos]` or `[batch, pos]` (one row counts as `[pos]`).
            prepend_bos: For texts: whether each begins with the BOS token; by default as the tokenizer does it.

        Raises InputError as `prompts` does.

        >>> import mechinterp as mi
        >>> mi.load_model("bundled").to_str_tokens("When Mary and John went")
        ['<bos>', 'When', 'Mary', 'and', 'John', 'went']
        """
        if is_text(given):
            words = [list(own) for own in self.prompts(given, prepend_bos).str_tokens]
            return words[0] if isinstance(given, str) else words
        if prepend_bos is not None:
            raise InputError("`prepend_bos` is for texts; these are token ids.")
        ids = _ids(cast(Any, given))
        rows = [self._words(row) for row in (ids if ids.ndim == 2 else ids.reshape(1, -1)).tolist()]
        return rows[0] if len(rows) == 1 else rows

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token, such as `" Mary"`. Raises InputError for a text of more or fewer.

        >>> import mechinterp as mi
        >>> model = mi.load_model("bundled")
        >>> model.to_string(model.to_single_token(" Mary"))  # this tokenizer's tokens are words without spaces
        'Mary'
        """
        ids = list(self._need_tokenizer()(text, add_special_tokens=False)["input_ids"])
        if len(ids) != 1:
            raise InputError(f"{text!r} is {len(ids)} tokens ({self._words(ids)}), not one; mind the leading space.")
        return int(ids[0])

    def _words(self, ids: Sequence[int]) -> list[str]:
        tokenizer = self._need_tokenizer()
        return [str(tokenizer.decode([one], clean_up_tokenization_spaces=False)) for one in ids]

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError("The model has no tokenizer for texts; give load_model one, or give token ids.")
        return self.tokenizer


def _ids(tokens: Any) -> Tensor:
    """The ids as a tensor of at most two axes. Raises InputError for anything else."""
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"These are not token ids: {clip(str(error), 100)}.") from None
    if ids.ndim > 2 or ids.dtype == torch.bool or ids.is_floating_point():
        raise InputError(f"Token ids are whole numbers [pos] or [batch, pos]; got {ids.dtype} {list(ids.shape)}.")
    return ids
