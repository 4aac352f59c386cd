"""Parts of a model, positions and prompts as a user names them.

A part is what can be patched: a site, or one head or neuron of it, each with one text form.

`a9.h9` is a head's output z, `a9.h9<q>` its query (`<k>`, `<v>`, `<pattern>` alike; `a5.kv1<k>` where query heads
share a key/value head), `m3` what an MLP writes, `m3.n17` a neuron, `a9` what an attention layer writes, `input` the
residual stream that enters the first layer; any site can be named by itself (`resid_pre.5`). `@S2` or `@4` after it
says at which position.

Positions are absolute, counted from the end, named by the task, or sets of these. Prompts are pairs, or token ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError, clip
from mechinterp.base.registry import unknown
from mechinterp.models.layout import Dims
from mechinterp.models.sites import LAYER_SITES, Address, Site, not_a_name
from mechinterp.models.source import ModelInfo
from mechinterp.models.texts import ReadsTexts, is_text
from mechinterp.tasks.pairs import Pairs

UNIT_AXES = {
    "q": "head",
    "k": "kv_head",
    "v": "kv_head",
    "z": "head",
    "scores": "head",
    "pattern": "head",
    "mlp_pre": "neuron",
    "mlp_up": "neuron",
    "mlp_post": "neuron",
}
"""The axis along which a site has units; the others are one vector per token."""
BY_QUERY = ("scores", "pattern")
"""Sites `[batch, head, query, key]`; a position in them is the query's."""

CHANNELS = ("q", "k", "v", "z", "pattern", "scores")
"""The values of a head that can be named: `a9.h9<pattern>`; by default its output z."""
NODES_WITH_SITES = ("head", "mlp", "neuron")
"""The kinds of nodes whose output a site holds, so that they can be read and edited by themselves."""


@runtime_checkable
class HasNeurons(Protocol):
    """An object with the MLPs' weights."""

    def neurons(self, layer: int) -> Any:
        """The weights of a layer's MLP; `W_out` is `[neuron, ...]`."""
        ...


@runtime_checkable
class HasSites(Protocol):
    """A model whose parts can be named: a HookManager, or an encoder."""

    @property
    def dims(self) -> Dims: ...
    @property
    def info(self) -> ModelInfo: ...
    @property
    def layout(self) -> HasNeurons: ...
    def has(self, site: Site, /) -> bool:
        """Whether it has the site."""
        ...

    def resolve(self, site: Site, /) -> str:
        """Its own name of the site. Raises an error with the reason if it does not have the site."""
        ...


@dataclass(frozen=True)
class Part:
    """One head or neuron of a site (`unit`), or all of it (None); `position` is None if the text has none."""

    site: Site
    unit: int | None = None
    position: Position | None = None


def parse_part(model: HasSites, text: str) -> Part:
    """The part that the text names. Raises InputError for what the model does not have, by name."""
    found = Address.parse(text)
    where = found.position or None
    number = as_number(found.position)
    where = where if number is None else number
    if found.channel and (found.kind not in ("head", "kv_head") or found.channel not in CHANNELS):
        raise not_a_name(text, "part of a model")
    if found.kind in ("feature", "error"):
        raise InputError(
            f"{clip(text, 60)!r} is a feature of {found.base!r}, and no feature basis is given; pass "
            "`features=[basis]` to an analysis that takes features."
        )
    if found.kind in ("logits", "expert"):
        raise InputError(f"{clip(text, 60)!r} cannot be read or edited by itself; name 'm3' or a site.")
    if found.kind in ("site", "input", "embed", "pos_embed"):
        name = {"site": found.base, "input": "resid_pre.0"}.get(found.kind, found.kind)
        site = Site.parse(name)
        model.resolve(site)
        return Part(site, None, where)
    if found.layer >= model.dims.n_layers:
        raise InputError(f"{text!r} does not exist: the model has layers 0 to {model.dims.n_layers - 1}.")
    unit = found.number if found.number >= 0 else None
    if found.kind in ("head", "kv_head"):
        channel = found.channel or "z"
        check_head(model.dims, text, "kv" if found.kind == "kv_head" else "h", found.number, channel)
        site = Site(channel, found.layer)
    else:
        site = Site({"attention": "attn_out", "mlp": "mlp_out", "neuron": "mlp_post"}[found.kind], found.layer)
    model.resolve(site)
    if found.kind == "neuron" and found.number >= n_units(model, site):
        raise InputError(
            f"{text!r} does not exist: the MLP of layer {found.layer} has neurons 0 to {n_units(model, site) - 1}."
        )
    return Part(site, unit, where)


