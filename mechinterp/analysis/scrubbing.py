"""Concept scrubbing: LEACE at every site, each fitted on what the erasures before it have left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp.analysis.directions import vector_sites
from mechinterp.analysis.steering import affine
from mechinterp.base.errors import InputError
from mechinterp.features.affine_fits import AffineFit, fit_affine
from mechinterp.models.components import Positions, position_sets
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.interventions import Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True, eq=False)
class Scrubbing:
    """The erasures of a concept, by site in the order of the model.

    Args:
        fits: The map at each site.
        positions: Where they were fitted.
    """

    fits: Mapping[Site, AffineFit]
    positions: Positions = None

    def interventions(self, pairs: Pairs | None = None) -> list[Intervention]:
        """The erasures, for a run of the clean or corrupt prompts of `pairs` (needed if they are at positions).

        Args:
            pairs: The prompts that will be run.
        """
        if self.positions is None:
            return [affine(site, fit.matrix, fit.bias) for site, fit in self.fits.items()]
        return [
            affine(site, fit.matrix, fit.bias, pairs=pairs, positions=self.positions) for site, fit in self.fits.items()
        ]


def scrub_concept(
    model: HookManager, pairs: Pairs, sites: str | Sequence[str | Site] = "resid_pre", *, positions: Positions = None
) -> Scrubbing:
    """Erasures (LEACE) of what distinguishes clean from corrupt prompts, through the layers.

    At each site in turn the map is fitted on the values that the model has under the erasures before it; so after all
    of them no linear probe at any of the sites is better than a constant, on the prompts of the fit. Erasing at one
    site only leaves later layers free to compute the concept again.

    Args:
        model: The model.
        pairs: Clean and corrupt prompts: the two classes. Every token at the positions is one activation.
        sites: A kind (`resid_pre`: every layer) or a list of sites in the order in which the model computes them.
        positions: One set of positions; by default all real tokens.

    Cost: two forwards per site. Sites at which the classes do not differ are left out.

    Raises InputError when the classes differ at none of the sites.

    Source: Belrose et al. 2023 (arXiv 2306.03819), section 6; here with one LEACE fit per site.
    """
    places = vector_sites(model, sites)
    where = position_sets(pairs, positions)
    if len(where.labels) != 1:
        raise InputError(f"`positions` must be one set here; write [({', '.join(map(repr, where.labels))})].")
    mask = where.masks[0] & pairs.mask
    found = Scrubbing({}, positions)
    for site in places:
        edits = found.interventions(pairs)
        values: list[Tensor] = []
        for tokens in (pairs.clean, pairs.corrupt):
            value = model.run(tokens, pairs.mask, record=[site], stop=site, interventions=edits).values[site]
            values.append(value[mask.to(value.device)])
        labels = torch.arange(2, device=values[0].device).repeat_interleave(len(values[0]))
        try:
            fit = fit_affine(torch.cat(values), labels, "leace")
        except InputError as error:
            if "do not differ" not in str(error):
                raise
            continue
        found = Scrubbing({**found.fits, site: fit}, positions)
    if not found.fits:
        raise InputError("Clean and corrupt prompts do not differ at any of the sites; there is nothing to erase.")
    return found
