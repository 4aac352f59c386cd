"""A model up to one site, whose logits are the reading of a direction there; so everything that explains logits does.

It is a view of a loaded model: same weights, same hooks, same runs in progress. Its layers are those before the site,
its final residual stream is the value at the site, and its "unembedding" has two columns without a norm before them:
the reading `x @ read - offset`, and 0. So the metric `direction` (the first less the second) is the reading, and the
softmax is the logistic function of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.interventions import Edit, Intervention, Run, SiteName, as_interventions
from mechinterp.models.layout import Dims
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Site
from mechinterp.models.tokens import check_at

FINAL = Site("resid_final")


@dataclass(frozen=True)
class Explained:
    """What the parts of a model are said to write toward, as analyses name it and in words."""

    direction: str | int
    """The `direction` of `direct_logit_attribution`."""
    metric: str
    """The name of its metric."""
    aim: str
    """What a part writes toward, for labels."""
    right: str
    """The same, for sentences."""
    total: str
    """The sum of all direct effects."""


ANSWERS = Explained("answers", "logit_diff", "the answer", "the right answers", "the logit difference")
READING = Explained(0, "direction", "the reading", "the reading", "the difference of clean and corrupt readings")


def explained(model: HookManager) -> Explained:
    """The answers; the reading for a model whose only output is the reading of a direction."""
    return READING if isinstance(model, DirectionReadout) else ANSWERS


def dims_before(dims: Dims, site: Site) -> Dims:
    """The dimensions of a model that ends at a residual stream, with the reading in place of the logits.

    Raises InputError for another site, and for `resid_pre.0`, before which there is nothing.
    """
    after = {"resid_pre": 0, "resid_post": 1}
    if site != FINAL and (site.kind not in after or site.layer is None):
        raise InputError(
            f"'{site}' is not a residual stream between layers, where everything before it has been added up; a "
            "direction is explained at 'resid_pre', 'resid_post' or 'resid_final'."
        )
    end = dims.n_layers if site.layer is None else site.layer + after[site.kind]
    if not 0 < end <= dims.n_layers:
        why = "nothing is written before it but the input" if end == 0 else f"the model has {dims.n_layers} layers"
        raise InputError(f"A direction cannot be explained at '{site}': {why}. Take another site.")
    return replace(dims, n_layers=end, layers=dims.layers[:end], d_vocab_out=2)


class DirectionReadout(HookManager):
    """Made by `mechinterp.read_direction`.

    Args:
        model: The model, which is shared.
        site: A residual stream: `resid_pre.3`, `resid_post.2` (the same) or `resid_final`.
        read: The direction that is read.
        offset: What is subtracted.
        sha256: Of the direction, for `info`.
        file: The direction file that it was read from, which a circuit file then names; None: it is in memory only.
    """

    def __init__(
        self,
        model: HookManager,
        site: Site,
        read: Float[Tensor, " d_model"],
        offset: float,
        sha256: str,
        file: str | None = None,
    ) -> None:
        if isinstance(model, DirectionReadout):
            raise InputError("The model reads a direction already; give the model that was loaded.")
        model.resolve(site)
        dims = dims_before(model.dims, site)
        end = dims.n_layers
        if read.shape != (model.dims.d_model,):
            raise InputError(f"The direction has {list(read.shape)} numbers, the residual stream {model.dims.d_model}.")
        vars(self).update(vars(model))
        own = model.layout
        wide = torch.promote_types(model.dtype, torch.float32)
        columns = torch.stack([read, torch.zeros_like(read)], 1).to(device=model.device, dtype=wide)
        self.whole, self.site, self.direction_sha256, self.file = model, site, sha256, file
        self.layout = replace(
            own,
            dims=dims,
            attention=own.attention.until(end),
            mlp_norm=own.mlp_norm[:end],
            mlp_maps=own.mlp_maps[:end],
            mlp_post=own.mlp_post[:end],
            mixers=own.mixers[:end],
            final_norm=Norm("none"),
            W_U=columns,
            b_U=torch.tensor([-offset, 0.0], dtype=wide, device=model.device),
            soft_cap=None,
        )
        self._end = FINAL if end == model.dims.n_layers else Site("resid_pre", end)
        self.refused = {**model.refused, Site("final_norm"): "a direction is read without the final norm"}
        self.info = replace(
            model.info,
            name=f"{model.info.name}, direction {sha256[:12]} at {site}",
            origin="memory",
            weights={**model.info.weights, "direction.read": read, "direction.offset": torch.tensor(offset)},
            file=None,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return self.whole.dtype

    def __repr__(self) -> str:
        return f"DirectionReadout({self.info.name}, {self.dims.n_layers} layers before it)"

    def generate(self, *_: Any, **__: Any) -> Any:
        """Raises InputError: a reading is not a token."""
        raise InputError("A direction's reading is not a token; generate with the model itself.")

    def has(self, site: SiteName) -> bool:
        """Whether the site exists before the direction's; of a basis, all its sites."""
        site = self._plain(site)
        if not isinstance(site, (str, Site)):
            return super().has(site)
        site = Site.parse(site) if isinstance(site, str) else site
        return (site.layer is None or site.layer < self.dims.n_layers) and super().has(site)

    def _hook_name(self, site: Site) -> str:
        return super()._hook_name(self._end if site == FINAL else site)

    def _run(
        self,
        tokens: Any,
        mask: Any,
        interventions: Iterable[Intervention] | Mapping[Any, Edit | Tensor] = (),
        *,
        loss: Callable[[Tensor], Tensor] | None = None,
        at: Int[Tensor, "batch n_at"] | None = None,
        stop: SiteName | None = None,
        **given: Any,
    ) -> Run:
        """A run ends at the site; its logits `[batch, pos, 2]` are the reading and 0."""
        if stop is not None:
            return super()._run(tokens, mask, interventions, loss=loss, at=at, stop=stop, **given)
        seen: list[Tensor] = []

        def note(value: Tensor) -> Tensor:
            seen[:] = [value.detach()]
            return value

        def logits(resid: Tensor) -> Tensor:
            if at is None:
                return self.layout.unembed(resid.to(self.layout.W_U.dtype))
            index = check_at(at, resid[..., 0])
            rows = resid.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, resid.shape[-1]))
            found = self.layout.unembed(rows.to(self.layout.W_U.dtype))
            return found.masked_fill((index < 0)[..., None], torch.nan)

        edits = [*as_interventions(interventions), Intervention(FINAL, note)]
        inner = None if loss is None else lambda resid: loss(logits(resid))
        run = super()._run(tokens, mask, edits, loss=inner, stop=FINAL, **given)
        return replace(run, logits=logits(seen[0]))
