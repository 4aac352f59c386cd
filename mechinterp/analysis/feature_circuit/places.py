"""In which order the sites of dictionaries come in a run, and which reaches which without passing through another."""

from __future__ import annotations

from collections.abc import Sequence

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.features.addresses import by_name
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site

ATTENTION, MLP = ("attn_in", "z", "attn_raw", "attn_out"), ("mlp_in", "mlp_post", "mlp_raw", "mlp_out")
"""Sites in a row: all that goes from one to the next but one passes through what is between them."""
RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "resid_final")
_STAGES = {kind: i for i, kind in enumerate(("resid_pre", *ATTENTION, "resid_mid", *MLP))}


def place(site: Site, n_layers: int) -> tuple[int, int]:
    """(layer, stage) of a site; `resid_post.2` and `resid_pre.3` are one place.

    Raises UnsupportedError for a site that is not one vector per token on the way to the logits.
    """
    if site.kind in ("embed", "pos_embed"):
        return -1, 0
    if site.kind == "resid_final":
        return n_layers, 0
    if site.kind == "resid_post":
        return (site.layer or 0) + 1, 0
    if site.kind not in _STAGES:
        known = ", ".join(("embed", *RESIDUAL, *ATTENTION, *MLP))
        raise UnsupportedError(f"A feature circuit takes dictionaries of the sites {known}; got '{site}'.")
    return site.layer or 0, _STAGES[site.kind]


def in_order(model: HookManager, bases: Sequence[FeatureBasis]) -> tuple[FeatureBasis, ...]:
    """The bases in the order of a run.

    Raises InputError for no basis, two at one place, two of one name, and a transcoder around another basis;
    UnsupportedError for a basis of several sites, or of a site that no feature circuit takes.
    """
    if not bases:
        raise InputError("A feature circuit needs at least one dictionary; see `mi.load_bases`.")
    by_name(bases)
    n = model.dims.n_layers
    for basis in bases:
        model.resolve(basis)
        if len(basis.sites_in) != 1 or len(basis.sites_out) != 1:
            raise UnsupportedError(
                f"'{basis.name}' has several sites; a feature circuit takes dictionaries of one site, and transcoders."
            )
    ordered = tuple(sorted(bases, key=lambda basis: place(basis.sites_out[0], n)))
    spans = [(place(basis.sites_in[0], n), place(basis.sites_out[0], n)) for basis in ordered]
    for i, (_, end) in enumerate(spans):
        for k, (first, last) in enumerate(spans):
            if i != k and (end == last or first < end < last) and not _side_by_side(ordered[i], ordered[k]):
                raise InputError(
                    f"'{ordered[i].name}' and '{ordered[k].name}' overlap: at one place of the run there can be one "
                    "dictionary."
                )
    return ordered


def _side_by_side(one: FeatureBasis, other: FeatureBasis) -> bool:
    return {one.sites_out[0].kind, other.sites_out[0].kind} == {"embed", "pos_embed"}


def reaches(model: HookManager, start: Site, end: Site, between: Sequence[Site]) -> bool:
    """Whether something goes from one site to another in the model without passing through the sites `between`.

    Args:
        model: The model.
        start: The earlier site.
        end: The later one; `resid_final` stands for the logits, too, unless it is among `between`.
        between: Sites at which everything is stopped; those outside the two do not matter.
    """
    n = model.dims.n_layers
    first, last = place(start, n), place(end, n)
    if start == end or first > last:
        return start == end
    if model.dims.parallel and first[0] == last[0] and start.kind in ATTENTION and end.kind in MLP:
        return False
    for site in between:
        if site not in (start, end) and first <= (at := place(site, n)) <= last:
            same = {chain for chain in (ATTENTION, MLP) for one in (start, end) if _in_row(one, site, chain)}
            if (site.kind in RESIDUAL and first < at < last) or same:
                return False
    return True


def _in_row(one: Site, other: Site, chain: tuple[str, ...]) -> bool:
    return one.layer == other.layer and one.kind in chain and other.kind in chain
