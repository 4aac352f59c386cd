"""`wrap_basis`: any object with `encode` and `decode` as a feature basis, such as a dictionary of another library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp.base.canonical_json import canonical_sha256
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.features.basis import MEMORY, PER_HEAD, Basis, by_site, check_ids, check_sites
from mechinterp.features.dictionary import site_of
from mechinterp.models.feature_basis import BasisSource, Features
from mechinterp.models.sites import Site
from mechinterp.models.source import hash_tensors


@dataclass(frozen=True, eq=False, repr=False)
class Wrapped(Basis):
    """An object with `encode(x) -> activations` and `decode(activations) -> y`; made by `wrap_basis`.

    Its decoder must be affine, which is checked. It cannot be saved, and its sha256 is over the tensors of the module
    (an object that is not a module is equal to itself only).
    """

    sites_in: tuple[Site, ...]
    sites_out: tuple[Site, ...]
    wrapped: Any
    n_features: int = 0  # pyright: ignore[reportIncompatibleMethodOverride]
    offset: Tensor = torch.zeros(())  # noqa: RUF009
    """What it decodes no features to."""
    label: str = ""
    source: BasisSource = MEMORY

    @property
    def kind(self) -> str:
        """The class of the object."""
        return type(self.wrapped).__name__

    @cached_property
    def _sha256(self) -> str:
        """sha256 over the sites and the tensors of the module; of another object over its identity in memory."""
        tensors = self.tensors()
        what = hash_tensors(tensors) if tensors else f"{id(self.wrapped):x}"
        sites = [[str(site) for site in several] for several in (self.sites_in, self.sites_out)]
        return canonical_sha256({"kind": self.kind, "sites": sites, "wrapped": what})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the module."""
        return dict(self.wrapped.state_dict()) if isinstance(self.wrapped, nn.Module) else {}

    def settings(self) -> dict[str, Any]:
        """Raises UnsupportedError: what the object computes with is not known."""
        raise UnsupportedError(
            f"A wrapped {self.kind} cannot be saved; make the basis from its tensors, as with `sae`."
        )

    def encode(self, x: Tensor | Mapping[Any, Tensor], /) -> Features:
        """What the object encodes."""
        (value,) = by_site(self, x, self.sites_in)
        context: dict[str, Any] = {}
        if self.sites_in[0].kind in PER_HEAD:
            context["heads"], value = value.shape[-2], value.flatten(-2)
        return Features(self.wrapped.encode(value.to(self.offset)), context)

    def decode(self, features: Features, /) -> dict[Any, Tensor]:
        """What the object decodes."""
        out = self.wrapped.decode(features.values)
        if self.sites_out[0].kind in PER_HEAD:
            out = out.unflatten(-1, (features.context["heads"], -1))
        return {self.sites_out[0]: out}

    def writes(self, ids: Sequence[int] | Tensor | None = None, /) -> Tensor:
        """What each feature of activation 1 adds to the reconstruction, `[feature, d]`."""
        chosen = check_ids(self, ids)
        rows = torch.zeros(len(chosen), self.n_features).to(self.offset)
        rows[torch.arange(len(chosen)), chosen] = 1
        return (self.wrapped.decode(rows) - self.offset).detach()

    def reads(self, ids: Sequence[int] | Tensor | None = None, /) -> None:
        """None: the object does not say."""
        return None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Raises UnsupportedError: move the object itself, and wrap it again."""
        raise UnsupportedError(f"A wrapped {self.kind} is moved by moving the object and wrapping it again.")


def wrap_basis(
    wrapped: Any, site: str | Site, site_out: str | Site | None = None, *, width: int, label: str = ""
) -> Wrapped:
    """An object with `encode` and `decode` as a feature basis: of sae_lens, sparsify, dictionary_learning, or your own.

    Args:
        wrapped: The object. `encode` maps `[n, width]` to activations `[n, feature]`, `decode` these to `[n, d]`.
        site: What it reads.
        site_out: What it reconstructs; by default the site that it reads.
        width: How many numbers the input has.
        label: Its name in addresses.

    Raises InputError when the object does not encode and decode such vectors, UnsupportedError for a decoder that is
    not affine (a normalisation with statistics, a skip connection): there its features have no directions.
    """
    missing = [name for name in ("encode", "decode") if not callable(getattr(wrapped, name, None))]
    if missing:
        raise InputError(f"A {type(wrapped).__name__} has no {' and no '.join(missing)}, so it cannot be wrapped.")
    module: Any = wrapped
    own = next(iter(module.parameters()), None) if isinstance(wrapped, nn.Module) else None
    like = torch.empty(0) if own is None else own.detach()
    places = (site_of(site),), (site_of(site if site_out is None else site_out),)
    check_sites(*places)
    encode, decode = module.encode, module.decode
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, width, generator=generator).to(like)
    values = _tensor(encode(probe), "encode")
    n = values.shape[-1]
    if values.shape[:-1] != probe.shape[:-1]:
        raise InputError(f"`encode` must give activations [4, feature] for [4, {width}]; got {list(values.shape)}.")
    offset = _tensor(decode(torch.zeros(1, n).to(like)), "decode")[0].detach()
    first, second = torch.rand(2, 3, n, generator=generator).to(like)
    parts = [_tensor(decode(value), "decode") - offset for value in (first, second, first + 2 * second)]
    size = float(parts[2].abs().max()) + 1e-6
    if not float((parts[0] + 2 * parts[1] - parts[2]).abs().max()) < 1e-3 * size:
        raise UnsupportedError(f"The decoder of this {type(wrapped).__name__} is not affine in the activations.")
    return Wrapped(*places, wrapped, n, offset.to(like), label, BasisSource(format=type(wrapped).__module__))


def _tensor(value: Any, method: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(f"`{method}` must return a tensor; got {type(value).__name__}.")
    return value
