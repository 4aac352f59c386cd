"""The MLP of one layer, or the rest of it where parts of it are nodes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.graphs.families.family import Moment, Ports, Recorded, gram
from mechinterp.graphs.families.layer_parts import ReadsNorm, WritesAsMlp
from mechinterp.graphs.families.write_block import Dense
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Node, Site


@dataclass(frozen=True)
class Mlp(WritesAsMlp, ReadsNorm):
    """One writer with one input: `m5`."""

    parallel: bool

    @property
    def reads(self) -> Moment:
        """The stream after the attention; in a parallel layer, the layer's input."""
        return (self.layer, 0 if self.parallel else 1)

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

    def writes(self, model: HookManager, now: Recorded) -> Dense:
        """What the MLP adds."""
        return Dense(now[self.output][None])

    def read(self, model: HookManager, ports: Ports, seen: Float[Tensor, "port rows pos d_model"]) -> Tensor:
        """The norm of the stream."""
        return model.layout.read_mlp(self.layer, seen[0])

    def norm(self, model: HookManager) -> Norm:
        """The norm before the MLP."""
        norm = model.layout.mlp_norm[self.layer]
        assert norm is not None
        return norm

    def written_grams(self, model: HookManager) -> Iterator[Float[Tensor, "d_model d_model"]]:
        """Of the output matrix."""
        maps = model.layout.neurons(self.layer)
        yield gram(maps.post.project(maps.W_out.to(torch.promote_types(model.dtype, torch.float32))).T)

    def read_grams(self, model: HookManager) -> Iterator[Float[Tensor, "d_model d_model"]]:
        """Of the input matrix, and the gate's beside it."""
        maps = model.layout.neurons(self.layer)
        inward = [maps.W_in] if maps.W_gate is None else [maps.W_gate, maps.W_in]
        dtype = torch.promote_types(model.dtype, torch.float32)
        yield gram(self.norm(model).project_transposed(torch.cat(inward, 1).to(dtype).T).T)
