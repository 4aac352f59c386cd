"""The table of all writes minus their replacements, and what readers see of it, a block of layers at a time.

Reader r sees `resid - sum over writers w of cut[r, w] * difference[w]`. In these sums the table passes through memory
more often than it is computed with. So a block of a few layers reads all writers before it at once, for all of its
readers; each layer then adds the few writers inside the block.

In the names below a *port* is a reader without its position: one row of sums, each token with its own position's cuts.

Writes that are activations times directions (`LowRank`) have no rows in the table: their share of the sums is computed
from the activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.graphs.families.family import NodeFamily
from mechinterp.graphs.families.write_block import LowRank, WriteBlock
from mechinterp.graphs.graph import Graph

PORTS_OF_A_BLOCK = 64
"""About as many ports make a block: more would save little traffic, and add sums inside the block."""


def layer_blocks(graph: Graph) -> Iterator[range]:
    """The layers, a few at a time."""
    n, n_layers = graph.n_positions, graph.dims.n_layers
    per_layer = [(stop - start) // n for start, stop in pairwise(graph.readers_before)]
    size = max(1, round(PORTS_OF_A_BLOCK / max(per_layer)))
    return (range(first, min(first + size, n_layers)) for first in range(0, n_layers, size))


@dataclass(frozen=True)
class Place:
    """The tokens of one position (None: all tokens) and the weights of writers there."""

    tokens: Tensor | None
    weights: Float[Tensor, "candidate port writer"]

    def of(self, rows: Float[Tensor, "row candidate token d_model"]) -> Float[Tensor, "row candidate here d_model"]:
        """The rows at the tokens of this position."""
        return rows if self.tokens is None else rows[:, :, self.tokens]

    def add(self, weights: Float[Tensor, "candidate to of"], rows: Tensor, total: Tensor, *, keep: bool = True) -> None:
        """Adds the weighted rows, at this position, to `total` (or puts them there), both `[row, candidate, ...]`."""
        if self.tokens is None:
            matrices(total).baddbmm_(weights, matrices(rows), beta=int(keep))
            return
        found = torch.bmm(weights, matrices(self.of(rows))).transpose(0, 1).unflatten(2, (len(self.tokens), -1))
        total[:, :, self.tokens] = total[:, :, self.tokens] + found if keep else found


@dataclass
class LowRankRows:
    """The writers of one family that are activations times directions, as far as a reader needs them."""

    writers: slice
    index: Int[Tensor, " chosen"]
    """Which of them are needed."""
    weights: list[Float[Tensor, "candidate port chosen"]]
    """For every place."""
    used: list[Bool[Tensor, "candidate port"]]
    """For every place, whether a port reads any of them otherwise than it is; on the CPU."""
    block: LowRank | None = None
    """`[chosen, candidate, token]`; None before they are written."""
    first: LowRankRows | None = None
    """Earlier rows of the same writers that have the same activations, if these are such."""

    def keep(self, block: LowRank) -> None:
        """Stores the activations minus their replacements, `[writer, candidate, batch, pos]`."""
        self.block = LowRank(block.values[self.index].flatten(2), block.directions[self.index])

    def of(self, candidate: int, tokens: Tensor | None) -> LowRank:
        """One candidate's writes at some tokens."""
        assert self.block is not None
        values = self.block.values[:, candidate]
        return LowRank(values if tokens is None else values[:, tokens], self.block.directions)


def as_one(several: Sequence[LowRankRows], ports: slice) -> list[LowRankRows]:
    """Fewer rows with the same sums for these ports: such with the activations and weights of earlier ones are one with
    them, of the summed directions."""
    found: dict[int, LowRankRows] = {}
    for rows in several:
        first, own = None if rows.first is None else found.get(id(rows.first)), rows.block
        together = first is not None and all(
            torch.equal(one[:, ports], other[:, ports]) for one, other in zip(first.weights, rows.weights, strict=True)
        )
        if first is None or not together:
            found[id(rows)] = rows
            continue
        assert first.block is not None and own is not None
        summed = LowRank(first.block.values, first.block.directions + own.directions)
        found[id(rows.first)] = replace(first, block=summed)
    return list(found.values())


@dataclass
class Block:
    """The sums of some layers' ports."""

    ports: slice
    base: int
    """The rows before this one are in `sums` for all ports from the beginning."""
    first: int
    """The same as a number of writers."""
    sums: Float[Tensor, "port candidate token d_model"]
    place_of: Tensor
    """For every port of the block, its row in `sums`."""
    n_writers: int = 0
    """The rows before this one have been read."""
    last: int = 0
    """The same as a number of writers."""

    def rows(self, ports: slice) -> slice:
        """The rows in `sums` of some ports that stand side by side there."""
        first = int(self.place_of[ports.start - self.ports.start])
        return slice(first, first + ports.stop - ports.start)


