"""A run with edges cut that can be differentiated with respect to the mask: what its two kinds have in common.

`mask_gradients.py` keeps all writes in full, `window_gradients.py` makes them again for a window of tokens at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from einops import repeat
from torch import Tensor

from mechinterp.engines.edge_patching import wide
from mechinterp.engines.patched_run import PatchedRun
from mechinterp.engines.replacement import Values
from mechinterp.engines.whole_nodes import edges_only
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.token_positions import take_positions
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

Loss = Callable[[Tensor], Tensor]
"""From the logits at the answer positions `[candidate, batch, n_answer, d_vocab]` to `[candidate, batch]`."""


class DifferentiableRun(PatchedRun):
    """A patched run that can be differentiated with respect to the mask and the writes."""

    def __init__(
        self,
        model: HookManager,
        graph: Graph,
        pairs: Pairs,
        masks: Tensor,
        values: Values,
        window: int | None = None,
    ) -> None:
        # Single edges only: a node that is replaced would have no gradient.
        cuts = edges_only(graph, masks.detach().to(wide(model)))
        super().__init__(model, graph, pairs, cuts, values, window=window)
        self.chain = torch.zeros((), device=model.device, requires_grad=True)
        """Goes into every reader, so that the backward reaches it."""

    def _whole(self) -> Tensor:
        """No reader keeps the model's own value, since its mask would then get no gradient."""
        return torch.zeros_like(super()._whole())

    def _needed(self) -> Tensor:
        return torch.ones(len(self.graph.writers), dtype=torch.bool)

    @property
    @abstractmethod
    def of_cuts(self) -> Tensor:
        """The gradient of every cut, when the backward is done."""

    def differentiate(self, loss: Loss) -> tuple[Tensor, Tensor]:
        """The loss of every example under each mask, and the gradient of their sum in the mask."""
        start, last = self.chain, Site("resid_final")
        found: list[Tensor] = []

        def differentiated(resid: Tensor) -> Tensor:
            at = repeat(self.pairs.answer_pos, "batch n_answer -> (candidate batch) n_answer", candidate=self.n)
            logits = self.model.layout.unembed(take_positions(self.read_logits(self.fold(resid)), at))
            value = loss(logits.unflatten(0, (self.n, -1)))
            torch.autograd.grad(value.sum(), [start])  # what is differentiated gathers in the table
            found.append(value.detach())
            return resid.sum((1, 2))  # the run takes a gradient at its last site, which is not used

        layers = range(self.model.dims.n_layers)
        tokens, mask = (t.repeat(self.n, 1) for t in (self.pairs.clean, self.pairs.mask))
        self.model.run(tokens, mask, interventions=self.plan(layers), grads=[last], loss=differentiated, stop=last)
        return found[0], torch.where(self.graph.possible.to(self.model.device), self.of_cuts, 0)

    def forget(self) -> None:
        """Breaks the reference cycle of this run and the nodes of its backward, so that its memory is freed at once."""
        self.seen, self.apart, self.noted = {}, {}, {}
        del self.chain, self.cuts, self.table
