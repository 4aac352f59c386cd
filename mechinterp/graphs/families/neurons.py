"""Some neurons of one MLP as nodes of their own: an activation times a row of W_out each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.graphs.families.family import Recorded, gram
from mechinterp.graphs.families.layer_parts import PartOfMlp
from mechinterp.graphs.families.write_block import LowRank
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Node, Site


@dataclass(frozen=True)
class Neurons(PartOfMlp):
    """Neurons of a layer: `m5.n17`. Their input is the MLP's."""

    numbers: tuple[int, ...]

    @property
    def writers(self) -> tuple[str, ...]:
        """`m5.n17`."""
        return tuple(str(Node("neuron", self.layer, number)) for number in self.numbers)

    def check(self, model: HookManager) -> None:
        """Return None if the MLP has these neurons. Raises InputError otherwise."""
        d_mlp = len(model.layout.neurons(self.layer).W_out)
        if not all(0 <= number < d_mlp for number in self.numbers):
            name = self.writers[self.numbers.index(max(self.numbers, key=abs))]
            raise InputError(f"The graph has neuron {name}; that layer has neurons 0 to {d_mlp - 1}.")

    @property
    def sites(self) -> tuple[Site, ...]:
        """The activations of all neurons of the MLP."""
        return (Site("mlp_post", self.layer),)

    @property
    def low_rank(self) -> bool:
        """Each writes one direction."""
        return True

    def writes(self, model: HookManager, now: Recorded) -> LowRank:
        """Under a post-norm it is a neuron's share of the normed sum, as for heads."""
        post = now[self.sites[0]]
        values, directions = model.layout.neuron_parts(self.layer, post, list(self.numbers))
        return LowRank(values, directions)

    def written_grams(self, model: HookManager) -> Iterator[Float[Tensor, "d_model d_model"]]:
        """Of the rows of the output matrix."""
        maps = model.layout.neurons(self.layer)
        rows = maps.W_out[list(self.numbers)].to(torch.promote_types(model.dtype, torch.float32))
        yield from (gram(maps.post.project(row[None]).T) for row in rows)
