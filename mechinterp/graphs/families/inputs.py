"""What enters the first layer: `input`, or its parts `embed` and `pos_embed`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.graphs.families.family import Moment, NodeFamily, Recorded, gram
from mechinterp.graphs.families.write_block import Dense
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site


@dataclass(frozen=True)
class Input(NodeFamily):
    """One writer without ports."""

    name: str = "input"
    """`input`, `embed` or `pos_embed`."""

    @property
    def layer(self) -> int:
        """It comes before layer 0."""
        return 0

    @property
    def written(self) -> Moment:
        """The stream begins with it."""
        return (0, 0)

    @property
    def writers(self) -> tuple[str, ...]:
        """The name."""
        return (self.name,)

    @property
    def output(self) -> Site:
        """The site of its value."""
        return Site("resid_pre", 0) if self.name == "input" else Site(self.name)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The site of its value."""
        return (self.output,)

    def writes(self, model: HookManager, now: Recorded) -> Dense:
        """Its value."""
        return Dense(now[self.output][None])

    def written_grams(self, model: HookManager) -> Iterator[Float[Tensor, "d_model d_model"]]:
        """That of the embedding matrix divided by the root of its rows, so that it is one typical token."""
        dtype = torch.promote_types(model.dtype, torch.float32)
        embedding = model.bridge.embed.W_E.detach().to(model.device, dtype)
        yield gram(embedding.T) / len(embedding)
