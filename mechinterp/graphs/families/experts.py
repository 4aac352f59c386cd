"""A mixture of experts with its experts as nodes: each writes its output times its weight by the router.

The MLP of such a layer has two inputs: what the experts read (`m5`) and what the router reads (`m5<router>`).
"""

from __future__ import annotations

from dataclasses import dataclass

from mechinterp.base.errors import InputError
from mechinterp.graphs.families.family import Ports, Recorded
from mechinterp.graphs.families.layer_parts import PartOfMlp
from mechinterp.graphs.families.mlp import Mlp
from mechinterp.graphs.families.write_block import Dense
from mechinterp.models.experts import expert_writes, n_experts
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Node, Site


@dataclass(frozen=True)
class RoutedMlp(Mlp):
    """The MLP of such a layer: all that its experts leave of it is rounding."""

    @property
    def ports(self) -> tuple[Ports, ...]:
        """`m5`, and `m5<router>`."""
        (own,) = super().ports
        router = Ports(
            Site("router_in", self.layer), (f"{own.names[0]}<router>",), own.feeds, by_port=False, follows=own.site
        )
        return own, router


@dataclass(frozen=True)
class Experts(PartOfMlp):
    """The experts of a layer: `m5.e0`, `m5.e1`, ... Their inputs are the MLP's."""

    count: int

    @property
    def writers(self) -> tuple[str, ...]:
        """`m5.e0`, expert by expert."""
        return tuple(str(Node("expert", self.layer, number)) for number in range(self.count))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The inputs, from which router and experts are computed again."""
        return Site("mlp_in", self.layer), Site("router_in", self.layer)

    def check(self, model: HookManager) -> None:
        """Return None if the layer has so many experts. Raises InputError or UnsupportedError otherwise."""
        if (count := n_experts(model, self.layer)) != self.count:
            raise InputError(f"The graph has {self.count} experts in layer {self.layer}; the model has {count}.")

    def writes(self, model: HookManager, now: Recorded) -> Dense:
        """Each expert's output times its weight."""
        return Dense(expert_writes(model, self.layer, *(now[site] for site in self.sites)))
