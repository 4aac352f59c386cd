"""Affine maps that move one class of activations onto another, or erase the classes: mean matching, MiMiC, LEACE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.features.subspaces import leace_basis

KINDS = ("mean", "mimic", "leace")


@dataclass(frozen=True, eq=False)
class AffineFit:
    """The map x -> `x @ matrix + bias`; give both to `affine` for an intervention.

    Args:
        matrix: Its matrix, for rows.
        bias: Its bias.
        kind: How it was fitted.
    """

    matrix: Float[Tensor, "d d"]
    bias: Float[Tensor, " d"]
    kind: str

    def __call__(self, values: Float[Tensor, "*axes d"]) -> Float[Tensor, "*axes d"]:
        """The mapped values, in their own dtype."""
        wide = values.to(torch.promote_types(values.dtype, self.matrix.dtype))
        return (wide @ self.matrix.to(wide) + self.bias.to(wide)).to(values.dtype)


def fit_affine(
    values: Float[Tensor, "n d"], labels: Int[Tensor, " n"], kind: str = "mimic", *, toward: int = 1
) -> AffineFit:
    """The affine map of activations that gives them the moments of another class, or erases the class.

    - `mean`: `x + mean(toward) - mean(others)`; afterwards the others have the mean of the class `toward`.
    - `mimic`: `mean(toward) + (x - mean(others)) W` with `W = S^-1/2 (S^1/2 T S^1/2)^1/2 S^-1/2`, S the covariance of
      the others and T that of `toward`; afterwards they have its mean and covariance, and no affine map that does this
      moves them less (in mean square). Directions without variance in S get none.
    - `leace`: the least change after which all classes have one mean, so that no linear probe beats a constant.

    The first two are for values of the other classes; a value of the class `toward` is moved on, too.

    Args:
        values: The activations.
        labels: The class of each.
        kind: `mean`, `mimic` or `leace`.
        toward: The class whose moments are given (not for `leace`).

    Raises InputError for an unknown kind, a class that is missing or has one activation only, and shapes that do not
    fit.

    Source: Singh et al. 2024 (arXiv 2402.09631) for `mean` and `mimic`; Belrose et al. 2023 (arXiv 2306.03819).

    >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 1.0], [9.0, 1.0]])
    >>> fit_affine(x, torch.tensor([0, 0, 1, 1]), "mean")(x[:2]).tolist()
    [[6.0, 1.0], [8.0, 1.0]]
    """
    if kind not in KINDS:
        raise unknown("kind of affine fit", kind, KINDS)
    if labels.shape != values.shape[:1] or labels.is_floating_point():
        raise InputError(
            f"Give one whole number per activation: {len(values)} activations, labels {list(labels.shape)}."
        )
    dtype = torch.promote_types(values.dtype, torch.float32)
    x = values.double()
    one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    if kind == "leace":
        basis = leace_basis("resid_pre.0", x, labels)  # the site only names it
        matrix = one - basis.reads().T @ basis.writes()
        bias = x.mean(0) - x.mean(0) @ matrix
        return AffineFit(matrix.to(dtype), bias.to(dtype), kind)
    there, here = x[labels == toward], x[labels != toward]
    if len(there) < 2 or len(here) < 2:
        raise InputError(
            f"A fit toward class {toward} needs two activations of it and two others; got {len(there)}, {len(here)}."
        )
    matrix = one if kind == "mean" else _optimal(_covariance(here), _covariance(there))
    bias = there.mean(0) - here.mean(0) @ matrix
    return AffineFit(matrix.to(dtype), bias.to(dtype), kind)


def _covariance(x: Tensor) -> Tensor:
    return (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)


def _optimal(source: Tensor, target: Tensor) -> Tensor:
    """The symmetric W with `W source W = target`: the optimal transport between two Gaussians."""
    root, inverse = _roots(source)
    middle, _ = _roots(root @ target @ root)
    return inverse @ middle @ inverse


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a positive semidefinite matrix, and the pseudo-inverse of that root."""
    size, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    root = size.clamp(min=0).sqrt()
    kept = size > float(size[-1]) * 1e-12
    inverse = torch.where(kept, 1 / torch.where(kept, root, torch.ones_like(root)), torch.zeros_like(root))
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T
