"""`supervised_basis`: a dictionary whose features are known attributes of prompts, fitted from labelled activations.

An activation is approximated by the mean plus one direction per attribute, that of the prompt's value of it (the
subject is Mary, the order is ABB). It is what an unsupervised dictionary can be compared with.

Source: Makelov et al. 2024 (arXiv 2405.08366), who read the attributes off the prompts; here `encode` also infers them
from an activation alone, so that it is a basis like the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.features.basis import MEMORY, check_sites
from mechinterp.features.dictionary import site_of
from mechinterp.features.one_site import OneSite
from mechinterp.models.feature_basis import BasisSource, Features
from mechinterp.models.sites import Site

MOST_SWEEPS = 20


@dataclass(frozen=True, eq=False, repr=False)
class Supervised(OneSite):
    """One feature per value of every attribute; exactly one value of each attribute is active, at 1.

    `encode` starts with no value and then chooses, attribute by attribute until nothing changes, the value that leaves
    the least squared error. Its encoding is not affine, so `reads` is None. To edit an attribute, set one value's
    feature to 0 and another's to 1. Made by `supervised_basis`.

    Args:
        sites_in: The site, as a tuple of one.
        sites_out: The same.
        W_dec: The direction of every value, `[feature, d]`, attribute by attribute.
        b_dec: The mean, `[d]`.
        attributes: The names of the attributes, each with those of its values.
        label: Its name in addresses.
        source: Where it comes from.
    """

    stored_as: ClassVar[str] = "supervised"
    sites_in: tuple[Site, ...]
    sites_out: tuple[Site, ...]
    W_dec: Tensor
    b_dec: Tensor
    attributes: tuple[tuple[str, tuple[str, ...]], ...]
    label: str = ""
    source: BasisSource = MEMORY

    def __post_init__(self) -> None:
        check_sites(self.sites_in, self.sites_out)
        if len(self.sites_in) != 1 or self.sites_in != self.sites_out:
            raise InputError("A supervised dictionary reconstructs the one site that it reads.")
        names = [name for name, _ in self.attributes]
        if (
            not names
            or len(set(names)) != len(names)
            or any(len(set(v)) != len(v) or not v for _, v in self.attributes)
        ):
            raise InputError(
                "A supervised dictionary needs attributes with different names, each with different values."
            )
        count = sum(len(values) for _, values in self.attributes)
        if self.W_dec.ndim != 2 or len(self.W_dec) != count or self.b_dec.shape != self.W_dec.shape[1:]:
            raise InputError(f"The directions of {count} values must be [{count}, d], the mean [d].")
        if not bool(self.W_dec.isfinite().all() and self.b_dec.isfinite().all()):
            raise InputError("W_dec and b_dec of a dictionary must hold finite floats.")

    @property
    def kind(self) -> str:
        """`supervised`."""
        return "supervised"

    @property
    def about(self) -> str:
        """Its attributes."""
        return ", ".join(f"{name} ({len(values)})" for name, values in self.attributes)

    def settings(self) -> dict[str, Any]:
        """The names of attributes and values."""
        return {"attributes": [[name, list(values)] for name, values in self.attributes]}

    def feature(self, attribute: str, value: str) -> int:
        """The number of the feature of a value. Raises InputError for an unknown attribute or value."""
        first = 0
        for name, values in self.attributes:
            if name == attribute:
                if value not in values:
                    raise unknown(f"value of {attribute}", value, values)
                return first + values.index(value)
            first += len(values)
        raise unknown("attribute", attribute, [name for name, _ in self.attributes])

    def code(self, attributes: Mapping[str, Sequence[str]]) -> Float[Tensor, "row feature"]:
        """The activations for known values of every attribute, one row each; for `Features(values)` and `decode`."""
        if set(attributes) != {name for name, _ in self.attributes}:
            raise InputError(f"Give the values of the attributes {', '.join(name for name, _ in self.attributes)}.")
        count = {len(values) for values in attributes.values()}
        if len(count) != 1:
            raise InputError(f"Every attribute needs as many values as there are rows; got {sorted(count)}.")
        rows = self.W_dec.new_zeros(count.pop(), self.n_features)
        for name, values in attributes.items():
            for row, value in enumerate(values):
                rows[row, self.feature(name, value)] = 1
        return rows

    def encode(self, x: Tensor | Mapping[Any, Tensor], /) -> Features:
        """The values of the attributes that reconstruct the value at the site best."""
        value, context = self.vectors(x)
        wide = self.wide(value)
        directions = self.W_dec.to(value.device, wide)
        rows = (value.detach().to(wide) - self.b_dec.to(directions)).reshape(-1, value.shape[-1])
        groups = directions.split([len(values) for _, values in self.attributes])
        parts = [torch.zeros_like(rows) for _ in groups]
        chosen = [torch.full((len(rows),), -1, device=rows.device) for _ in groups]
        for _ in range(MOST_SWEEPS):
            before = torch.stack(chosen)
            for i, group in enumerate(groups):
                rest = rows - sum(parts[:i] + parts[i + 1 :], torch.zeros_like(rows))
                chosen[i] = (rest @ group.T - group.square().sum(1) / 2).argmax(1)
                parts[i] = group[chosen[i]]
            if torch.equal(before, torch.stack(chosen)):
                break
        hot = [torch.nn.functional.one_hot(one, len(group)) for one, group in zip(chosen, groups, strict=True)]
        values = torch.cat(hot, 1).to(wide)
        return Features(values.reshape(*value.shape[:-1], -1), context)


def supervised_basis(
    site: str | Site,
    values: Float[Tensor, "row d"],
    attributes: Mapping[str, Sequence[str]],
    *,
    fit: str = "least squares",
    label: str = "",
) -> Supervised:
    """The dictionary of known attributes of activations.

    Args:
        site: Where the activations are from.
        values: The activations, one row per prompt (and position).
        attributes: By name, the value of every row.
        fit: `least squares`: the directions that reconstruct the activations best together. `means`: each value's mean
            less the mean of all, which is the same where attributes are independent.
        label: Its name in addresses.

    The directions of an attribute have mean 0 over the rows, so that its share of the reconstruction is defined.

    Raises InputError for attributes without a value for every row.

    >>> import torch
    >>> values = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 4.0], [3.0, 4.0]])
    >>> basis = supervised_basis("resid_pre.1", values, {"who": ["a", "b", "a", "b"], "where": ["x", "x", "y", "y"]})
    >>> basis.about, bool(basis.error(values).abs().max() < 1e-5)
    ('who (2), where (2)', True)
    """
    if fit not in ("least squares", "means"):
        raise unknown("fit", fit, ("least squares", "means"))
    if not attributes or any(isinstance(v, str) or len(v) != len(values) for v in attributes.values()):
        raise InputError(f"Every attribute needs a value for each of the {len(values)} rows, at least one attribute.")
    named = tuple((name, tuple(dict.fromkeys(map(str, of_rows)))) for name, of_rows in attributes.items())
    x, place = values.double(), site_of(site)
    mean = x.mean(0)
    hot: list[Tensor] = []
    for (_, known), of_rows in zip(named, attributes.values(), strict=True):
        index = torch.tensor([known.index(str(value)) for value in of_rows], device=values.device)
        hot.append(torch.nn.functional.one_hot(index, len(known)).double())
    if fit == "means":
        directions = [z.T @ (x - mean) / z.sum(0)[:, None] for z in hot]
    else:
        together = torch.linalg.pinv(torch.cat(hot, 1)) @ (x - mean)
        directions = list(together.split([z.shape[1] for z in hot]))
    shifts = [z.mean(0) @ group for z, group in zip(hot, directions, strict=True)]
    directions = [group - shift for group, shift in zip(directions, shifts, strict=True)]
    source = BasisSource(format="supervised", about={"values": str(len(values)), "fit": fit})
    W_dec = torch.cat(directions).to(values.dtype)
    return Supervised((place,), (place,), W_dec, (mean + sum(shifts)).to(values.dtype), named, label, source)
