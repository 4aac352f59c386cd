"""Patchscopes: a hidden state of one prompt, written into another prompt, and what the model then predicts.

Source: Ghandeharioun et al. 2024 (arXiv 2401.06102). The logit lens (write into the last residual stream) and causal
tracing (write a clean state into a noised run of the same prompt) are special cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.engines.grid import Grid, numbered
from mechinterp.models.components import Position, as_pairs, position_index
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.interventions import Intervention
from mechinterp.models.sites import Site

RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "resid_final", "embed")
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Patchscope:
    """What the model predicts for the target with each hidden state written into it."""

    logits: Float[Tensor, "site example d_vocab"]
    """At the last token of the target prompt."""
    top_tokens: Int[Tensor, "site example k"]
    probabilities: Grid
    """Of the top tokens; axes site, example, rank."""
    generated: Int[Tensor, "site example new"]
    """The tokens generated greedily, the patch kept at its position; empty for `max_new_tokens=0`."""

    def to_frame(self, tokenizer: Any = None) -> pd.DataFrame:
        """A row per source site and example: the most probable token, its probability, and what was generated."""
        frame = self.probabilities.at(rank=0).to_frame()
        first = self.top_tokens[..., 0].flatten().tolist()
        generated = self.generated.flatten(0, 1).tolist()
        frame["token"] = first if tokenizer is None else [tokenizer.decode([token]) for token in first]
        frame["generated"] = generated if tokenizer is None else [tokenizer.decode(ids) for ids in generated]
        return frame


def patchscope(
    model: HookManager,
    source: Int[Tensor, "batch source_pos"],
    target: Int[Tensor, "target_batch target_pos"],
    source_sites: Sequence[str | Site],
    *,
    source_position: Position = -1,
    source_mask: Bool[Tensor, "batch source_pos"] | None = None,
    target_site: str | Site | None = None,
    target_position: int = -1,
    target_model: HookManager | None = None,
    mapping: Map | None = None,
    top_k: int = 5,
    max_new_tokens: int = 0,
) -> Patchscope:
    """The next-token distribution of the target prompt with each source site's hidden state written into it.

    Args:
        model: The model of the sources.
        source: The source prompts.
        target: The target prompt, one for all sources or one each, without padding.
        source_sites: Residual streams whose states are written, one after another.
        source_position: Where the state is read; -1: the last real token.
        source_mask: True at the sources' real tokens; by default everywhere.
        target_site: Where the state is written; by default the site it comes from.
        target_position: The position where it is written; negative from the end.
        target_model: The model of the target; by default `model`.
        mapping: Applied to the state in between, `[batch, d] -> [batch, d]`; it must give the target's d_model.
        top_k: How many of the most probable tokens to keep.
        max_new_tokens: How many tokens to generate greedily, the patch kept at its position.

    Cost: one forward of the sources, and one of the targets per site (and per new token). Memory: the logits at one
    position, `n_sites * batch * d_vocab`.

    Raises InputError for sites that are not residual streams, positions outside the prompts, a number of targets that
    does not fit, and a state of another width than the target's.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=2)
    >>> said = mi.patchscope(model, pairs.clean, pairs.clean[:1], ["resid_pre.2"], source_mask=pairs.mask)
    >>> said.logits.shape[:2], said.probabilities.axes
    (torch.Size([1, 2]), ('site', 'example', 'rank'))
    """
    into = target_model or model
    sites = [_residual(model, site) for site in _listed(source_sites)]
    goal = None if target_site is None else _residual(into, target_site)
    sources = as_pairs(source, source_mask).to(model.device)
    if target.ndim != 2 or len(target) not in (1, len(source)):
        raise InputError(
            f"`target` must be one prompt, or one for each of the {len(source)} sources; got {list(target.shape)}."
        )
    width = target.shape[1]
    at = target_position + width if target_position < 0 else target_position
    if not 0 <= at < width:
        raise InputError(f"Target position {target_position} is outside the target prompt of {width} tokens.")
    if not 1 <= top_k <= into.dims.d_vocab_out or max_new_tokens < 0:
        raise InputError(f"`top_k` must be from 1 to {into.dims.d_vocab_out} and `max_new_tokens` at least 0.")
    where = position_index(sources, source_position)
    run = model.run(sources.clean, sources.mask, record=list(dict.fromkeys(sites)))
    tokens = target.expand(len(source), -1).to(into.device)
    logits: list[Tensor] = []
    generated: list[Tensor] = []
    for site in sites:
        state = run.values[site][torch.arange(len(source), device=where.device), where]
        state = state if mapping is None else mapping(state)
        if tuple(state.shape) != (len(source), into.dims.d_model):
            raise InputError(
                f"The state from '{site}' is {list(state.shape)} where the target has [{len(source)}, "
                f"{into.dims.d_model}]; give a `mapping` between the two."
            )
        edit = Intervention(goal or _residual(into, site), _write(state.to(into.device), at))
        grown, first = tokens, None
        for _ in range(max(1, max_new_tokens)):
            last = torch.full((len(grown), 1), grown.shape[1] - 1, device=grown.device)
            found = into.run(grown, interventions=[edit], at=last).logits
            if found is None:
                raise InputError("The target model gave no logits.")
            first = found[:, 0] if first is None else first
            grown = torch.cat([grown, found[:, 0].argmax(-1, keepdim=True)], 1)
        assert first is not None
        logits.append(first)
        generated.append(grown[:, width : width + max_new_tokens])
    whole = torch.stack(logits)
    best = whole.to(torch.promote_types(whole.dtype, torch.float32)).softmax(-1).topk(top_k, -1)
    labels = {"site": tuple(map(str, sites)), "example": numbered(len(source)), "rank": numbered(top_k)}
    about = {
        "analysis": "patchscope",
        "target_site": "the source's" if goal is None else str(goal),
        "target_position": at,
        "target_model": into.info.name,
    }
    cost = {"forwards": 1.0 + len(sites) * max(1, max_new_tokens)}
    return Patchscope(
        whole, best.indices, Grid(best.values, labels, "probability", "", about, cost), torch.stack(generated)
    )


def _listed(sites: Sequence[str | Site]) -> list[str | Site]:
    if isinstance(sites, (str, Site)) or not len(sites):
        raise InputError("`source_sites` must be a list of at least one residual stream, such as ['resid_pre.5'].")
    if len({str(site) for site in sites}) != len(sites):
        raise InputError(f"A source site is given twice: {', '.join(map(str, sites))}.")
    return list(sites)


def _residual(model: HookManager, site: str | Site) -> Site:
    site = Site.parse(site) if isinstance(site, str) else site
    if site.kind not in RESIDUAL:
        raise InputError(
            f"'{site}' is not a residual stream; a state can be read and written at {', '.join(RESIDUAL)}."
        )
    model.resolve(site)
    return site


def _write(state: Float[Tensor, "batch d"], at: int) -> Callable[[Tensor], Tensor]:
    def write(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, at] = state.to(value.dtype)
        return value

    return write
