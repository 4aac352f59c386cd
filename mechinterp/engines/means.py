"""Means of activations over reference prompts, for mean ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mechinterp.base.batches import over_batches
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.models.components import BY_QUERY
from mechinterp.models.interventions import Run
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

MEANS = ("mean", "mean-positional")
"""mean: over all real tokens of the corrupt prompts. mean-positional: the same per position, for one length."""


@runtime_checkable
class Runs(Protocol):
    """A model whose activations can be recorded: a HookManager, or an encoder."""

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

    def sums(batch: Pairs, _: slice) -> dict[str, Tensor]:
        run = model.run(batch.corrupt, batch.mask, record=sites, stop=Site("resid_final"))
        return {str(site): total(run.values[site], batch.mask) for site in sites}

    def total(value: Tensor, mask: Tensor) -> Tensor:
        value = value.to(torch.promote_types(model.dtype, torch.float32))
        if positional:
            return value.sum(0, keepdim=True)
        # The values at padding may be NaN.
        return torch.where(mask.reshape(*mask.shape, *[1] * (value.ndim - 2)), value, 0).sum((0, 1))[None, None]

    size = 64 if batch_size is None else batch_size
    totals = over_batches(reference.to(model.device), size, sums, {str(site): "sum" for site in sites})
    count = len(reference) if positional else int(reference.mask.sum())
    return {site: totals[str(site)].to(model.device) / count for site in sites}


def check_means(means: Mapping[Site, Tensor], pairs: Pairs) -> None:
    """Return None when the means fit the prompts. Raises InputError for means per position of another length."""
    for site, mean in means.items():
        if mean.shape[1] != 1 and site.kind not in BY_QUERY and mean.shape[1] != pairs.clean.shape[1]:
            raise InputError(
                f"The means per position have {mean.shape[1]} positions, the pairs {pairs.clean.shape[1]}; use "
                "prompts of the same length, or replacement 'mean'."
            )
