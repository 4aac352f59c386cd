"""What a caller says about the files of a basis, where the files do not say it themselves."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from mechinterp.base.errors import FormatError
from mechinterp.models.sites import Site


@dataclass(frozen=True)
class Asked:
    """What the caller of `load_bases` says; None: the files must say it.

    Args:
        site: What is read.
        site_out: What is written to, for a transcoder.
        k: The k of a top-k dictionary.
        input_scale: The factor by which activations were multiplied in training.
        layers: Which layers of a set are read; None: all.
        has: Whether the model has a site; None: no model is given.
    """

    site: Site | None = None
    site_out: Site | None = None
    k: int | None = None
    input_scale: float | None = None
    layers: tuple[int, ...] | None = None
    has: Callable[[Site], bool] | None = None

    def wants(self, layer: int) -> bool:
        """Whether this layer of a set is read."""
        return self.layers is None or layer in self.layers


def no_site(where: str) -> FormatError:
    """The error for files that do not say what they were trained on."""
    return FormatError(f"{where} does not say which site it reads; give it, as in site='resid_post.5'.")


def layer_in(text: str) -> int | None:
    """The layer that a path names (`layer_20`, `layers.3`, `L12R`), the last one if several; None for none."""
    found = re.findall(r"(?:layers?[._]?|L)(\d{1,4})(?=\D|$)", text)
    return int(found[-1]) if found else None
