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


@dataclass(frozen=True)
class Reading:
    """Ports that are read together."""

    asked: list[int]
    behind: list[int]
    """Ports that are summed along, for later."""
    before: Behind | None
    """How the sums of the asked ones begin, if they were summed along."""
    n_writers: int
    """The writers before them."""

    @property
    def ports(self) -> list[int]:
        """All that are summed."""
        return self.asked + self.behind

    @property
    def first(self) -> int:
        """The first writer that is not in `before`."""
        return 0 if self.before is None else self.before.n_writers


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
            self.keep_low_rank(family, block)
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
        reading, stream = self.reading(ports, n_writers), resid.flatten(1, 2)
        n_asked, n_behind = len(reading.asked), len(reading.behind)
        later = self.rows.new_empty(n_behind, self.shape[0], stream.shape[1], self.shape[3])
        for window in self.windows:
            rows = self.rows[: self.n_rows(reading), :, : _size(window.at)]
            self.expand(window, reading, rows)
            rows[-1] = stream[:, window.tokens]
            sums = self.sums(window, reading, rows, reading.ports)
            later[:, :, window.tokens] = sums[n_asked:]
            yield as_rows(sums[:n_asked], window.at)
        if n_behind:
            self.behind = Behind(reading.behind, n_writers, later)

    def reading(self, ports: slice, n_writers: int) -> Reading:
        """What these ports need, and which ones of the same layer are summed along: up to `MOST_BEHIND`."""
        asked, before = list(range(ports.start, ports.stop)), self.behind
        if before is not None and set(asked) <= set(before.ports):
            return Reading(asked, [], before, n_writers)
        n, last = self.graph.n_positions, len(self.read) - 1
        stop = next((rows // n for rows in self.graph.readers_before if rows // n >= ports.stop), last)
        stop = last + 1 if stop >= last else stop  # the logits belong to the last layer
        behind = [port for port in range(ports.stop, stop) if self.read[port]]
        return Reading(asked, behind if len(behind) <= MOST_BEHIND else [], None, n_writers)

    def n_rows(self, reading: Reading) -> int:
        """How many rows it takes, with one for the stream."""
        return self.n_kept[reading.n_writers] - self.n_kept[reading.first] + 1

    def sums(
        self,
        window: TokenWindow,
        reading: Reading,
        rows: Float[Tensor, "row candidate token d_model"],
        ports: list[int],
    ) -> Float[Tensor, "port candidate token d_model"]:
        """The sums of some of the ports over the rows; the last row is the stream, which only the asked ones add."""
        base, stop, before = self.n_kept[reading.first], self.n_kept[reading.n_writers], reading.before
        sums = rows.new_empty(len(ports), *rows.shape[1:])
        if before is not None:
            sums[:] = before.sums[[before.ports.index(port) for port in ports]][:, :, window.tokens]
        own = torch.tensor([float(port in reading.asked) for port in ports]).to(rows)[None, :, None]
        for place in window.places:
            weights = torch.cat([place.weights[:, ports, base:stop], own.expand(len(place.weights), -1, -1)], -1)
            place.add(weights, rows, sums, keep=before is not None)
        self.add_low_rank(ports, reading.first, reading.n_writers, sums, window.tokens, window.places)
        return sums

    def expand(self, window: TokenWindow, reading: Reading, rows: Tensor) -> None:
        """Puts the writes that it needs into the first rows, at the window's tokens."""
        for family, own in self.kept_between(reading):
            rows[own] = self.writes_at(window, family).flatten(2, 3)

    def writes_at(self, window: TokenWindow, family: NodeFamily) -> Float[Tensor, "row candidate batch pos d_model"]:
        """The writes of a family that are kept, at the window's tokens."""
        written = self.written[family]
        if isinstance(written, Unexpanded):
            return self._kept_of(family, written.at(window.at, window.values, self.dtype).dense())
        examples, positions = window.at
        return written.writes[:, :, examples, positions]

    def kept_between(self, reading: Reading) -> Iterator[tuple[NodeFamily, slice]]:
        """The families with rows that it needs, and which rows these are."""
        base = self.n_kept[reading.first]
        for family in self.written:
            writers = self.graph.writers_of(family)
            if reading.first <= writers.start and writers.stop <= reading.n_writers:
                yield family, slice(self.n_kept[writers.start] - base, self.n_kept[writers.stop] - base)


def as_rows(
    sums: Float[Tensor, "port candidate token d_model"], window: Window
) -> Float[Tensor, "port rows pos d_model"]:
    """The sums of a window with the axes of the model."""
    examples, positions = window
    shape = (sums.shape[1] * (examples.stop - examples.start), positions.stop - positions.start)
    return sums.flatten(1, 2).unflatten(1, shape)


def _size(window: Window) -> int:
    rows, columns = window
    return (rows.stop - rows.start) * (columns.stop - columns.start)
