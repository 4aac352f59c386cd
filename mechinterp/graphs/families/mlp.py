"""The MLP of one layer, or the rest of it where parts of it are nodes of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.graphs.families.family import Moment, NodeFamily, Ports, Recorded, gram
from mechinterp.graphs.families.normed_ports import Step, pull_back_norm
from mechinterp.graphs.families.write_block import Dense
from mechinterp.graphs.token_windows import Window
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Node, Site


@dataclass(frozen=True)
class Mlp(NodeFamily):
    """One writer with one input: `m5`."""

    of_layer: int
    parallel: bool

    @property
    def layer(self) -> int:
        """Its layer."""
        return self.of_layer

    @property
    def reads(self) -> Moment:
        """The stream after the attention; in a parallel layer, the layer's input."""
        return (self.layer, 0 if self.parallel else 1)

    @property
    def written(self) -> Moment:
        """What the next layer reads."""
        return (self.layer + 1, 0)

    @property
    def writers(self) -> tuple[str, ...]:
        """`m5`."""
        return (str(Node("mlp", self.layer)),)

    @property
    def ports(self) -> tuple[Ports, ...]:
        """`m5`."""
        return (Ports(Site("mlp_in", self.layer), self.writers, (range(1),), by_port=False),)

    @property
    def sites(self) -> tuple[Site, ...]:
        """What the MLP adds."""
        return (Site("mlp_out", self.layer),)

    @property
    def output(self) -> Site:
        """What the MLP adds."""
        return Site("mlp_out", self.layer)

    def writes(self, model: HookManager, now: Recorded) -> Dense:
        """What the MLP adds."""
        return Dense(now[self.output][None])

    def read(self, model: HookManager, ports: Ports, seen: Float[Tensor, "port rows pos d_model"]) -> Tensor:
        """The norm of the stream."""
        return model.layout.read_mlp(self.layer, seen[0])

    def pull_back(
        self,
        model: HookManager,
        steps: Sequence[Step],
        window: Window,
        out: Float[Tensor, "port token d_model"],
        *,
        frozen: bool,
    ) -> None:
        """Through the norm."""
        norm = model.layout.mlp_norm[self.layer]
        assert norm is not None
        pull_back_norm(norm, self.ports[0].site, self.stream, steps, window, out, frozen=frozen)

    def written_grams(self, model: HookManager) -> Iterator[Float[Tensor, "d_model d_model"]]:
        """Of the output matrix."""
        maps = model.layout.neurons(self.layer)
        yield gram(maps.post.project(maps.W_out.to(torch.promote_types(model.dtype, torch.float32))).T)

    def read_grams(self, model: HookManager) -> Iterator[Float[Tensor, "d_model d_model"]]:
        """Of the input matrix, and the gate's beside it."""
        maps, norm = model.layout.neurons(self.layer), model.layout.mlp_norm[self.layer]
        assert norm is not None
        inward = [maps.W_in] if maps.W_gate is None else [maps.W_gate, maps.W_in]
        dtype = torch.promote_types(model.dtype, torch.float32)
        yield gram(norm.project_transposed(torch.cat(inward, 1).to(dtype).T).T)
