"""What bases share that reconstruct the one site that they read, as a sum of directions and perhaps a mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.features.basis import PER_HEAD, Basis, by_site, check_ids
from mechinterp.models.feature_basis import Features


class OneSite(Basis):
    """A basis of directions `W_dec` `[feature, d]`; subclasses have that field, perhaps `b_dec` `[d]`, and `encode`."""

    W_dec: Tensor

    @property
    def n_features(self) -> int:
        """How many features it has."""
        return len(self.W_dec)

    @property
    def _mean(self) -> Tensor | None:
        return getattr(self, "b_dec", None)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, as they are stored."""
        return {"W_dec": self.W_dec} | ({} if self._mean is None else {"b_dec": self._mean})

    def vectors(self, x: Tensor | Mapping[Any, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """The value at the site as one vector a token, and what `decode` needs. Raises InputError for another width."""
        (value,) = by_site(self, x, self.sites_in)
        context: dict[str, Any] = {}
        if self.sites_in[0].kind in PER_HEAD:
            context["heads"], value = value.shape[-2], value.flatten(-2)
        if value.shape[-1] != self.W_dec.shape[1]:
            raise InputError(
                f"The basis '{self.name}' reads vectors of {self.W_dec.shape[1]} numbers; got {value.shape[-1]}. Is it "
                "of another model, or of another site?"
            )
        return value, context

    def wide(self, value: Tensor) -> torch.dtype:
        """The dtype to compute activations in: that of value or directions, float32 at least."""
        return torch.promote_types(torch.promote_types(value.dtype, self.W_dec.dtype), torch.float32)

    def decode(self, features: Features, /) -> dict[Any, Tensor]:
        """The reconstruction of the site."""
        out = features.values @ self.W_dec.to(features.values)
        if self._mean is not None:
            out = out + self._mean.to(features.values)
        if self.sites_out[0].kind in PER_HEAD:
            out = out.unflatten(-1, (features.context["heads"], -1))
        return {self.sites_out[0]: out}

    def writes(self, ids: Sequence[int] | Tensor | None = None, /) -> Tensor:
        """The directions, `[feature, d]`; of neurons, `writes() @ W_out` is what they add to the residual stream."""
        return self.W_dec if ids is None else self.W_dec[check_ids(self, ids).to(self.W_dec.device)]

    def reads(self, ids: Sequence[int] | Tensor | None = None, /) -> None:
        """None: the encoding is not affine before an activation."""
        return None
