"""`feature_weights`: how much one feature feeds another through the weights alone, directly or through a head.

No prompt is needed: the number is the part of an edge that does not depend on the input (Dunefsky et al. 2024, arXiv
2406.11944, section 3.3). On a prompt the contribution of feature i to the pre-activation of feature j is the activation
of i times this number, divided by the scale of the norm before j (and through a head times its attention, divided by
the scale of the norm before the head). Norm weights and centring are folded in; scales are taken as 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.analysis.describe_subject import STREAM
from mechinterp.analysis.weights import FOLDED, head_of, reading, writing
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.engines.grid import Grid
from mechinterp.features.basis import Basis, check_ids
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.modes import Gradients
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Site

LARGEST = 2**27
"""A table of more pairs of features than this is refused."""
STAGES = {
    **{"resid_pre": 0, "attn_in": 0, "attn_out": 1, "resid_mid": 1, "mlp_in": 1},
    **{"mlp_raw": 2, "mlp_out": 2, "resid_post": 2},
}
"""When a site is read or written within its layer."""


def feature_weights(
    model: HookManager,
    a: Basis,
    b: Basis,
    *,
    via: str = "resid",
    sources: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
) -> Grid:
    """The weights from the features of one basis to those of a later one, without any prompt.

    Args:
        model: The model.
        a: A basis that writes to the residual stream.
        b: A basis that reads it, or an MLP's input, along one direction per feature.
        via: `resid`: directly along the residual stream. A head (`a9.h9`) between the two: through its values and
            output, as if it attended with weight 1 to the token of `a`.
        sources: Which features of `a`; by default all.
        targets: Which features of `b`; by default all.

    Returns a Grid `source, target` in units of b's pre-activation per unit of a's activation, norm scales taken as 1:
    positive = it excites. Over several output sites of `a` that lie before `b`, it is the sum.

    Memory: the table, and nothing larger than the two dictionaries.

    Raises InputError for bases in the wrong order, a head that is not between them, and a table of more than 2^27
    numbers; UnsupportedError for a basis without one read direction per feature.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> m1, m2 = mi.load_basis("bundled:m1"), mi.load_basis("bundled:m2")
    >>> mi.feature_weights(model, m1, m2, sources=[17]).values.shape
    torch.Size([1, 256])
    """
    for basis in (a, b):
        model.resolve(basis)
    ids = [check_ids(basis, chosen) for basis, chosen in ((a, sources), (b, targets))]
    if len(ids[0]) * len(ids[1]) > LARGEST:
        raise InputError(
            f"{len(ids[0]):,} x {len(ids[1]):,} pairs of features are too many; choose sources= or targets=."
        )
    reader = _only(b)
    head = None if via == "resid" else head_of(model, via)
    middle = (0, 0) if head is None else (head.layer, 0)
    with Gradients(False) as off, off:
        read = _read_directions(model, b, ids[1])
        if head is not None:
            if not (head.layer, 1) <= _place(model, reader):
                raise InputError(f"'{b.name}' reads {reader}, before the head {via} writes.")
            value = reading(model, head.layer, "v")[head.head]
            read = read @ writing(model, head.layer)[head.head].T @ value.T
        total = read.new_zeros(len(ids[0]), len(ids[1]))
        n_before = 0
        for site, rows in _writes(model, a, ids[0]):
            limit = _place(model, reader) if head is None else middle
            if _place(model, site) <= limit:
                total, n_before = total + rows.to(read) @ read.T, n_before + 1
    if not n_before:
        what = f"'{b.name}' reads {reader}" if head is None else f"{via} reads layer {head.layer}"
        raise InputError(f"'{a.name}' writes to {' + '.join(map(str, a.sites_out))}, and {what}, which is earlier.")
    labels = {"source": tuple(map(a.address, ids[0].tolist())), "target": tuple(map(b.address, ids[1].tolist()))}
    return Grid(total, labels, "weight", "pre-activation per activation", {"via": via, "scales": FOLDED})


def _only(basis: Basis) -> Site:
    if len(basis.sites_in) != 1:
        raise UnsupportedError(f"'{basis.name}' reads several sites; weights into it are not one number.")
    return basis.sites_in[0]


def _place(model: HookManager, site: Site) -> tuple[int, int]:
    """Where a site stands in the residual stream, as (layer, stage)."""
    if site.kind == "embed":
        return (0, 0)
    if site.kind in ("resid_final", "final_norm"):
        return (10**6, 0)
    if site.kind not in STAGES:
        raise UnsupportedError(f"'{site}' is not at the residual stream or an MLP's input.")
    layer = site.layer or 0
    if site.kind == "mlp_in" and model.dims.parallel:
        return (layer, 0)
    return (layer + 1, 0) if STAGES[site.kind] == 2 else (layer, STAGES[site.kind])


def _read_directions(model: HookManager, basis: Basis, ids: Tensor) -> Float[Tensor, "feature d_model"]:
    """What each feature reads of the residual stream, the norm before it folded in."""
    site, rows = _only(basis), basis.reads(ids)
    if rows is None or site.kind not in (*STREAM, "mlp_in"):
        raise UnsupportedError(f"The features of '{basis.name}' do not read the residual stream along one direction.")
    rows = rows.to(model.device, torch.promote_types(model.dtype, torch.float32))
    if site.kind != "mlp_in":
        return rows
    return (model.layout.mlp_norm[site.layer or 0] or Norm("none")).project_transposed(rows)


def _writes(model: HookManager, basis: Basis, ids: Tensor) -> list[tuple[Site, Float[Tensor, "feature d_model"]]]:
    """What each feature writes to the residual stream, by site."""
    wide = torch.promote_types(model.dtype, torch.float32)
    rows = basis.writes(ids).to(model.device, wide)
    rows = rows[:, None] if rows.ndim == 2 else rows
    found: list[tuple[Site, Tensor]] = []
    for i, site in enumerate(basis.sites_out):
        if site.kind == "mlp_raw":
            found.append((site, model.layout.mlp_post[site.layer or 0].project(rows[:, i])))
        elif site.kind in STREAM:
            found.append((site, rows[:, i]))
        else:
            raise UnsupportedError(f"'{basis.name}' writes to {site}, not to the residual stream.")
    return found
