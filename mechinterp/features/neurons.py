"""`Neurons`: the identity as a basis: every number of a site is a feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.features.basis import MEMORY, PER_HEAD, Basis, by_site, check_ids, check_sites
from mechinterp.features.dictionary import site_of
from mechinterp.models.feature_basis import BasisSource, Features
from mechinterp.models.sites import Site


@dataclass(frozen=True, eq=False, repr=False)
class Neurons(Basis):
    """The numbers of a site as its features: the neuron baseline of a dictionary, with an error of 0.

    Args:
        sites_in: The site, as a tuple of one.
        sites_out: The same.
        n_features: How many numbers the site has.
        label: Its name in addresses.
        source: Where it comes from.
    """

    stored_as: ClassVar[str] = "neurons"
    sites_in: tuple[Site, ...]
    sites_out: tuple[Site, ...]
    n_features: int = 0  # pyright: ignore[reportIncompatibleMethodOverride]
    label: str = ""
    source: BasisSource = MEMORY

    def __post_init__(self) -> None:
        check_sites(self.sites_in, self.sites_out)
        if self.sites_in != self.sites_out or len(self.sites_in) != 1 or self.n_features < 1:
            raise InputError("The identity reads and writes one site, of at least one number.")

    @property
    def kind(self) -> str:
        """`neurons`."""
        return "neurons"

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The number of features."""
        return {"n_features": self.n_features}

    def encode(self, x: Tensor | Mapping[Any, Tensor], /) -> Features:
        """The value at the site, heads flattened to one vector a token."""
        (value,) = by_site(self, x, self.sites_in)
        context: dict[str, Any] = {}
        if self.sites_in[0].kind in PER_HEAD:
            context["heads"], value = value.shape[-2], value.flatten(-2)
        if value.shape[-1] != self.n_features:
            raise InputError(f"The basis '{self.name}' has {self.n_features} features; the site has {value.shape[-1]}.")
        return Features(value.to(torch.promote_types(value.dtype, torch.float32)), context)

    def decode(self, features: Features, /) -> dict[Any, Tensor]:
        """The values themselves."""
        out = features.values
        if self.sites_out[0].kind in PER_HEAD:
            out = out.unflatten(-1, (features.context["heads"], -1))
        return {self.sites_out[0]: out}

    def writes(self, ids: Sequence[int] | Tensor | None = None, /) -> Tensor:
        """Rows of the identity matrix."""
        return torch.eye(self.n_features)[check_ids(self, ids)]

    def reads(self, ids: Sequence[int] | Tensor | None = None, /) -> Tensor:
        """Rows of the identity matrix."""
        return self.writes(ids)


def neuron_basis(site: str | Site, n: int, *, label: str = "") -> Neurons:
    """The identity at a site: each of its `n` numbers is a feature.

    Args:
        site: Where, such as `mlp_post.3`.
        n: How many numbers it has (of all heads together).
        label: Its name in addresses.

    >>> neuron_basis("mlp_post.3", 8).address(5)
    'mlp_post.3.f5'
    """
    place = site_of(site)
    return Neurons((place,), (place,), n, label)
