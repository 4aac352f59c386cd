"""The experts of one MLP as nodes of their own: each writes its output times its weight by the router."""

from __future__ import annotations

from dataclasses import dataclass

from mechinterp.base.errors import InputError
from mechinterp.graphs.families.family import Moment, NodeFamily, Recorded
from mechinterp.graphs.families.write_block import Dense
from mechinterp.models.experts import expert_writes, n_experts
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Node, Site


@dataclass(frozen=True)
class Experts(NodeFamily):
    """The experts of a layer: `m5.e0`, `m5.e1`, ... Their input is the MLP's, which the router reads, too."""

    of_layer: int
    count: int

    @property
    def layer(self) -> int:
        """Its layer."""
        return self.of_layer

    @property
    def written(self) -> Moment:
        """What the next layer reads."""
        return (self.layer + 1, 0)

    @property
    def writers(self) -> tuple[str, ...]:
        """`m5.e0`, expert by expert."""
        return tuple(str(Node("expert", self.layer, number)) for number in range(self.count))

    @property
    def part_of(self) -> str:
        """The MLP; all that the experts leave of it is rounding."""
        return str(Node("mlp", self.layer))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The input, from which router and experts are computed again."""
        return (Site("mlp_in", self.layer),)

    @property
    def output(self) -> Site:
        """What the MLP adds."""
        return Site("mlp_out", self.layer)

    def check(self, model: HookManager) -> None:
        """Return None if the layer has so many experts. Raises InputError or UnsupportedError otherwise."""
        if (count := n_experts(model, self.layer)) != self.count:
            raise InputError(f"The graph has {self.count} experts in layer {self.layer}; the model has {count}.")

    def writes(self, model: HookManager, now: Recorded) -> Dense:
        """Each expert's output times its weight."""
        return Dense(expert_writes(model, self.layer, now[self.sites[0]]))
