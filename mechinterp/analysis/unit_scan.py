"""`scan_units`: the units, and the examples, whose activations are unlike a reference, by subset scanning.

Every activation gets an empirical p-value against the same unit's reference activations. Under the reference these are
uniform; a set of units whose p-values are small too often, together, is found by maximising the Berk-Jones statistic
over all sets of units and examples. One maximisation is exact: for given examples and a level the best set of k units
are the k with the largest share of p-values below it (linear-time subset scanning), so only the sizes are tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError

LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
MOST_ROUNDS = 50


@dataclass(frozen=True, eq=False)
class UnitScan:
    """The subset of units and examples with the largest Berk-Jones score.

    Args:
        units: Their numbers.
        examples: The examples in which they are unlike the reference.
        score: The Berk-Jones statistic of the subset, in nats.
        level: The level of p-values at which it is largest.
        null: The scores of the best subsets when reference and other activations are exchanged at random.
        p_value: The share of these that are as large, counting the score itself.
    """

    units: Int[Tensor, " n_units"]
    examples: Int[Tensor, " n_examples"]
    score: float
    level: float
    null: Float[Tensor, " n_null"]
    p_value: float

    def __repr__(self) -> str:
        return (
            f"UnitScan({len(self.units)} units, {len(self.examples)} examples, score {self.score:.4g} at level "
            f"{self.level:g}, p {self.p_value:.2g} of {len(self.null)} exchanges)"
        )


def scan_units(
    reference: Float[Tensor, "n unit"],
    other: Float[Tensor, "m _unit"],
    *,
    levels: Sequence[float] = LEVELS,
    exchanges: int = 99,
    restarts: int = 3,
    seed: int = 0,
) -> UnitScan:
    """The units whose activations on some of the other examples are unlike those of the reference.

    The p-value of an activation is two-sided: twice the share of the reference's activations of that unit that are as
    extreme on its side, at most 1 (each counted with the activation itself). The score of a set of N activations, N_a
    of whose p-values are at most a, is `N * KL(N_a / N || a)` where N_a / N is above a, and otherwise 0. It is
    maximised over the levels, and over units and examples in turn until neither changes (a local maximum of the two
    together; from all examples and from `restarts` random halves).

    Args:
        reference: Activations of the reference examples, such as neurons at a position.
        other: Activations of the same units on other examples.
        levels: The levels a that are tried.
        exchanges: How often reference and other examples are exchanged at random, for the p-value of the score.
        restarts: Random starts besides all examples.
        seed: Of exchanges and restarts.

    Cost: `(1 + exchanges) * (1 + restarts)` searches of `levels * (n + m) * unit` steps.

    Raises InputError for activations that do not fit, are not finite, and levels outside (0, 1).

    Source: McFowland, Speakman and Neill 2013 (fast generalised subset scan, JMLR 14); Berk and Jones 1979. For
    activations: Cintas et al. 2020 (IJCAI); for personas in language models 2025 (arXiv 2505.24539).

    >>> import mechinterp as mi, torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> clean, other = (torch.randn(60, 20, generator=generator) for _ in range(2))
    >>> other[:30, [3, 7]] += 4.0
    >>> found = mi.scan_units(clean, other, exchanges=19)
    >>> found.units.tolist(), found.p_value
    ([3, 7], 0.05)
    """
    if (
        reference.ndim != 2
        or other.ndim != 2
        or reference.shape[1] != other.shape[1]
        or min(map(len, (reference, other))) < 2
    ):
        raise InputError(
            "Give activations [example, unit] of the same units, two examples at least; got "
            f"{list(reference.shape)} and {list(other.shape)}."
        )
    both = torch.cat([reference, other.to(reference.device)]).double()
    if not bool(both.isfinite().all()):
        raise InputError("Some activations are not finite.")
    if not levels or not all(0 < level < 1 for level in levels) or exchanges < 1 or restarts < 0:
        raise InputError("`levels` lie between 0 and 1, `exchanges` is at least 1 and `restarts` at least 0.")
    generator = torch.Generator().manual_seed(seed)
    n = len(reference)

    def best(values: Tensor) -> tuple[float, float, Tensor, Tensor]:
        p = p_values(values[:n], values[n:])
        starts = [torch.ones(len(p), dtype=torch.bool)]
        starts += [torch.rand(len(p), generator=generator) < 0.5 for _ in range(restarts)]
        found = [_search(p <= level, level, start.to(p.device)) for level in levels for start in starts if start.any()]
        return max(found, key=lambda one: one[0])

    score, level, examples, units = best(both)
    null: list[float] = []
    for _ in range(exchanges):
        order = torch.randperm(len(both), generator=generator).to(both.device)
        null.append(best(both[order])[0])
    as_large = 1 + sum(value >= score for value in null)
    return UnitScan(
        units.nonzero()[:, 0].cpu(),
        examples.nonzero()[:, 0].cpu(),
        score,
        level,
        torch.tensor(null, dtype=torch.float64),
        as_large / (1 + exchanges),
    )


def p_values(reference: Float[Tensor, "n unit"], other: Float[Tensor, "m unit"]) -> Float[Tensor, "m unit"]:
    """The two-sided empirical p-value of every activation, from 1 / (n + 1) doubled to 1."""
    ordered, n = reference.T.contiguous().sort(1).values, len(reference)
    values = other.T.contiguous()
    below = torch.searchsorted(ordered, values, right=True)  # as small or smaller
    above = n - torch.searchsorted(ordered, values)  # as large or larger
    return (2 * (torch.minimum(below, above) + 1).double() / (n + 1)).clamp(max=1).T


def berk_jones(n: Tensor | float, n_small: Tensor, level: float) -> Tensor:
    """`N KL(N_a / N || a)` where N_a / N is above a, otherwise 0."""
    share = n_small / n
    divergence = torch.special.xlogy(share, share / level) + torch.special.xlogy(1 - share, (1 - share) / (1 - level))
    return torch.where(share > level, n * divergence, 0.0)


def best_units(small: Bool[Tensor, "example unit"], level: float) -> tuple[float, Bool[Tensor, " unit"]]:
    """(the largest score over all sets of units for these examples, the set): exact, by the order of their shares."""
    counts = small.double().sum(0)
    order = counts.argsort(descending=True, stable=True)
    total = counts[order].cumsum(0)
    sizes = torch.arange(1, len(counts) + 1, device=counts.device).double() * len(small)
    scores = berk_jones(sizes, total, level)
    k = int(scores.argmax())
    chosen = torch.zeros_like(counts, dtype=torch.bool)
    chosen[order[: k + 1]] = True
    return float(scores[k]), chosen


def _search(
    small: Bool[Tensor, "example unit"], level: float, examples: Bool[Tensor, " example"]
) -> tuple[float, float, Bool[Tensor, " example"], Bool[Tensor, " unit"]]:
    """(score, level, examples, units): units and examples chosen in turn, until the score does not rise."""
    score, units = best_units(small[examples], level)
    for _ in range(MOST_ROUNDS):
        by_example, rows = best_units(small[:, units].T, level)
        again, columns = best_units(small[rows], level)
        if max(by_example, again) <= score:
            break
        score, examples, units = again, rows, columns
    return score, level, examples, units
