"""Qwen-Scope: one `layer3.sae.pt` per layer; top-k, with k in the name of the repository (`...-L0_50`)."""

from __future__ import annotations

import re

from mechinterp.base.errors import FormatError
from mechinterp.features.activations import TopK
from mechinterp.features.basis import Basis
from mechinterp.features.dictionary import sae
from mechinterp.features.files import Files, take
from mechinterp.features.formats.asked import Asked
from mechinterp.models.sites import Site

NAME = "qwen-scope"
_FILE = re.compile(r"layer(\d{1,4})\.sae\.pt")


def matches(files: Files) -> bool:
    """Whether there are files of that name."""
    return bool(_names(files))


def read(files: Files, asked: Asked) -> tuple[Basis, ...]:
    """One basis per layer, of the stream after it. `W_enc` is stored [feature, d], `W_dec` [d, feature]."""
    named = re.search(r"L0_(\d{1,6})(?=\D|$)", files.label)
    k = asked.k or (int(named[1]) if named else None)
    if k is None:
        raise FormatError(f"{files.label} does not say how many features are active; give it, as in k=50.")
    bases: list[Basis] = []
    for layer, name in sorted(_names(files).items()):
        if not asked.wants(layer):
            continue
        tensors, where = files.torch(name), f"{files.label}/{name}"
        encoder = take(tensors, "W_enc", (None, None), where)
        n, d = encoder.shape
        if k > n:
            raise FormatError(f"{where}: k of a top-k dictionary must be from 1 to {n}; got {k}.")
        made = sae(
            asked.site or Site("resid_post", layer),
            encoder.T,
            take(tensors, "W_dec", (d, n), where).T,
            b_enc=take(tensors, "b_enc", (n,), where),
            b_dec=take(tensors, "b_dec", (d,), where),
            activation=TopK(k),
            source=files.source(NAME, k=k),
        )
        bases.append(made)
    return tuple(bases)


def _names(files: Files) -> dict[int, str]:
    names = [files.only] if files.only else files.names("layer*.sae.pt")
    return {int(found[1]): name for name in names if (found := _FILE.fullmatch(name))}
