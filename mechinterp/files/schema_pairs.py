"""Sets of examples as a circuit file holds them: what makes them again, or their token ids."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mechinterp.files.limits import MAX_EXAMPLES, MAX_PADDED, MAX_TOKEN_IDS
from mechinterp.files.schema_parts import Count, Flag, Index, Label, Named, Seed, Sha256
from mechinterp.tasks.schema import Strict

Row = Annotated[tuple[Index, ...], Field(max_length=MAX_TOKEN_IDS)]
Rows = Annotated[tuple[Row, ...], Field(max_length=10**6)]


class TaskPairs(Strict):
    """Pairs that the task makes again from these."""

    kind: Literal["task"] = "task"
    split: Label
    seed: Seed
    prepend_bos: Flag


class TokenPairs(Strict):
    """Pairs as token ids, without padding; -1 is no entry in answers and answer positions."""

    kind: Literal["tokens"] = "tokens"
    clean: Rows
    corrupt: Rows
    right: Rows | None = None
    wrong: Rows | None = None
    answer_pos: Rows
    positions: Annotated[dict[Label, Annotated[tuple[Index, ...], Field(max_length=10**6)]], Named] = Field(
        default_factory=dict
    )

    @model_validator(mode="after")
    def _can_be_padded(self) -> TokenPairs:
        for name in ("clean", "corrupt", "right", "wrong", "answer_pos"):
            rows: tuple[tuple[int, ...], ...] = getattr(self, name) or ()
            longest = max(map(len, rows), default=0)
            if longest * len(rows) > MAX_PADDED:
                raise ValueError(f"{name} has {len(rows)} rows, padded to {longest} ids more than {MAX_PADDED}")
        if len(self.positions) * len(self.clean) > MAX_PADDED:
            raise ValueError(f"{len(self.positions)} positions of {len(self.clean)} rows are too many")
        return self


class PairsRecord(Strict):
    """One set of examples. `sha256` is over the token ids, answers and positions themselves."""

    n: Count
    sha256: Sha256
    made_from: Annotated[TaskPairs | TokenPairs, Field(discriminator="kind")]

    @model_validator(mode="after")
    def _not_too_many(self) -> PairsRecord:
        if isinstance(self.made_from, TaskPairs) and self.n > MAX_EXAMPLES:
            raise ValueError(f"n is {self.n}; a file states at most {MAX_EXAMPLES} examples of a task")
        return self
