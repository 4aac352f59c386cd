"""`text_span`: which tokens' directions span what a head writes (Gandelsman et al. 2024, arXiv 2310.05916)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.graphs.token_positions import take_positions
from mechinterp.models.components import Position, position_index
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Node, Site
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True, eq=False)
class TextSpan:
    """The tokens whose directions span some vectors, greedily.

    Args:
        tokens: Token ids, in the order in which they were taken.
        directions: The orthonormal directions that they add to the span.
        explained: Of each, the share of the variance.
        mean: The mean of the vectors.
        span: The part of each vector (less the mean) in the span.
        remainder: What is left: mean + span + remainder is the vector.
    """

    tokens: Int[Tensor, " rank"]
    directions: Float[Tensor, "rank d"]
    explained: Float[Tensor, " rank"]
    mean: Float[Tensor, " d"]
    span: Float[Tensor, "n d"]
    remainder: Float[Tensor, "n d"]

    def to_frame(self, tokenizer: Any = None) -> pd.DataFrame:
        """One row per token: its id, its text (with a tokenizer), its share of the variance and their sum so far.

        Args:
            tokenizer: Of the model: `model.tokenizer`.
        """
        rows: dict[str, object] = {"token": self.tokens.tolist()}
        if tokenizer is not None:
            rows["text"] = [tokenizer.decode([token]) for token in self.tokens.tolist()]
        rows |= {"explained": self.explained.tolist(), "cumulative": self.explained.cumsum(0).tolist()}
        return pd.DataFrame(rows)


def text_span(
    model: HookManager,
    pairs: Pairs,
    part: str,
    position: Position = -1,
    *,
    rank: int = 10,
    tokens: Sequence[int] | None = None,
) -> TextSpan:
    """The tokens whose unembedding directions span what a head or MLP writes at a position, over the prompts.

    A token's direction is its column of the unembedding, through the weight of the final norm (and its centring): what
    raises its logit. Clean and corrupt prompts count alike. The share that a few tokens explain is to be compared with
    that of as many random tokens (`tokens=`): in few dimensions any tokens explain something.

    Args:
        model: The model.
        pairs: The prompts.
        part: A head (`a9.h9`) or an MLP (`m3`).
        position: Where it writes.
        rank: How many tokens are taken.
        tokens: The candidates; by default the whole vocabulary.

    Cost: two forwards; `rank` products of the writes with the candidates.

    Raises InputError for another part, a rank above `d_model` and writes that are the same in all prompts.

    Source: Gandelsman et al. 2024 (arXiv 2310.05916), algorithm 1, for CLIP; here the texts are tokens, and all
    candidates have length 1 at every step.
    """
    node = Node.parse(part)
    if node.kind not in ("head", "mlp") or node.layer >= model.dims.n_layers or node.head >= model.dims.n_heads:
        raise InputError(f"`part` is a head or an MLP of the model, such as 'a3.h1' or 'm3'; got {part!r}.")
    site = Site("z" if node.kind == "head" else "mlp_out", node.layer)
    at = position_index(pairs, position)[:, None]
    found: list[Tensor] = []
    for ids in (pairs.clean, pairs.corrupt):
        value = model.run(ids, pairs.mask, record=[site]).values[site]
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        own = take_positions(wide.flatten(2), at)[:, 0]
        if node.kind == "head":
            own = model.layout.head_writes(node.layer, own.unflatten(1, wide.shape[2:]))[node.head]
        found.append(own)
    layout, columns = model.layout, model.layout.W_U.detach()
    chosen = torch.arange(columns.shape[1]) if tokens is None else torch.as_tensor(list(tokens))
    if not len(chosen) or int(chosen.min()) < 0 or int(chosen.max()) >= columns.shape[1]:
        raise InputError(f"`tokens` are ids from 0 to {columns.shape[1] - 1}, at least one.")
    texts = layout.final_norm.project_transposed(columns[:, chosen.to(columns.device)].T.to(found[0]))
    span = span_of(torch.cat(found), texts, rank)
    return TextSpan(chosen[span.tokens], span.directions, span.explained, span.mean, span.span, span.remainder)


def span_of(values: Float[Tensor, "n d"], texts: Float[Tensor, "m d"], rank: int) -> TextSpan:
    """The greedy span of `values` by the rows of `texts`: each step takes the direction of largest variance.

    Before each step the directions taken so far are projected out of values and texts, and the texts are
    normalised again, so that a long row is not preferred; a row without anything left is not taken.

    Args:
        values: The vectors.
        texts: The candidates.
        rank: How many are taken.

    Raises InputError for vectors without variance and a rank that the candidates do not have.
    """
    if values.ndim != 2 or texts.ndim != 2 or values.shape[1] != texts.shape[1] or len(values) < 2:
        got = f"{list(values.shape)} and {list(texts.shape)}"
        raise InputError(f"Give at least two vectors and candidates of one width; got {got}.")
    x = values.double()
    mean = x.mean(0)
    left = x - mean
    total = float(left.square().sum())
    if not 1 <= rank <= min(texts.shape):
        raise InputError(f"`rank` must be from 1 to {min(texts.shape)}; got {rank}.")
    if not total > 0:
        raise InputError("The vectors are all the same: there is no variance to explain.")
    rows = texts.double()
    lengths = rows.norm(dim=1)
    taken: list[int] = []
    directions: list[Tensor] = []
    explained: list[float] = []
    for _ in range(rank):
        size = rows.norm(dim=1)
        usable = size > 1e-6 * lengths.clamp(min=1e-30)
        if not bool(usable.any()):
            raise InputError(f"The candidates span {len(taken)} directions only; take a `rank` of at most that.")
        variance = (left @ rows.T).square().sum(0) / size.clamp(min=1e-30).square()
        best = int(torch.where(usable, variance, -1.0).argmax())
        unit = rows[best] / size[best]
        taken.append(best)
        directions.append(unit)
        explained.append(float((left @ unit).square().sum()) / total)
        left = left - torch.outer(left @ unit, unit)
        rows = rows - torch.outer(rows @ unit, unit)
    basis = torch.stack(directions)
    span = (x - mean) @ basis.T @ basis
    return TextSpan(torch.tensor(taken), basis, torch.tensor(explained, dtype=x.dtype), mean, span, x - mean - span)
