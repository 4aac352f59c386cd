"""Compensation: how much more every part writes toward the answer when other parts are replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mechinterp.analysis.direct_logit_attribution import direct_logit_attribution
from mechinterp.base.batches import batches
from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.engines.grid import Grid
from mechinterp.engines.means import MEANS, check_means, site_means
from mechinterp.models.components import Part, parse_part, position_sets
from mechinterp.models.direction_readout import explained
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

REPLACEMENTS = ("pair", "mean", "mean-positional", "zero")


def compensation(
    model: HookManager,
    pairs: Pairs,
    replaced: Sequence[str],
    *,
    replacement: str = "pair",
    batch_size: int | None = None,
) -> Grid:
    """A Grid (node, example) in logits: the direct effect of every part with others replaced, minus that without.

    Positive = the part writes more toward the right answers than in the clean run, so that it compensates for those
    that are missing. The sum over all parts is the change of the logit difference (before a soft cap), minus the effect
    of `activation_patching`. The final norm's scale is that of each run. In the view of `read_direction` the reading
    takes the place of the logit difference.

    Args:
        model: The model.
        pairs: Clean and corrupt prompts.
        replaced: Heads (`a9.h9`) and MLPs (`m3`) that are replaced together, each with an optional `@end`.
        replacement: `pair` (their values on the corrupt prompts), `mean` or `mean-positional` (over the corrupt
            prompts), or `zero`.
        batch_size: Examples at a time; by default all.

    Cost: two forwards, one more with `pair`, `mean` or `mean-positional`.

    Raises InputError for no parts, and for parts that do not exist or are not heads or MLPs.

    Source: backup name mover heads, Wang et al. 2022 (arXiv 2211.00593), section 3.4. They replace by the mean over ABC
    prompts and measure direct effects by path patching to the logits.

    >>> import mechinterp as mi
    >>> from mechinterp.analysis.compensation import compensation
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=8, split="train", seed=0)
    >>> compensation(model, pairs, ["a2.h1"]).axes
    ('node', 'example')
    """
    if replacement not in REPLACEMENTS:
        raise unknown("replacement", replacement, REPLACEMENTS)
    if isinstance(replaced, str) or not replaced:
        raise InputError(f"`replaced` is a list of at least one head or MLP, as in ['a9.h9']; got {replaced!r}.")
    pairs = pairs.to(model.device)
    parts = [_whole_node(model, name) for name in replaced]
    sites = tuple(dict.fromkeys(part.site for part in parts))
    means = site_means(model, pairs, sites, replacement, batch_size) if replacement in MEANS else {}
    found: list[Tensor] = []
    grids: list[Grid] = []
    toward = explained(model).direction
    for _, chunk in batches(pairs, batch_size):
        values = _values(model, chunk, sites, replacement, means)
        edits = [
            Intervention(site, _write([p for p in parts if p.site == site], chunk, values[site])) for site in sites
        ]
        before = direct_logit_attribution(model, chunk, toward)
        with model.intervene(*edits):
            after = direct_logit_attribution(model, chunk, toward)
        found.append(after.values - before.values)
        grids.append(after)
    labels = {**grids[0].labels, "example": tuple(str(i) for i in range(len(pairs)))}
    about = {"replaced": list(replaced), "replacement": replacement, "sign": "positive = compensates"}
    cost = {"forwards": 2.0 + (replacement != "zero")}
    return replace(grids[0], values=torch.cat(found, 1), labels=labels, name="change", about=about, cost=cost)


def _whole_node(model: HookManager, name: str) -> Part:
    part = parse_part(model, name)
    if part.site.kind != "mlp_out" and (part.site.kind != "z" or part.unit is None):
        raise InputError(f"{name!r} is neither a head ('a9.h9') nor an MLP ('m3').")
    return part


def _values(
    model: HookManager, pairs: Pairs, sites: Sequence[Site], replacement: str, means: dict[Site, Tensor]
) -> dict[Site, Tensor]:
    if replacement == "pair":
        run = model.run(pairs.corrupt, pairs.mask, record=sites, stop=Site("resid_final"))
        return {site: run.values[site] for site in sites}
    if replacement == "zero":
        return {site: torch.zeros((), device=model.device) for site in sites}
    check_means(means, pairs)
    return means


def _write(parts: Sequence[Part], pairs: Pairs, given: Tensor) -> Callable[[Tensor], Tensor]:
    """Writes the new values of one site's parts where their positions are."""
    masks = [position_sets(pairs, None if part.position is None else [part.position]).masks[0] for part in parts]

    def edit(value: Tensor) -> Tensor:
        new, full = value.clone(), given.to(value.dtype).expand_as(value)
        for part, mask in zip(parts, masks, strict=True):
            unit = slice(None) if part.unit is None else slice(part.unit, part.unit + 1)
            where = mask.reshape(*mask.shape, *[1] * (value.ndim - 2))
            new[:, :, unit] = torch.where(where, full[:, :, unit], new[:, :, unit])
        return new

    return edit
