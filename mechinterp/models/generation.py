"""Text from a model under edits, token by token, with the key/value cache or without (`HookManager.generate`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.models.interventions import BoundEdit, EditAt, Intervention
from mechinterp.models.past import Past
from mechinterp.models.texts import Prompts, is_text

if TYPE_CHECKING:
    from mechinterp.models.hook_manager import HookManager

NO_TOKEN = -1


@dataclass(frozen=True, eq=False)
class Generated:
    """What a model has generated.

    Args:
        tokens: The new tokens of every prompt, -1 after its end.
        text: The same as text, if the model has a tokenizer.
        cache: Whether keys and values were kept.
    """

    tokens: Int[Tensor, "batch new"]
    text: tuple[str, ...] | None
    cache: bool


@dataclass(frozen=True)
class Request:
    """The settings of `HookManager.generate`."""

    n: int
    temperature: float
    top_k: int | None
    seed: int
    stop: Sequence[int] | None
    cache: bool | None
    on_token: Callable[[int, int], None] | None


class Generates:
    """What a model of text does with prompts; `HookManager` is one."""

    def generate(
        self,
        prompts: Int[Tensor, "batch pos"] | Sequence[Sequence[int]] | Sequence[str] | str | Prompts,
        n: int = 20,
        *,
        mask: Bool[Tensor, "batch pos"] | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        stop: Sequence[int] | None = None,
        interventions: Iterable[Intervention] = (),
        cache: bool | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Generated:
        """Up to `n` new tokens for every prompt, under the edits of `intervene` blocks and of `interventions`.

        Edits act while the prompt is read and on every generated token; edits at `positions` of prompts act on those
        only. With the key/value cache each new token is a run of one token. That is the same as running the whole
        text again if an edit treats every token by itself, which is known of the edits of this package and tested for
        your own; `cache=False` runs the whole text for every token, for edits that look at several tokens.

        Args:
            prompts: Token ids, or texts (with a tokenizer, read as `prompts` reads them).
            n: How many tokens at most.
            mask: True at the real tokens of right-padded token ids.
            temperature: 0: the most probable token; otherwise the logits are divided by it and a token is drawn.
            top_k: Draw among the k most probable tokens only.
            seed: Of the draws. They are the same for a prompt whatever else is in the batch before or after it.
            stop: Token ids after which a prompt ends; by default the tokenizer's end of text, if any.
            interventions: Edits of these runs, besides those of the blocks.
            cache: Whether to keep keys and values; by default, if the model can (and, under an edit of your own, if no
                prompt has only one token, on which it cannot be tested).
            on_token: Called with (row, token id) as soon as there is a token: streaming.

        Cost: one run of the prompts, and one run of one token per new token (without cache: of all tokens).

        Raises InputError for prompts and `n` beyond the context, an edit that cannot be continued from the cache, and
        texts without a tokenizer.

        >>> import mechinterp as mi
        >>> model = mi.load_model("bundled")
        >>> model.generate([[5, 6, 7]], 4).tokens.shape
        torch.Size([1, 4])
        """
        asked = Request(n, temperature, top_k, seed, stop, cache, on_token)
        model: HookManager = self  # pyright: ignore[reportAssignmentType]
        return generated(model, prompts, mask, model.edits_around(interventions), asked)


def generated(
    model: HookManager,
    prompts: Any,
    mask: Bool[Tensor, "batch pos"] | None,
    edits: Sequence[BoundEdit],
    asked: Request,
) -> Generated:
    """The tokens of all prompts; those of one length are run together, so that no prompt is padded."""
    rows = _rows(model, prompts, mask)
    _check(model, rows, asked)
    cache = model.keeps_past and model.dims.causal if asked.cache is None else asked.cache
    if cache and not (model.keeps_past and model.dims.causal):
        raise UnsupportedError(f"{model.info.name} does not keep keys and values; give cache=False.")
    if cache and min(map(len, rows)) == 1 and (untested := _untested(edits)):
        if asked.cache:
            raise InputError(
                f"The edit at '{untested[0].site}' cannot be tested on a prompt of one token: whether it treats every "
                "token by itself does not show there; give cache=False, or an edit of this package."
            )
        cache = False
    found = torch.full((len(rows), asked.n), NO_TOKEN)
    for length in sorted({len(row) for row in rows}):
        same = torch.tensor([i for i, row in enumerate(rows) if len(row) == length])
        tokens = torch.tensor([rows[i] for i in same.tolist()], device=model.device)
        found[same] = _group(model, tokens, same, edits, asked, cache)
    text = None
    if model.tokenizer is not None:
        text = tuple(model.tokenizer.decode([token for token in row if token >= 0]) for row in found.tolist())
    return Generated(found, text, cache)


def _rows(model: HookManager, prompts: Any, mask: Tensor | None) -> list[list[int]]:
    if is_text(prompts):
        prompts = model.prompts(prompts)
    if isinstance(prompts, Prompts):
        if mask is not None:
            raise InputError("Prompts have their own mask; leave out `mask`.")
        prompts, mask = prompts.tokens, prompts.mask
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2 or prompts.is_floating_point():
            raise InputError(f"Prompts are token ids [batch, pos]; got {prompts.dtype} {list(prompts.shape)}.")
        lengths = [prompts.shape[1]] * len(prompts) if mask is None else mask.sum(1).tolist()
        if mask is not None and not bool(
            (mask == (torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, True))).all()
        ):
            raise InputError("Prompts must be padded on the right to be continued; give them as lists of token ids.")
        return [row[:n] for row, n in zip(prompts.tolist(), lengths, strict=True)]
    if mask is not None:
        raise InputError("A mask belongs to prompts that are a tensor of token ids.")
    return [list(map(int, row)) for row in prompts]


def _check(model: HookManager, rows: list[list[int]], asked: Request) -> None:
    if not rows or not all(rows):
        raise InputError("Every prompt needs at least one token.")
    if asked.n < 1 or not asked.temperature >= 0 or (asked.top_k is not None and asked.top_k < 1):
        raise InputError("`n` and `top_k` must be at least 1, `temperature` at least 0.")
    longest = max(map(len, rows))
    if longest + asked.n > model.dims.n_ctx:
        raise InputError(
            f"A prompt of {longest} tokens and {asked.n} new ones are more than the model reads ({model.dims.n_ctx})."
        )


def _group(
    model: HookManager, tokens: Tensor, rows: Tensor, edits: Sequence[BoundEdit], asked: Request, cache: bool
) -> Int[Tensor, "batch new"]:
    n_prompts, length = tokens.shape
    stops = set(_stops(model, asked.stop))
    draws = [torch.Generator().manual_seed(asked.seed * 1_000_003 + row) for row in rows.tolist()]
    made = torch.full((n_prompts, asked.n), NO_TOKEN)
    going = torch.ones(n_prompts, dtype=torch.bool)
    past: Past | None = None
    for step in range(asked.n):
        first = past.n_pos if past is not None else 0
        own = list(_moved(edits, rows, length, first, cache))
        at = torch.full((n_prompts, 1), tokens.shape[1] - first - 1, device=tokens.device)
        given: dict[str, Any] = dict(only=own, at=at, past=past, keep_past=cache)
        run = model._run(tokens[:, first:], None, **given)  # pyright: ignore[reportPrivateUsage]
        if cache:
            past = run.past
            if past is None:
                raise UnsupportedError(f"{model.info.name} kept no keys and values; give cache=False.")
        assert run.logits is not None
        chosen = _chosen(run.logits[:, 0].double().cpu(), asked, draws)
        made[going, step] = chosen[going]
        for i in going.nonzero()[:, 0].tolist():
            if asked.on_token is not None:
                asked.on_token(int(rows[i]), int(chosen[i]))
            going[i] = int(chosen[i]) not in stops
        if not bool(going.any()):
            break
        tokens = torch.cat([tokens, chosen[:, None].to(tokens.device)], 1)
    return made


def _chosen(
    logits: Float[Tensor, "batch d_vocab"], asked: Request, draws: Sequence[torch.Generator]
) -> Int[Tensor, " batch"]:
    """The next tokens. A draw inverts the distribution function, so that it does not depend on the batch."""
    if asked.temperature == 0:
        return logits.argmax(-1)
    logits = logits / asked.temperature
    if asked.top_k is not None and asked.top_k < logits.shape[1]:
        lowest = logits.topk(asked.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    sums = logits.softmax(-1).cumsum(-1)
    numbers = torch.stack([torch.rand(1, generator=own, dtype=torch.float64) for own in draws])
    return torch.searchsorted(sums, numbers * sums[:, -1:], right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def _stops(model: HookManager, stop: Sequence[int] | None) -> list[int]:
    if stop is not None:
        return [int(token) for token in stop]
    end = getattr(model.tokenizer, "eos_token_id", None)
    return [] if end is None else [int(end)]


def _moved(edits: Sequence[BoundEdit], rows: Tensor, length: int, first: int, cache: bool) -> Iterator[BoundEdit]:
    """The edits for a run of these prompts that begins with token `first`."""
    for edit in edits:
        if edit.value is None:
            continue  # an edit of gradients only
        if isinstance(edit.value, EditAt):
            yield replace(edit, value=edit.value.of(rows, length, first))
        elif isinstance(edit.value, Tensor):
            raise InputError(
                f"The value given at '{edit.site}' is for one run, not for a text that grows; give an edit."
            )
        elif cache and first == 0 and length > 1:
            yield replace(edit, value=_tested(edit))
        else:
            yield edit


def _untested(edits: Sequence[BoundEdit]) -> list[BoundEdit]:
    """The edits of which it is not known that they treat every token by itself."""
    return [edit for edit in edits if callable(edit.value) and not isinstance(edit.value, EditAt)]


def _tested(edit: BoundEdit) -> Callable[[Tensor], Tensor]:
    """The edit, after checking on the prompt that it does to the last token alone what it does to it among others."""
    change: Any = edit.value

    def checked(value: Tensor) -> Tensor:
        try:
            alone = change(value[:, -1:].clone())
        except Exception:  # a user's function may raise anything on one token
            alone = None
        new = change(value)
        same = isinstance(alone, Tensor) and isinstance(new, Tensor) and alone.shape == new[:, -1:].shape
        if not same or not torch.allclose(alone, new[:, -1:], rtol=1e-4, atol=1e-6):  # pyright: ignore[reportArgumentType]
            raise InputError(
                f"The edit at '{edit.site}' does not treat every token by itself, so that it cannot go on from the "
                "cache; give cache=False, or an edit of this package with `positions`."
            )
        return new

    return checked
