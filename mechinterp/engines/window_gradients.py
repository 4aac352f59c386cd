"""Gradients in the mask without a table of all writes: a reader's sums are made again, and differentiated, in windows.

The forward is that of `window_table.py`. Autograd carries the gradients of what writes are made of (z, not the writes)
from reader to writer. On the way back through a reader its writes and sums are made again for a window of tokens: the
gradient at what it saw, times the writes, is the gradient of its cuts; times the mask, that of the writes, which goes
on to what they are made of. So nothing is kept that grows with the writers, at about twice the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.engines.differentiable_run import DifferentiableRun
from mechinterp.engines.patched_run import ReadAt
from mechinterp.engines.window_table import Behind, Reading, TokenWindow, WindowTable, as_rows
from mechinterp.engines.write_table import Place, Unexpanded, Written, matrices
from mechinterp.graphs.families.family import NodeFamily
from mechinterp.graphs.families.write_block import LowRank
from mechinterp.models.modes import Gradients


@dataclass(frozen=True)
class Reader:
    """Some of the ports that are read together, and how they are read."""

    ports: slice
    """Counted from the first that is asked."""
    read: Callable[[Tensor], Tensor]
    """From `[port, rows, pos, d_model]` to `[rows, pos, ...]`."""


class WindowRun(DifferentiableRun):
    """A run whose writes are made again in each window, in the forward and in the backward."""

    table: WindowTable

    def _table(self) -> WindowTable:
        assert self.window is not None
        self.sources: dict[NodeFamily, tuple[Tensor, ...]] = {}
        """What the writes of each family are made of, with their history."""
        self.gradient_of_cuts = torch.zeros_like(self.cuts.edges)
        return WindowTable(self.graph, self.cuts.edges, *self._rows(), self.values, self.window)

    @property
    def of_cuts(self) -> Tensor:
        """The gradient of every cut, when the backward is done."""
        return self.gradient_of_cuts

    def keep(self, family: NodeFamily, block: Written) -> None:
        """Stores what the writes are made of."""
        if isinstance(block, Unexpanded):
            wide = {site: value.to(self.table.dtype) for site, value in block.now.items()}
            block, found = Unexpanded(family, wide), tuple(wide.values())
        else:
            found = (block.values,) if isinstance(block, LowRank) else (block.dense(),)
        self.sources[family] = found
        self.table.keep(family, block)

    def read(self, family: NodeFamily, resid: Tensor) -> dict[ReadAt, Tensor]:
        """The values of a family's sites, from what its ports see of the residual stream."""
        own = self.graph.ports_of(family)
        sites = {
            at: Reader(slice(rows.start - own.start, rows.stop - own.start), read)
            for at, (rows, read) in self.readings(family, list(self.graph.sites_of(family))).items()
        }
        found = self._read(own, self._n_writers_seen(family), resid, list(sites.values()))
        return dict(zip(sites, found, strict=True))

    def read_logits(self, resid: Tensor) -> Tensor:
        """What the logits read of the final residual stream."""
        own = slice(self.graph.n_ports - 1, self.graph.n_ports)
        return self._read(own, len(self.graph.writers), resid, [Reader(slice(0, 1), lambda seen: seen[0])])[0]

    def _read(self, ports: slice, n_writers: int, resid: Tensor, readers: Sequence[Reader]) -> list[Tensor]:
        reading = self.table.reading(ports, n_writers)
        families = [family for family in self.sources if self._between(family, reading)]
        sources = [source for family in families for source in self.sources[family]]
        begun = None if reading.before is None else reading.before.sums
        *found, behind = _Read.apply(self.chain, resid, begun, self, reading, readers, families, *sources)
        if reading.behind:
            self.table.behind = Behind(reading.behind, n_writers, behind)
        return found

    def _between(self, family: NodeFamily, reading: Reading) -> bool:
        writers = self.graph.writers_of(family)
        return reading.first <= writers.start and writers.stop <= reading.n_writers

    def joined(self, values: list[Tensor]) -> Float[Tensor, "rows pos ..."]:
        """What was read in windows."""
        return self._joined(values)

    def forget(self) -> None:
        """Breaks the reference cycle of this run and the nodes of its backward."""
        super().forget()
        del self.sources

    # -- the backward of one window ---------------------------------------------------------------------------------

    def settle(
        self,
        window: TokenWindow,
        reading: Reading,
        rows: Float[Tensor, "row candidate token d_model"],
        gradients: Float[Tensor, "port candidate token d_model"],
    ) -> Float[Tensor, "row candidate token d_model"]:
        """Adds the gradients of the cuts of writers with rows; returns those of the rows."""
        table, base, stop = self.table, self.table.n_kept[reading.first], self.table.n_kept[reading.n_writers]
        owed = torch.empty_like(rows)
        for i, place in _met(window):
            found = matrices(place.of(gradients)) @ matrices(place.of(rows)).transpose(1, 2)
            self.gradient_of_cuts[:, self._readers(reading, i)[:, None], table.index[base:stop]] -= found
            place.add(place.weights[:, reading.ports, base:stop].transpose(1, 2), gradients, owed, keep=False)
        return owed

    def settle_low_rank(
        self, window: TokenWindow, reading: Reading, family: NodeFamily, gradients: Tensor
    ) -> Float[Tensor, "writer candidate token"]:
        """The same for the activations of a family without rows."""
        low_rank = self.table.low_rank[family]
        assert low_rank.block is not None
        owed = torch.zeros_like(low_rank.block.values[:, :, window.tokens])
        for i, place in _met(window):
            here = slice(None) if place.tokens is None else place.tokens
            for candidate in range(self.n):
                writes, own = low_rank.of(candidate, place.tokens, window.tokens), place.of(gradients)[:, candidate]
                readers = self._readers(reading, i)
                self.gradient_of_cuts[candidate, readers, low_rank.writers] -= writes.inner(own)
                weights = low_rank.weights[i][candidate, reading.ports]
                owed[:, candidate, here] += writes.accumulate(weights, own)
        return owed

    def _readers(self, reading: Reading, place: int) -> Tensor:
        """The readers of the ports at a position; the logits have one for all."""
        n, last = self.graph.n_positions, self.graph.n_ports - 1
        found = [port * n + (place if port < last else 0) for port in reading.ports]
        return torch.tensor(found, device=self.model.device)


