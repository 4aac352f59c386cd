"""The table of all writes minus their replacements, and what readers see of it, a block of layers at a time.

Reader r sees `resid - sum over writers w of cut[r, w] * difference[w]`. In these sums the table passes through memory
more often than it is computed with. So a block of a few layers reads all writers before it at once, for all of its
readers; each layer then adds the few writers inside the block.

In the names below a *port* is a reader without its position: one row of sums, each token with its own position's cuts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.graphs.graph import Graph

PORTS_OF_A_BLOCK = 64
"""About as many ports make a block: more would save little traffic, and add sums inside the block."""


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
class Block:
    """The sums of some layers' ports."""

    ports: slice
    base: int
    """The writers before this one are in `sums` for all ports from the beginning."""
    sums: Float[Tensor, "port candidate token d_model"]
    place_of: Tensor
    """For every port of the block, its row in `sums`."""
    n_writers: int = 0
    """The writers before this one have been read."""

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
        self.index = needed.nonzero().flatten().to(masks.device)
        """The writers that are kept: an index, since a boolean mask would make the host wait for the device."""
        n, masks = graph.n_positions, masks[..., self.index]
        self.needed, self.n_kept = needed, [0, *needed.cumsum(0).tolist()]
        self.graph, self.read, self.shape = graph, read, (len(masks), *shape)
        by_port = [torch.cat([masks[:, i:-1:n], masks[:, -1:]], 1) for i in range(n)]
        self.tokens = places
        tokens = [None] if places is None else places
        self.places = [Place(at, -weights) for at, weights in zip(tokens, by_port, strict=True)]
        n_batch, n_pos, d_model = shape
        # A further row, so that behind any number of writers there is one for the residual stream.
        size = (1 + self.n_kept[-1], len(masks), n_batch * n_pos, d_model)
        self.rows = torch.empty(size, dtype=masks.dtype, device=masks.device)
        self.block: Block | None = None

    def kept(self, writers: slice) -> Float[Tensor, "row candidate token d_model"]:
        """The rows of those of the writers that are kept."""
        return self.rows[self.n_kept[writers.start] : self.n_kept[writers.stop]]

    def keep(self, writers: slice, differences: Float[Tensor, "writer candidate batch pos d_model"]) -> None:
        """Stores writers' current writes minus their replacements."""
        rows, chosen = self.kept(writers), self.needed[writers]
        if len(rows) < len(chosen):
            kept = self.index[self.n_kept[writers.start] : self.n_kept[writers.stop]] - writers.start
            differences = differences[kept]
        rows.copy_(differences.flatten(2, 3))

    def seen(
        self, ports: slice, n_writers: int, resid: Float[Tensor, "candidate batch pos d_model"]
    ) -> Float[Tensor, "port candidate token d_model"]:
        """What these ports read of the stream, corrected for the writers before them: a view of the block's sums."""
        n_writers = self.n_kept[n_writers]
        block = self.block
        if block is None or ports.start >= block.ports.stop:
            block = self.block = self._open(ports, n_writers)
        sums = block.sums[block.rows(ports)]
        behind = self.rows[n_writers].clone()  # in a parallel layer the next writer's row may be filled already
        self.rows[n_writers] = resid.flatten(1, 2)
        new = self.rows[block.base : n_writers + 1]
        for place in self.places:
            weights = place.weights[:, ports, block.base : n_writers]
            place.add(torch.nn.functional.pad(weights, (0, 1), value=1.0), new, sums)
        self.rows[n_writers] = behind
        block.n_writers = n_writers
        return sums

    def _open(self, ports: slice, n_writers: int) -> Block:
        """The block that begins with these ports: what all of its ports see of the writers so far."""
        per_layer = (len(self.read) - 1) // self.graph.dims.n_layers
        size = per_layer * max(1, round(PORTS_OF_A_BLOCK / per_layer))
        stop = (ports.start // size + 1) * size
        if stop >= len(self.read) - 1 or ports.start == len(self.read) - 1:
            stop = len(self.read)  # the logits belong to the last block
        wanted = self.read[ports.start : stop]
        size = (int(wanted.sum()), self.shape[0], self.shape[1] * self.shape[2], self.shape[3])
        sums, index = self.rows.new_empty(size), wanted.nonzero().flatten().to(self.rows.device)
        block = Block(slice(ports.start, stop), n_writers, sums, wanted.cumsum(0) - 1)
        for place in self.places:
            weights = place.weights[:, block.ports, :n_writers][:, index]
            place.add(weights, self.rows[:n_writers], sums, keep=False)
        return block


def matrices(rows: Float[Tensor, "row candidate token d_model"]) -> Float[Tensor, "candidate row numbers"]:
    """A view with one matrix a candidate."""
    return rows.view(*rows.shape[:2], -1).transpose(0, 1)
