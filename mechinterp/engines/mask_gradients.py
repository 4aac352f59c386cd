"""The exact engine with gradients: how the metric changes with every entry of a mask between kept (0) and cut (1).

The forward is that of `run_edges`. The table of all writes minus their replacements is filled once and never copied:
in the backward each reader adds its gradient to a second table of that size, and a writer reads its row once all later
readers have done so. So memory is two tables, not one per layer, and a backward costs two products where the forward
costs one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from mechinterp.engines.edge_patching import PatchedRun, read
from mechinterp.engines.replacement import Values
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.token_positions import take_positions
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

Loss = Callable[[Tensor], Tensor]
"""From the logits at the answer positions `[candidate, batch, n_answer, d_vocab]` to `[candidate, batch]`."""


def mask_gradients(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    masks: Float[Tensor, "candidate reader writer"],
    values: Values,
    loss: Loss,
) -> tuple[Float[Tensor, "candidate batch"], Float[Tensor, "candidate reader writer"]]:
    """The loss of every example under each mask, and the gradient of their sum over examples with respect to the mask.

    Cost: one patched forward and its backward per candidate, side by side. Memory: two tables of
    `n_writers * candidates * batch * pos * d_model` numbers, and what the model's own backward keeps.
    """
    if model.edited and len(masks) > 1:  # its edits expect the prompts as they are, not repeated
        found = [mask_gradients(model, graph, pairs, mask[None], values, loss) for mask in masks]
        return torch.cat([value for value, _ in found]), torch.cat([gradient for _, gradient in found])
    run = _DifferentiableRun(model, graph, pairs, masks.to(model.device), values)
    try:
        return run.differentiate(loss)
    finally:
        run.forget()


class _DifferentiableRun(PatchedRun):
    """A patched run that can be differentiated with respect to the mask and the writes."""

    def __init__(self, model: HookManager, graph: Graph, pairs: Pairs, masks: Tensor, values: Values) -> None:
        super().__init__(model, graph, pairs, masks.detach(), values)
        self.masks = self.masks.requires_grad_()
        self.cut_readers = graph.possible.any(1)
        self.write_gradients = torch.zeros_like(self.differences)
        self.chain = torch.zeros((), device=self.rows.device, requires_grad=True)
        """Passes through every writer and reader in the order of the model, which fixes the order of the backward."""

    def differentiate(self, loss: Loss) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        n_readers, last = len(self.graph.readers), Site("resid_final")

        def differentiated(resid: Tensor) -> Tensor:
            wide = self.fold(resid).to(self.differences.dtype)
            seen = self.corrected(slice(n_readers - 1, n_readers), len(self.graph.writers), wide)[:, 0].flatten(0, 1)
            at = repeat(self.pairs.answer_pos, "batch n_answer -> (candidate batch) n_answer", candidate=self.n)
            logits = self.model.layout.unembed(take_positions(seen, at))
            value = loss(logits.unflatten(0, (self.n, -1)))
            found.extend(torch.autograd.grad(value.sum(), [self.masks], retain_graph=True))
            found.append(value.detach())
            return value

        layers = range(self.model.dims.n_layers)
        tokens, mask = (t.repeat(self.n, 1) for t in (self.pairs.clean, self.pairs.mask))
        self.model.run(tokens, mask, interventions=self.plan(layers), grads=[last], loss=differentiated, stop=last)
        gradient, value = found
        return value, torch.where(self.graph.possible.to(gradient.device), gradient, 0)

    def forget(self) -> None:
        """Breaks the reference cycle of this run and the nodes of its backward, so that its memory is freed at once."""
        self.seen = self.apart = self.resid = None
        del self.chain, self.masks

    def keep(self, writers: slice, differences: Tensor) -> None:
        self.chain = _Keep.apply(self.chain, differences, self, writers)

    def corrected(self, readers: slice, n_writers: int, resid: Tensor) -> Tensor:
        cut = self.masks[:, readers, :n_writers]
        out, self.chain = _Read.apply(self.chain, cut, resid, self, readers, n_writers)
        return out

    def _whole(self, readers: slice) -> Tensor:
        """No reader keeps the model's own value, since its mask would then get no gradient."""
        n_readers = (readers.stop - readers.start) // self.graph.n_positions
        return torch.zeros(self.n * len(self.pairs), n_readers, dtype=torch.bool, device=self.masks.device)


class _Keep(torch.autograd.Function):
    """Stores the differences of writes in the table; the backward reads their gradients from the second table."""

    @staticmethod
    def forward(ctx: Any, chain: Tensor, differences: Tensor, run: _DifferentiableRun, writers: slice) -> Tensor:
        run.differences[writers] = differences
        ctx.run, ctx.writers = run, writers
        return chain.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, ctx.run.write_gradients[ctx.writers], None, None


class _Read(torch.autograd.Function):
    """The residual stream minus the cut shares of the differences, as each reader reads it."""

    @staticmethod
    def forward(
        ctx: Any, chain: Tensor, cut: Tensor, resid: Tensor, run: _DifferentiableRun, readers: slice, n_writers: int
    ) -> tuple[Tensor, Tensor]:
        ctx.run, ctx.places, ctx.n_writers = run, run.places_for(readers), n_writers
        ctx.save_for_backward(cut)
        run.rows[0] = resid
        weights = torch.nn.functional.pad(-cut, (1, 0), value=1.0)
        return read(weights, run.rows[: 1 + n_writers], ctx.places), chain.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, chain: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (cut,) = ctx.saved_tensors
        run, n_writers = ctx.run, ctx.n_writers
        # [candidate, reader, token, d_model] and [writer, candidate, token, d_model]
        back = gradient.flatten(2, 3)
        rows, gradients = (table[:n_writers].flatten(2, 3) for table in (run.differences, run.write_gradients))
        places = [slice(None)] if ctx.places is None else ctx.places
        by_place = cut.unflatten(1, (-1, len(places)))
        to_cut = torch.empty_like(by_place)
        for i, tokens in enumerate(places):
            here = back[:, :, tokens].flatten(2)
            to_cut[:, :, i] = -torch.bmm(here, rows[:, :, tokens].flatten(2).permute(1, 2, 0))
            add = torch.bmm(by_place[:, :, i].transpose(1, 2), here).unflatten(2, (-1, back.shape[-1]))
            gradients[:, :, tokens] -= add.transpose(0, 1)
        return chain, to_cut.flatten(1, 2), gradient.sum(1), None, None, None
