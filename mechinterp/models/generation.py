"""Text from a model under edits, token by token, with the key/value cache or without (`HookManager.generate`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.models.interventions import EditAt, Intervention
from mechinterp.models.past import Past

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


def generated(
    model: HookManager,
    prompts: Any,
    mask: Bool[Tensor, "batch pos"] | None,
    edits: Sequence[Intervention],
    asked: Request,
) -> Generated:
    """The tokens of all prompts; those of one length are run together, so that no prompt is padded."""
    rows = _rows(model, prompts, mask)
    _check(model, rows, asked)
    cache = model.keeps_past and model.dims.causal if asked.cache is None else asked.cache
    if cache and not (model.keeps_past and model.dims.causal):
        raise UnsupportedError(f"{model.info.name} does not keep keys and values; give cache=False.")
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
    if isinstance(prompts, str):
        prompts = [prompts]
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
    listed = list(prompts)
    if listed and all(isinstance(prompt, str) for prompt in listed):
        if model.tokenizer is None:
            raise InputError(f"{model.info.name} has no tokenizer; give token ids.")
        listed = [model.tokenizer(prompt)["input_ids"] for prompt in listed]
    return [list(map(int, row)) for row in listed]


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
    model: HookManager, tokens: Tensor, rows: Tensor, edits: Sequence[Intervention], asked: Request, cache: bool
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
        given: dict[str, Any] = dict(interventions=own, at=at, past=past, keep_past=cache)
        run = model._run([], tokens[:, first:], None, **given)  # pyright: ignore[reportPrivateUsage]
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


def _moved(edits: Sequence[Intervention], rows: Tensor, length: int, first: int, cache: bool) -> Iterator[Intervention]:
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


def _tested(edit: Intervention) -> Callable[[Tensor], Tensor]:
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
