"""Means of activations over reference prompts: what mean ablation writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.models.components import BY_QUERY
from mechinterp.models.interventions import Run
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

MEANS = ("mean", "mean-positional")
"""mean: over all real tokens of the corrupt prompts. mean-positional: the same per position, for one length."""


@runtime_checkable
class Runs(Protocol):
    """A model whose activations can be read: a HookManager, or an encoder."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def run(self, tokens: Tensor, mask: Tensor | None = None, /, *, record: Sequence[Site], stop: Site) -> Run:
        """The values at the sites."""
        ...


def site_means(
    model: Runs, reference: Pairs, sites: Sequence[Site], kind: str, batch_size: int | None
) -> dict[Site, Tensor]:
    """Every site's mean over the corrupt prompts of the reference: `[1, 1, ...]`, or `[1, pos, ...]` per position.

    Cost: one forward. Raises UnsupportedError for the mean of a pattern over positions, InputError for a mean per
    position over prompts of different lengths.
    """
    positional = kind == "mean-positional"
    if positional and not bool(reference.mask.all()):
        raise InputError("A mean per position needs prompts of one length; use 'mean', or pairs without padding.")
    if not positional:
        for site in sites:
            if site.kind in BY_QUERY:
                raise UnsupportedError(
                    f"Attention has no mean over positions at '{site}'; use 'mean-positional' or 'zero'."
                )
    totals: dict[Site, Tensor] = {}
    for chunk in reference.to(model.device).chunks(batch_size or 64):
        run = model.run(chunk.corrupt, chunk.mask, record=sites, stop=Site("resid_final"))
        for site in sites:
            value = run.values[site].to(torch.promote_types(model.dtype, torch.float32))
            if not positional:  # what stands at padding may be NaN
                value = torch.where(chunk.mask.reshape(*chunk.mask.shape, *[1] * (value.ndim - 2)), value, 0)
            total = value.sum(0, keepdim=True) if positional else value.sum((0, 1))[None, None]
            totals[site] = totals[site] + total if site in totals else total
    count = len(reference) if positional else int(reference.mask.sum())
    return {site: total / count for site, total in totals.items()}


def check_means(means: Mapping[Site, Tensor], pairs: Pairs) -> None:
    """Return None when the means fit the prompts. Raises InputError for means per position of another length."""
    for site, mean in means.items():
        if mean.shape[1] != 1 and site.kind not in BY_QUERY and mean.shape[1] != pairs.clean.shape[1]:
            raise InputError(
                f"The means per position are of {mean.shape[1]} positions, the pairs have {pairs.clean.shape[1]}; take "
                "both of one length, or replacement 'mean'."
            )