def check_head(dims: Dims, text: str, kind: str, head: int, channel: str) -> None:
    """Return None when the model has that head with that channel. Raises InputError otherwise."""
    grouped = dims.n_kv_heads != dims.n_heads
    shared = channel in ("k", "v")
    if kind == "kv" and not (grouped and shared):
        why = "only <k> and <v> are per key/value head" if grouped else "here every head has its own keys and values"
        raise InputError(f"{text!r} does not exist: {why}; write 'a5.h1<{channel}>'.")
    if kind == "h" and grouped and shared:
        of = head // (dims.n_heads // dims.n_kv_heads)
        raise InputError(f"{text!r} does not exist: query heads share it; write 'kv{of}<{channel}>'.")
    count = dims.n_kv_heads if kind == "kv" else dims.n_heads
    if not count:
        raise InputError(f"{text!r} does not exist: the model has no heads; name 'a5', what mixes tokens in layer 5.")
    if head >= count:
        raise InputError(f"{text!r} does not exist: a layer has {'key/value ' * (kind == 'kv')}heads 0 to {count - 1}.")


def n_units(model: HasSites, site: Site) -> int:
    """How many units a site has. Raises UnsupportedError for an MLP that is not two matrices."""
    axis = UNIT_AXES.get(site.kind)
    if axis is None:
        raise InputError(f"Site '{site}' has no heads or neurons.")
    if axis == "neuron":
        return int(model.layout.neurons(site.layer or 0).W_out.shape[0])
    return model.dims.n_heads if axis == "head" else model.dims.n_kv_heads


def unit_axis(model: HasSites, kind: str) -> str | None:
    """`head`, `kv_head` (only where query heads share keys and values), `neuron`, or None."""
    axis = UNIT_AXES.get(kind)
    return "head" if axis == "kv_head" and model.dims.n_kv_heads == model.dims.n_heads else axis