def _met(window: TokenWindow) -> Iterator[tuple[int, Place]]:
    """The positions with a token in the window, by number."""
    return ((i, place) for i, place in enumerate(window.places) if place.tokens is None or len(place.tokens))


class _Read(torch.autograd.Function):
    """What ports read, each from its own residual stream, and the sums of those that read later."""

    @staticmethod
    def forward(
        ctx: Any,
        chain: Tensor,
        resid: Tensor,
        begun: Tensor | None,
        run: WindowRun,
        reading: Reading,
        readers: Sequence[Reader],
        families: Sequence[NodeFamily],
        *sources: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.reading, ctx.readers, ctx.families, ctx.resid = run, reading, readers, families, resid
        ctx.shapes = [source.shape for source in sources]
        found: list[list[Tensor]] = [[] for _ in readers]
        ports = slice(reading.asked[0], reading.asked[-1] + 1)
        for seen in run.table.windows_seen(ports, reading.n_writers, resid):
            for values, reader in zip(found, readers, strict=True):
                values.append(reader.read(seen[reader.ports]))
        behind = run.table.behind.sums if reading.behind and run.table.behind is not None else resid.new_zeros(0)
        return *(run.joined(values).clone() for values in found), behind

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        run, reading, table = ctx.run, ctx.reading, ctx.run.table
        *of_readers, of_behind = gradients
        stream = ctx.resid.detach().flatten(1, 2)
        to_resid = torch.empty_like(stream, dtype=table.dtype)
        before = reading.before
        to_begun = None if before is None else torch.zeros_like(before.sums)
        to_sources = [torch.zeros(shape, dtype=table.dtype, device=stream.device) for shape in ctx.shapes]
        for window in table.windows:
            examples, positions = window.at
            rows = stream.new_empty(
                table.n_rows(reading),
                run.n,
                window.tokens.stop - window.tokens.start,
                stream.shape[-1],
                dtype=table.dtype,
            )
            made = _made_again(run, window, reading, rows)
            rows[-1] = stream[:, window.tokens]
            sums = table.sums(window, reading, rows, reading.asked)
            own = [g.unflatten(0, (run.n, -1))[:, examples, positions].flatten(0, 1) for g in of_readers]
            found = _through_readers(ctx.readers, as_rows(sums, window.at), own).reshape(sums.shape).contiguous()
            to_resid[:, window.tokens] = found.sum(0)
            if to_begun is not None and before is not None:
                to_begun[[before.ports.index(port) for port in reading.asked], :, window.tokens] = found
            if reading.behind:
                found = torch.cat([found, of_behind[:, :, window.tokens]])
            owed = run.settle(window, reading, rows[:-1], found)
            _to_sources(ctx, window, made, owed, found, to_sources)
        to_resid = to_resid.view_as(ctx.resid).to(ctx.resid.dtype)
        return torch.zeros((), device=stream.device), to_resid, to_begun, None, None, None, None, *to_sources


def _made_again(
    run: WindowRun, window: TokenWindow, reading: Reading, rows: Tensor
) -> dict[NodeFamily, tuple[slice, Tensor | None, list[Tensor]]]:
    """Puts the writes of a window into the rows; for every family which ones, and the writes with what makes them."""
    made: dict[NodeFamily, tuple[slice, Tensor | None, list[Tensor]]] = {}
    examples, positions = window.at
    for family, own in run.table.kept_between(reading):
        written = run.table.written[family]
        if not isinstance(written, Unexpanded):
            rows[own] = written.writes[:, :, examples, positions].flatten(2, 3)
            made[family] = own, None, []
            continue
        now = {site: value[:, examples, positions].detach().requires_grad_() for site, value in written.now.items()}
        with Gradients(True) as on, on:
            writes = window.values.differences(family, now).dense()
        rows[own] = writes.detach().flatten(2, 3)
        made[family] = own, writes, list(now.values())
    return made


def _through_readers(readers: Sequence[Reader], seen: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """The gradient at what was seen, from those of what was read."""
    seen = seen.detach().requires_grad_()
    with Gradients(True) as on, on:
        values = [reader.read(seen[reader.ports]) for reader in readers]
    return torch.autograd.grad(values, [seen], list(gradients))[0]


def _to_sources(
    ctx: Any,
    window: TokenWindow,
    made: dict[NodeFamily, tuple[slice, Tensor | None, list[Tensor]]],
    owed: Tensor,
    gradients: Tensor,
    to_sources: list[Tensor],
) -> None:
    """Adds a window's gradients to those of what the writes are made of."""
    run, (examples, positions), given = ctx.run, window.at, iter(to_sources)
    for family in ctx.families:
        if family in run.table.low_rank:
            found = run.settle_low_rank(window, ctx.reading, family, gradients)
            next(given).flatten(2, 3)[:, :, window.tokens] += found
            continue
        own, writes, now = made[family]
        shape = (examples.stop - examples.start, positions.stop - positions.start)
        of_writes = owed[own].unflatten(2, shape)
        if writes is None:
            next(given)[:, :, examples, positions] += of_writes
            continue
        for found in torch.autograd.grad(writes, now, of_writes):
            next(given)[:, examples, positions] += found
