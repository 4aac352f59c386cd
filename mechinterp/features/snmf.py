"""`snmf_basis`: features of neurons by semi-nonnegative matrix factorisation, and `Snmf`, which encodes with them.

The activations `[d, token]` of a site are approximated by a product of features `[d, feature]` of any sign and amounts
`[feature, token]` that are not negative. A new vector is encoded by nonnegative least squares. Features are not unique:
amounts mixed nonnegatively do as well; winners (few neurons per feature) choose among them.

Source: Shafran et al. 2025 (arXiv 2506.10920), after Ding et al. 2010 for the updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.features.basis import MEMORY, check_sites
from mechinterp.features.dictionary import site_of
from mechinterp.features.one_site import OneSite
from mechinterp.models.feature_basis import BasisSource, Features
from mechinterp.models.sites import Site


@dataclass(frozen=True, eq=False, repr=False)
class Snmf(OneSite):
    """Directions that are combined with nonnegative amounts, found for each token by nonnegative least squares.

    Encoding runs on the CPU, a token at a time (about a millisecond each at 100 features), and has no gradient; `reads`
    is None.

    Args:
        sites_in: The site, as a tuple of one.
        sites_out: The same.
        W_dec: The features, `[feature, d]`.
        label: Its name in addresses.
        source: Where it comes from.
    """

    stored_as: ClassVar[str] = "snmf"
    sites_in: tuple[Site, ...]
    sites_out: tuple[Site, ...]
    W_dec: Tensor
    label: str = ""
    source: BasisSource = MEMORY

    def __post_init__(self) -> None:
        check_sites(self.sites_in, self.sites_out)
        if len(self.sites_in) != 1 or self.sites_in != self.sites_out:
            raise InputError("A factorisation reconstructs the one site that it reads.")
        if self.W_dec.ndim != 2 or not self.W_dec.is_floating_point() or not bool(self.W_dec.isfinite().all()):
            raise InputError(f"W_dec must hold finite floats [feature, d]; got {list(self.W_dec.shape)}.")

    @property
    def kind(self) -> str:
        """`snmf`."""
        return "snmf"

    @property
    def about(self) -> str:
        """One line about it."""
        return "nonnegative least squares"

    def settings(self) -> dict[str, Any]:
        """Nothing else."""
        return {}

    def encode(self, x: Tensor | Mapping[Any, Tensor], /) -> Features:
        """The amounts of the features that come closest to the value at the site."""
        value, context = self.vectors(x)
        matrix = self.W_dec.T.double().cpu().numpy()
        rows = value.detach().double().cpu().reshape(-1, value.shape[-1]).numpy()
        amounts = torch.stack([torch.from_numpy(nnls(matrix, row, maxiter=50 * self.n_features)[0]) for row in rows])
        wide = self.wide(value)
        return Features(amounts.reshape(*value.shape[:-1], -1).to(value.device, wide), context)


@dataclass(frozen=True)
class Factorised:
    """A fit: the basis, the amounts of its features in the activations, and the squared error after every step."""

    basis: Snmf
    amounts: Float[Tensor, "token feature"]
    losses: tuple[float, ...]


def snmf_basis(
    site: str | Site,
    values: Float[Tensor, "token d"],
    n_features: int,
    *,
    steps: int = 200,
    winners: float | None = None,
    seed: int = 0,
    label: str = "",
) -> Factorised:
    """Features of a site by semi-nonnegative matrix factorisation of activations.

    Args:
        site: Where the activations are from, usually `mlp_post.3`.
        values: The activations.
        n_features: How many features.
        steps: Updates of the amounts; each is followed by the best features for them.
        winners: The share of the numbers of each feature that is kept, the largest (the paper: 0.01); the others are
            set to 0 in every step. None: all are kept, and the error never rises.
        seed: Of the first amounts.
        label: Its name in addresses.

    Cost: per step a few products of activations with features. Raises InputError for a number of features or a share
    that does not fit, and activations that are all 0.
    """
    if values.ndim != 2 or not 1 <= n_features <= len(values):
        raise InputError(f"{list(values.shape)} activations have 1 to {len(values)} features; got {n_features}.")
    if steps < 1 or (winners is not None and not 0 < winners <= 1):
        raise InputError("`steps` must be at least 1, and `winners` a share above 0 and up to 1.")
    if not bool(values.isfinite().all()) or not bool(values.any()):
        raise InputError("The activations must be finite, and not all 0.")
    A = values.double().T
    generator = torch.Generator().manual_seed(seed)
    amounts = torch.rand(len(values), n_features, generator=generator, dtype=torch.float64).to(A.device) + 0.1
    losses: list[float] = []
    features = _features(A, amounts, winners)
    for _ in range(steps):
        cross, gram = A.T @ features, features.T @ features
        up = cross.clamp(min=0) + amounts @ (-gram).clamp(min=0)
        down = (-cross).clamp(min=0) + amounts @ gram.clamp(min=0)
        amounts = amounts * (up / down.clamp(min=1e-300)).sqrt()
        features = _features(A, amounts, winners)
        losses.append(float((A - features @ amounts.T).square().sum()))
    used = {"values": str(len(values)), "steps": str(steps), "winners": str(winners), "seed": str(seed)}
    place, source = site_of(site), BasisSource(format="snmf", about=used)
    basis = Snmf((place,), (place,), features.T.contiguous().to(values.dtype), label, source)
    return Factorised(basis, amounts.to(values.dtype), tuple(losses))


def _features(activations: Tensor, amounts: Tensor, winners: float | None) -> Tensor:
    """The features with the least squared error for these amounts, or their largest numbers."""
    found = activations @ torch.linalg.pinv(amounts).T
    if winners is None:
        return found
    kept = max(1, round(winners * len(found)))
    best = found.abs().topk(kept, dim=0).indices
    return torch.zeros_like(found).scatter(0, best, found.gather(0, best))
