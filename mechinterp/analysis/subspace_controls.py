"""Two checks of claims about subspaces: does anything read the direction, and would the method find it anywhere?

A patch along a direction may work through a part that nothing reads (the null space of the weights that follow), which
carries the information, and a part that is read, which never varies by itself: the interpretability illusion.
`split_effects` patches the two by themselves. A search that is expressive enough aligns anything with anything:
`alignment_controls` repeats it with arbitrary labels, and on a model with random weights.

Sources: Makelov et al. 2023 (arXiv 2311.17030) and the reply of Wu et al. 2024 (arXiv 2401.12631); Sutter et al. 2025
(arXiv 2507.08802).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.analysis.subspace import learn_subspace, subspace_interchange
from mechinterp.base.batches import batches
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.engines.grid import Grid, numbered
from mechinterp.engines.readout import FINAL, checked_metric, metric_readout
from mechinterp.models.components import Position, parse_part, position_index
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.interchange import interchange
from mechinterp.models.random_weights import with_random_weights
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs

VANISHING = 1e-6
"""The length below which the part of a direction is not there."""
FEWEST_PAIRS = 5
"""Of which chance gets all right in less than 5 % of cases."""


@dataclass(frozen=True, eq=False)
class SubspaceParts:
    """A subspace split by what the weights after it read.

    Args:
        row: The parts of the directions in the row space of the readers, `[d, rank]`; row + null is the direction.
        null: The parts that no reader sees.
        null_share: Of every direction, the share of its squared length that is in `null`.
    """

    row: Float[Tensor, "d rank"]
    null: Float[Tensor, "d rank"]
    null_share: Float[Tensor, " rank"]


def split_subspace(directions: Float[Tensor, "d rank"], readers: Float[Tensor, "d n"]) -> SubspaceParts:
    """The parts of directions that weights read, and that they do not.

    Args:
        directions: The directions, as columns.
        readers: The weights that read the site, as columns: for neurons, `W_out`.

    Raises InputError for other shapes.

    >>> import torch
    >>> parts = split_subspace(torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0], [0.0]]))
    >>> parts.row[:, 0].tolist(), parts.null[:, 0].tolist(), round(float(parts.null_share), 2)
    ([3.0, 0.0], [0.0, 4.0], 0.64)
    """
    if directions.ndim != 2 or readers.ndim != 2 or len(directions) != len(readers):
        raise InputError(
            f"Directions are [d, rank] and readers [d, n]; got {list(directions.shape)} and {list(readers.shape)}."
        )
    U, S, _ = torch.linalg.svd(readers.double(), full_matrices=False)
    read = U[:, float(S[0]) * max(readers.shape) * torch.finfo(readers.dtype).eps < S]
    wide = directions.double()
    row = read @ (read.T @ wide)
    null = wide - row
    share = null.square().sum(0) / wide.square().sum(0).clamp(min=torch.finfo(wide.dtype).tiny)
    return SubspaceParts(row.to(directions), null.to(directions), share.to(directions))


def split_effects(
    model: HookManager,
    pairs: Pairs,
    part: str,
    basis: Float[Tensor, "d rank"],
    *,
    readers: Float[Tensor, "d n"] | None = None,
    position: Position = -1,
    metric: MetricLike = "logit_diff",
    batch_size: int | None = None,
) -> Grid:
    """The effect of patching a subspace, and of patching its part that is read and its part that is not.

    Axes subspace (`basis`, `row`, `null`, `whole`), example; signs as in `subspace_interchange`. `null` is 0: nothing
    reads it. If `row` is far below `basis`, the subspace works only together with directions that nothing reads, and is
    no evidence that the model uses it. `about` has the share of the null space; a part that vanishes has NaN.

    Args:
        model: The model.
        pairs: Clean and corrupt prompts.
        part: The neurons of a layer, `mlp_post.3`; or another state of one vector per token, with `readers`.
        basis: Orthonormal directions, as columns.
        readers: The weights that read the state; by default `W_out` of the layer.
        position: Where the state is read and written.
        metric: What is measured.
        batch_size: Examples at a time.

    Cost: three calls of `subspace_interchange`.

    Raises UnsupportedError for a state other than the neurons without `readers`, and as `subspace_interchange` does.
    """
    found = parse_part(model, part)
    if readers is None:
        if found.site.kind != "mlp_post" or found.unit is not None:
            raise UnsupportedError(
                f"What reads '{part}' is not one matrix; give `readers`, or the neurons of a layer, 'mlp_post.3'."
            )
        readers = model.layout.neurons(found.site.layer or 0).W_out
    parts = split_subspace(basis, readers.to(basis))
    settings: dict[str, Any] = {"position": position, "metric": metric, "batch_size": batch_size, "placebos": 0}
    given = subspace_interchange(model, pairs, part, basis, **settings)
    found_effects = [given.at(subspace="basis").values]
    for own in (parts.row, parts.null):
        U, S, _ = torch.linalg.svd(own.double(), full_matrices=False)
        kept = U[:, S > VANISHING].to(basis)
        if kept.shape[1]:
            effects = subspace_interchange(model, pairs, part, kept, **settings).at(subspace="basis").values
        else:
            effects = torch.full_like(found_effects[0], torch.nan)
        found_effects.append(effects)
    table = torch.stack([*found_effects, given.at(subspace="whole").values])
    about = {
        "analysis": "split effects",
        "part": part,
        "position": str(position),
        "null_share": [round(float(share), 6) for share in parts.null_share],
        "sign": "positive = the subspace helps the task",
    }
    labels = {"subspace": ("basis", "row", "null", "whole"), "example": numbered(len(pairs))}
    return Grid(table, labels, "effect", given.unit, about)


@dataclass(frozen=True, eq=False)
class AlignmentControls:
    """How well a search for a subspace does, and how well it does where there is nothing to find.

    Args:
        frame: A row per search: search (`model`, `arbitrary labels`, `random weights`), train and test (the share of
            pairs whose answer becomes the aimed one under the interchange), unpatched (the same without it, on test).
        limit: What chance reaches in 95 % of cases on the training pairs: 1/2 and a margin for their number.
        limit_test: The same on the test pairs.
        rank: Of the subspace.
        parameters: How many numbers the search fits.
    """

    frame: pd.DataFrame
    limit: float
    limit_test: float
    rank: int
    parameters: int

    @property
    def warning(self) -> str:
        """What a control has reached that it should not; "" if none has."""
        told: list[str] = []
        for row in self.frame.to_dict("records"):
            if row["search"] != "model" and row["train"] > self.limit:
                told.append(
                    f"{row['search']} reach {row['train']:.2f} on the training pairs (chance: {self.limit:.2f})"
                )
            if row["search"] != "model" and row["test"] > self.limit_test:
                told.append(
                    f"{row['search']} reach {row['test']:.2f} on the test pairs (chance: {self.limit_test:.2f})"
                )
        if not told:
            return ""
        return (
            "This search aligns what it should not: " + "; ".join(told) + ". Its accuracy on the model says little; "
            "take a lower rank or more pairs."
        )

    def __repr__(self) -> str:
        table = self.frame.round(3).to_string(index=False)
        told = f"\nWarning: {self.warning}" if self.warning else ""
        return f"AlignmentControls(rank {self.rank}, {self.parameters:,} numbers fitted)\n{table}{told}"


def alignment_controls(
    model: HookManager,
    train: Pairs,
    test: Pairs,
    part: str,
    rank: int,
    *,
    position: Position = -1,
    random_model: HookManager | None = None,
    seed: int = 0,
    epochs: int = 20,
    batch_size: int = 128,
    learning_rate: float = 1e-2,
) -> AlignmentControls:
    """The interchange accuracy of a learned subspace (`learn_subspace`), beside two searches that should find nothing.

    `arbitrary labels`: in a random half of the pairs the right and the wrong answer are exchanged. `random weights`:
    the same search on a model that has learned nothing. Each is measured on the pairs that it was fitted on, where a
    search that is too expressive shows, and on other pairs.

    Args:
        model: The model.
        train: Pairs to fit on, with one right and one wrong answer: the wrong one is the corrupt prompt's.
        test: Other pairs.
        part: As in `learn_subspace`.
        rank: The number of directions.
        position: Where the state is read and written.
        random_model: The model that has learned nothing; by default this architecture with random weights.
        seed: Of the search, the labels and the weights.
        epochs: Passes over the pairs.
        batch_size: Examples per training step, and at a time.
        learning_rate: Of Adam.

    Cost: three times that of `learn_subspace`, and a copy of the model.

    Raises what `learn_subspace` raises, and InputError for fewer than five pairs, which chance gets right too often.
    """
    if min(len(train), len(test)) < FEWEST_PAIRS:
        raise InputError(
            f"Chance gets all of {min(len(train), len(test))} pairs right in more than 5 % of cases, so no control "
            f"could fail; give at least {FEWEST_PAIRS} of each, preferably dozens."
        )
    other = with_random_weights(model, seed=seed) if random_model is None else random_model
    settings: dict[str, Any] = {
        "position": position,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    searches = {
        "model": (model, train, test),
        "arbitrary labels": (model, _arbitrary(train, seed), _arbitrary(test, seed + 1)),
        "random weights": (other, train, test),
    }
    rows: list[dict[str, object]] = []
    width = 0
    for name, (own, fitted, held) in searches.items():
        basis = learn_subspace(own, fitted, part, rank, seed=seed, **settings)
        width = len(basis)
        on, off = (_accuracy(own, some, part, basis, position, batch_size) for some in (fitted, held))
        rows.append({"search": name, "train": on[0], "test": off[0], "unpatched": off[1]})
    limits = [chance_limit(len(some)) for some in (train, test)]
    return AlignmentControls(pd.DataFrame(rows), limits[0], limits[1], rank, width * rank)


def chance_limit(n: int) -> float:
    """The largest share of n pairs that chance (1/2 each) does not exceed in 95 % of cases, by the binomial."""
    below, right = 0.0, -1
    while below < 0.95:
        right += 1
        below += math.comb(n, right) / 2**n
    return right / n


def _arbitrary(pairs: Pairs, seed: int) -> Pairs:
    """The pairs with right and wrong answers exchanged in a random half of them."""
    if pairs.right is None or pairs.wrong is None or pairs.right.shape != pairs.wrong.shape:
        raise InputError("Arbitrary labels need pairs with as many wrong as right answers.")
    generator = torch.Generator().manual_seed(seed)
    swap = torch.zeros(len(pairs), dtype=torch.bool)
    swap[torch.randperm(len(pairs), generator=generator)[: len(pairs) // 2]] = True
    where = swap.to(pairs.device)[:, None]
    right, wrong = torch.where(where, pairs.wrong, pairs.right), torch.where(where, pairs.right, pairs.wrong)
    return Pairs(
        clean=pairs.clean,
        corrupt=pairs.corrupt,
        mask=pairs.mask,
        right=right,
        wrong=wrong,
        positions=dict(pairs.positions),
        answer_pos=pairs.answer_pos,
    )


def _accuracy(
    model: HookManager, pairs: Pairs, part: str, basis: Float[Tensor, "d rank"], position: Position, batch_size: int
) -> tuple[float, float]:
    """The share of pairs in which the wrong answer is above the right one (with the interchange, without it)."""
    pairs, site = pairs.to(model.device), parse_part(model, part).site
    metric = checked_metric(model, pairs, "logit_diff")
    flipped = torch.zeros(2)
    for _, batch in batches(pairs, batch_size):
        rows, at = torch.arange(len(batch), device=model.device), position_index(batch, position)
        source = model.run(batch.corrupt, batch.mask, record=[site], stop=FINAL).values[site][rows, at]

        def exchanged(value: Tensor, rows: Tensor = rows, at: Tensor = at, source: Tensor = source) -> Tensor:
            new = value.clone()
            new[rows, at] = interchange(value[rows, at], source, basis.to(value)).to(value)
            return new

        readout = metric_readout(model, batch, metric)
        edits: Sequence[Sequence[Intervention]] = ([Intervention(site, exchanged)], [])
        for i, several in enumerate(edits):
            run = model.run(batch.clean, batch.mask, interventions=several, record=[FINAL], stop=FINAL)
            flipped[i] += int((readout.of_resid(run.values[FINAL]) < 0).sum())
    with_it, without = (flipped / len(pairs)).tolist()
    return with_it, without
