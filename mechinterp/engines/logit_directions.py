"""Directions of logits: per example a weighted sum of unembedding columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.models.layout import Layout
from mechinterp.tasks.metrics import NO_ENTRY
from mechinterp.tasks.pairs import Pairs

NAMED = ("answers", "right", "wrong")
"""`answers`: mean logit of the right answers minus mean logit of the wrong ones (the metric `logit_diff`). `right` and
`wrong`: the mean logit of those answers alone."""

TokenIds: TypeAlias = "int | Int[Tensor, ''] | Int[Tensor, ' batch']"
"""One token id for every example, or one per example."""
DirectionLike: TypeAlias = "str | int | Tensor | tuple[int | Tensor, int | Tensor]"
"""A name of `NAMED`; token ids (their logit); two of them (the first's logit minus the second's); or a float tensor
`[d_vocab]` or `[batch, d_vocab]` of weights on all logits."""


@runtime_checkable
class HasUnembedding(Protocol):
    """Anything with an unembedding `W_U [d_model, d_vocab]`."""

    @property
    def W_U(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Direction:
    """Per example `sum over columns of weight * logit`, of logits before any soft cap.

    Only the columns that have a weight in some example are read from the unembedding.
    """

    columns: Int[Tensor, " n_columns"]
    """Sorted token ids."""
    weights: Float[Tensor, "batch n_columns"]
    text: str
    """A description of it."""

    def rows(self, chosen: slice) -> Direction:
        """The direction of some of the examples."""
        return replace(self, weights=self.weights[chosen])

    def unembedded(self, layout: Layout, dtype: torch.dtype) -> tuple[Float[Tensor, "batch d_model"], Tensor]:
        """The direction in the residual stream after the final norm, and the unembedding bias along it `[batch]`.

        Cost: one product of the columns with the weights, `batch * n_columns * d_model`.
        """
        every = len(self.columns) == layout.W_U.shape[1]
        weights = self.weights.to(dtype)
        matrix = layout.W_U if every else layout.W_U[:, self.columns]
        vectors = weights @ matrix.to(dtype).T
        if layout.b_U is None:
            return vectors, weights.new_zeros(len(weights))
        return vectors, weights @ layout.b_U[self.columns].to(dtype)


def logit_direction(pairs: Pairs, direction: DirectionLike, layout: HasUnembedding) -> Direction:
    """The direction that `direction` names, for every example of `pairs`, on the device of the model.

    Raises InputError for an unknown name, answers that the pairs do not have, an id outside the vocabulary, another
    shape, NaN, and a direction that is 0 everywhere.
    """
    device, d_vocab = layout.W_U.device, layout.W_U.shape[1]
    if isinstance(direction, str):
        found = _of_answers(pairs, direction, d_vocab)
    elif isinstance(direction, tuple):
        if len(direction) != 2:
            raise InputError(
                f"A pair of token ids is (the logit of these, minus that of these); got {len(direction)} entries."
            )
        ids = [_token_ids(part, len(pairs), d_vocab) for part in direction]
        found = _of_tables([(ids[0][:, None], 1.0), (ids[1][:, None], -1.0)], "logit of a token less logit of another")
    elif isinstance(direction, Tensor) and direction.is_floating_point():
        found = _of_weights(direction, len(pairs), d_vocab)
    else:
        ids_of_all = _token_ids(direction, len(pairs), d_vocab)
        found = _of_tables([(ids_of_all[:, None], 1.0)], "logit of a token")
    nothing = (found.weights == 0).all(1)
    if bool(nothing.any()):
        raise InputError(f"The direction is 0 everywhere in row {int(nothing.nonzero()[0])}.")
    wide = torch.promote_types(layout.W_U.dtype, torch.float32)
    return replace(found, columns=found.columns.to(device), weights=found.weights.to(wide).to(device))


def _of_answers(pairs: Pairs, name: str, d_vocab: int) -> Direction:
    if name not in NAMED:
        raise unknown("direction", name, NAMED)
    signs = {"answers": {"right": 1.0, "wrong": -1.0}}.get(name, {name: 1.0})
    tables: list[tuple[Tensor, float]] = []
    for answers, sign in signs.items():
        table = pairs.right if answers == "right" else pairs.wrong
        if table is None:
            raise InputError(
                f"The direction {name!r} needs {answers} answers, but the prompts have none; give token ids, a pair of "
                "them, or weights [d_vocab] as `direction`."
            )
        if int(table.max()) >= d_vocab:
            raise InputError(f"The {answers} answers hold token id {int(table.max())}; the model has {d_vocab} logits.")
        tables.append((table, sign))
    texts = {"answers": "mean logit of the right answers less that of the wrong ones"}
    return _of_tables(tables, texts.get(name, f"mean logit of the {name} answers"))


def _of_tables(tables: list[tuple[Int[Tensor, "batch _n"], float]], text: str) -> Direction:
    """The signed sum of the mean logits of each table's ids; -1 means no entry."""
    tables = [(table.cpu(), sign) for table, sign in tables]  # shares in float64, which not every device has
    ids = torch.cat([table.flatten() for table, _ in tables])
    columns = ids[ids != NO_ENTRY].unique(sorted=True)
    weights = torch.zeros(len(tables[0][0]), len(columns), dtype=torch.float64)
    for table, sign in tables:
        valid = table != NO_ENTRY
        share = sign * valid / valid.sum(1, keepdim=True)
        places = torch.searchsorted(columns, table.clamp(min=0)).clamp(max=len(columns) - 1)
        weights.scatter_add_(1, places, share.double())
    return Direction(columns, weights, text)


def _of_weights(given: Tensor, batch: int, d_vocab: int) -> Direction:
    if tuple(given.shape) not in ((d_vocab,), (batch, d_vocab)):
        raise InputError(
            f"A direction of weights must be [d_vocab] = [{d_vocab}] or [batch, d_vocab] = [{batch}, {d_vocab}]; got "
            f"{list(given.shape)}."
        )
    if not bool(torch.isfinite(given).all()):
        raise InputError("The direction's weights contain NaN or infinity.")
    table = given.detach().expand(batch, d_vocab)
    used = (given != 0) if given.ndim == 1 else (given != 0).any(0)
    columns = used.nonzero()[:, 0]
    return Direction(columns, table[:, columns], "a given direction over the vocabulary")


def _token_ids(given: object, batch: int, d_vocab: int) -> Int[Tensor, " batch"]:
    if isinstance(given, bool) or not isinstance(given, (int, Tensor)):
        raise InputError(
            f"A direction is one of {', '.join(NAMED)}, token ids, a pair of them, or float weights on all logits; "
            f"got {type(given).__name__}."
        )
    ids = torch.as_tensor(given)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"Token ids must be whole numbers; got {ids.dtype}.")
    if ids.ndim > 1 or (ids.ndim == 1 and len(ids) != batch):
        raise InputError(f"Token ids must be one number, or one per example [{batch}]; got shape {list(ids.shape)}.")
    if int(ids.min()) < 0 or int(ids.max()) >= d_vocab:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise InputError(f"Token id {wrong} is outside the model's {d_vocab} logits (0..{d_vocab - 1}).")
    return ids.long().expand(batch)
