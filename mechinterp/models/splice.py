"""A feature basis in one run: encoded where it reads, edited, and added as a difference where it writes.

The run goes on with `value + decode(edited) - decode(features)`, which is the edited reconstruction plus the error. So
without an edit nothing changes, to the last bit, and the error node needs no computation of its own.

Gradients follow the convention of the *live error*: as `decode(encode(x)) + (x - decode(encode(x)))` is x, a splice
without edits passes gradients as if it were not there, and the gradient at a feature is the gradient at the output
sites along the direction that it writes. Nothing goes through the encoder unless features are edited; then the run is
what it is, a function of its own activations, and is differentiated as such. (With a detached error, the gradient of
everything earlier would pass through the dictionary: another model.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mechinterp.base.errors import UnsupportedError
from mechinterp.models.feature_basis import FeatureBasis, Features, shift
from mechinterp.models.interventions import Point, fire
from mechinterp.models.sites import Site


class Splice:
    """One basis in one run; `point` has its edits and what is recorded, as for a site; `given` the edits of what it
    reads, which is not what the site holds then."""

    def __init__(self, basis: FeatureBasis) -> None:
        self.basis, self.point, self.given, self.writing = basis, Point(), Point(), False
        self._seen: dict[Site, Tensor] = {}
        self._features: Features | None = None
        self._new: Tensor | None = None
        self._change: Mapping[Any, Tensor] | None = None

    def read(self, site: Site) -> Callable[[Tensor], Tensor]:
        """The edit at an input site: it does not change the site; the last one encodes."""

        def seen(value: Tensor) -> Tensor:
            new = fire(self.given, value)
            self._seen[site] = value if new is None else new
            if len(self._seen) == len(self.basis.sites_in):
                self._encode()
            return value

        return seen

    def write(self, site: Site) -> Callable[[Tensor], Tensor]:
        """The edit at an output site: the difference that the edited features make is added."""

        def added(value: Tensor) -> Tensor:
            if self._features is None or self._new is None:
                late = [str(s) for s in self.basis.sites_in if s not in self._seen]
                raise UnsupportedError(
                    f"The basis '{self.basis.name}' writes to '{site}' before it has read {', '.join(late)}: in one "
                    "run its features can be recorded, not edited."
                )
            if self._change is None:
                self._change = shift(self.basis, self._features, self._new)
            return value + self._change[site].to(value.dtype)

        return added

    def _encode(self) -> None:
        edited = any(edit.value is not None for edit in self.point.edits)
        seen = self._seen if edited else {site: value.detach() for site, value in self._seen.items()}
        only = next(iter(seen.values()))
        self._features = self.basis.encode(only if len(seen) == 1 else seen)
        new = fire(self.point, self._features.values)
        self._new = self._features.values if new is None else new
