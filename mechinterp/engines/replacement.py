"""The value that a cut edge carries instead: the corrupt run's write, a mean, or zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mechinterp.base.batches import Combine, over_batches
from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.graphs.families.family import NodeFamily, NodeSite, Recorded
from mechinterp.graphs.families.write_block import Dense, LowRank, WriteBlock
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.token_windows import Window
from mechinterp.graphs.write_rows import write_rows
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

KINDS = ("corrupt", "mean", "mean-positional", "zero")
"""corrupt: the write in the paired corrupt prompt (resample). mean: its mean over all real tokens of the reference
pairs' corrupt prompts. mean-positional: the same per position, for prompts of one length. zero: no write."""


@runtime_checkable
class Values(Protocol):
    """The replacement writes for one batch of pairs."""

    def differences(self, family: NodeFamily, now: Recorded) -> WriteBlock:
        """What the family's writers write with the activations `now`, minus their replacements.

        The activations are `[*candidate, batch, pos, ...]`.
        """
        ...

    def rows(self, chosen: Window) -> Values:
        """The values of some of the tokens: of some examples, at some positions."""
        ...


@dataclass(frozen=True)
class Replacement:
    """A kind of replacement on one model; `on(pairs)` gives its values for a batch."""

    kind: str
    on: Callable[[Pairs], Values]


def input_sites(graph: Graph) -> list[Site]:
    """The sites of the graph's input writers."""
    return [family.output for family in graph.families[: graph.n_inputs]]


def write_sites(graph: Graph) -> list[NodeSite]:
    """The sites with every write in compact form: inputs, `z`, `mlp_out`, `mlp_post` for neurons, and features."""
    return list(dict.fromkeys(site for family in write_rows(graph).graph.families for site in family.sites))


def record_writes(model: HookManager, graph: Graph, tokens: Tensor, pairs: Pairs) -> CompactWrites:
    """The writes of every node of one run in compact form: one forward up to the last write."""
    run = model.run(tokens, pairs.mask, record=write_sites(graph), stop=graph.families[-1].output)
    return compact_writes(model, graph, run.values)


def compact_writes(model: HookManager, graph: Graph, values: Mapping[Any, Tensor]) -> CompactWrites:
    """The writes of every node in a run that has recorded their sites."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    return CompactWrites(model, {site: values[site].to(dtype) for site in write_sites(graph)})


@dataclass(frozen=True)
class CompactWrites:
    """Writes kept as `z` and `mlp_out`, so that `[..., head, d_model]` is never stored for the whole model."""

    model: HookManager
    values: dict[NodeSite, Tensor]

    @property
    def nbytes(self) -> int:
        """What they take."""
        return sum(value.nbytes for value in self.values.values())

    def writes(self, family: NodeFamily) -> WriteBlock:
        """What the family's writers wrote."""
        return family.writes(self.model, self.values)

    def differences(self, family: NodeFamily, now: Recorded) -> WriteBlock:
        """What the family's writers write with the activations `now`, minus what they wrote."""
        return family.differences(self.model, now, self.values)

    def rows(self, chosen: Window) -> CompactWrites:
        """The writes of some of the tokens."""
        return CompactWrites(self.model, {site: value[chosen] for site, value in self.values.items()})


@dataclass(frozen=True)
class ConstantWrites:
    """The same writes for every example: means (per position or not) or zero."""

    model: HookManager
    constants: Mapping[NodeFamily, WriteBlock]
    """Per family its writers' constants, `[writer, d_model]` or `[writer, pos, d_model]`; zero where it is absent."""

    def differences(self, family: NodeFamily, now: Recorded) -> WriteBlock:
        """What the family's writers write with the activations `now`, minus their constants."""
        current = family.writes(self.model, now)
        return current.minus(self.constants[family]) if family in self.constants else current

    def rows(self, chosen: Window) -> ConstantWrites:
        """The writes at some positions: they do not depend on the example."""
        return ConstantWrites(self.model, {family: block.at(chosen[1]) for family, block in self.constants.items()})


def corrupt_replacement(model: HookManager, graph: Graph) -> Replacement:
    """Replaces a write by the same node's write in the paired corrupt prompt. One forward per batch."""
    return Replacement("corrupt", lambda pairs: record_writes(model, graph, pairs.corrupt, pairs))


def build_replacement(
    kind: str, model: HookManager, graph: Graph, reference: Pairs | None = None, batch_size: int | None = None
) -> Replacement:
    """The replacement of a kind; one forward per batch of `reference` for the means.

    Args:
        kind: One of `KINDS`.
        model: The model.
        graph: Its graph.
        reference: The pairs over whose corrupt prompts the means are taken; the other kinds do not need them.
        batch_size: Examples per batch for the means; 64 by default.

    Raises InputError for an unknown kind, a mean without `reference`, or a positional mean over different lengths.
    """
    if kind == "corrupt":
        return corrupt_replacement(model, graph)
    if kind == "zero":
        constants: Mapping[NodeFamily, WriteBlock] = {}
    elif kind in KINDS:
        if reference is None:
            raise InputError(f"Replacement {kind!r} needs reference pairs to take the mean over.")
        constants = _means(model, graph, reference.to(model.device), kind == "mean-positional", batch_size)
    else:
        raise unknown("replacement", kind, KINDS)
    values = ConstantWrites(model, constants)
    n_pos = reference.clean.shape[1] if reference is not None and kind == "mean-positional" else None

    def on(pairs: Pairs) -> Values:
        if n_pos is not None and pairs.clean.shape[1] != n_pos:
            raise InputError(
                f"The means per position have {n_pos} positions, the pairs {pairs.clean.shape[1]}; use pairs of one "
                "length, or replacement 'mean'."
            )
        return values

    return Replacement(kind, on)


def _means(
    model: HookManager, graph: Graph, reference: Pairs, positional: bool, batch_size: int | None
) -> dict[NodeFamily, WriteBlock]:
    if positional and not bool(reference.mask.all()):
        raise InputError("A mean per position needs prompts of one length; use 'mean', or pairs without padding.")
    directions: dict[NodeFamily, Tensor] = {}
    families = write_rows(graph).graph.families

    def sums(batch: Pairs, _: slice) -> dict[str, Tensor]:
        compact = record_writes(model, graph, batch.corrupt, batch)
        found: dict[str, Tensor] = {}
        for number, family in enumerate(families):
            block = compact.writes(family).sums(batch.mask, positional=positional)
            if isinstance(block, LowRank):
                directions[family] = block.directions
            found[str(number)] = block.values if isinstance(block, LowRank) else block.dense()
        return found

    names: dict[str, Combine] = {str(number): "sum" for number in range(len(families))}
    totals = over_batches(reference, batch_size or 64, sums, names)
    if len(directions) < sum(family.low_rank for family in families):  # this process had no batch
        sums(reference[:1], slice(0, 1))
    count = len(reference) if positional else int(reference.mask.sum())
    found: dict[NodeFamily, WriteBlock] = {}
    for number, family in enumerate(families):
        mean = totals[str(number)].to(model.device) / count
        found[family] = LowRank(mean, directions[family]) if family in directions else Dense(mean)
    return found
