"""The table of all writes minus their replacements, and what readers see of it, a block of layers at a time.

Reader r sees `resid - sum over writers w of cut[r, w] * difference[w]`. In these sums the table passes through memory
more often than it is computed with. So a block of a few layers reads all writers before it at once, for all of its
readers; each layer then adds the few writers inside the block.

In the names below a *port* is a reader without its position: one row of sums, each token with its own position's cuts.

Writes that are activations times directions (`LowRank`) have no rows in the table: their share of the sums is computed
from the activations.

The table of a batch may not fit: it takes 17 MB a token on the Llama-3.1-8B shape. `plan_table` says when: then some
examples are run at a time, and where one does not fit either, its sums are taken a window of tokens at a time
(`window_table.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.engines.replacement import Values
from mechinterp.graphs.families.family import NodeFamily, Recorded
from mechinterp.graphs.families.write_block import LowRank, WriteBlock
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.token_windows import Window

TABLE_BUDGET_BYTES = 2**31
"""A table of writes takes no more than this many bytes, with the sums of a block; at least one token's."""
EVERY = slice(None)
"""All tokens."""
PORTS_OF_A_BLOCK = 64
"""About as many ports make a block: more would save little traffic, and add sums inside the block."""


def layer_blocks(graph: Graph) -> Iterator[range]:
    """The layers, a few at a time."""
    n, n_layers = graph.n_positions, graph.dims.n_layers
    per_layer = [(stop - start) // n for start, stop in pairwise(graph.readers_before)]
    size = max(1, round(PORTS_OF_A_BLOCK / max(per_layer)))
    return (range(first, min(first + size, n_layers)) for first in range(0, n_layers, size))


@dataclass(frozen=True)
class TablePlan:
    """How the writes of a batch are kept while it is run with edges cut."""

    examples: int
    """Examples that are run together."""
    tokens: int | None
    """Tokens whose writes are in full together; None: all."""
    nbytes: int
    """What these writes and sums take."""

    def words(self, n_examples: int) -> str:
        """How the writes are kept, for people.

        >>> TablePlan(8, None, 0).words(20), TablePlan(20, 100, 0).words(20)
        ('all writes of 8 of 20 examples at once', 'the writes of 100 tokens at once, made again for each layer')
        """
        if self.tokens is not None:
            return f"the writes of {self.tokens:,} tokens at once, made again for each layer"
        some = f"{self.examples} of " if self.examples < n_examples else ""
        return f"all writes of {some}{n_examples} examples at once"


def plan_table(
    graph: Graph, n_rows: int, n_examples: int, n_pos: int, itemsize: int, *, together: bool = False
) -> TablePlan:
    """The plan whose tables fit in `TABLE_BUDGET_BYTES`: all examples, else some at a time, else windows of tokens.

    Args:
        graph: The graph.
        n_rows: Writers of which every token's write is needed, times the candidates that are run side by side.
        n_examples: The examples of the batch.
        n_pos: Their length in tokens.
        itemsize: Bytes of a number.
        together: Whether the examples must be run together.
    """
    per_token = n_rows * graph.dims.d_model * itemsize
    most = max(1, TABLE_BUDGET_BYTES // per_token)
    if n_examples * n_pos <= most:
        return TablePlan(n_examples, None, n_examples * n_pos * per_token)
    if n_pos <= most and not together:
        return TablePlan(most // n_pos, None, most // n_pos * n_pos * per_token)
    return TablePlan(n_examples, most, most * per_token)


def rows_beside(graph: Graph) -> int:
    """Rows of the size of a write that a token takes beside those of the table: a block's sums, and new writes."""
    n, before = graph.n_positions, graph.readers_before
    ports = max((before[layers.stop] - before[layers.start]) // n for layers in layer_blocks(graph))
    dense = (graph.writers_of(family) for family in graph.families if not family.low_rank)
    return 1 + ports + max(writers.stop - writers.start for writers in dense)


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
        if not len(self.tokens):
            return
        found = torch.bmm(weights, matrices(self.of(rows))).transpose(0, 1).unflatten(2, (len(self.tokens), -1))
        total[:, :, self.tokens] = total[:, :, self.tokens] + found if keep else found


@dataclass(frozen=True)
class Unexpanded:
    """What a family's writers write, as the activations of which it is a product with weights: much less memory."""

    family: NodeFamily
    now: Recorded
    """`[candidate, batch, pos, ...]`, in the model's dtype."""

    def at(self, window: Window, values: Values, dtype: torch.dtype) -> WriteBlock:
        """The writes of a window, less the replacements there, `[writer, candidate, examples, positions, d_model]`."""
        rows, columns = window
        now = {site: value[:, rows, columns].to(dtype) for site, value in self.now.items()}
        return values.differences(self.family, now)

    def expand(self, n: int) -> Unexpanded:
        """The same for `n` candidates, from one."""
        now = {site: value.expand(n, *value.shape[1:]) for site, value in self.now.items()}
        return Unexpanded(self.family, now)


Written: TypeAlias = WriteBlock | Unexpanded


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

    def of(self, candidate: int, tokens: Tensor | None, within: slice = EVERY) -> LowRank:
        """One candidate's writes at some tokens, which are numbered from the first of those within."""
        assert self.block is not None
        values = self.block.values[:, candidate, within]
        return LowRank(values if tokens is None else values[:, tokens], self.block.directions)


def as_one(several: Sequence[LowRankRows], ports: slice | list[int]) -> list[LowRankRows]:
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
        self.tokens, self.dtype = places, masks.dtype
        tokens = [None] if places is None else places
        self.places = [Place(at, -weights) for at, weights in zip(tokens, self._by_port(masks), strict=True)]
        # A further row, so that behind any number of writers there is one for the residual stream.
        size = (1 + self.n_kept[-1], len(masks), self._n_tokens(), shape[2])
        self.rows = torch.empty(size, dtype=masks.dtype, device=masks.device)
        self.block: Block | None = None

    def _n_tokens(self) -> int:
        """The tokens of a row."""
        return self.shape[1] * self.shape[2]

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

    def keep(self, family: NodeFamily, block: Written) -> None:
        """Stores a family's writes minus their replacements, `[writer, candidate, batch, pos, d_model]`."""
        assert not isinstance(block, Unexpanded)
        if isinstance(block, LowRank):
            self.keep_low_rank(family, block)
            return
        writers, differences = self.graph.writers_of(family), block.dense()
        rows = self.kept(writers)
        if len(rows) < len(differences):
            kept = self.index[self.n_kept[writers.start] : self.n_kept[writers.stop]] - writers.start
            differences = differences[kept]
        rows.copy_(differences.flatten(2, 3))

    def keep_low_rank(self, family: NodeFamily, block: LowRank) -> None:
        """Stores a family's activations minus their replacements."""
        rows = self.low_rank[family]
        rows.keep(block)
        first = self.low_rank[family.origin]
        if first is not rows and first.block is not None and torch.equal(first.index, rows.index):
            assert rows.block is not None
            rows.first = first if torch.equal(first.block.values, rows.block.values) else None

    def keeps_sites(self, family: NodeFamily) -> bool:
        """Whether it takes a family's writes as `Unexpanded`."""
        return False

    def total_where(self, written: Written, chosen: Bool[Tensor, "writer ..."]) -> Tensor:
        """The sum over the writers that are chosen there."""
        assert not isinstance(written, Unexpanded)
        return written.total_where(chosen)

    def add_low_rank(
        self,
        ports: slice | list[int],
        base: int,
        stop: int,
        sums: Tensor,
        tokens: slice = EVERY,
        places: list[Place] | None = None,
    ) -> None:
        """Adds to the sums of some ports the writers from `base` to `stop` with no rows.

        The sums may be of a window: some neighbouring tokens, and the places by their numbers there.
        """
        here = [rows for rows in self.low_rank.values() if base <= rows.writers.start and rows.writers.stop <= stop]
        for rows in as_one(here, ports):
            for place, weights, used in zip(places or self.places, rows.weights, rows.used, strict=True):
                some = weights[:, ports]
                for candidate in used[:, ports].any(1).nonzero().flatten().tolist():
                    found = rows.of(candidate, place.tokens, tokens).weighted_sum(some[candidate])
                    if place.tokens is None:
                        sums[:, candidate] += found
                    else:
                        sums[:, candidate, place.tokens] += found

    def windows_seen(
        self, ports: slice, n_writers: int, resid: Float[Tensor, "candidate batch pos d_model"]
    ) -> Iterator[Float[Tensor, "port rows pos d_model"]]:
        """What these ports read of the stream, a window of tokens at a time; here all of them in one."""
        yield self.seen(ports, n_writers, resid).view(ports.stop - ports.start, -1, *resid.shape[2:])

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
        self.add_low_rank((ports.start + wanted.nonzero().flatten()).tolist(), 0, n_before, sums)
        return block


def matrices(rows: Float[Tensor, "row candidate token d_model"]) -> Float[Tensor, "candidate row numbers"]:
    """A view with one matrix a candidate."""
    return rows.view(*rows.shape[:2], rows.shape[2] * rows.shape[3]).transpose(0, 1)
