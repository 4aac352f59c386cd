"""`Plan`: what happens in one run, put together before it starts."""

from __future__ import annotations

from collections.abc import Callable

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
