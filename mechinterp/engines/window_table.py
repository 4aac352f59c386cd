"""The sums of `write_table.py` a window of tokens at a time, for runs whose table of writes does not fit.

What heads write is kept as `z`, `d_head` numbers for `d_model`; other writes as they are. When a layer's readers are
computed, all earlier writes are made again for a few tokens, in the rows of a small table, summed, and given up for
those of the next tokens. So memory beyond the activations is that of one window, whatever the length, and each reading
layer costs a product with the output weights of all heads before it: about as much again as a forward of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.engines.replacement import Values
from mechinterp.engines.write_table import Place, Unexpanded, WriteTable, Written
from mechinterp.graphs.families.family import NodeFamily
from mechinterp.graphs.families.write_block import Dense, LowRank
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.token_windows import Window, token_windows, tokens_inside

MOST_BEHIND = 8
"""Ports behind those that are read, in the same layer, whose sums are kept until they are read: `d_model` numbers per
port and token, which save a further pass over all writes."""


@dataclass(frozen=True)
class TokenWindow:
    """Some tokens of the batch."""

    at: Window
    tokens: slice
    """The same in the flattened batch: neighbours."""
    values: Values
    """The replacements there."""
    places: list[Place]
    """Those of the table, with their tokens by number in the window."""


@dataclass(frozen=True)
class Behind:
    """The sums of ports that will be read later in the same layer, over the writers so far."""

    ports: list[int]
    n_writers: int
    sums: Float[Tensor, "port candidate token d_model"]


class WindowTable(WriteTable):
    """The writes of one run in compact form, and what its readers see of them."""

    def __init__(
        self,
        graph: Graph,
        masks: Float[Tensor, "candidate reader writer"],
        places: list[Tensor] | None,
        read: Bool[Tensor, " port"],
        needed: Bool[Tensor, " writer"],
        shape: tuple[int, int, int],
        values: Values,
        most: int,
    ) -> None:
        """As a `WriteTable`, with the replacements, and the most tokens of a window."""
        self.windows_at = list(token_windows(shape[0], shape[1], most))
        super().__init__(graph, masks, places, read, needed, shape)
        self.written: dict[NodeFamily, Dense | Unexpanded] = {}
        self.behind: Behind | None = None
        self.windows = [self._window(window, values.rows(window)) for window in self.windows_at]

    def _n_tokens(self) -> int:
        return max(_size(window) for window in self.windows_at)

    def _window(self, window: Window, values: Values) -> TokenWindow:
        rows, columns = window
        first = rows.start * self.shape[2] + columns.start
        tokens = slice(first, first + _size(window))
        if self.tokens is None:
            return TokenWindow(window, tokens, values, self.places)
        inside = tokens_inside(self.tokens, window, self.shape[2])
        places = [Place(here, place.weights) for here, place in zip(inside, self.places, strict=True)]
        return TokenWindow(window, tokens, values, places)

    def keeps_sites(self, family: NodeFamily) -> bool:
        """Whether its writes can be made again, and no parts are taken out of them."""
        return family.compact and not any(True for _ in self.graph.parts_of(family))

    def keep(self, family: NodeFamily, block: Written) -> None:
        """Stores a family's writes: what they are made of, or those that a reader needs."""
        if isinstance(block, LowRank):
            self.low_rank[family].keep(block)
        elif self.n_kept[self.graph.writers_of(family).start] == self.n_kept[self.graph.writers_of(family).stop]:
            return
        elif isinstance(block, Unexpanded):
            self.written[family] = block
        else:
            self.written[family] = Dense(self._kept_of(family, block.dense()))

    def _kept_of(self, family: NodeFamily, writes: Float[Tensor, "writer ..."]) -> Float[Tensor, "row ..."]:
        """Of all writes of a family, those that are kept."""
        writers = self.graph.writers_of(family)
        chosen = self.index[self.n_kept[writers.start] : self.n_kept[writers.stop]]
        return writes if len(chosen) == len(writes) else writes[chosen - writers.start]

    def total_where(self, written: Written, chosen: Bool[Tensor, "writer ..."]) -> Tensor:
        """The sum over the writers that are chosen there, `[candidate, batch, pos, d_model]`."""
        if not isinstance(written, Unexpanded):
            return written.total_where(chosen)
        total, chosen = self.rows.new_empty(self.shape), chosen.expand(-1, *self.shape[:3])
        for window in self.windows:
            rows, columns = window.at
            block = written.at(window.at, window.values, self.dtype)
            total[:, rows, columns] = block.total_where(chosen[:, :, rows, columns])
        return total

    def windows_seen(
        self, ports: slice, n_writers: int, resid: Float[Tensor, "candidate batch pos d_model"]
    ) -> Iterator[Float[Tensor, "port rows pos d_model"]]:
        """What these ports read of the stream, a window of tokens at a time."""
        asked, before, new = list(range(ports.start, ports.stop)), self.behind, None
        if before is None or not set(asked) <= set(before.ports):
            before = None
            new = self.behind = self._behind(ports.stop, n_writers)
        stream = resid.flatten(1, 2)
        for window in self.windows:
            sums = self._sums(window, asked, before, new, n_writers, stream[:, window.tokens])
            rows, columns = window.at
            shape = (self.shape[0] * (rows.stop - rows.start), columns.stop - columns.start)
            yield sums.flatten(1, 2).unflatten(1, shape)

    def _behind(self, first: int, n_writers: int) -> Behind | None:
        """Room for the sums of the ports that will be read in the same layer; None for too many, or none."""
        n, last = self.graph.n_positions, len(self.read) - 1
        stop = next((rows // n for rows in self.graph.readers_before if rows // n > first - 1), last)
        ports = [port for port in range(first, last + 1 if stop >= last else stop) if self.read[port]]
        if not 0 < len(ports) <= MOST_BEHIND:
            return None
        n_tokens = self.shape[1] * self.shape[2]
        return Behind(ports, n_writers, self.rows.new_empty(len(ports), self.shape[0], n_tokens, self.shape[3]))

    def _sums(
        self,
        window: TokenWindow,
        asked: list[int],
        before: Behind | None,
        new: Behind | None,
        n_writers: int,
        stream: Float[Tensor, "candidate token d_model"],
    ) -> Float[Tensor, "port candidate token d_model"]:
        """The sums of the ports in one window, begun by `before`; those of `new` are stored."""
        ports = asked if new is None else asked + new.ports
        first = 0 if before is None else before.n_writers
        base, stop = self.n_kept[first], self.n_kept[n_writers]
        rows = self.rows[: stop - base + 1, :, : stream.shape[1]]
        self._expand(window, first, n_writers, rows)
        rows[-1] = stream
        sums = rows.new_empty(len(ports), *rows.shape[1:])
        if before is not None:
            sums[:] = before.sums[[before.ports.index(port) for port in asked]][:, :, window.tokens]
        own = torch.zeros(1, len(ports), 1, dtype=self.dtype, device=rows.device)
        own[:, : len(asked)] = 1  # the stream, which the ports behind add when they are read
        for place in window.places:
            weights = torch.cat([place.weights[:, ports, base:stop], own.expand(len(place.weights), -1, -1)], -1)
            place.add(weights, rows, sums, keep=before is not None)
        self.add_low_rank(ports, first, n_writers, sums, window.tokens, window.places)
        if new is not None:
            new.sums[:, :, window.tokens] = sums[len(asked) :]
        return sums[: len(asked)]

    def _expand(self, window: TokenWindow, first: int, stop: int, rows: Tensor) -> None:
        """Puts into the rows the writes of the writers from `first` to `stop` that are kept, at the window's tokens."""
        base = self.n_kept[first]
        for family, written in self.written.items():
            writers = self.graph.writers_of(family)
            own = slice(self.n_kept[writers.start] - base, self.n_kept[writers.stop] - base)
            if writers.start < first or writers.stop > stop or own.start == own.stop:
                continue
            if isinstance(written, Unexpanded):
                writes = self._kept_of(family, written.at(window.at, window.values, self.dtype).dense())
            else:
                examples, positions = window.at
                writes = written.writes[:, :, examples, positions]
            rows[own] = writes.flatten(2, 3)


def _size(window: Window) -> int:
    rows, columns = window
    return (rows.stop - rows.start) * (columns.stop - columns.start)
