"""What a feature basis is: the protocol by which the hook manager, the analyses and the graph know dictionaries.

A basis reads one site or several, gives a value per feature, and writes a direction per feature to one site or several:
an autoencoder at one site, a transcoder from an MLP's input to its output, a subspace, the neurons themselves. The
kinds are in `mechinterp/features/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from mechinterp.models.sites import Site


@dataclass(frozen=True)
class BasisSource:
    """Where a basis comes from: a folder or repository, or the recipe of a fit.

    Args:
        where: The folder, `org/name/folder` of the hub, or "" for a basis made in memory.
        format: The layout of the files (`saelens`, `gemma-scope`, ...), or how it was made (`memory`, `svd`, ...).
        revision: The commit of the repository; "" otherwise.
        sha256: Of the files it was read from, by file name.
        about: Anything else that the files or the fit say, as text.
        address: What `load_basis` loads it from, with its commit on the hub; "" for a basis made in memory.
        options: What `load_basis` was told besides, such as the layer of a set.
    """

    where: str = ""
    format: str = "memory"
    revision: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict[str, str])
    about: Mapping[str, str] = field(default_factory=dict[str, str])
    address: str = field(default="", compare=False)
    options: Mapping[str, str | int | float] = field(default_factory=dict[str, str | int | float], compare=False)

    def __str__(self) -> str:
        at = f"@{self.revision[:12]}" * bool(self.revision)
        return f"{self.format}: {self.where}{at}" if self.where else self.format


@dataclass(frozen=True, eq=False)
class Features:
    """The code of an input: one value per feature, and what decoding needs besides.

    Args:
        values: The feature activations; 0 = not active.
        context: What `decode` needs of the input: the statistics of a normalisation, the input of a skip connection.
    """

    values: Float[Tensor, "*axes feature"]
    context: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def with_values(self, values: Tensor) -> Features:
        """The same code with other activations."""
        return replace(self, values=values)


@runtime_checkable
class FeatureBasis(Protocol):
    """Features that are read from sites and write to sites.

    `decode` is affine in the activations (given the context), with the rows of `writes` as its matrix; so the error
    (what was at the output site less the decoded features) does not depend on which features are edited.
    """

    @property
    def name(self) -> str:
        """The name in addresses such as `m3.f17`: `m3`, `resid_pre.5`."""
        ...

    @property
    def source(self) -> BasisSource:
        """Where it comes from."""
        ...

    @property
    def sites_in(self) -> tuple[Site, ...]:
        """What it reads."""
        ...

    @property
    def sites_out(self) -> tuple[Site, ...]:
        """What it writes to."""
        ...

    @property
    def n_features(self) -> int:
        """How many features it has."""
        ...

    def encode(self, x: Tensor | Mapping[Any, Tensor], /) -> Features:
        """The features of the value at the input site (several sites: of the values by site)."""
        ...

    def decode(self, features: Features, /) -> Mapping[Any, Tensor]:
        """The reconstruction of every output site."""
        ...

    def writes(self, ids: Sequence[int] | Tensor | None = None, /) -> Tensor:
        """The direction that each feature writes, `[feature, d]`; `[feature, site, d]` for several output sites."""
        ...

    def reads(self, ids: Sequence[int] | Tensor | None = None, /) -> Tensor | None:
        """The direction that each feature reads, `[feature, d]` or `[feature, site, d]`; None: not affine."""
        ...


def shift(basis: FeatureBasis, features: Features, values: Tensor) -> Mapping[Any, Tensor]:
    """What changes at each output site when the activations of `features` become `values`; the error stays.

    Exactly 0 where the two are the same.
    """
    before, after = basis.decode(features), basis.decode(features.with_values(values))
    return {site: after[site] - before[site] for site in before}


@runtime_checkable
class ChosenFeatures(FeatureBasis, Protocol):
    """Some features of a basis, as the nodes of a graph; all else that is at the output site is their error.

    The value of a feature is how much of its direction it writes: its activation (under a normalisation of the basis,
    times the scale of the token). So `decode` is values times `writes`, and the nodes need no other site of the run.
    """

    @property
    def whole(self) -> NodeBasis:
        """The basis of which these are some features."""
        ...

    @property
    def ids(self) -> tuple[int, ...]:
        """The numbers of the features."""
        ...

    def encode_each(self, x: Float[Tensor, "feature *axes d"], /) -> Float[Tensor, "*axes feature"]:
        """The value of every feature when each reads an input of its own."""
        ...

    def slopes(self, values: Float[Tensor, "*axes feature"], /) -> Float[Tensor, "*axes feature"]:
        """The derivative of every value with respect to the product of the input and the feature's `reads`."""
        ...


@runtime_checkable
class NodeBasis(FeatureBasis, Protocol):
    """A basis whose features can be nodes of a graph."""

    @property
    def sha256(self) -> str:
        """sha256 over all that it computes with."""
        ...

    @property
    def reads_affinely(self) -> bool:
        """Whether a value is an activation function of `x @ reads + constant`, of known slope: then it has a port."""
        ...

    def chosen(self, ids: Sequence[int], /) -> ChosenFeatures:
        """Some of its features."""
        ...
