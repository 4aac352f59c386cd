"""One example of the task on the page: the clean and the corrupt prompt with their positions and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True)
class PromptExample:
    """A pair of prompts as tokens; `positions` are indices into both, `pairs` is their name in the circuit file."""

    pairs: str
    row: int
    clean: tuple[str, ...]
    corrupt: tuple[str, ...]
    positions: Mapping[str, int]
    answer_pos: int
    right: tuple[str, ...]
    wrong: tuple[str, ...]


def prompt_example(model: HookManager, pairs: Pairs, row: int, pairs_name: str) -> PromptExample:
    """The example in row `row` of the pairs, as tokens of the model. No forward."""
    length = int(pairs.lengths[row])
    clean, corrupt = (
        tuple(token_text(model, token) for token in ids[row, :length].tolist()) for ids in (pairs.clean, pairs.corrupt)
    )
    return PromptExample(
        pairs_name,
        row,
        clean,
        corrupt,
        {name: int(at[row]) for name, at in pairs.positions.items() if 0 <= int(at[row]) < length},
        int(pairs.answer_pos[row, 0]),
        answer_texts(model, pairs.right, row),
        answer_texts(model, pairs.wrong, row),
    )


def answer_texts(model: HookManager, table: Tensor | None, row: int) -> tuple[str, ...]:
    """The answers of one row as text; empty if there are none."""
    return () if table is None else tuple(token_text(model, int(i)) for i in table[row].tolist() if i >= 0)


def token_text(model: HookManager, token: int) -> str:
    """The token as text, with visible spaces and line ends; its number if there is no tokenizer."""
    if model.tokenizer is None:
        return f"#{token}"
    text = str(model.tokenizer.decode([token]))
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or f"#{token}"
