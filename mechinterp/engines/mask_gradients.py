"""The exact engine with gradients: how the metric changes with every entry of a mask between kept (0) and cut (1).

The forward is that of `run_edges`, and keeps what every reader saw. On the way back a reader's gradient takes the place
of what it saw. When a block of layers is done, its gradients times the writes are the gradient of its cuts, and their
share in earlier writes goes to a second table; a writer takes its row there, and adds what later readers of its own
block owe. So a backward costs two products where the forward costs one.

Norms and projections of heads are differentiated in closed form. With y = standardize(x), s its scale, W the projection
with the norm's weight and g the gradient of y W, the gradient of x is `W' g / s - y <y W, g> / (d_model s)`, and `y W`
is there already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.engines.differentiable_run import DifferentiableRun, Loss
from mechinterp.engines.edge_patching import wide
from mechinterp.engines.patched_run import ReadAt
from mechinterp.engines.replacement import Values
from mechinterp.engines.window_gradients import WindowRun
from mechinterp.engines.write_table import (
    Block,
    TablePlan,
    Unexpanded,
    WriteTable,
    Written,
    matrices,
    plan_table,
    rows_beside,
)
from mechinterp.graphs.families.family import NodeFamily
from mechinterp.graphs.families.normed_ports import Projections
from mechinterp.graphs.families.write_block import Dense, LowRank
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.write_rows import write_rows
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.pairs import Pairs


def mask_gradients(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    masks: Float[Tensor, "candidate reader writer"],
    values: Values,
    loss: Loss,
) -> tuple[Float[Tensor, "candidate batch"], Float[Tensor, "candidate reader writer"]]:
    """The loss of every example under each mask, and the gradient of their sum over examples with respect to the mask.

    Cost: one patched forward and its backward per candidate, side by side. Memory: `(2 n_writers + n_readers) *
    candidates * batch * pos * d_model` numbers, and what the model's own backward keeps. Where that is more than 2 GiB,
    candidates are run one by one; where one takes more, writes are made again for a window of tokens at a time, at
    about twice the work.
    """
    plan = plan_gradients(model, graph, pairs.clean.shape, len(masks))
    # Edits of the user expect the prompts as they are, not repeated.
    if len(masks) > 1 and (model.edited or plan.tokens is not None):
        found = [mask_gradients(model, graph, pairs, mask[None], values, loss) for mask in masks]
        return torch.cat([value for value, _ in found]), torch.cat([gradient for _, gradient in found])
    rows, window = write_rows(graph), plan.tokens
    of = _TableRun if window is None else partial(WindowRun, window=window)
    run = of(model, rows.graph, pairs, rows.masks(masks.to(model.device)), values)
    try:
        found, gradient = run.differentiate(loss)
    finally:
        run.forget()
    return found, rows.tables(gradient)


def plan_gradients(
    model: HookManager, graph: Graph, shape: Sequence[int], n_candidates: int = 1, *, together: bool = True
) -> TablePlan:
    """How a batch is differentiated: in full, or in windows of tokens; with `together=False`, some examples at a time.

    In full a token takes its writes, their gradients, and what every reader saw; in a window the writes of the earlier
    layers three times: as they are, with what they are made of, and as gradients.
    """
    (n_examples, n_pos), itemsize = shape, wide(model).itemsize
    n_dense = sum(len(family.writers) for family in graph.families if not family.low_rank)
    in_full = n_candidates * (2 * n_dense + graph.n_ports + rows_beside(graph))
    plan = plan_table(graph, in_full, n_examples, n_pos, itemsize, together=together)
    if plan.tokens is None:
        return plan
    in_window = n_candidates * 3 * (n_dense + rows_beside(graph))
    plan = plan_table(graph, in_window, n_examples, n_pos, itemsize, together=True)
    return plan if plan.tokens is not None else replace(plan, tokens=n_examples * n_pos)


def examples_at_once(model: HookManager, graph: Graph, n_pos: int, batch_size: int, n_candidates: int) -> int:
    """Examples of a batch that are best given to `mask_gradients` together: not so many that windows are needed.

    The candidates run side by side, and count as examples; where that does not fit, one by one.
    """
    wanted = max(1, batch_size // n_candidates)
    plan = plan_gradients(model, graph, (wanted, n_pos), together=False)
    return plan.examples if plan.tokens is None else 1


class _TableRun(DifferentiableRun):
    """A run whose writes, and what every reader saw, are kept in full."""

    def _table(self) -> _GradientTable:
        self.gradients = _GradientTable(self.graph, self.cuts.edges, *self._rows())
        return self.gradients

    @property
    def of_cuts(self) -> Tensor:
        """The gradient of every cut, when the backward is done."""
        return self.gradients.of_cuts

    def forget(self) -> None:
        """Breaks the reference cycle of this run and the nodes of its backward, so that its memory is freed at once."""
        super().forget()
        del self.gradients

    def keep(self, family: NodeFamily, block: Written) -> None:
        assert not isinstance(block, Unexpanded)
        values = block.values if isinstance(block, LowRank) else block.dense()
        directions = block.directions if isinstance(block, LowRank) else None
        self.chain = _Keep.apply(self.chain, values, directions, self.gradients, family)

    def see(self, ports: slice, n_writers: int, resid: Tensor) -> Iterator[Tensor]:
        seen, self.chain = _See.apply(self.chain, resid, self.gradients, ports, n_writers)
        yield seen.flatten(1, 2)

    def read(self, family: NodeFamily, resid: Tensor) -> dict[ReadAt, Tensor]:
        projections = family.projections(self.model, self.table.dtype)
        if projections is None:
            return super().read(family, resid)
        *found, self.chain = _ReadProjections.apply(
            self.chain, resid, self.gradients, projections, self.graph.ports_of(family), self._n_writers_seen(family)
        )
        n_pos = self.pairs.clean.shape[1]
        return {
            ports.site: read.unflatten(1, (-1, n_pos)).permute(1, 2, 0, 3)
            for ports, read in zip(family.ports, found, strict=True)
        }


class _GradientTable(WriteTable):
    """The table of writes, in which the sums of a reader give way to its gradient, in the order of the backward."""

    def __init__(
        self,
        graph: Graph,
        masks: Tensor,
        places: list[Tensor] | None,
        read: Tensor,
        needed: Tensor,
        shape: tuple[int, int, int],
    ) -> None:
        super().__init__(graph, masks, places, read, needed, shape)
        self.of_cuts = torch.zeros_like(masks)
        self.blocks: list[Block] = []
        self.owed_activations: dict[NodeFamily, Tensor] = {}
        """The same for writers that are activations times directions."""
        self.owed: Tensor | None = None
        """The gradients of writers before the last block, from the readers of all blocks that are done."""
        self.first = len(read)
        """The ports from this one on have their gradient."""

    def _open(self, ports: slice, n_writers: int) -> Block:
        self.blocks.append(super()._open(ports, n_writers))
        return self.blocks[-1]

    def sums(self, ports: slice) -> Float[Tensor, "port candidate token d_model"]:
        """What these ports saw; in the backward, where their gradient is to be written."""
        return self.blocks[-1].sums[self.blocks[-1].rows(ports)]

    def done(self, ports: slice) -> None:
        """To be called when these ports' sums hold their gradient."""
        self.first = ports.start
        if ports.start == self.blocks[-1].ports.start:
            self._settle(self.blocks.pop())

    def _settle(self, block: Block) -> None:
        """The gradients of the block's cuts, and of the writers before it."""
        later, self.owed = self.owed, torch.empty_like(self.rows[: block.base]) if self.owed is None else self.owed
        n, last = self.graph.n_positions, len(self.read) - 1
        readers = torch.arange(block.ports.start, block.ports.stop) * n
        for i, place in enumerate(self.places):
            rows = torch.where(readers == last * n, last * n, readers + i).to(self.rows.device)
            gradients, writes = place.of(block.sums), place.of(self.rows[: block.n_writers])
            self.of_cuts[:, rows[:, None], self.index[: block.n_writers]] -= matrices(gradients) @ matrices(
                writes
            ).transpose(1, 2)
            self._settle_low_rank(block, i, rows, gradients)
            weights = place.weights[:, block.ports, : block.base].transpose(1, 2)
            place.add(weights, block.sums, self.owed[: block.base], keep=later is not None)

    def _settle_low_rank(self, block: Block, i: int, readers: Tensor, gradients: Tensor) -> None:
        """The same for writers without rows: of those before the block, and the cuts of those inside it."""
        tokens = self.places[i].tokens
        for family, rows in self.low_rank.items():
            if rows.block is None or rows.writers.stop > block.last:
                continue
            for candidate in range(self.shape[0]):
                writes = rows.of(candidate, tokens)
                self.of_cuts[candidate, readers, rows.writers] -= writes.inner(gradients[:, candidate])
                if rows.writers.stop <= block.first:
                    weights = rows.weights[i][candidate, block.ports]
                    self._owe(family, candidate, tokens, writes.accumulate(weights, gradients[:, candidate]))

    def _owe(self, family: NodeFamily, candidate: int, tokens: Tensor | None, found: Tensor) -> None:
        own = self.low_rank[family].block
        assert own is not None
        owed = self.owed_activations.setdefault(family, torch.zeros_like(own.values))[:, candidate]
        owed[:, slice(None) if tokens is None else tokens] += found

    def of_writes(self, family: NodeFamily) -> Float[Tensor, "writer candidate token ..."]:
        """The gradient of a family's writes (or activations), when all later readers are done."""
        later: slice | None = None
        if self.blocks and self.first < self.blocks[-1].ports.stop:
            later = slice(self.first, self.blocks[-1].ports.stop)
        if (low_rank := self.low_rank.get(family)) is not None:
            assert low_rank.block is not None
            for i, place in enumerate(self.places if later is not None else ()):
                assert later is not None
                for candidate in range(self.shape[0]):
                    gradients, weights = place.of(self.sums(later))[:, candidate], low_rank.weights[i][candidate, later]
                    found = low_rank.of(candidate, place.tokens).accumulate(weights, gradients)
                    self._owe(family, candidate, place.tokens, found)
            found = self.owed_activations.pop(family, None)
            return torch.zeros_like(low_rank.block.values) if found is None else found
        writers = self.graph.writers_of(family)
        rows = slice(self.n_kept[writers.start], self.n_kept[writers.stop])
        found = torch.zeros_like(self.rows[rows])
        if self.owed is not None and rows.start < len(self.owed):
            found = self.owed[rows]
        if later is not None:
            for place in self.places:
                place.add(place.weights[:, later, rows].transpose(1, 2), self.sums(later), found)
        return found


