"""Edits of attention patterns: which position may see which, and how much."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.models.components import Part, Positions, layer_range, parse_part, position_sets
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.interventions import Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs


def knock_out_attention(
    model: HookManager,
    pairs: Pairs,
    queries: Positions,
    keys: Positions,
    *,
    heads: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> list[Intervention]:
    """Interventions under which the queries cannot attend to the keys; the rest of each row is renormalised.

    Setting scores to minus infinity before the softmax and renormalising the pattern after it are equivalent; here the
    pattern is renormalised, which works on every model.

    Args:
        model: The model.
        pairs: The prompts that will be run.
        queries: One set of positions: `"end"`, `[("S1", "S2")]`, None for all.
        keys: One set of positions. A query still sees its own position if that is not among them.
        heads: Names of heads (`a9.h9`); by default all heads of `layers`.
        layers: The layers, if `heads` is not given; by default all.

    For `model.run(tokens, mask, interventions=...)` and `with model.intervene(*...)`, on prompts of the same batch.

    Raises InputError for positions and heads that do not exist, and where a query would have no key left.

    Source: Geva et al. 2023 (arXiv 2304.14767), attention knockout.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=4)
    >>> blind = mi.knock_out_attention(model, pairs, "end", "S2", layers=[2, 3])
    >>> with model.intervene(*blind):
    ...     pattern = model.run(pairs.clean, pairs.mask, record=["pattern.2"]).values["pattern.2"]
    >>> float(pattern[0, :, pairs.positions["end"][0], pairs.positions["S2"][0]].max())
    0.0
    """
    blocked = _entries(pairs, queries, keys)
    columns = torch.arange(blocked.shape[-1], device=blocked.device)
    visible = (columns[None, :] <= columns[:, None]) & pairs.mask.to(blocked.device)[:, None, :]
    blind = (blocked.any(-1) & ~(visible & ~blocked).any(-1)) & pairs.mask.to(blocked.device)
    if bool(blind.any()):
        row, query = (int(i) for i in blind.nonzero()[0])
        raise InputError(
            f"Position {query} of row {row} would have no key left to attend to; leave it one, or ablate the head "
            "with `edit_pattern(..., scale=0)`."
        )

    def knock_out(pattern: Tensor, chosen: Bool[Tensor, "batch 1 query key"]) -> Tensor:
        kept = torch.where(chosen, 0, pattern)
        # A row that gave all its attention to the blocked keys has nothing left to renormalise. Its other scores were
        # lost in the softmax, so this is an error and not a guess.
        total = kept.sum(-1, keepdim=True)
        touched = chosen.any(-1, keepdim=True)
        if bool((touched & (total <= 0)).any()):
            raise InputError(
                "A query attends to nothing but the keys that are knocked out, to the last bit; its other scores are "
                "lost in the softmax, so the pattern after the knockout is unknown."
            )
        return torch.where(touched, kept / total, pattern)

    return _interventions(model, blocked, heads, layers, knock_out)


def edit_pattern(
    model: HookManager,
    pairs: Pairs,
    queries: Positions,
    keys: Positions,
    *,
    set: float | None = None,
    add: float | None = None,
    scale: float | None = None,
    renormalize: bool = False,
    heads: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> list[Intervention]:
    """Interventions that set, add to or scale the attention from queries to keys, after the softmax.

    Args:
        model: The model.
        pairs: The prompts that will be run.
        queries: One set of positions, as in `knock_out_attention`.
        keys: One set of positions.
        set: The new attention. Exactly one of `set`, `add` and `scale` is given.
        add: Added to the attention.
        scale: Multiplies the attention.
        renormalize: Divide every edited row by its sum; without it, as in the paper, a row need not sum to 1.
        heads: Names of heads (`a9.h9`); by default all heads of `layers`.
        layers: The layers, if `heads` is not given; by default all.

    Raises InputError as `knock_out_attention` does, and for none or several of `set`, `add` and `scale`.

    Source: Ortu et al. 2024 (Competition of Mechanisms, arXiv 2402.11655), which multiplies single entries.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=4)
    >>> len(mi.edit_pattern(model, pairs, "end", "S2", scale=5.0, heads=["a2.h1", "a2.h3"]))
    1
    """
    given = {name: value for name, value in (("set", set), ("add", add), ("scale", scale)) if value is not None}
    if len(given) != 1:
        raise InputError(f"Give one of `set`, `add` and `scale`; got {', '.join(given) or 'none'}.")
    (how, amount), entries = next(iter(given.items())), _entries(pairs, queries, keys)

    def edit(pattern: Tensor, chosen: Bool[Tensor, "batch 1 query key"]) -> Tensor:
        new = {"set": torch.full_like(pattern, amount), "add": pattern + amount, "scale": pattern * amount}[how]
        new = torch.where(chosen, new, pattern)
        if not renormalize:
            return new
        return torch.where(chosen.any(-1, keepdim=True), new / new.sum(-1, keepdim=True), pattern)

    return _interventions(model, entries, heads, layers, edit)


def _entries(pairs: Pairs, queries: Positions, keys: Positions) -> Bool[Tensor, "batch query key"]:
    """True where a chosen query could see a chosen key (not a later one)."""
    masks: list[Tensor] = []
    for name, wanted in (("queries", queries), ("keys", keys)):
        found = position_sets(pairs, wanted)
        if len(found.labels) != 1:
            raise InputError(f"`{name}` must be one set of positions; write [({', '.join(map(repr, found.labels))})].")
        masks.append(found.masks[0])
    entries = (masks[0][:, :, None] & masks[1][:, None, :]).tril()
    if not bool(entries.flatten(1).any(1).all()):
        row = int((~entries.flatten(1).any(1)).nonzero()[0])
        raise InputError(f"In row {row} no chosen key is at or before a chosen query, so nothing can be edited.")
    return entries


def _interventions(
    model: HookManager,
    entries: Bool[Tensor, "batch query key"],
    heads: Sequence[str] | None,
    layers: Sequence[int] | None,
    edit: Callable[[Tensor, Tensor], Tensor],
) -> list[Intervention]:
    """One intervention a layer on the patterns of its chosen heads."""
    if heads is None:
        chosen: dict[int, list[int]] = {
            layer: list(range(model.dims.n_heads)) for layer in layer_range(model, "pattern", layers)
        }
    else:
        if layers is not None:
            raise InputError("Give `heads` or `layers`, not both: heads name their layer.")
        if isinstance(heads, str) or not len(heads):
            raise InputError("`heads` must be a list of at least one head, such as ['a9.h9'].")
        chosen = defaultdict(list)
        for name in heads:
            part: Part = parse_part(model, name)
            if part.site.kind != "z" or part.unit is None or part.position is not None or part.site.layer is None:
                raise InputError(f"{name!r} is not a head; heads look like 'a9.h9'.")
            chosen[part.site.layer].append(part.unit)
        model.resolve(Site("pattern", min(chosen)))
    return [Intervention(Site("pattern", layer), _on_heads(entries, units, edit)) for layer, units in chosen.items()]


def _on_heads(
    entries: Bool[Tensor, "batch query key"], units: list[int], edit: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    def on_heads(pattern: Tensor) -> Tensor:
        times, rest = divmod(pattern.shape[0], len(entries))
        if rest or pattern.shape[2:] != entries.shape[1:]:
            raise InputError(
                f"The edit is for {len(entries)} prompts of {entries.shape[1]} tokens; the run has a pattern "
                f"{list(pattern.shape)}."
            )
        # Sweeps run the same prompts several times side by side.
        chosen = entries.to(pattern.device).repeat(times, 1, 1)[:, None]
        new = pattern.clone()
        new[:, units] = edit(pattern[:, units], chosen)
        return new

    return on_heads
