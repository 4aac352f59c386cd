"""`PatchedRun`: one forward with edges cut, on which everything else that cuts edges is built.

A reader without a cut edge keeps the model's own input. Any other reader gets `resid - sum over cut writers (current
write - replacement)` (see `write_table.py`), and its norm and projection are computed again, per head. If the graph has
named positions, each position has its own sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.engines.replacement import Values
from mechinterp.engines.whole_nodes import Cuts
from mechinterp.engines.window_table import WindowTable
from mechinterp.engines.write_table import (
    Unexpanded,
    WriteTable,
    Written,
)
from mechinterp.graphs.families.family import NodeFamily, NodeSite, Ports
from mechinterp.graphs.families.write_block import less_parts
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.token_positions import places_of, take_positions
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.interventions import Edit, Intervention
from mechinterp.models.modes import Gradients
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True)
class Prefix:
    """The run of one batch up to a layer, which later patched runs share."""

    layer: int
    resid: Float[Tensor, "batch pos d_model"]
    differences: dict[NodeFamily, Written]
    """The earlier writes minus their replacements, `[writer, 1, batch, pos, d_model]`."""
    cut: Float[Tensor, "reader writer"] | None = None
    """The cut edges of the readers before the layer; None: there are none."""
    noted: dict[NodeFamily, dict[NodeSite, Tensor]] = field(default_factory=dict[NodeFamily, dict[NodeSite, Tensor]])
    """Of families that write after the layer what they have read before it."""

    @property
    def unexpanded(self) -> bool:
        """Whether it needs a table that makes the writes itself."""
        return any(isinstance(written, Unexpanded) for written in self.differences.values())


@dataclass(frozen=True)
class GivenTo:
    """The residual stream that a basis is to read: what the port that it follows sees."""

    basis: NodeSite


ReadAt: TypeAlias = "NodeSite | GivenTo"
"""What is read of the stream, and where it is put."""
Readings: TypeAlias = "dict[ReadAt, tuple[slice, Callable[[Tensor], Tensor]]]"
"""For each the ports, and the map from `[port, rows, pos, d_model]` to `[rows, pos, ...]`."""


class PatchedRun:
    """One forward of (candidate x batch) prompts with edges cut; used for that run only."""

    def __init__(
        self,
        model: HookManager,
        graph: Graph,
        pairs: Pairs,
        cuts: Cuts,
        values: Values,
        prefix: Prefix | None = None,
        window: int | None = None,
    ) -> None:
        """A `window` is the number of tokens of which writes are in full together; None: all of them."""
        self.model, self.graph, self.pairs, self.values = model, graph, pairs, values
        self.cuts, self.n, self.window = cuts, len(cuts.edges), window
        self.whole, self.replaced = self._whole(), cuts.nodes.any(0).any(-1).cpu()
        self.table = self._table()
        self.prefix = prefix
        self.seen: dict[ReadAt, Tensor] = {}
        """Values of ports' sites that were read of the stream and are to be put there."""
        self.apart: dict[str, Tensor] = {}
        """What parts of a writer wrote minus their replacements, until the writer's own block is known."""
        self.noted: dict[NodeFamily, dict[NodeSite, Tensor]] = {}
        """What is known so far of the sites from which a family's writes are computed."""
        self.excess: dict[Site, Tensor] = {}
        """What replaced nodes wrote minus their replacements, until the site is there that has their writes."""

    def _table(self) -> WriteTable:
        if self.window is not None:
            return WindowTable(self.graph, self.cuts.edges, *self._rows(), self.values, self.window)
        return WriteTable(self.graph, self.cuts.edges, *self._rows())

    def _rows(self) -> tuple[list[Tensor] | None, Tensor, Tensor, tuple[int, int, int]]:
        n_batch, n_pos = self.pairs.clean.shape
        shape = (n_batch, n_pos, self.model.dims.d_model)
        return places_of(self.graph, self.pairs), self._read_together(), self._needed(), shape

    def _needed(self) -> Bool[Tensor, " writer"]:
        """The writers that some reader does not see as they are."""
        return self.cuts.needed.any(0).cpu()

    def _whole(self) -> Bool[Tensor, "candidate port"]:
        """Which readers have no cut edge at any position."""
        n, uncut = self.graph.n_positions, (self.cuts.edges == 0).all(-1).cpu()
        return torch.cat([uncut[:, :-1].unflatten(1, (-1, n)).all(-1), uncut[:, -1:]], 1)

    def _read_together(self) -> Bool[Tensor, " port"]:
        """Which ports are read: from the first to the last of a family's sites with a cut edge."""
        read = torch.zeros(self.whole.shape[1], dtype=torch.bool)
        for family in self.graph.families:
            if sites := self._cut_sites(family):
                read[_span(sites)] = True
        read[-1] = self._cut(slice(-1, None))
        return read

    def _cut(self, ports: slice) -> bool:
        """Whether any candidate cuts an edge into one of the ports."""
        return not bool(self.whole[:, ports].all())

    def _cut_sites(self, family: NodeFamily) -> list[tuple[Ports, slice]]:
        """The sites of a family's inputs with a cut edge, or that follow one with a cut edge, with their ports."""
        cut = {ports.site for ports, rows in self._sites_around(family) if self._cut(rows)}
        return [
            (ports, rows) for ports, rows in self.graph.sites_of(family) if ports.site in cut or ports.follows in cut
        ]

    def _sites_around(self, family: NodeFamily) -> Iterator[tuple[Ports, slice]]:
        """The inputs of a family, and of the one of which it is a part."""
        for one in self.graph.families:
            if one is family or family.part_of in one.writers:
                yield from self.graph.sites_of(one)

    def run(self, columns: Tensor | None) -> Float[Tensor, "rows n_answer n_columns"]:
        """Logits at the answer positions; the rows are candidate by candidate."""
        with Gradients(False) as off, off:
            seen = self.read_logits(self._final_resid())
            at = repeat(self.pairs.answer_pos, "batch n_answer -> (candidate batch) n_answer", candidate=self.n)
            return self.model.layout.unembed(take_positions(seen, at), columns)

    def _final_resid(self) -> Float[Tensor, "candidate batch pos d_model"]:
        """The final residual stream, the layers before the first cut edge run once for all candidates."""
        first, last = self._first_cut_layer(), Site("resid_final")
        n_layers = self.model.dims.n_layers
        tokens, mask, start = self.pairs.clean, self.pairs.mask, None
        if self.prefix is not None and self._begins_as(self.prefix, first):
            first, shared = self.prefix.layer, self.prefix.resid
            for family, block in self.prefix.differences.items():
                self.table.keep(family, block.expand(self.n))
            for family, now in self.prefix.noted.items():
                self.noted[family] = {site: value.expand(self.n, *value.shape[1:]) for site, value in now.items()}
        else:
            shared = self.shared(first) if first > 0 else None
        if first == n_layers:
            assert shared is not None
            return self.fold(shared)
        if shared is not None and first > 0:
            start = (first, self._repeated(shared))
        plan = self.plan(range(first, n_layers))
        run = self.model.run(
            self._repeated(tokens),
            self._repeated(mask),
            interventions=plan,
            record=[last],
            start=start,
            stop=last,
        )
        return self.fold(run.values[last])

    def _begins_as(self, prefix: Prefix, first: int) -> bool:
        """Whether all candidates cut the edges of the prefix, and no others before its layer; `first` is the first
        layer with a cut edge."""
        if prefix.cut is None:
            return prefix.layer <= first
        rows = self.graph.readers_before[prefix.layer]
        return bool((self.cuts.edges[:, :rows] == prefix.cut[:rows]).all())

    def shared(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before a layer, run once for all candidates; the writes until then are kept."""
        stop = Site("resid_pre", layer) if layer < self.model.dims.n_layers else Site("resid_final")
        plan = self.plan(range(layer))
        return self.model.run(self.pairs.clean, self.pairs.mask, interventions=plan, record=[stop], stop=stop).values[
            stop
        ]

    def _repeated(self, value: Tensor) -> Tensor:
        return value.repeat(self.n, *[1] * (value.ndim - 1))

    def _first_cut_layer(self) -> int:
        """The layer where the first edge is cut or the first node replaced; the number of layers if there is none."""
        cut = (~self.whole.all(0)).nonzero()
        first = self.model.dims.n_layers
        if len(cut):
            first = self.graph.layer_of_reader(min(int(cut[0]) * self.graph.n_positions, len(self.graph.readers) - 1))
        replaced = self.replaced.nonzero()
        return min([first, *(self.graph.layer_of(w) for w in replaced[:1, 0].tolist())])

    def plan(self, layers: range) -> list[Intervention]:
        """The edits of these layers in the order of the model: at one site, what is read is there before what writes.

        The parts of a writer are kept before the writer itself.
        """
        families = self.graph.families
        here = [family for family in families if family.layer in layers and family.reads is not None]
        steps = [(family.reads, 1, True, self._reading(family)) for family in here]
        here = [family for family in families if family.layer in layers or family.starts in layers]
        steps += [(family.written, 0, family.part_of is None, self._writing(family, layers)) for family in here]
        return [edit for *_, edits in sorted(steps, key=lambda step: step[:3]) for edit in edits]

    def _reading(self, family: NodeFamily) -> list[Intervention]:
        sites = self._cut_sites(family)
        whole = {ports.site: self.whole[:, rows] for ports, rows in self._sites_around(family)}
        for ports, _ in sites:
            if ports.follows in whole:
                whole[ports.site] = whole[ports.site] & whole[ports.follows]
        edits: list[Intervention] = []
        for ports, _ in sites:
            if ports.of_stream and ports.follows is not None and not bool(whole[ports.follows].all()):
                given = self._put_in(GivenTo(ports.site), whole[ports.follows])
                edits.append(Intervention(ports.site, given, reading=True))
            edits.append(Intervention(ports.site, self._put_in(ports.site, whole[ports.site])))
        return [Intervention(family.stream, self._stream_tap(family)), *edits] if sites else []

    def _writing(self, family: NodeFamily, layers: range) -> list[Intervention]:
        plan = self._write_taps(family, layers) if self._used(family) else []
        together = [family, *self.graph.parts_of(family)] if family.part_of is None else []
        if any(self._replaced(one) for one in together):
            plan.append(Intervention(family.output, self._replacing(family.output)))
        return plan

    def fold(self, value: Tensor) -> Tensor:
        """`[candidate, batch, ...]`; a run shared by all candidates is expanded along the candidate axis."""
        shared = value.shape[0] == len(self.pairs)
        return value[None].expand(self.n, *value.shape) if shared else value.unflatten(0, (self.n, len(self.pairs)))

    def _used(self, family: NodeFamily) -> bool:
        """Whether any writer of the family (or the writer of which it is a part) is kept or replaced."""
        related = [family, *(one for one in self.graph.families if family.part_of in one.writers)]
        return any(bool(self.table.needed[self.graph.writers_of(one)].any()) or self._replaced(one) for one in related)

    def _replaced(self, family: NodeFamily) -> bool:
        return bool(self.replaced[self.graph.writers_of(family)].any())

    def _stream_tap(self, family: NodeFamily) -> Edit:
        def tap(value: Tensor) -> Tensor:
            self.seen |= self.read(family, self.fold(value))
            return value

        return tap

    def _write_taps(self, family: NodeFamily, layers: range) -> list[Intervention]:
        """Keeps what the family writes, when the last of its sites is there; the taps in some layers."""
        now = self.noted.setdefault(family, {})
        first, *others = family.sites
        sites = [first] * (family.starts in layers) + others * (family.layer in layers)

        def tap(site: NodeSite) -> Edit:
            def note(value: Tensor) -> Tensor:
                now[site] = self.fold(value)
                if site == family.sites[-1]:
                    self._wrote(family, self._written(family, dict(now)))
                    now.clear()
                return value

            return note

        return [Intervention(site, tap(site)) for site in sites]

    def _written(self, family: NodeFamily, now: dict[NodeSite, Tensor]) -> Written:
        if self.table.keeps_sites(family):
            return Unexpanded(family, now)
        return self.values.differences(family, {site: value.to(self.table.dtype) for site, value in now.items()})

    def _wrote(self, family: NodeFamily, block: Written) -> None:
        if isinstance(block, Unexpanded):  # neither a part of a writer, nor a writer with parts
            self.keep(family, block)
            return
        if (whole := family.part_of) is not None:
            total = block.total()
            self.apart[whole] = self.apart[whole] + total if whole in self.apart else total
        parts = {i: self.apart.pop(name) for i, name in enumerate(family.writers) if name in self.apart}
        self.keep(family, less_parts(block, parts))

    def keep(self, family: NodeFamily, block: Written) -> None:
        """Stores writers' current writes minus their replacements, where a reader needs them."""
        self.table.keep(family, block)
        if self._replaced(family):
            total = self.table.total_where(block, self._where_replaced(self.graph.writers_of(family)))
            before = self.excess.get(family.output)
            self.excess[family.output] = total if before is None else before + total

    def _where_replaced(self, writers: slice) -> Bool[Tensor, "writer candidate batch pos"]:
        nodes = self.cuts.nodes[:, writers].transpose(0, 1)  # [writer, candidate, position]
        if self.table.tokens is None:
            return nodes[..., None]
        place = torch.empty(self.pairs.clean.numel(), dtype=torch.long, device=nodes.device)
        for i, tokens in enumerate(self.table.tokens):
            place[tokens] = i
        return nodes[..., place].unflatten(2, self.pairs.clean.shape)

    def _replacing(self, output: Site) -> Edit:
        """Puts the replacements of the nodes that wrote a value into it, where these are replaced."""

        def replace(value: Tensor) -> Tensor:
            return (self.fold(value) - self.excess.pop(output)).flatten(0, 1).to(value.dtype)

        return replace

    def read(
        self, family: NodeFamily, resid: Float[Tensor, "candidate batch pos d_model"]
    ) -> dict[ReadAt, Float[Tensor, "rows pos ..."]]:
        """The values of a family's sites with a cut edge, from what its ports see of the residual stream."""
        sites = self._cut_sites(family)  # together, so that their sums share one pass over the writes
        span, readings = _span(sites), self.readings(family, sites)
        found: dict[ReadAt, list[Tensor]] = {at: [] for at in readings}
        for seen in self.see(span, self._n_writers_seen(family), resid):
            for at, (rows, read) in readings.items():
                found[at].append(read(seen[rows.start - span.start : rows.stop - span.start]))
        return {at: self._joined(values) for at, values in found.items()}

    def readings(self, family: NodeFamily, sites: list[tuple[Ports, slice]]) -> Readings:
        """How some of a family's sites are read, and the streams that bases are given which follow them."""
        found: Readings = {ports.site: (rows, partial(family.read, self.model, ports)) for ports, rows in sites}
        rows_of = {ports.site: rows for ports, rows in sites}
        for ports in (ports for part in self.graph.parts_of(family) for ports in part.ports if ports.of_stream):
            if ports.follows in rows_of:
                found[GivenTo(ports.site)] = rows_of[ports.follows], _of_one_port
        return found

    def _joined(self, values: list[Tensor]) -> Float[Tensor, "rows pos ..."]:
        """What was read in windows of neighbouring tokens, `[rows, pos, ...]` each."""
        if len(values) == 1:
            return values[0]
        by_token = torch.cat([value.unflatten(0, (self.n, -1)).flatten(1, 2) for value in values], 1)
        return by_token.unflatten(1, self.pairs.clean.shape).flatten(0, 1)

    def _n_writers_seen(self, family: NodeFamily) -> int:
        assert family.reads is not None
        return self.graph.n_writers_at(family.reads)

    def see(
        self, ports: slice, n_writers: int, resid: Float[Tensor, "candidate batch pos d_model"]
    ) -> Iterator[Float[Tensor, "port rows pos d_model"]]:
        """What ports see of the residual stream, a window of tokens at a time."""
        return self.table.windows_seen(ports, n_writers, resid)

    def read_logits(self, resid: Float[Tensor, "candidate batch pos d_model"]) -> Float[Tensor, "rows pos d_model"]:
        """What the logits read of the final residual stream."""
        if not self._cut(slice(-1, None)):
            return resid.flatten(0, 1).to(self.table.dtype)
        own = slice(self.graph.n_ports - 1, self.graph.n_ports)
        return self._joined([seen[0] for seen in self.see(own, len(self.graph.writers), resid)])

    def _put_in(self, at: ReadAt, whole: Bool[Tensor, "candidate port"]) -> Edit:
        """Puts in what the ports read; a port without a cut edge keeps the model's own value, to the last bit."""

        def edit(value: Tensor) -> Tensor:
            new = self.seen.pop(at).to(value.dtype)
            if not bool(whole.any()):
                return new
            own = whole.repeat_interleave(len(self.pairs), 0).to(value.device)[:, None]  # [rows, 1, port]
            return torch.where(own.unflatten(2, (-1, *[1] * (value.ndim - 3))), value, new)

        return edit


def _of_one_port(seen: Float[Tensor, "1 rows pos d_model"]) -> Float[Tensor, "rows pos d_model"]:
    """What the port sees."""
    return seen[0]


def _span(sites: list[tuple[Ports, slice]]) -> slice:
    """The ports from the first to the last of these."""
    return slice(sites[0][1].start, sites[-1][1].stop)
