"""Bases to compare a dictionary with: the same number of random directions, the coordinates, the state as one piece."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.features.dictionary import Dictionary, sae, site_of
from mechinterp.features.matching_pursuit import MatchingPursuit
from mechinterp.features.neurons import Neurons, neuron_basis
from mechinterp.models.feature_basis import BasisSource
from mechinterp.models.sites import Site


def random_dictionary(
    site: str | Site, values: Float[Tensor, "n d"], n_features: int, l0: int, *, seed: int = 0, label: str = ""
) -> MatchingPursuit:
    """A dictionary of random directions: as many as another one has, and as many active per token.

    Directions are drawn evenly from the sphere. They are fitted to an activation (less the mean) one after another,
    `l0` times that which fits the rest best (matching pursuit): directions that fit an activation are similar, so
    their coordinates, taken at once, would add up to several times of it. What such a dictionary achieves, any
    dictionary of this size does.

    Args:
        site: Where.
        values: Activations there, for the mean.
        n_features: How many directions.
        l0: How many are active per token, at most.
        seed: Of the directions.
        label: Its name in addresses.

    Cost: `l0` times the encoding of a dictionary of this size.

    Raises InputError for numbers below 1, or more active features than there are.
    """
    if not 1 <= l0 <= n_features:
        raise InputError(f"A random dictionary of {n_features} features has 1 to {n_features} active; got {l0}.")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_features, values.shape[1], generator=generator, dtype=torch.float64)
    rows = (rows / rows.norm(dim=1, keepdim=True)).to(values)
    at, source = (site_of(site),), BasisSource(format="random", about={"seed": str(seed)})
    return MatchingPursuit(at, at, rows, values.mean(0), 0.0, l0, False, label, source)


def whole_state(site: str | Site, d: int, *, label: str = "") -> Dictionary:
    """The state as one piece: a dictionary with one feature that is never active, so that its error is all of the site.

    Args:
        site: Where.
        d: The width of the site.
        label: Its name in addresses.
    """
    return sae(site, torch.zeros(d, 1), torch.zeros(1, d), label=label, source=BasisSource(format="whole state"))


def coordinates(site: str | Site, d: int, *, label: str = "") -> Neurons:
    """The numbers of a site as features, with an error of 0: the neuron baseline.

    Args:
        site: Where.
        d: The width of the site.
        label: Its name in addresses.
    """
    return neuron_basis(site_of(site), d, label=label)
