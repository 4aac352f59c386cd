"""`Basis`: what the kinds of feature bases share: identity by content, names, errors, tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor
from typing_extensions import Self

from mechinterp.base.canonical_json import canonical_sha256
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.features.chosen import Chosen
from mechinterp.models.feature_basis import BasisSource, Features
from mechinterp.models.sites import Site
from mechinterp.models.source import hash_tensors

MEMORY = BasisSource()
PER_HEAD = ("q", "k", "v", "z")
"""Sites `[.., head, d_head]`: a basis reads and writes them flattened to one vector a token."""
_SHORT = {"mlp_out": "m{}", "attn_out": "a{}"}


class Basis(ABC):
    """A feature basis of this package: frozen, equal to another one with the same numbers at the same sites.

    Subclasses are frozen dataclasses with the fields `sites_in`, `sites_out`, `label` and `source`.
    """

    stored_as: ClassVar[str] = ""
    """The name of the class in files; "" for one that cannot be saved."""
    sites_in: tuple[Site, ...]
    sites_out: tuple[Site, ...]
    label: str
    source: BasisSource

    def from_source(self, **facts: Any) -> Self:
        """The same basis with other facts about where it comes from, such as `address`."""
        own: Any = self  # a dataclass, as every subclass is
        return replace(own, source=replace(self.source, **facts))

    @property
    @abstractmethod
    def n_features(self) -> int:
        """How many features it has."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """What it is in one or two words: `sae`, `transcoder`, `subspace`."""

    @property
    def about(self) -> str:
        """More about it: the activation function, a skip connection."""
        return ""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, as they are stored."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything else that it computes with, as JSON values."""

    @abstractmethod
    def encode(self, x: Tensor | Mapping[Any, Tensor], /) -> Features:
        """The features of the value at the input site (several sites: of the values by site)."""

    @abstractmethod
    def decode(self, features: Features, /) -> Mapping[Any, Tensor]:
        """The reconstruction of every output site."""

    @abstractmethod
    def writes(self, ids: Sequence[int] | Tensor | None = None, /) -> Tensor:
        """The direction that each feature writes, `[feature, d]`; `[feature, site, d]` for several output sites."""

    @abstractmethod
    def reads(self, ids: Sequence[int] | Tensor | None = None, /) -> Tensor | None:
        """The direction that each feature reads, `[feature, d]` or `[feature, site, d]`; None: not affine."""

    @property
    def name(self) -> str:
        """Its name in addresses such as `m3.f17`; by default that of what it writes to: `m3`, `a3`, `resid_pre.5`."""
        if self.label:
            return self.label
        site = self.sites_out[0]
        return _SHORT.get(site.kind, str(site)).format(site.layer)

    @property
    def sha256(self) -> str:
        """sha256 (hex) over sites, settings and the bytes of all tensors; not over the label and the source."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        sites = [[str(site) for site in several] for several in (self.sites_in, self.sites_out)]
        content = {"kind": self.stored_as, "sites": sites, "settings": self.settings()}
        return canonical_sha256({**content, "tensors": hash_tensors(self.tensors())})

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Basis) and self.sha256 == other.sha256)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        read, written = (" + ".join(map(str, several)) for several in (self.sites_in, self.sites_out))
        sites = read if self.sites_in == self.sites_out else f"{read} -> {written}"
        parts = [f"{self.kind} at {sites}", f"{self.n_features:,} features", self.about, f"{self.source}"]
        return f"{type(self).__name__}({self.name}: {', '.join(filter(None, parts))}, sha256 {self.sha256[:12]})"

    def to_frame(self) -> pd.DataFrame:
        """One row that says what it is: name, kind, reads, writes, features, activation, source, sha256."""
        row = {
            "name": self.name,
            "kind": self.kind,
            "reads": " + ".join(map(str, self.sites_in)),
            "writes": " + ".join(map(str, self.sites_out)),
            "features": self.n_features,
            "activation": self.about,
            "source": str(self.source),
            "sha256": self.sha256,
        }
        return pd.DataFrame([row])

    def address(self, feature: int) -> str:
        """The name of a feature: `m3.f17`. Raises InputError for a feature that it does not have."""
        return f"{self.name}.f{check_ids(self, [feature])[0]}"

    def error(self, x: Tensor | Mapping[Any, Tensor], y: Tensor | Mapping[Any, Tensor] | None = None) -> Any:
        """What the reconstruction misses: the output site less `decode(encode(x))`.

        Args:
            x: The value at the input site (several: by site).
            y: The value at the output site; by default `x`, for a basis that writes where it reads.

        Raises InputError when `y` is missing for a basis that writes elsewhere.
        """
        if y is None:
            if self.sites_in != self.sites_out:
                raise InputError(f"The basis '{self.name}' writes to '{self.sites_out[0]}'; give the value there, too.")
            y = x
        decoded = self.decode(self.encode(x))
        if isinstance(y, Mapping):
            return {site: value - decoded[site] for site, value in y.items()}
        return y - next(iter(decoded.values()))

    @property
    def reads_affinely(self) -> bool:
        """Whether a value is an activation function of known slope of `x @ reads + constant`."""
        return False

    def alone(self, ids: Sequence[int] | Tensor) -> Basis | None:
        """The basis of some features, whose activations stay the same; None where they depend on the others."""
        return None

    def chosen(self, ids: Sequence[int] | Tensor) -> Chosen:
        """Some of its features as the nodes of a graph; see `build_graph(features=)`.

        Raises InputError for features that it does not have, or that are named twice.
        """
        numbers = tuple(sorted(check_ids(self, ids).tolist()))
        if len(set(numbers)) != len(numbers):
            raise InputError(f"A feature of '{self.name}' is named twice.")
        return Chosen(self, numbers)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same basis with its tensors on a device or in a dtype (another dtype is another sha256)."""
        return _moved(self, device, dtype)


