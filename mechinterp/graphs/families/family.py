"""`NodeFamily`: all that engines, methods, evaluation and files know of a kind of node.

A family is what one part of the model (the heads of a layer, an MLP, some neurons of it) reads and writes. It is plain
data: which writers and ports it has, and in which order; the maps take the model as an argument, so that a graph can
be read from a file without one. `docs/how-to/add-node-family.md` adds one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import UnsupportedError
from mechinterp.graphs.families.normed_ports import DirectionGradients, Projections, Step
from mechinterp.graphs.families.write_block import WriteBlock
from mechinterp.graphs.token_windows import Window
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site

Moment: TypeAlias = "tuple[int, int]"
"""A state of the residual stream: (layer, 0) before a layer, (layer, 1) between its attention and its MLP."""
NodeSite: TypeAlias = "Site | FeatureBasis"
"""Where a node's numbers are in a run: a site, or the features of a basis."""
Recorded: TypeAlias = "Mapping[NodeSite, Tensor]"
"""Activations of one run, in float32 or better."""


@dataclass(frozen=True)
class Ports:
    """Inputs that one site holds, such as the queries of a layer's heads, or the input of an MLP.

    Args:
        site: The site: `[batch, pos, port, ...]`, or `[batch, pos, ...]` for one port; or the features of a basis.
        names: The names of the ports: `a5.h1<q>`.
        feeds: For every port, which of the family's writers it is an input of, by number.
        everywhere: Whether it serves its writers at all later positions, as keys and values do.
        by_port: Whether the site has an axis of ports.
        follows: Another port's site, of this family or of that of which it is a part, from which this one is computed
            (a router's input from the MLP's): where that one is edited, this one is set too; and the gradient there
            has this one's in it, which engines take out (`pull_back` is of the site alone).
        of_stream: Whether the basis reads the residual stream itself, and what it follows reads that through a norm:
            where that one is edited, the basis is given the stream that it sees. The model's own stream stays.
    """

    site: NodeSite
    names: tuple[str, ...]
    feeds: tuple[range, ...]
    everywhere: bool = False
    by_port: bool = True
    follows: NodeSite | None = None
    of_stream: bool = False


class NodeFamily(ABC):
    """The writers of one part of the model, with their inputs. Subclasses are frozen dataclasses.

    What has a default here need not be defined by a family without ports: the inputs of a model, or parts of what
    another writer writes, fed by its inputs.
    """

    # -- the order: who can reach whom follows from it ------------------------------------------------------------

    @property
    @abstractmethod
    def layer(self) -> int:
        """Its layer; 0 for the inputs."""

    @property
    @abstractmethod
    def written(self) -> Moment:
        """The first state of the residual stream that has its writes."""

    @property
    def reads(self) -> Moment | None:
        """The state of the residual stream that its ports read; None without ports."""
        return None

    # -- the nodes ------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def writers(self) -> tuple[str, ...]:
        """The names of its writers, in the order of its blocks."""

    @property
    def ports(self) -> tuple[Ports, ...]:
        """Its inputs, a site at a time."""
        return ()

    @property
    def part_of(self) -> str | None:
        """The writer of which these are parts, whose ports feed them; it is then the rest of what it was."""
        return None

    @property
    def rows(self) -> tuple[NodeFamily, ...]:
        """What it writes, a moment at a time: a family for each. Only features that write in several layers have more
        than one; engines compute with these (`graphs/write_rows.py`)."""
        return (self,)

    @property
    def origin(self) -> NodeFamily:
        """The first of the rows that this one is among: the same nodes, which write here what is known since then."""
        return self

    @property
    def starts(self) -> int:
        """The layer in which the first of `sites` is; all others are in the family's own."""
        return self.origin.layer

    @property
    def fingerprint(self) -> str:
        """A hash of what the names do not say (such as a direction), which enters the digest of a graph."""
        return ""

    def check(self, model: HookManager) -> None:
        """Return None if the model has these nodes. Raises InputError or UnsupportedError otherwise."""
        return None

    # -- what they write ------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def sites(self) -> tuple[NodeSite, ...]:
        """What must be recorded to know what they write, in the order of the model."""

    @property
    @abstractmethod
    def output(self) -> Site:
        """The site of what is added to the residual stream: their writes, and those of families with the same one."""

    @property
    def low_rank(self) -> bool:
        """Whether the blocks are `LowRank`."""
        return False

    @property
    def compact(self) -> bool:
        """Whether the sites take much less memory than the writes, which are one product of them with weights: then
        engines that are short of memory keep the sites, and make the writes again whenever they are read."""
        return False

    @abstractmethod
    def writes(self, model: HookManager, now: Recorded) -> WriteBlock:
        """What every writer writes, from the values of `sites` in one run."""

    def differences(self, model: HookManager, now: Recorded, then: Recorded) -> WriteBlock:
        """What every writer writes, less what it writes in another run."""
        return self.writes(model, now).minus(self.writes(model, then))

    def writes_together(self, model: HookManager) -> bool:
        """Whether what one writer writes depends on the others: they share the scale of a norm."""
        return False

    # -- what they read -------------------------------------------------------------------------------------------

    @property
    def stream(self) -> Site:
        """The site of the residual stream that the ports read."""
        assert self.reads is not None
        layer, stage = self.reads
        return Site("resid_mid" if stage else "resid_pre", layer)

    def read(self, model: HookManager, ports: Ports, seen: Float[Tensor, "port rows pos d_model"]) -> Tensor:
        """The value of the ports' site when each port sees its own residual stream."""
        raise NotImplementedError

    def projections(self, model: HookManager, dtype: torch.dtype) -> Projections | None:
        """The ports as projections of one norm, where they are that: then sums over them are shared. None: they are
        not, and `read` is differentiated as it is."""
        return None

    def pull_back(
        self,
        model: HookManager,
        steps: Sequence[Step],
        window: Window,
        out: Float[Tensor, "port token d_model"],
        *,
        frozen: bool,
    ) -> None:
        """Writes to `out` the gradient at the residual stream of every port, summed over the steps.

        It is the transposed Jacobian of `read` times the gradient at the ports' sites.

        Args:
            model: The model.
            steps: Values at the stream and the ports' sites, and gradients at the latter.
            window: Which tokens: slices of the examples and of the positions.
            out: Where to write it.
            frozen: Whether the scales of norms are constants.
        """
        raise NotImplementedError

    def direction_gradients(
        self, model: HookManager, steps: Sequence[Step], window: Window, dtype: torch.dtype, *, frozen: bool
    ) -> DirectionGradients | None:
        """What `pull_back` gives, for ports that are one number each of a norm's output; None for others."""
        return None

    # -- their weights --------------------------------------------------------------------------------------------

    def written_grams(self, model: HookManager) -> Iterator[Float[Tensor, "d_model d_model"]]:
        """O' O for every writer, with O the matrix of what it can write; in float32 or better.

        Raises UnsupportedError if that is not known.
        """
        raise UnsupportedError(f"The weights of {self.writers[0]} are not known; take a method that runs the model.")

    def read_grams(self, model: HookManager) -> Iterator[Float[Tensor, "d_model d_model"]]:
        """R R' for every port, with R the matrix by which it reads the standardized stream."""
        yield from ()


def gram(matrix: Float[Tensor, "d_model n"]) -> Float[Tensor, "d_model d_model"]:
    """The product of a matrix with its transpose."""
    return matrix @ matrix.T