class _Keep(torch.autograd.Function):
    """Stores the differences of writes (or of activations) in the table; the backward reads their gradients there."""

    @staticmethod
    def forward(
        ctx: Any,
        chain: Tensor,
        values: Tensor,
        directions: Tensor | None,
        table: _GradientTable,
        family: NodeFamily,
    ) -> Tensor:
        table.keep(family, Dense(values) if directions is None else LowRank(values, directions))
        ctx.table, ctx.family = table, family
        return chain.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        owed = ctx.table.of_writes(ctx.family).unflatten(2, ctx.table.shape[1:3])
        return gradient, owed, None, None, None


class _See(torch.autograd.Function):
    """What ports see of the residual stream."""

    @staticmethod
    def forward(
        ctx: Any, chain: Tensor, resid: Tensor, table: _GradientTable, ports: slice, n_writers: int
    ) -> tuple[Tensor, Tensor]:
        ctx.table, ctx.ports, ctx.dtype = table, ports, resid.dtype
        return table.seen(ports, n_writers, resid).unflatten(2, table.shape[1:3]).clone(), chain.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, chain: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.table.sums(ctx.ports)[:] = gradient.flatten(2, 3)
        ctx.table.done(ctx.ports)
        return chain, gradient.sum(0).to(ctx.dtype), None, None, None