def _moved(value: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    changed: dict[str, Any] = {}
    for one in fields(value):
        part = getattr(value, one.name)
        if isinstance(part, Tensor):
            changed[one.name] = part.to(device=device, dtype=dtype if part.is_floating_point() else None)
        elif hasattr(part, "keep") and hasattr(part, "about"):
            changed[one.name] = _moved(part, device, dtype)
    return replace(value, **changed)


def check_ids(basis: Any, ids: Sequence[int] | Tensor | None) -> Tensor:
    """The ids of features as a tensor (None: all). Raises InputError for one that the basis does not have."""
    if ids is None:
        return torch.arange(basis.n_features)
    found = torch.as_tensor(ids)
    if found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool or not len(found):
        raise InputError(f"Features are named by whole numbers, at least one; got {str(ids)[:60]}.")
    if bool(((found < 0) | (found >= basis.n_features)).any()):
        bad = int(found[(found < 0) | (found >= basis.n_features)][0])
        raise InputError(f"The basis '{basis.name}' has features 0 to {basis.n_features - 1}; got {bad}.")
    return found


def by_site(basis: Any, x: Tensor | Mapping[Any, Tensor], keys: Sequence[Any]) -> list[Tensor]:
    """The values of the input sites in order, in float32 or better, heads flattened to one vector a token."""
    if isinstance(x, Tensor):
        if len(keys) != 1:
            raise InputError(f"The basis '{basis.name}' reads {', '.join(map(str, keys))}; give the values by site.")
        x = {keys[0]: x}
    named = {str(key): value for key, value in x.items()}
    if set(named) != {str(key) for key in keys}:
        raise InputError(
            f"The basis '{basis.name}' reads {', '.join(map(str, keys))}; got values of {', '.join(named) or 'none'}."
        )
    return [named[str(key)] for key in keys]


def check_sites(*several: tuple[Site, ...]) -> None:
    """Return None when each tuple has sites of one vector a token, at least one. Raises InputError otherwise."""
    for sites in several:
        if not sites:
            raise InputError("A feature basis needs at least one site that it reads and one that it writes to.")
        for site in sites:
            if site.kind in ("scores", "pattern"):
                raise UnsupportedError(f"'{site}' is an attention pattern; a feature basis needs one vector a token.")
