"""Fits of one direction to two classes of activations: difference of means, logistic probe, LDA, LEACE, PCA, pairs.

Every fit has the same units: it is scaled so that the means of the two classes are 1 apart along it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.features.subspaces import leace_basis


@dataclass(frozen=True, eq=False)
class DirectionFit:
    """One direction: how it is read, and what it writes. The reading of x is `x @ read - offset`.

    Args:
        read: What is read. The classes' means are 1 apart along it.
        write: What is added to x to raise the reading by 1: `read @ write` is 1.
        offset: Readings above 0 are of the first class.
    """

    read: Float[Tensor, " d"]
    write: Float[Tensor, " d"]
    offset: float

    def reading(self, values: Float[Tensor, "*axes d"]) -> Float[Tensor, "*axes"]:
        """The reading of each value; positive = the first class."""
        return values.to(self.read) @ self.read - self.offset


Values = Tensor
"""Activations of one class, `[n, d]`, in float64."""
Fitted = tuple[Tensor, Tensor, "float | None"]
"""(what is read, what is written, the boundary of a classifier along the first; None: halfway between the means)."""


def fit_direction(
    positive: Float[Tensor, "n d"], negative: Float[Tensor, "m d"], method: str = "mean-difference", **settings: Any
) -> DirectionFit:
    """The direction from the negative to the positive class.

    Args:
        positive: Activations of the first class.
        negative: Activations of the second; for `contrast-pairs`, row i belongs to row i of the first.
        method: `mean-difference`; `logistic` (`penalty=0.01`: L2 on the weights of activations of unit variance);
            `lda` (`shrinkage=0.01` of the covariance within the classes toward a multiple of the identity); `leace`
            (the direction whose erasure leaves nothing linear); `pca` (largest variance of all activations, without
            their labels); `contrast-pairs` (largest component of the differences within pairs).
        settings: Parameters of the method.

    Raises InputError for an unknown method or setting, fewer than two activations of a class, and a direction along
    which the classes have the same mean.

    Source: mean difference and its use, Marks and Tegmark 2023 (arXiv 2310.06824); LEACE, Belrose et al. 2023 (arXiv
    2306.03819); PCA of pairs, Zou et al. 2023 (arXiv 2310.01405), here not centred.

    >>> fit = fit_direction(torch.tensor([[2.0, 1.0], [4.0, 1.0]]), torch.tensor([[0.0, 1.0], [-2.0, 1.0]]))
    >>> fit.write.tolist(), fit.offset, fit.reading(torch.tensor([1.0, 7.0])).item()
    ([4.0, 0.0], 0.25, 0.0)
    """
    if method not in FITS:
        raise unknown("method of finding a direction", method, FITS)
    for name, values in (("positive", positive), ("negative", negative)):
        if len(values) < 2 or not bool(values.isfinite().all()):
            raise InputError(f"A direction needs at least two finite activations of each class; see the {name} ones.")
    if method in PAIRED and len(positive) != len(negative):
        raise InputError(f"{method!r} needs pairs: {len(positive)} positive and {len(negative)} negative activations.")
    a, b = positive.double(), negative.double()
    try:
        read, write, boundary = FITS[method](a, b, **settings)
    except TypeError as error:
        raise InputError(f"The method {method!r} does not take {', '.join(map(repr, settings))}: {error}.") from error
    apart = float(read @ (a.mean(0) - b.mean(0)))
    size = float(read.norm()) * float(torch.cat([a - a.mean(0), b - b.mean(0)]).square().mean().sqrt())
    if not abs(apart) > 1e-9 * max(size, 1e-30):
        raise InputError(
            f"The activations of both classes have the same mean along the direction of {method!r}: there is no "
            "direction from one to the other here. Is this the position at which the prompts differ?"
        )
    read = read / apart
    write = write / (read @ write)
    offset = float(read @ (a.mean(0) + b.mean(0))) / 2 if boundary is None else boundary / apart
    dtype = torch.promote_types(positive.dtype, torch.float32)
    return DirectionFit(read.to(dtype), write.to(dtype), offset)


def _mean_difference(a: Values, b: Values) -> Fitted:
    delta = a.mean(0) - b.mean(0)
    return delta, delta, None


def _logistic(a: Values, b: Values, penalty: float = 1e-2) -> Fitted:
    """Mean cross-entropy plus `penalty / 2 * |w|^2`, the intercept free; activations scaled by one number."""
    from scipy.optimize import minimize

    if not penalty > 0:
        raise InputError(f"`penalty` must be positive, or separable classes have no finite probe; got {penalty}.")
    x = torch.cat([a, b])
    mean, scale = x.mean(0), float((x - x.mean(0)).square().mean().sqrt())
    if scale == 0:
        return torch.zeros_like(mean), torch.zeros_like(mean), None
    rows = ((x - mean) / scale).cpu().numpy()
    target = np.concatenate([np.ones(len(a)), np.zeros(len(b))])

    def loss(w: Any) -> tuple[float, Any]:
        logits = rows @ w[:-1] + w[-1]
        error = 1 / (1 + np.exp(-np.clip(logits, -500, 500))) - target
        value = np.mean(np.logaddexp(0, logits) - target * logits) + penalty / 2 * np.sum(w[:-1] ** 2)
        return value, np.append(rows.T @ error / len(rows) + penalty * w[:-1], error.mean())

    options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-9}
    found = minimize(loss, np.zeros(rows.shape[1] + 1), jac=True, method="L-BFGS-B", options=options)
    weights = torch.as_tensor(found.x[:-1], dtype=x.dtype, device=x.device) / scale
    return weights, weights, float(weights @ mean) - float(found.x[-1])


def _lda(a: Values, b: Values, shrinkage: float = 1e-2) -> Fitted:
    if not 0 <= shrinkage <= 1:
        raise InputError(f"`shrinkage` must be from 0 to 1; got {shrinkage}.")
    centred = torch.cat([a - a.mean(0), b - b.mean(0)])
    covariance = centred.T @ centred / len(centred)
    size = float(covariance.trace()) / len(covariance)
    covariance = (1 - shrinkage) * covariance + shrinkage * size * torch.eye(len(covariance)).to(covariance)
    delta = a.mean(0) - b.mean(0)
    return torch.linalg.lstsq(covariance, delta[:, None], driver="gelsd").solution[:, 0], delta, None


def _leace(a: Values, b: Values) -> Fitted:
    labels = torch.cat([torch.ones(len(a)), torch.zeros(len(b))]).long().to(a.device)
    basis = leace_basis("resid_pre.0", torch.cat([a, b]), labels)  # the site only names it
    return basis.reads()[0], basis.writes()[0], None


def _pca(a: Values, b: Values) -> Fitted:
    x = torch.cat([a, b])
    first = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[0]
    return first, first, None


def _contrast_pairs(a: Values, b: Values) -> Fitted:
    first = torch.linalg.svd(a - b, full_matrices=False).Vh[0]
    return first, first, None


FITS: dict[str, Callable[..., Fitted]] = {
    "mean-difference": _mean_difference,
    "logistic": _logistic,
    "lda": _lda,
    "leace": _leace,
    "pca": _pca,
    "contrast-pairs": _contrast_pairs,
}
"""The methods by name."""
PAIRED = ("contrast-pairs",)
"""Methods that need to know which activations belong together."""
