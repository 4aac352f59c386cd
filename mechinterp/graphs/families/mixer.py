"""What takes the place of heads in a layer (a convolution, a state-space layer), as one node with one input: `a5`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mechinterp.graphs.families.family import Moment, NodeFamily, Ports, Recorded
from mechinterp.graphs.families.normed_ports import Step, pull_back_norm
from mechinterp.graphs.families.write_block import Dense
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Node, Site


@dataclass(frozen=True)
class Mixer(NodeFamily):
    """One writer with one input: `a5`. What it reads at a token may matter at every later one."""

    of_layer: int
    parallel: bool

    @property
    def layer(self) -> int:
        """Its layer."""
        return self.of_layer

    @property
    def reads(self) -> Moment:
        """The layer's input."""
        return (self.layer, 0)

    @property
    def written(self) -> Moment:
        """What the MLP reads; in a parallel layer, what the next layer reads."""
        return (self.layer + 1, 0) if self.parallel else (self.layer, 1)

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

    @property
    def output(self) -> Site:
        """What it adds to the residual stream."""
        return Site("attn_out", self.layer)

    def writes(self, model: HookManager, now: Recorded) -> Dense:
        """What it adds to the residual stream."""
        return Dense(model.layout.mixer(self.layer).post(now[self.sites[0]])[None])

    def read(self, model: HookManager, ports: Ports, seen: Float[Tensor, "port rows pos d_model"]) -> Tensor:
        """The norm of the stream."""
        return model.layout.read_mixer(self.layer, seen[0])

    def pull_back(
        self,
        model: HookManager,
        steps: Sequence[Step],
        chunk: slice,
        out: Float[Tensor, "port token d_model"],
        *,
        frozen: bool,
    ) -> None:
        """Through the norm."""
        norm = model.layout.mixer(self.layer).norm
        pull_back_norm(norm, self.ports[0].site, self.stream, steps, chunk, out, frozen=frozen)
