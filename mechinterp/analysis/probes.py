"""`probe_directions`: where a direction separates held-out prompts, with the controls that such a claim needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from mechinterp.analysis.directions import Direction, direction_of, direction_values, tokens_at, vector_sites
from mechinterp.base.errors import InputError
from mechinterp.engines.grid import Grid
from mechinterp.features.direction_fits import PAIRED, DirectionFit, fit_direction
from mechinterp.models.components import Position
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

MEASURES = ("accuracy", "train", "shuffled", "control", "selectivity", "embeddings", "auroc", "gap")


@dataclass(frozen=True, eq=False)
class Probes:
    """The directions of several sites and positions, and how well each separates held-out prompts.

    Args:
        grid: Axes site, pos, measure (`MEASURES`). Accuracies are shares of prompts (chance: 0.5); `gap` is the
            difference of the classes' mean readings on held-out prompts (1 on the prompts of the fit).
        directions: The direction of each site and position; a place where the classes have the same mean has none.
    """

    grid: Grid
    directions: Mapping[tuple[str, str], Direction]

    def to_frame(self) -> pd.DataFrame:
        """One row per site and position, one column per measure."""
        frame = self.grid.to_frame().pivot(index=["site", "pos"], columns="measure", values=self.grid.name)
        order = [(site, pos) for site in self.grid.labels["site"] for pos in self.grid.labels["pos"]]
        frame.index = frame.index.map(lambda key: tuple(map(str, key)))
        rows = [key for key in order if key in set(frame.index)]
        table = frame.loc[rows].reindex(columns=[name for name in MEASURES if name in frame.columns])
        table.index = pd.MultiIndex.from_tuples(rows, names=["site", "pos"])
        return table.rename_axis(columns=None).reset_index()

    def best(self) -> Direction:
        """The direction with the highest held-out accuracy; of equal ones, the earliest site."""
        accuracy = self.grid.at(measure="accuracy").values.nan_to_num(-1)
        if not self.directions:
            raise InputError("No site and position separates the prompts: there is no direction to take.")
        place = int(accuracy.flatten().argmax())
        names = self.grid.labels["pos"]
        return self.directions[self.grid.labels["site"][place // len(names)], names[place % len(names)]]


def probe_directions(
    model: HookManager,
    train: Pairs,
    test: Pairs,
    sites: str | Sequence[str | Site] = "resid_pre",
    positions: Sequence[Position] | Position = -1,
    method: str = "mean-difference",
    *,
    shuffles: int = 5,
    control_position: Position | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    **settings: Any,
) -> Probes:
    """The direction of every site and position, fitted on `train` and judged on `test` beside its controls.

    `accuracy` is the share of held-out prompts on the right side of the boundary. What it must be compared with:

    - `shuffled`: the mean accuracy of `shuffles` fits to labels that were exchanged at random within the pairs of each:
      what a fit of this kind finds where there is nothing (0.5, if test is large enough).
    - `control`: the accuracy on the control task of Hewitt and Liang (2019): a random label for every token that stands
      at `control_position`, the same in train and test. It says how much the fit memorises. `selectivity` is accuracy
      less control. NaN where all prompts have the same token there, or for methods that need pairs.
    - `embeddings`: the accuracy of the same fit on the input of the first layer at that position; 0.5 if the classes
      do not differ there. A probe that is not better reads the token, not what the model made of it.
    - `train`: the accuracy on the prompts of the fit; `auroc` depends on no boundary.

    Args:
        model: The model.
        train: Clean (positive) and corrupt (negative) prompts for the fits.
        test: Other prompts, for judging.
        sites: A kind (`resid_pre`: every layer), a site, or a list of sites of one vector per token.
        positions: One position or several.
        method: See `fit_direction`.
        shuffles: How many fits to shuffled labels.
        control_position: Whose tokens the control task labels; by default the position that is probed.
        seed: Of the shuffled and random labels.
        batch_size: Examples at a time; by default all.
        settings: Parameters of the method.

    Cost: four forwards; then one fit per site, position and control.

    Raises InputError for pairs of `test` that are also in `train`.

    Source: Hewitt and Liang 2019 (arXiv 1909.03368) for control tasks and selectivity.

    >>> import mechinterp as mi
    >>> model, task = mi.load_model("bundled"), mi.load_task("subject_verb_agreement")
    >>> train, test = (mi.orient_pairs(task.pairs(model, n=32, split=split)) for split in ("train", "test"))
    >>> test = mi.held_out(train, test)
    >>> found = mi.probe_directions(model, train, test, "resid_pre", "end")
    >>> found.grid.axes, found.best().site.kind
    (('site', 'pos', 'measure'), 'resid_pre')
    """
    places = vector_sites(model, sites)
    listed = [positions] if isinstance(positions, (str, int)) else list(positions)
    if shuffles < 1 or not listed or len(set(map(str, listed))) != len(listed):
        raise InputError("Give at least one position, each once, and `shuffles` of at least 1.")
    check_held_out(train, test)
    first = Site("resid_pre", 0)
    wanted = tuple(dict.fromkeys([*places, first]))
    fitted, held = (direction_values(model, p, wanted, listed, batch_size=batch_size) for p in (train, test))
    directions: dict[tuple[str, str], Direction] = {}
    values = torch.full((len(places), len(listed), len(MEASURES)), torch.nan, dtype=torch.float64)
    notes: dict[str, str] = {}
    fit = partial(fit_direction, method=method, **settings)
    for j, position in enumerate(listed):
        control = position if control_position is None else control_position
        tokens = [torch.cat(tokens_at(pairs, control)).cpu() for pairs in (train, test)]
        lexical = _judged(fit, fitted[first, position], held[first, position])
        for i, site in enumerate(places):
            own, other = fitted[site, position], held[site, position]
            try:
                found = direction_of(site, position, *own, method, train, model, **settings)
            except InputError as error:
                if "same mean" not in str(error):
                    raise
                notes[f"{site}@{position}"] = str(error)
                continue
            directions[str(site), str(position)] = found
            generator = torch.Generator().manual_seed(seed)
            shuffled = torch.stack([_shuffled(fit, own, other, generator) for _ in range(shuffles)]).mean()
            chance = torch.tensor(torch.nan) if method in PAIRED else _control(fit, own, other, tokens, generator)
            readings = [found.reading(part) for part in (*own, *other)]
            accuracy = share_right(*readings[2:])
            row = (
                accuracy,
                share_right(*readings[:2]),
                shuffled,
                chance,
                accuracy - chance,
                lexical,
                _auroc(*readings[2:]),
                readings[2].double().mean() - readings[3].double().mean(),
            )
            values[i, j] = torch.stack([torch.as_tensor(value).double().cpu() for value in row])
    labels = {"site": tuple(map(str, places)), "pos": tuple(map(str, listed)), "measure": MEASURES}
    about = {
        "method": method,
        "settings": dict(settings),
        "train": {"pairs": train.digest(), "examples": len(train)},
        "test": {"pairs": test.digest(), "examples": len(test)},
        "chance": 0.5,
        "shuffles": shuffles,
        "seed": seed,
        "without a direction": notes,
    }
    return Probes(Grid(values, labels, "value", "", about, {"forwards": 4.0}), directions)


Class = tuple[Tensor, Tensor]
"""The values of the positive and of the negative class."""


def share_right(positive: Tensor, negative: Tensor) -> Tensor:
    """The share on the right side of the boundary; a reading of exactly 0 counts as half."""
    right = ((positive > 0).double() + 0.5 * (positive == 0)).sum() + (
        (negative < 0).double() + 0.5 * (negative == 0)
    ).sum()
    return right / (len(positive) + len(negative))


def _auroc(positive: Tensor, negative: Tensor) -> Tensor:
    """The share of (positive, negative) that the reading orders rightly; a tie counts as half."""
    difference = positive.double()[:, None] - negative.double()[None]
    return ((difference > 0).double() + 0.5 * (difference == 0)).mean()


def _judged(fit: Any, train: Class, test: Class) -> Tensor:
    """The held-out accuracy of a fit; 0.5, that of a constant, where there is no direction."""
    try:
        found: DirectionFit = fit(*train)
    except InputError as error:
        if "same mean" not in str(error):
            raise
        return torch.tensor(0.5, dtype=torch.float64)
    return share_right(found.reading(test[0]), found.reading(test[1]))


def _shuffled(fit: Any, train: Class, test: Class, generator: torch.Generator) -> Tensor:
    """The accuracy when both have labels that were exchanged at random within pairs."""
    return _judged(fit, _exchanged(train, generator), _exchanged(test, generator))


def _exchanged(values: Class, generator: torch.Generator) -> Class:
    a, b = values
    swap = (torch.rand(len(a), generator=generator) < 0.5).to(a.device)[:, None]
    return torch.where(swap, b, a), torch.where(swap, a, b)


def _control(fit: Any, train: Class, test: Class, tokens: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """The accuracy on random labels per token, on test prompts whose token was seen in train."""
    kinds = tokens[0].unique()
    if len(kinds) < 2:
        return torch.tensor(torch.nan)
    order = torch.randperm(len(kinds), generator=generator)
    label = torch.zeros(len(kinds), dtype=torch.bool)
    label[order[: len(kinds) // 2]] = True
    parts: list[Class] = []
    for (a, b), ids in zip((train, test), tokens, strict=True):
        at = torch.searchsorted(kinds, ids).clamp(max=len(kinds) - 1)
        seen = kinds[at] == ids
        values, first = torch.cat([a, b]), label[at]
        parts.append((values[(seen & first).to(values.device)], values[(seen & ~first).to(values.device)]))
    if min(len(part) for pair in parts for part in pair) < 2:
        return torch.tensor(torch.nan)
    return _judged(fit, parts[0], parts[1])


def held_out(train: Pairs, test: Pairs) -> Pairs:
    """The pairs of `test` neither prompt of which is one of `train`.

    Args:
        train: The pairs of a fit.
        test: Others, which may share prompts with them.

    Raises InputError if none is left.
    """
    seen = set().union(*_prompts(train))
    kept = [i for i, both in enumerate(zip(*_prompts(test), strict=True)) if seen.isdisjoint(both)]
    return test if len(kept) == len(test) else test[kept]


def _prompts(pairs: Pairs) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The clean and the corrupt prompts, without padding."""
    lengths = pairs.lengths.tolist()

    def rows(ids: Tensor) -> list[tuple[int, ...]]:
        return [tuple(row[:n]) for row, n in zip(ids.tolist(), lengths, strict=True)]

    return rows(pairs.clean), rows(pairs.corrupt)


def check_held_out(train: Pairs, test: Pairs) -> None:
    """Return None when no prompt of `test` is one of `train`. Raises InputError otherwise."""
    shared = set().union(*_prompts(train)) & set().union(*_prompts(test))
    if shared:
        raise InputError(
            f"{len(shared)} prompts of `test` are also in `train`, so the accuracy would not be held out. Take the "
            "test split of the task, or `held_out(train, test)`."
        )
