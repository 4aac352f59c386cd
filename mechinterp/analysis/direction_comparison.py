"""`compare_directions`: the direction of a concept in several models, precisions or layers, and its transfer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mechinterp.analysis.directions import Direction, direction_of, direction_values, vector_site
from mechinterp.analysis.probes import check_held_out, share_right
from mechinterp.analysis.steering_sweep import steering_sweep
from mechinterp.base.errors import InputError
from mechinterp.engines.grid import Grid
from mechinterp.models.components import Position
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs

MEASURES = ("cosine", "accuracy", "effect")
"""cosine: of what the two directions write; accuracy: of the direction `of`, as a probe of the place `used in`; effect:
on the metric when the direction `of` is added there."""


@dataclass(frozen=True, eq=False)
class ComparedDirections:
    """The directions of several places, and how each does in the place of another.

    Args:
        grid: A Grid (of, used in, measure): cosine, accuracy, effect.
        random: A Grid (of, used in): the largest size of the effect of random directions in the place `used in`, as
            long as the direction `of`.
        directions: The direction of every place.
    """

    grid: Grid
    random: Grid
    directions: Mapping[str, Direction]


def compare_directions(
    places: Mapping[str, tuple[HookManager, str | Site]],
    train: Pairs,
    test: Pairs,
    position: Position = -1,
    method: str = "mean-difference",
    *,
    strength: float = 1.0,
    metric: MetricLike | None = "logit_diff",
    controls: int = 3,
    seed: int = 0,
    batch_size: int | None = None,
    **settings: Any,
) -> ComparedDirections:
    """The direction of a concept fitted in every place, and each of them used in every other one.

    Places are models (base and tuned, two checkpoints, two precisions), layers of one model, or both:
    `{"base": (a, "resid_pre.3"), "tuned": (b, "resid_pre.3")}`.

    - `cosine`: of the two directions as they are written. Across models and layers this means something only where the
      residual streams share a basis: a tuned model and its base do, two models from different seeds do not.
    - `accuracy`: the direction of one place as a probe of the held-out values of the other, with a boundary half way
      between the classes' means there (so an offset of the streams does not count).
    - `effect`: the change of the metric on the corrupt test prompts when `strength` times the direction is added there
      at the position. It is to be compared with `random`, whose directions are as long.

    Args:
        places: Each with its model and a site of one vector per token.
        train: Clean (positive) and corrupt (negative) prompts for the fits.
        test: Other prompts, for accuracy and effect.
        position: Where in each prompt.
        method: See `fit_direction`.
        strength: How much is added; 1 is the distance of the classes' means where the direction is from.
        metric: For the effects; None: they are not measured (NaN).
        controls: Random directions for each two places.
        seed: Of the random directions.
        batch_size: Examples at a time; by default all.
        settings: Parameters of the method.

    Cost: four forwards for each place, and for each two places 2 + `controls`.

    Raises InputError for fewer than two places, widths or vocabularies that differ, and pairs of `test` in `train`.

    Source: Du et al. 2025 (arXiv 2504.02904) for base and tuned models.

    >>> import mechinterp as mi
    >>> model, task = mi.load_model("bundled"), mi.load_task("gendered_pronoun")
    >>> train, test = (mi.orient_pairs(task.pairs(model, n=16, split=split)) for split in ("train", "test"))
    >>> layers = {f"layer {n}": (model, f"resid_pre.{n}") for n in (2, 3)}
    >>> found = mi.compare_directions(layers, train, mi.held_out(train, test), "end", metric=None)
    >>> found.grid.axes
    ('of', 'used in', 'measure')
    """
    names = tuple(places)
    if len(names) < 2:
        raise InputError("Name at least two places, such as {'base': (a, 'resid_pre.3'), 'tuned': (b, 'resid_pre.3')}.")
    check_held_out(train, test)
    sites = {name: vector_site(model, site) for name, (model, site) in places.items()}
    vocabularies = {model.dims.d_vocab for model, _ in places.values()}
    if len(vocabularies) > 1:
        raise InputError(f"The models have {sorted(vocabularies)} tokens; the prompts are token ids of one vocabulary.")
    values: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, (model, _) in places.items():
        key = sites[name], position
        both = (direction_values(model, pairs, [key[0]], [position], batch_size=batch_size) for pairs in (train, test))
        values[name] = {which: own[key] for which, own in zip(("train", "test"), both, strict=True)}
    directions = {
        name: direction_of(sites[name], position, *values[name]["train"], method, train, model, **settings)
        for name, (model, _) in places.items()
    }
    widths = {name: len(own.read) for name, own in directions.items()}
    if len(set(widths.values())) > 1:
        raise InputError(f"The directions have {widths} numbers; only directions of one width can be compared.")
    found = torch.full((len(names), len(names), len(MEASURES)), torch.nan, dtype=torch.float64)
    random = torch.full((len(names), len(names)), torch.nan, dtype=torch.float64)
    for i, of in enumerate(names):
        for j, used in enumerate(names):
            found[i, j, 0] = _cosine(directions[of].write, directions[used].write)
            found[i, j, 1] = _transferred(directions[of], values[used])
            if metric is not None:
                swept = steering_sweep(
                    places[used][0],
                    _moved(directions[of], sites[used], directions[used]),
                    [strength],
                    test,
                    None,
                    positions=position,
                    metric=metric,
                    controls=controls,
                    seed=seed,
                    batch_size=batch_size,
                ).at(measure="change")
                found[i, j, 2] = swept.values[0, 0]
                if controls:
                    random[i, j] = swept.values[1:, 0].abs().max()
    about = {
        "method": method,
        "settings": dict(settings),
        "position": str(position),
        "strength": strength,
        "places": {name: f"{model.info.name} at {sites[name]} ({model.dtype})" for name, (model, _) in places.items()},
        "controls": controls,
        "seed": seed,
    }
    cost = {"forwards": 4.0 * len(names) + (0 if metric is None else len(names) ** 2 * (2 + controls))}
    grid = Grid(found, {"of": names, "used in": names, "measure": MEASURES}, "value", "", about, cost)
    return ComparedDirections(
        grid, Grid(random, {"of": names, "used in": names}, "largest effect", "", about), directions
    )


def _moved(direction: Direction, site: Site, like: Direction) -> Direction:
    """The direction at another site, in the dtype and on the device of the direction there."""
    basis = direction.basis.to(like.read.device)
    tensors = {name: getattr(basis, name).to(like.read.dtype) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return replace(direction, basis=replace(basis, sites_in=(site,), sites_out=(site,), **tensors))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a.double().cpu(), b.double().cpu(), dim=0)


def _transferred(direction: Direction, values: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """The accuracy of what is read on the test values, the boundary half way between the means of the train values."""
    read = direction.read.double().cpu()
    readings = {which: [part.double().cpu() @ read for part in pair] for which, pair in values.items()}
    boundary = (readings["train"][0].mean() + readings["train"][1].mean()) / 2
    return share_right(*(part - boundary for part in readings["test"]))