class _ReadProjections(torch.autograd.Function):
    """What ports that are projections of a norm read, `[port, token, n]` a site, each from its own residual stream."""

    @staticmethod
    def forward(
        ctx: Any,
        chain: Tensor,
        resid: Tensor,
        table: _GradientTable,
        projections: Projections,
        ports: slice,
        n_writers: int,
    ) -> tuple[Tensor, ...]:
        ctx.table, ctx.ports, ctx.dtype, ctx.norm = table, ports, resid.dtype, projections.norm
        seen = table.seen(ports, n_writers, resid)
        given, ctx.factor, ctx.scale = ctx.norm.factored(seen.flatten(1, 2))
        if given.data_ptr() != seen.data_ptr():
            seen.copy_(given.view_as(seen))
        ctx.weights, ctx.products = [], []
        found: list[Tensor] = []
        first = 0
        for weight, constant in projections.maps:
            rows = slice(first, first + len(weight))
            product = torch.bmm(given[rows], weight)
            if ctx.factor is not None:
                product *= ctx.factor[rows]
            ctx.weights.append(weight)
            ctx.products.append(product)
            found.append(product + constant[:, None])
            first = rows.stop
        return *found, chain.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        table, norm = ctx.table, ctx.norm
        sums = table.sums(ctx.ports)
        seen = sums.flatten(1, 2)
        first = 0
        for weight, product, gradient in zip(ctx.weights, ctx.products, gradients[:-1], strict=True):
            rows = slice(first, first + len(weight))
            scaled = gradient if norm.kind == "none" else gradient / ctx.scale[rows]
            if norm.kind == "none":
                seen[rows] = 0
            else:
                along = (product * scaled).sum(-1, keepdim=True) / seen.shape[-1]
                seen[rows] *= -along if ctx.factor is None else -along * ctx.factor[rows]
            if norm.kind == "layer":
                weight = weight - weight.mean(1, keepdim=True)
            seen[rows].baddbmm_(scaled, weight.transpose(1, 2))
            first = rows.stop
        to_resid = sums.sum(0).unflatten(1, table.shape[1:3]).to(ctx.dtype)
        table.done(ctx.ports)
        return gradients[-1], to_resid, None, None, None, None
