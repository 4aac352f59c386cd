"""`Plan`: what happens in one run, put together before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.interventions import BoundEdit, Point, SiteLike
from mechinterp.models.sites import Site
from mechinterp.models.splice import Splice


class Plan:
    """What happens in one run: at which hook point, and with which feature bases."""

    def __init__(self, resolve: Callable[[SiteLike], str]) -> None:
        self.points: dict[str, Point] = {}
        self._splices: dict[FeatureBasis, Splice] = {}
        self._resolve = resolve

    def at(self, site: SiteLike) -> Point:
        """The point of a site, or of the activations of a basis."""
        if not isinstance(site, (str, Site)):
            return self.splice(site).point
        found = self.points.setdefault(self._resolve(site), Point())
        found.names.append(site)
        return found

    def splice(self, basis: FeatureBasis, *, writing: bool = False) -> Splice:
        """The basis in this run: it reads (and writes, if need be) after the edits that are planned so far."""
        if basis not in self._splices:
            self._resolve(basis)
            found = self._splices[basis] = Splice(basis)
            found.point.names.append(basis)
            for site in basis.sites_in:
                self.at(site).edits.append(BoundEdit(site, found.read(site)))
        found = self._splices[basis]
        if writing and not found.writing:
            found.writing = True
            for i, site in enumerate(basis.sites_out):
                self.at(site).edits.append(BoundEdit(site, found.write(site)))
                self.points[self._resolve(site)].later += i > 0
        return found


def planned(
    resolve: Callable[[SiteLike], str],
    record: Sequence[SiteLike],
    edits: Sequence[BoundEdit],
    grads: Sequence[SiteLike],
    stop: SiteLike | None,
) -> Plan:
    """What a run does that records these sites, applies these edits, and takes gradients at these sites.

    Args:
        resolve: The hook name of a site.
        record: Sites to record.
        edits: Edits, in the order in which they are applied.
        grads: Sites at which gradients are taken.
        stop: The site after which the run ends, if any.

    Raises InputError for a stop at a feature basis.
    """
    plan = Plan(resolve)
    for intervention in edits:
        site = intervention.site
        splice = None if isinstance(site, (str, Site)) else plan.splice(site, writing=True)
        point = splice.given if splice is not None and intervention.reading else plan.at(site)
        point.edits.append(intervention)
    for site in record:
        plan.at(site).record = True
    for site in grads:
        if not isinstance(site, (str, Site)):
            plan.splice(site, writing=True)
        plan.at(site).grad = True
    if stop is not None:
        if not isinstance(stop, (str, Site)):
            raise InputError(f"A run stops at a site, such as '{stop.sites_out[-1]}', not at a feature basis.")
        plan.at(stop).stop = True
    return plan


def by_example(function: Callable[[Tensor], Tensor | None], n_batch: int) -> Callable[[Tensor], Tensor | None]:
    """The function of a value `[batch, pos, d]` for a hook that has it as `[batch * pos, d]`: a router's input."""

    def flat(value: Tensor) -> Tensor | None:
        if value.ndim != 2:
            return function(value)
        new = function(value.unflatten(0, (n_batch, -1)))
        return None if new is None else new.flatten(0, 1)

    return flat
