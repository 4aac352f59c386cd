"""What the kinds of nodes of a layer have in common: the layer, their place in it, and reading through one norm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mechinterp.graphs.families.family import Moment, NodeFamily
from mechinterp.graphs.families.normed_ports import Step, pull_back_norm
from mechinterp.graphs.token_windows import Window
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Node, Site


@dataclass(frozen=True)
class InLayer(NodeFamily):
    """A family of one layer."""

    of_layer: int

    @property
    def layer(self) -> int:
        """Its layer."""
        return self.of_layer


class MixesTokens(InLayer):
    """What mixes tokens in a layer: the heads, or what takes their place. Subclasses say whether it is `parallel`."""

    parallel: bool
    """Whether the MLP reads what they read, the layer's input."""

    @property
    def reads(self) -> Moment:
        """The layer's input."""
        return (self.layer, 0)

    @property
    def written(self) -> Moment:
        """What the MLP reads; in a parallel layer, what the next layer reads."""
        return (self.layer + 1, 0) if self.parallel else (self.layer, 1)

    @property
    def output(self) -> Site:
        """What they add to the residual stream."""
        return Site("attn_out", self.layer)


class WritesAsMlp(InLayer):
    """The MLP of a layer, and its parts."""

    @property
    def written(self) -> Moment:
        """What the next layer reads."""
        return (self.layer + 1, 0)

    @property
    def output(self) -> Site:
        """What the MLP adds to the residual stream."""
        return Site("mlp_out", self.layer)


class PartOfMlp(WritesAsMlp):
    """Some parts of what the MLP of a layer writes, which read what it reads."""

    @property
    def part_of(self) -> str:
        """The MLP."""
        return str(Node("mlp", self.layer))


class ReadsNorm(InLayer):
    """Ports that are the output of one norm of the residual stream, each at a site of its own."""

    @abstractmethod
    def norm(self, model: HookManager) -> Norm:
        """The norm."""

    def pull_back(
        self,
        model: HookManager,
        steps: Sequence[Step],
        window: Window,
        out: Float[Tensor, "port token d_model"],
        *,
        frozen: bool,
    ) -> None:
        """Through the norm, port by port."""
        norm = self.norm(model)
        for row, ports in enumerate(self.ports):
            pull_back_norm(norm, ports.site, self.stream, steps, window, out[row : row + 1], frozen=frozen)
