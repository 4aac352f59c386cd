"""`knn_deviation`: how far the states of prompts are from those of reference prompts, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.analysis.directions import vector_sites
from mechinterp.base.batches import batches
from mechinterp.base.errors import InputError
from mechinterp.engines.grid import Grid, numbered
from mechinterp.graphs.token_positions import take_positions
from mechinterp.models.components import Position, position_index
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

MEASURES = ("distance", "deviation", "share")
"""distance: the mean distance to the k nearest reference states; deviation: in standard deviations of the reference's
own distances; share: of the reference states that are at least as far from the others."""


def knn_deviation(
    model: HookManager,
    pairs: Pairs,
    reference: Pairs,
    sites: str | Sequence[str | Site] = "resid_pre",
    position: Position = -1,
    *,
    k: int = 5,
    prompt: Literal["clean", "corrupt"] = "clean",
    batch_size: int | None = None,
) -> Grid:
    """A Grid (site, measure, example): how far each prompt's state is from the states of the reference prompts.

    The distance is the mean Euclidean distance to the k nearest reference states. Its baseline is the same distance of
    every reference state to the *other* reference states (leave one out), so a prompt that is like the reference has a
    `deviation` near 0 and a `share` that is uniform. The first site at which a prompt deviates is where it leaves
    them. The reference is for instance the prompts that the model does right.

    Args:
        model: The model.
        pairs: The prompts.
        reference: Prompts whose clean side is the reference; none of them may be among `pairs`.
        sites: A kind (every layer), a site, or a list.
        position: Where in each prompt.
        k: How many neighbours.
        prompt: Which side of `pairs`.
        batch_size: Examples at a time; by default all.

    Cost: two forwards, and distances of every prompt to every reference state.

    Raises InputError for fewer than k + 2 reference prompts, and for prompts that are also in the reference.

    Source: REMA, 2025 (arXiv 2509.22518), with leave-one-out distances as the baseline.

    >>> import mechinterp as mi
    >>> model, task = mi.load_model("bundled"), mi.load_task("ioi")
    >>> reference, other = (task.pairs(model, n=16, split=split) for split in ("train", "test"))
    >>> mi.knn_deviation(model, other, reference, position="end").axes
    ('site', 'measure', 'example')
    """
    if prompt not in ("clean", "corrupt"):
        raise InputError(f"`prompt` is 'clean' or 'corrupt'; got {prompt!r}.")
    if k < 1 or len(reference) < k + 2:
        raise InputError(f"k = {k} neighbours need at least {max(k, 1) + 2} reference prompts; got {len(reference)}.")
    known = set(_prompts(reference, "clean"))
    if shared := sum(own in known for own in _prompts(pairs, prompt)):
        raise InputError(
            f"{shared} of the {len(pairs)} prompts are also in the reference, so they would be their own neighbours; "
            "leave them out."
        )
    places = vector_sites(model, sites)
    states, own = (
        _states(model, p, which, places, position, batch_size) for p, which in ((pairs, prompt), (reference, "clean"))
    )
    found: list[Tensor] = []
    for site in places:
        distances, baseline = neighbour_distances(states[site], own[site], k)
        spread = baseline.std()
        deviation = (
            (distances - baseline.mean()) / spread if float(spread) > 0 else torch.full_like(distances, torch.nan)
        )
        share = (1 + (baseline[None] >= distances[:, None]).double().sum(1)) / (1 + len(baseline))
        found.append(torch.stack([distances, deviation, share]))
    labels = {"site": tuple(map(str, places)), "measure": MEASURES, "example": numbered(len(pairs))}
    about = {
        "k": k,
        "position": str(position),
        "reference": len(reference),
        "prompt": prompt,
        "baseline": "leave one out",
    }
    return Grid(torch.stack(found), labels, "value", "", about, {"forwards": 2.0})


def neighbour_distances(
    states: Float[Tensor, "n d"], reference: Float[Tensor, "m d"], k: int
) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    """(mean distance of each state to its k nearest reference states, that of each reference state to the others)."""
    wide = reference.double()
    exact = "donot_use_mm_for_euclid_dist"
    to_reference = torch.cdist(states.double().to(wide.device), wide, compute_mode=exact)
    among = torch.cdist(wide, wide, compute_mode=exact)
    among.fill_diagonal_(torch.inf)
    nearest = (table.topk(k, largest=False).values.mean(1) for table in (to_reference, among))
    first, second = nearest
    return first, second


def _states(
    model: HookManager, pairs: Pairs, prompt: str, sites: Sequence[Site], position: Position, batch_size: int | None
) -> dict[Site, Float[Tensor, "n d"]]:
    index = position_index(pairs, position)
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for rows, batch in batches(pairs, batch_size):
        tokens = batch.clean if prompt == "clean" else batch.corrupt
        values = model.run(tokens, batch.mask, record=sites).values
        for site in sites:
            found[site].append(take_positions(values[site], index[rows, None].to(values[site].device))[:, 0])
    return {site: torch.cat(own) for site, own in found.items()}


def _prompts(pairs: Pairs, prompt: str) -> list[tuple[int, ...]]:
    table = pairs.clean if prompt == "clean" else pairs.corrupt
    return [tuple(row[:n]) for row, n in zip(table.tolist(), pairs.lengths.tolist(), strict=True)]
