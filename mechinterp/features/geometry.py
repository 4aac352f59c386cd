"""The geometry of features: groups that write similar directions, whether a group is more than lines, superposition.

Sources: Engels et al. 2024 (arXiv 2405.14860) for clusters, separability and mixture; Elhage et al. 2022 (Toy Models of
Superposition) for dimensions per feature. Deviations: separability stands beside that of the same points with one
coordinate shuffled, since an estimate of mutual information from a histogram is never 0; the mixture index is searched
on a grid of angles and offsets, not by gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.cluster.vq import kmeans2
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.features.basis import Basis, check_ids

MOST_CLUSTERED = 10_000
"""Features up to which clusters are searched, whose table of cosines is decomposed as a whole."""
FEWEST_POINTS = 50


def feature_dimensions(directions: Float[Tensor, "feature d"]) -> Float[Tensor, " feature"]:
    """How many dimensions each direction has to itself: |w_i|^2 / sum_j (w_j . w_i/|w_i|)^2, from 0 to 1.

    1: orthogonal to all others. 1/2: an antipodal pair in one dimension. 2/5: a pentagon in the plane. They add up to
    the rank at most.

    Args:
        directions: The directions, as rows; of a basis, `basis.writes()`.

    Source: Elhage et al. 2022, Toy Models of Superposition.

    >>> import torch
    >>> feature_dimensions(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])).tolist()
    [0.5, 0.5, 1.0]
    """
    wide = directions.to(torch.promote_types(directions.dtype, torch.float32))
    if wide.ndim != 2:
        raise InputError(f"Directions are rows [feature, d]; got {list(wide.shape)}.")
    size = wide.square().sum(1)
    shared = ((wide @ (wide.T @ wide)) * wide).sum(1)  # sum_j (w_i . w_j)^2, without a table of all features
    return torch.where(size > 0, size.square() / torch.where(size > 0, shared, 1), 0)


def cluster_features(basis: Basis | Tensor, n: int, *, seed: int = 0) -> list[tuple[int, ...]]:
    """Groups of features that write similar directions, the largest first; features that write nothing are left out.

    Spectral clustering of the angles: the affinity of two directions is 1 - angle / pi, their normalised Laplacian's
    first `n` eigenvectors are grouped by k-means.

    Args:
        basis: A basis, or directions `[feature, d]`.
        n: How many clusters at most (k-means may leave one empty).
        seed: Of the starting points of k-means.

    Cost: an eigendecomposition of a table of all features.

    Raises InputError for fewer than two clusters or more than features, UnsupportedError for more than 10,000 features.
    """
    rows = basis if isinstance(basis, Tensor) else basis.writes().flatten(1)
    rows = rows.detach().double().cpu()
    alive = rows.norm(dim=1) > 0
    if type(n) is not int or not 2 <= n <= int(alive.sum()):
        raise InputError(f"Take from 2 to {int(alive.sum())} clusters; got {n!r}.")
    if int(alive.sum()) > MOST_CLUSTERED:
        raise UnsupportedError(f"Clusters are searched among at most {MOST_CLUSTERED:,} features; `keep` some of them.")
    unit = rows[alive] / rows[alive].norm(dim=1, keepdim=True)
    affinity = 1 - (unit @ unit.T).clamp(-1, 1).arccos() / math.pi
    scale = affinity.sum(1).rsqrt()
    vectors = torch.linalg.eigh(scale[:, None] * affinity * scale).eigenvectors[:, -n:]
    vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
    starts: dict[str, Any] = {"seed": np.random.default_rng(seed)}  # newer versions of scipy name it `rng`, too
    _, labels = kmeans2(vectors.numpy(), n, minit="++", **starts)
    numbers = alive.nonzero()[:, 0]
    groups = [tuple(numbers[torch.as_tensor(labels == k)].tolist()) for k in range(n)]
    return sorted((group for group in groups if group), key=lambda group: (-len(group), group))


def cluster_points(
    basis: Basis, values: Float[Tensor, "n feature"], ids: Sequence[int]
) -> Float[Tensor, "active component"]:
    """What a cluster of features writes, where any of it is active, as principal components (the largest first).

    Args:
        basis: The basis, of one output site.
        values: Activations of all its features, one row per token.
        ids: The features of the cluster.

    Raises InputError where none is active.
    """
    chosen = check_ids(basis, ids).to(values.device)
    own = values[:, chosen]
    on = own[(own != 0).any(1)].double()
    if not len(on):
        raise InputError("No feature of the cluster is active on these tokens.")
    points = on @ basis.writes(chosen).to(on)
    points = points - points.mean(0)
    U, S, _ = torch.linalg.svd(points, full_matrices=False)
    return U * S


@dataclass(frozen=True)
class Irreducibility:
    """Whether a cloud of points in the plane is one two-dimensional thing.

    Args:
        separability: The least mutual information (bits) of the two coordinates over all rotations; near `independent`:
            two features side by side.
        independent: The 95 % quantile of the same when one coordinate is shuffled, which leaves nothing to find.
        mixture: The largest share of points within epsilon rms of 0 along any line: near 1 for points that lie on few
            lines, of which each is its own feature.
        points: How many points.
    """

    separability: float
    independent: float
    mixture: float
    points: int

    @property
    def separable(self) -> bool:
        """Whether the coordinates are as independent, in some rotation, as shuffled ones."""
        return self.separability <= self.independent

    def __repr__(self) -> str:
        return (
            f"Irreducibility(separability {self.separability:.3f} bits (shuffled: below {self.independent:.3f}), "
            f"mixture {self.mixture:.3f}, {self.points:,} points)"
        )


def irreducibility(
    points: Float[Tensor, "n two"],
    *,
    angles: int = 64,
    bins: int | None = None,
    epsilon: float = 0.1,
    shuffles: int = 20,
    seed: int = 0,
) -> Irreducibility:
    """The separability and mixture indices of points in the plane.

    High separability and low mixture: a feature of two dimensions, such as a circle. Low separability: two independent
    features. High mixture: features that are not active at once.

    Args:
        points: The points; of `cluster_points`, two columns.
        angles: How many rotations and lines are tried.
        bins: Of the histogram, per coordinate; by default the cube root of the number of points.
        epsilon: Width of the mixture index, in units of the root mean square along the line.
        shuffles: Of the control.
        seed: Of the shuffles.

    Raises InputError for points that are not `[n, 2]`, fewer than 50, or all on one line of the coordinates.
    """
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < FEWEST_POINTS:
        raise InputError(f"Give at least {FEWEST_POINTS} points [n, 2]; got {list(points.shape)}.")
    given = points.double().cpu()
    given = given - given.mean(0)
    sizes = given.square().mean(0).sqrt()
    if not bool(given.isfinite().all()) or float(sizes.min()) == 0:
        raise InputError("The points must be finite and differ in both coordinates.")
    n_bins = max(4, round(len(given) ** (1 / 3))) if bins is None else bins
    if n_bins < 2 or angles < 2 or not 0 < epsilon < 1 or shuffles < 1:
        raise InputError("Give at least 2 bins and angles, an epsilon between 0 and 1, and a shuffle.")
    scaled = given / sizes.max()
    generator = torch.Generator().manual_seed(seed)
    found, best = _separability(scaled, angles, n_bins)
    turned = scaled @ _rotation(best)
    controls: list[float] = []
    for _ in range(shuffles):
        order = torch.randperm(len(turned), generator=generator)
        controls.append(_separability(torch.stack([turned[:, 0], turned[order, 1]], 1), angles, n_bins)[0])
    chance = float(torch.tensor(controls).quantile(0.95))
    return Irreducibility(found, chance, _mixture(scaled, angles, epsilon), len(given))


def _rotation(angle: float) -> Float[Tensor, "2 2"]:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def _separability(points: Tensor, angles: int, bins: int) -> tuple[float, float]:
    """(least mutual information in bits, its angle). A quarter turn exchanges the coordinates."""
    tried = [math.pi / 2 * k / angles for k in range(angles)]
    turned = points @ torch.stack([_rotation(angle) for angle in tried])
    low, high = turned.amin(1, keepdim=True), turned.amax(1, keepdim=True)
    cells = ((turned - low) / (high - low).clamp(min=1e-300) * bins).long().clamp(max=bins - 1)
    at = (torch.arange(angles)[:, None] * bins + cells[..., 0]) * bins + cells[..., 1]
    joint = torch.bincount(at.flatten(), minlength=angles * bins * bins).reshape(angles, bins, bins).double() / len(
        points
    )
    apart = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    ratio = torch.where(joint > 0, joint / apart.clamp(min=1e-300), 1)
    found = (joint * ratio.log2()).sum((1, 2))
    least = int(found.argmin())
    return float(found[least]), tried[least]


def _mixture(points: Tensor, angles: int, epsilon: float, offsets: int = 201) -> float:
    """max over lines of P(|v . x + c| < epsilon * rms of v . x + c), by angle and offset."""
    best = 0.0
    for k in range(2 * angles):
        along = (points @ _rotation(math.pi / 2 * k / angles))[:, 0].sort().values
        at = torch.linspace(float(along[0]), float(along[-1]), offsets, dtype=along.dtype)
        at = torch.cat([at, along[:: max(1, len(along) // offsets)]])
        width = epsilon * ((along.square().mean() - 2 * at * along.mean() + at.square()).clamp(min=0).sqrt())
        inside = torch.searchsorted(along, at + width) - torch.searchsorted(along, at - width, right=True)
        best = max(best, float(inside.max()) / len(along))
    return best


def clusters_table(
    basis: Basis, values: Float[Tensor, "n feature"], clusters: Sequence[Sequence[int]], *, seed: int = 0
) -> pd.DataFrame:
    """A row per cluster: cluster, size, tokens, plane (share of variance in two components), separability,
    independent, mixture; the most irreducible (separability above chance times 1 - mixture) first.

    Clusters of one feature, of fewer than 50 active tokens, or whose points lie on one line have NaN.

    Args:
        basis: The basis.
        values: Activations of all its features, one row per token.
        clusters: The features of every cluster.
        seed: Of the shuffles of the control.
    """
    rows: list[dict[str, float]] = []
    for k, ids in enumerate(clusters):
        tokens = int((values[:, list(ids)] != 0).any(1).sum())
        row: dict[str, float] = {"cluster": k, "size": len(ids), "tokens": tokens, "plane": torch.nan}
        row |= {"separability": torch.nan, "independent": torch.nan, "mixture": torch.nan}
        if tokens >= FEWEST_POINTS and len(ids) > 1:
            points = cluster_points(basis, values, ids)
            size = points.square().sum(0)
            if points.shape[1] > 1 and float(size[1]) > 1e-12 * float(size[0]):
                found = irreducibility(points[:, :2], seed=seed)
                row |= {"plane": float(size[:2].sum() / size.sum()), "separability": found.separability}
                row |= {"independent": found.independent, "mixture": found.mixture}
        rows.append(row)
    frame = pd.DataFrame(rows)
    order = ((frame["separability"] - frame["independent"]) * (1 - frame["mixture"])).fillna(-math.inf)
    return frame.loc[order.sort_values(ascending=False, kind="stable").index].reset_index(drop=True)
