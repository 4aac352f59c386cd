"""TransformerLens's subspace interchange, its placebo and DAS; only this folder may import TransformerLens."""

from __future__ import annotations

from inspect import currentframe
from typing import Any

from torch import Tensor

from mechinterp.models.exclusive_runs import Turn, use_of


def interchange(base: Tensor, source: Tensor, basis: Tensor) -> Tensor:
    """The base vectors with their components in the subspace replaced by those of the source vectors, `[batch, d]`."""
    from transformer_lens.tools.analysis.interchange import SubspaceInterchange

    return SubspaceInterchange(basis)(base, source)


def placebo(base: Tensor, source: Tensor, basis: Tensor, other: Tensor) -> Tensor:
    """The base vectors moved as far as `interchange` moves them, but in another subspace."""
    from transformer_lens.tools.analysis.interchange import NormMatchedPlacebo, SubspaceInterchange

    return NormMatchedPlacebo(SubspaceInterchange(basis), other)(base, source)


def random_basis(d: int, rank: int, seed: int) -> Tensor:
    """A seeded random orthonormal basis `[d, rank]`."""
    from transformer_lens.tools.analysis.interchange import random_basis as draw

    return draw(d, rank, seed)


def das(
    bridge: Any, name: str, hook_name: str, base: Tensor, source: Tensor, targets: Tensor, logits: Any, **settings: Any
) -> Any:
    """TransformerLens's distributed alignment search; see its `fit_das`.

    It hooks the bridge and freezes its weights; both are undone at the end, also after an error.
    """
    from transformer_lens.tools.analysis.interchange import fit_das

    point = bridge.hook_dict[hook_name]
    hooks, handles = dict(point._forward_hooks), list(point.fwd_hooks)
    trained = [parameter for parameter in bridge.parameters() if parameter.requires_grad]

    def undo() -> None:
        for key in set(point._forward_hooks) - set(hooks):
            point._forward_hooks.pop(key, None)
        point.fwd_hooks[:] = handles
        for parameter in trained:
            parameter.requires_grad_(True)

    with Turn(use_of(bridge), bridge, name, currentframe()) as turn, turn:
        turn.undo.append(undo)
        return fit_das(bridge, hook_name, base, source, targets, logits, **settings)
