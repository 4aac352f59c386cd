"""`top_features`: the features of dictionaries that matter most, as separate nodes of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mechinterp.analysis.attribution import attribution_patching
from mechinterp.base.errors import InputError
from mechinterp.features.addresses import by_name
from mechinterp.features.basis import Basis
from mechinterp.graphs.families.features import features_of
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs


def top_features(
    model: HookManager,
    pairs: Pairs,
    bases: Basis | Sequence[Basis],
    n: int,
    *,
    metric: MetricLike = "logit_diff",
    method: str = "eap-ig-inputs",
    steps: int = 5,
    batch_size: int = 32,
) -> dict[Basis, tuple[int, ...]]:
    """The numbers of the `n` features of largest estimated effect (either sign), by basis: `features` of `build_graph`.

    The effect is that of `attribution_patching` of the basis, summed over positions, mean over examples; the error of a
    basis is not a feature. Features of no effect at all (those that are active in neither prompt) are left out, so
    there may be fewer than `n`. Ties go to the earlier feature. Cost: that of `attribution_patching`, for every basis.

    Raises InputError for `n` below 1, or when no feature has an effect; UnsupportedError for a basis whose features
    cannot be nodes, such as one of the residual stream.

    Args:
        model: The model.
        pairs: The examples.
        bases: One basis or several.
        n: How many features, of all bases together.
        metric: A metric or its name.
        method: As in `attribution_patching`.
        steps: Integration steps, as in `attribution_patching`.
        batch_size: How many examples are run at once.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs, basis = mi.load_task("ioi").pairs(model, n=8), mi.load_basis("bundled:m3")
    >>> graph = mi.build_graph(model, features=mi.top_features(model, pairs, basis, 5))
    >>> len(graph.writers) - len(mi.build_graph(model).writers)
    5
    """
    several = [bases] if isinstance(bases, Basis) else list(bases)
    if type(n) is not int or n < 1 or not several:
        raise InputError(f"Take at least one feature of at least one basis; got {n!r} of {len(several)} bases.")
    by_name(several)
    for basis in several:
        features_of(basis, [0], model.dims)
    effects = [_effects(model, pairs, basis, metric, method, steps, batch_size) for basis in several]
    sizes = torch.cat(effects).abs()
    best = sizes.argsort(descending=True, stable=True)[:n]
    best = best[sizes[best] > 0]
    if not len(best):
        names = ", ".join(f"'{basis.name}'" for basis in several)
        raise InputError(f"No feature of {names} has an effect on these pairs: each is as active in both prompts.")
    found: dict[Basis, tuple[int, ...]] = {}
    first = 0
    for basis, own in zip(several, effects, strict=True):
        numbers = sorted(i - first for i in best.tolist() if first <= i < first + len(own))
        if numbers:
            found[basis] = tuple(numbers)
        first += len(own)
    return found


def _effects(
    model: HookManager,
    pairs: Pairs,
    basis: Basis,
    metric: MetricLike,
    method: str,
    steps: int,
    batch_size: int,
) -> Tensor:
    """The effect of every feature, summed over positions and examples."""
    total = torch.zeros(basis.n_features, dtype=torch.float64)
    for chunk in pairs.chunks(batch_size):
        grid = attribution_patching(model, chunk, basis, method=method, steps=steps, metric=metric)
        total += grid.values[:-1].nansum(1).sum(-1).double().cpu()
    return total
