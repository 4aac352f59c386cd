"""Linear bases: orthonormal subspaces (SVD, DAS), erased subspaces (LEACE) and concept directions.

All are a `Dictionary` with a linear activation: a coordinate per direction, and an error that holds the rest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.features.activations import Identity
from mechinterp.features.dictionary import Dictionary, sae
from mechinterp.models.feature_basis import BasisSource
from mechinterp.models.sites import Site


def subspace_basis(
    site: str | Site,
    basis: Float[Tensor, "d rank"],
    *,
    mean: Float[Tensor, " d"] | None = None,
    label: str = "",
    source: BasisSource | None = None,
) -> Dictionary:
    """A subspace with orthonormal directions (as of `learn_subspace`): a feature is the coordinate along a direction.

    Args:
        site: Where.
        basis: The directions, as columns.
        mean: What counts as 0; by default the zero vector.
        label: Its name in addresses.
        source: Where it comes from.

    Raises InputError for directions that are not orthonormal.
    """
    if basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
        raise InputError(f"The basis must be [d, rank], one direction per column; got {list(basis.shape)}.")
    wide = basis.double()
    unit = torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device)
    if not torch.allclose(wide.T @ wide, unit, atol=1e-4):
        raise InputError(
            "The basis is not orthonormal; torch.linalg.qr(basis).Q is an orthonormal basis of the same subspace."
        )
    return _linear(site, basis, basis.T, mean, label, source or BasisSource(format="subspace"))


def svd_basis(
    site: str | Site, values: Float[Tensor, "n d"], rank: int, *, center: bool = True, label: str = ""
) -> Dictionary:
    """The subspace of largest variance (or, without centering, of largest size) of some activations, by SVD.

    Args:
        site: Where the activations are from.
        values: The activations.
        rank: The number of directions.
        center: Whether the mean is subtracted first; it is then what counts as 0.
        label: Its name in addresses.

    Raises InputError for a rank that the activations do not have.
    """
    if values.ndim != 2 or not 1 <= rank <= min(values.shape):
        raise InputError(
            f"An SVD of {list(values.shape)} activations has 1 to {min(values.shape)} directions; got {rank}."
        )
    mean = values.double().mean(0) if center else values.new_zeros(values.shape[1], dtype=torch.float64)
    directions = torch.linalg.svd(values.double() - mean, full_matrices=False).Vh[:rank]
    source = BasisSource(format="svd", about={"values": str(len(values)), "rank": str(rank), "centered": str(center)})
    return subspace_basis(site, directions.T.to(values.dtype), mean=mean.to(values.dtype), label=label, source=source)


def leace_basis(
    site: str | Site, values: Float[Tensor, "n d"], labels: Int[Tensor, " n"], *, label: str = ""
) -> Dictionary:
    """The subspace that holds all that is linearly known about labels; setting its features to 0 erases them (LEACE).

    What remains has no covariance with the labels, so no linear classifier on it beats a constant one, and it is the
    smallest such change in the metric of the covariance. The projection is oblique: the directions that are read differ
    from those that are written.

    Args:
        site: Where the activations are from.
        values: The activations.
        labels: The class of each, as whole numbers.
        label: Its name in addresses.

    Raises InputError for fewer than two classes, or activations that do not differ between them.

    Source: Belrose et al. 2023 (arXiv 2306.03819): x - W+ P W (x - mean), W the whitening matrix.
    """
    if labels.shape != values.shape[:1] or labels.is_floating_point() or len(labels.unique()) < 2:
        raise InputError("LEACE needs one whole number per activation, of at least two classes.")
    x, z = values.double(), torch.nn.functional.one_hot(labels.unique(return_inverse=True)[1]).double()
    mean = x.mean(0)
    x, z = x - mean, z - z.mean(0)
    covariance, cross = x.T @ x / len(x), x.T @ z / len(x)
    size, vectors = torch.linalg.eigh(covariance)
    kept = size > size[-1] * 1e-10
    root = size.clamp(min=0).sqrt()
    whiten = (vectors[:, kept] / root[kept]) @ vectors[:, kept].T
    color = (vectors[:, kept] * root[kept]) @ vectors[:, kept].T
    directions, S, _ = torch.linalg.svd(whiten @ cross, full_matrices=False)
    directions = directions[:, max(float(S[0]), 1e-12) * 1e-8 < S]
    if not directions.shape[1] or float(S[0]) < 1e-8:
        raise InputError("The activations do not differ between the classes, so there is nothing to erase.")
    source = BasisSource(format="leace", about={"values": str(len(values)), "classes": str(z.shape[1])})
    reads, writes = (whiten @ directions).to(values.dtype), (color @ directions).T.to(values.dtype)
    return _linear(site, reads, writes, mean.to(values.dtype), label, source)


def concept_basis(
    site: str | Site, directions: Float[Tensor, "concept d"], *, label: str = "", mean: Tensor | None = None
) -> Dictionary:
    """Concept directions of any angle and length: features are the least-squares coordinates along them.

    One direction v gives the coordinate `x . v / v . v`, so that adding 1 to the feature adds v.

    Args:
        site: Where.
        directions: The directions, as rows.
        label: Its name in addresses.
        mean: What counts as 0; by default the zero vector.

    Raises InputError for directions that are 0 or depend on each other.
    """
    if directions.ndim != 2 or not bool(directions.isfinite().all()):
        raise InputError(f"Concept directions are finite rows [concept, d]; got {list(directions.shape)}.")
    if int(torch.linalg.matrix_rank(directions.double())) < len(directions):
        raise InputError("A concept direction is 0 or a combination of the others, so its coordinate is not defined.")
    reads = torch.linalg.pinv(directions.double()).to(directions.dtype)
    return _linear(site, reads, directions, mean, label, BasisSource(format="concept"))


def direction_basis(
    site: str | Site,
    read: Float[Tensor, " d"],
    write: Float[Tensor, " d"],
    offset: float = 0.0,
    *,
    label: str = "",
    source: BasisSource | None = None,
) -> Dictionary:
    """One direction that is read along one vector and written along another: the feature is `x @ read - offset`.

    Args:
        site: Where.
        read: What is read.
        write: What an activation of 1 adds; `read @ write` must be 1, so that what is added is what is read.
        offset: The reading that counts as 0.
        label: Its name in addresses.
        source: Where it comes from.

    Raises InputError for vectors that do not fit, and for `read @ write` other than 1.
    """
    if read.shape != write.shape or not bool(torch.isfinite(torch.cat([read, write])).all()):
        raise InputError(
            f"A direction has two finite vectors of one length; got {list(read.shape)}, {list(write.shape)}."
        )
    product = float(read.double() @ write.double())
    if not abs(product - 1) < 1e-3:
        raise InputError(
            f"What a direction writes must be read as 1: `read @ write` is {product:.4g}. Divide one by it."
        )
    zero = (offset / product) * write
    return _linear(site, read[:, None], write[None], zero, label, source or BasisSource(format="direction"))


def _linear(
    site: str | Site, reads: Tensor, writes: Tensor, mean: Tensor | None, label: str, source: BasisSource
) -> Dictionary:
    settings: dict[str, Any] = {"activation": Identity(), "label": label, "source": source}
    made = sae(site, reads.contiguous(), writes.contiguous(), b_dec=mean, **settings)
    return made if mean is None else replace(made, subtract_b_dec=True)