class WriteTable:
    """The writes of one run of (candidate x batch) prompts, and the sums that its readers see."""

    def __init__(
        self,
        graph: Graph,
        masks: Float[Tensor, "candidate reader writer"],
        places: list[Tensor] | None,
        read: Bool[Tensor, " port"],
        needed: Bool[Tensor, " writer"],
        shape: tuple[int, int, int],
    ) -> None:
        """Which ports will be read, which writers are kept, and the shape of one candidate's residual stream."""
        self.needed, self.graph, self.read, self.shape = needed, graph, read, (len(masks), *shape)
        self.low_rank = {
            family: self._low_rank(masks, graph.writers_of(family)) for family in graph.families if family.low_rank
        }
        dense = needed.clone()
        for rows in self.low_rank.values():
            dense[rows.writers] = False
        self.n_kept = [0, *dense.cumsum(0).tolist()]
        self.index = dense.nonzero().flatten().to(masks.device)
        """The writers that are kept: an index, since a boolean mask would make the host wait for the device."""
        masks = masks[..., self.index]
        self.tokens = places
        tokens = [None] if places is None else places
        self.places = [Place(at, -weights) for at, weights in zip(tokens, self._by_port(masks), strict=True)]
        n_batch, n_pos, d_model = shape
        # A further row, so that behind any number of writers there is one for the residual stream.
        size = (1 + self.n_kept[-1], len(masks), n_batch * n_pos, d_model)
        self.rows = torch.empty(size, dtype=masks.dtype, device=masks.device)
        self.block: Block | None = None

    def _by_port(self, masks: Float[Tensor, "candidate reader writer"]) -> list[Float[Tensor, "candidate port writer"]]:
        """The masks at every position."""
        n = self.graph.n_positions
        return [torch.cat([masks[:, i:-1:n], masks[:, -1:]], 1) for i in range(n)]

    def _low_rank(self, masks: Tensor, writers: slice) -> LowRankRows:
        index = self.needed[writers].nonzero().flatten().to(masks.device)
        weights = [-own for own in self._by_port(masks[..., writers][..., index])]
        return LowRankRows(writers, index, weights, [(own != 0).any(-1).cpu() for own in weights])

    def kept(self, writers: slice) -> Float[Tensor, "row candidate token d_model"]:
        """The rows of those of the writers that are kept."""
        return self.rows[self.n_kept[writers.start] : self.n_kept[writers.stop]]

    def keep(self, family: NodeFamily, block: WriteBlock) -> None:
        """Stores a family's writes minus their replacements, `[writer, candidate, batch, pos, d_model]`."""
        if isinstance(block, LowRank):
            rows = self.low_rank[family]
            rows.keep(block)
            first = self.low_rank[family.origin]
            if first is not rows and first.block is not None and torch.equal(first.index, rows.index):
                assert rows.block is not None
                rows.first = first if torch.equal(first.block.values, rows.block.values) else None
            return
        writers, differences = self.graph.writers_of(family), block.dense()
        rows = self.kept(writers)
        if len(rows) < len(differences):
            kept = self.index[self.n_kept[writers.start] : self.n_kept[writers.stop]] - writers.start
            differences = differences[kept]
        rows.copy_(differences.flatten(2, 3))

    def add_low_rank(self, ports: slice, base: int, stop: int, sums: Tensor, read: Tensor | None = None) -> None:
        """Adds to the sums of some ports (of those that are `read`) the writers from `base` to `stop` with no rows."""
        index = None if read is None else read.nonzero().flatten().to(sums.device)
        here = [rows for rows in self.low_rank.values() if base <= rows.writers.start and rows.writers.stop <= stop]
        for rows in as_one(here, ports):
            for place, weights, used in zip(self.places, rows.weights, rows.used, strict=True):
                some = weights[:, ports] if index is None else weights[:, ports][:, index]
                for candidate in used[:, ports].any(1).nonzero().flatten().tolist():
                    found = rows.of(candidate, place.tokens).weighted_sum(some[candidate])
                    if place.tokens is None:
                        sums[:, candidate] += found
                    else:
                        sums[:, candidate, place.tokens] += found

    def seen(
        self, ports: slice, n_writers: int, resid: Float[Tensor, "candidate batch pos d_model"]
    ) -> Float[Tensor, "port candidate token d_model"]:
        """What these ports read of the stream, corrected for the writers before them: a view of the block's sums."""
        n_before, n_writers = n_writers, self.n_kept[n_writers]
        block = self.block
        if block is None or ports.start >= block.ports.stop:
            block = self.block = self._open(ports, n_before)
        sums = block.sums[block.rows(ports)]
        behind = self.rows[n_writers].clone()  # in a parallel layer the next writer's row may be filled already
        self.rows[n_writers] = resid.flatten(1, 2)
        new = self.rows[block.base : n_writers + 1]
        for place in self.places:
            weights = place.weights[:, ports, block.base : n_writers]
            place.add(torch.nn.functional.pad(weights, (0, 1), value=1.0), new, sums)
        self.rows[n_writers] = behind
        self.add_low_rank(ports, block.first, n_before, sums)
        block.n_writers, block.last = n_writers, n_before
        return sums

    def _open(self, ports: slice, n_writers: int) -> Block:
        """The block that begins with these ports: what all of its ports see of the writers so far."""
        n, last = self.graph.n_positions, len(self.read) - 1
        stops = [self.graph.readers_before[layers.stop] // n for layers in layer_blocks(self.graph)]
        stop = next((stop for stop in stops if stop > ports.start), last)
        if stop >= last:
            stop = last + 1  # the logits belong to the last block
        wanted = self.read[ports.start : stop]
        n_before, n_writers = n_writers, self.n_kept[n_writers]
        size = (int(wanted.sum()), self.shape[0], self.shape[1] * self.shape[2], self.shape[3])
        sums, index = self.rows.new_empty(size), wanted.nonzero().flatten().to(self.rows.device)
        block = Block(slice(ports.start, stop), n_writers, n_before, sums, wanted.cumsum(0) - 1)
        if not n_writers:
            sums.zero_()
        for place in self.places if n_writers else ():
            weights = place.weights[:, block.ports, :n_writers][:, index]
            place.add(weights, self.rows[:n_writers], sums, keep=False)
        self.add_low_rank(block.ports, 0, n_before, sums, wanted)
        return block


def matrices(rows: Float[Tensor, "row candidate token d_model"]) -> Float[Tensor, "candidate row numbers"]:
    """A view with one matrix a candidate."""
    return rows.view(*rows.shape[:2], -1).transpose(0, 1)