def layer_range(model: HasSites, kind: str, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The chosen layers, which must have the site; by default all, in a hybrid model all that have it.

    Raises InputError for none or unknown layers.
    """
    if kind not in LAYER_SITES:
        raise unknown("site of a layer", kind, LAYER_SITES)
    every = range(model.dims.n_layers)
    wanted = tuple(every) if layers is None else tuple(layers)
    if layers is None and model.dims.layers:
        wanted = tuple(layer for layer in every if model.has(Site(kind, layer))) or wanted
    if not wanted or len(set(wanted)) != len(wanted) or not set(wanted) <= set(every):
        raise InputError(f"`layers` must be distinct, from 0 to {len(every) - 1}, at least one; got {list(wanted)}.")
    for layer in wanted:
        if not model.has(Site(kind, layer)):
            model.resolve(Site(kind, layer))  # raises with the reason
            raise UnsupportedError(f"{model.info.architecture} has no site '{kind}.{layer}'.")
    return wanted


def unit_range(model: HasSites, site: Site, units: Sequence[int] | None) -> tuple[int, ...]:
    """The chosen heads or neurons (all by default). Raises InputError for none or unknown ones."""
    count = n_units(model, site)
    wanted = tuple(range(count)) if units is None else tuple(units)
    if not wanted or len(set(wanted)) != len(wanted) or not set(wanted) <= set(range(count)):
        axis = UNIT_AXES[site.kind]
        raise InputError(f"`units` must be distinct {axis}s from 0 to {count - 1}, at least one; got {list(wanted)}.")
    return wanted


Position: TypeAlias = "str | int"
"""A named position of the task (`S2`, `end`), or a number: 0 is the first token, -1 the last real one."""
Positions: TypeAlias = "str | int | Sequence[Position | Sequence[Position]] | None"
"""None: all positions at once. `each`: every position by itself. Otherwise one position, or a list of positions and
of sets of positions (`["S2", ("IO", "S1")]`)."""


def as_number(text: str) -> int | None:
    """The token position that a text gives as a number (`4`, `-1`), or None."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else None


@dataclass(frozen=True)
class PositionSets:
    """Sets of positions with their labels; `masks[i]` is True at the positions of set i.

    A row without any True has no such position (a shorter prompt, with `each`) and is not measured there.
    """

    labels: tuple[str, ...]
    masks: Bool[Tensor, "set batch pos"]

    @property
    def present(self) -> Bool[Tensor, "set batch"]:
        """Whether the example has the position."""
        return self.masks.any(-1)

    def first(self, index: int) -> int:
        """The earliest position of a set in any example."""
        return int(self.masks[index].any(0).nonzero()[0])


def position_sets(pairs: Pairs, positions: Positions) -> PositionSets:
    """The sets of positions that the user named.

    Raises InputError for a name that the pairs do not have, a number outside a prompt, an empty choice or a duplicate.
    """
    if positions is None:
        return PositionSets(("all",), pairs.mask[None])
    if isinstance(positions, str) and positions == "each" and "each" not in pairs.positions:
        width = pairs.clean.shape[1]
        every = torch.eye(width, dtype=torch.bool, device=pairs.device)[:, None] & pairs.mask
        return PositionSets(tuple(str(i) for i in range(width)), every)
    if isinstance(positions, (str, int)):
        positions = [positions]
    if not len(positions):
        raise InputError("No position is given; name at least one, or omit `positions` for all of them.")
    labels: list[str] = []
    masks: list[Tensor] = []
    for wanted in positions:
        members = [wanted] if isinstance(wanted, (str, int)) else list(wanted)
        if not members:
            raise InputError("A set of positions is empty; name at least one position in it.")
        label = ",".join(str(member) for member in members)
        if label in labels:
            raise InputError(f"The position {label!r} is given twice.")
        labels.append(label)
        masks.append(_mask_of(pairs, members))
    return PositionSets(tuple(labels), torch.stack(masks))


def position_index(pairs: Pairs, position: Position) -> Int[Tensor, " batch"]:
    """The column of one position in each example. Raises InputError as `position_sets` does."""
    if isinstance(position, str):
        if position in pairs.positions:
            return pairs.positions[position]
        number = as_number(position)
        if number is None:
            raise unknown("position", position, pairs.positions)
        position = number
    if abs(position) >= 10**9:
        raise InputError(f"Position {str(position)[:20]} is outside every prompt.")
    index = pairs.lengths + position if position < 0 else torch.full_like(pairs.lengths, position)
    outside = (index < 0) | (index >= pairs.lengths)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise InputError(
            f"Position {position} is outside the prompt of row {row}, which has {int(pairs.lengths[row])} tokens."
        )
    return index


def _mask_of(pairs: Pairs, members: Sequence[Position]) -> Bool[Tensor, "batch pos"]:
    columns = torch.arange(pairs.clean.shape[1], device=pairs.device)
    found = torch.zeros_like(pairs.mask)
    for member in members:
        found |= columns[None] == position_index(pairs, member)[:, None]
    return found


def as_pairs(prompts: object, mask: Bool[Tensor, "batch pos"] | None = None, model: ReadsTexts | None = None) -> Pairs:
    """The pairs as they are, or pairs made from token ids `[batch, pos]` and their mask; else raises InputError.

    With a model also from texts, in its tokens (see `HookManager.prompts`).
    """
    if isinstance(prompts, Pairs):
        return prompts
    if model is not None and is_text(prompts):
        made = model.prompts(prompts)
        prompts, mask = made.tokens, made.mask
    if not isinstance(prompts, Tensor) or prompts.ndim != 2 or not len(prompts):
        got = f"shape {list(prompts.shape)}" if isinstance(prompts, Tensor) else type(prompts).__name__
        raise InputError(
            f"Give Pairs,{' texts,' * (model is not None)} or token ids as a tensor [batch, pos]; got {got}."
        )
    twice = torch.cat([prompts, prompts])  # Pairs need two rows; here one prompt is enough
    real = None if mask is None else torch.cat([mask, mask])
    return Pairs(clean=twice, corrupt=twice, mask=real)[: len(prompts)]
