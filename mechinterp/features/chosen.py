"""`Chosen`: some features of a basis as a basis of their own, for the nodes of a graph.

Only these features are computed where their activations do not depend on the others; in a top-k dictionary all are
encoded, and these are taken. Everything else of the site (other features, biases, a skip connection, what the
reconstruction misses) is the error of these few, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.models.feature_basis import BasisSource, Features
from mechinterp.models.sites import Site


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some features of a basis; made by `basis.chosen(ids)`.

    Args:
        whole: The basis.
        ids: The numbers of the features.
    """

    whole: Any
    ids: tuple[int, ...]

    def __hash__(self) -> int:
        return hash((self.whole.sha256, self.ids))

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Chosen) and (self.whole, self.ids) == (other.whole, other.ids))

    def __str__(self) -> str:
        return f"{len(self.ids)} features of '{self.whole.name}'"

    @property
    def name(self) -> str:
        """The name of the basis."""
        return str(self.whole.name)

    @property
    def source(self) -> BasisSource:
        """Where the basis comes from."""
        return self.whole.source

    @property
    def sites_in(self) -> tuple[Site, ...]:
        """What the basis reads."""
        return self.whole.sites_in

    @property
    def sites_out(self) -> tuple[Site, ...]:
        """What the basis writes to."""
        return self.whole.sites_out

    @property
    def n_features(self) -> int:
        """How many features were chosen."""
        return len(self.ids)

    @cached_property
    def _alone(self) -> Any:
        """The dictionary of these features alone; None where a value depends on the other features, too."""
        return self.whole.alone(self.ids)

    @cached_property
    def _rows(self) -> Tensor:
        return self.whole.writes(list(self.ids))

    def encode(self, x: Tensor | Mapping[Any, Tensor], /) -> Features:
        """How much of its direction every feature writes."""
        found = (self.whole if self._alone is None else self._alone).encode(x)
        values = found.values if self._alone is not None else found.values[..., list(self.ids)]
        if (scale := found.context.get("scale")) is not None:
            values = values * scale
        return Features(values, {key: value for key, value in found.context.items() if key == "heads"})

    def encode_each(self, x: Float[Tensor, "feature *axes d"], /) -> Float[Tensor, "*axes feature"]:
        """The value of every feature when each reads an input of its own."""
        if self._alone is not None:
            return self._alone.encode_each(x)
        return torch.stack([self.whole.encode(x[i]).values[..., n] for i, n in enumerate(self.ids)], -1)

    def slopes(self, values: Float[Tensor, "*axes feature"], /) -> Float[Tensor, "*axes feature"]:
        """The derivative of every value with respect to what its activation function is given."""
        return (self.whole if self._alone is None else self._alone).activation.slopes(values)

    def decode(self, features: Features, /) -> Mapping[Any, Tensor]:
        """Values times directions."""
        rows, heads = self._rows.to(features.values), features.context.get("heads")
        if rows.ndim == 3:
            return {site: features.values @ rows[:, i] for i, site in enumerate(self.sites_out)}
        out = features.values @ rows
        return {self.sites_out[0]: out if heads is None else out.unflatten(-1, (heads, -1))}

    def writes(self, ids: Sequence[int] | Tensor | None = None, /) -> Tensor:
        """The direction that each of them writes, `[feature, d]`; `[feature, site, d]` for several output sites."""
        return self._rows if ids is None else self._rows[torch.as_tensor(ids)]

    def reads(self, ids: Sequence[int] | Tensor | None = None, /) -> Tensor | None:
        """The direction that each of them reads, `[feature, d]`; None: its encoding is not affine."""
        found = self.whole.reads(list(self.ids))
        return found if found is None or ids is None else found[torch.as_tensor(ids)]
