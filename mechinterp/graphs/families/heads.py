"""The heads of one layer. They read through q, k and v (k and v per key/value head) and write z times W_O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.graphs.families.family import Ports, Recorded, gram
from mechinterp.graphs.families.layer_parts import MixesTokens
from mechinterp.graphs.families.normed_ports import Projections, Step, pull_back_projections
from mechinterp.graphs.families.write_block import Dense
from mechinterp.graphs.token_windows import Window
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Node, Site


@dataclass(frozen=True)
class Heads(MixesTokens):
    """The heads of a layer: `a5.h0`, `a5.h1`, ..."""

    n_heads: int
    n_kv_heads: int
    parallel: bool

    @property
    def writers(self) -> tuple[str, ...]:
        """`a5.h1`, head by head."""
        return tuple(str(Node("head", self.layer, head)) for head in range(self.n_heads))

    @property
    def ports(self) -> tuple[Ports, ...]:
        """`a5.h1<q>`; `a5.h1<k>` and `<v>`, or `a5.kv1<k>` where query heads share it."""
        return tuple(self._channel(channel) for channel in "qkv")

    def _channel(self, channel: str) -> Ports:
        shared = channel != "q" and self.n_kv_heads != self.n_heads
        count, kind = (self.n_kv_heads, "kv_head") if shared else (self.n_heads, "head")
        width = self.n_heads // count
        return Ports(
            Site(channel, self.layer),
            tuple(f"{Node(kind, self.layer, head)}<{channel}>" for head in range(count)),
            tuple(range(head * width, (head + 1) * width) for head in range(count)),
            everywhere=channel != "q",
        )

    @property
    def sites(self) -> tuple[Site, ...]:
        """The heads' outputs before the output projection."""
        return (Site("z", self.layer),)

    @property
    def compact(self) -> bool:
        """z has d_head numbers for each d_model of the writes."""
        return len(self.writers) > 1

    def writes(self, model: HookManager, now: Recorded) -> Dense:
        """z times W_O, head by head."""
        return Dense(model.layout.head_writes(self.layer, now[self.sites[0]]))

    def differences(self, model: HookManager, now: Recorded, then: Recorded) -> Dense:
        """In one product where the write is linear in z."""
        z, other = now[self.sites[0]], then[self.sites[0]]
        return Dense(model.layout.head_write_differences(self.layer, z, other.expand_as(z)))

    def writes_together(self, model: HookManager) -> bool:
        """Under a norm that is one for all heads: after the attention, or inside it."""
        return model.layout.attention[self.layer].post.kind != "none" or self.layer in model.coupled_heads

    def read(self, model: HookManager, ports: Ports, seen: Float[Tensor, "port rows pos d_model"]) -> Tensor:
        """q, k or v of every head, `[rows, pos, head, d_head]`."""
        assert isinstance(ports.site, Site)
        return model.layout.read_heads(self.layer, ports.site.kind, seen).permute(1, 2, 0, 3)

    def projections(self, model: HookManager, dtype: torch.dtype) -> Projections:
        """q, k and v."""
        maps = tuple(model.layout.folded(self.layer, channel, dtype) for channel in "qkv")
        return Projections(model.layout.attention[self.layer].norm, maps)

    def pull_back(
        self,
        model: HookManager,
        steps: Sequence[Step],
        window: Window,
        out: Float[Tensor, "port token d_model"],
        *,
        frozen: bool,
    ) -> None:
        """Through the projections and the norm."""
        projections, sites = self.projections(model, out.dtype), [ports.site for ports in self.ports]
        pull_back_projections(projections, sites, self.stream, steps, window, out, frozen=frozen)

    def written_grams(self, model: HookManager) -> Iterator[Float[Tensor, "d_model d_model"]]:
        """Of the output matrices."""
        maps, dtype = model.layout.attention[self.layer], torch.promote_types(model.dtype, torch.float32)
        yield from (gram(maps.post.project(head).T) for head in maps.W_O.to(dtype))

    def read_grams(self, model: HookManager) -> Iterator[Float[Tensor, "d_model d_model"]]:
        """Of the matrices of q, k and v, with the norm's weights and centring."""
        maps, dtype = model.layout.attention[self.layer], torch.promote_types(model.dtype, torch.float32)
        for channel in "qkv":
            yield from (gram(maps.norm.project_transposed(weight.T).T) for weight in maps.W[channel].to(dtype))


@dataclass(frozen=True)
class WholeAttention(Heads):
    """The attention of a layer as one writer, `a5`, of which features are parts; its inputs are the heads'."""

    @property
    def writers(self) -> tuple[str, ...]:
        """`a5`."""
        return (str(Node("attention", self.layer)),)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The heads' outputs, and last what the attention adds: then the features of that are known."""
        return (*super().sites, self.output)

    def _channel(self, channel: str) -> Ports:
        ports = super()._channel(channel)
        return replace(ports, feeds=(range(1),) * len(ports.names))

    def writes(self, model: HookManager, now: Recorded) -> Dense:
        """The sum of all heads."""
        return Dense(super().writes(model, now).total()[None])

    def differences(self, model: HookManager, now: Recorded, then: Recorded) -> Dense:
        """The sum of all heads."""
        return Dense(super().differences(model, now, then).total()[None])

    def writes_together(self, model: HookManager) -> bool:
        """There is one writer."""
        return False

    def written_grams(self, model: HookManager) -> Iterator[Float[Tensor, "d_model d_model"]]:
        """Of the output matrices side by side."""
        yield torch.stack(list(super().written_grams(model))).sum(0)
