"""What takes the place of heads in a layer (a convolution, a state-space layer), as one node with one input: `a5`."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mechinterp.graphs.families.family import Ports, Recorded
from mechinterp.graphs.families.layer_parts import MixesTokens, ReadsNorm
from mechinterp.graphs.families.write_block import Dense
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Node, Site


@dataclass(frozen=True)
class Mixer(MixesTokens, ReadsNorm):
    """One writer with one input: `a5`. What it reads at a token may matter at every later one."""

    parallel: bool

    @property
    def writers(self) -> tuple[str, ...]:
        """`a5`."""
        return (str(Node("attention", self.layer)),)

    @property
    def ports(self) -> tuple[Ports, ...]:
        """`a5`."""
        return (Ports(Site("attn_in", self.layer), self.writers, (range(1),), everywhere=True, by_port=False),)

    @property
    def sites(self) -> tuple[Site, ...]:
        """What it writes, before a constant or a norm that comes after it."""
        return (Site("attn_raw", self.layer),)

    def writes(self, model: HookManager, now: Recorded) -> Dense:
        """What it adds to the residual stream."""
        return Dense(model.layout.mixer(self.layer).post(now[self.sites[0]])[None])

    def read(self, model: HookManager, ports: Ports, seen: Float[Tensor, "port rows pos d_model"]) -> Tensor:
        """The norm of the stream."""
        return model.layout.read_mixer(self.layer, seen[0])

    def norm(self, model: HookManager) -> Norm:
        """The norm of the layer's input."""
        return model.layout.mixer(self.layer).norm
