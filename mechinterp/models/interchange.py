"""TransformerLens's subspace interchange, its placebo and DAS: imported here, where TransformerLens may be."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def interchange(base: Tensor, source: Tensor, basis: Tensor) -> Tensor:
    """The base vectors with their coordinates inside the basis taken from the source vectors, all `[batch, d]`."""
    from transformer_lens.tools.analysis.interchange import SubspaceInterchange

    return SubspaceInterchange(basis)(base, source)


def placebo(base: Tensor, source: Tensor, basis: Tensor, other: Tensor) -> Tensor:
    """The base vectors moved exactly as far as `interchange` moves them, but inside another subspace."""
    from transformer_lens.tools.analysis.interchange import NormMatchedPlacebo, SubspaceInterchange

    return NormMatchedPlacebo(SubspaceInterchange(basis), other)(base, source)


def random_basis(d: int, rank: int, seed: int) -> Tensor:
    """A seeded random orthonormal basis `[d, rank]`."""
    from transformer_lens.tools.analysis.interchange import random_basis as draw

    return draw(d, rank, seed)


def das(
    bridge: Any, hook_name: str, base: Tensor, source: Tensor, targets: Tensor, logits: Any, **settings: Any
) -> Any:
    """TransformerLens's distributed alignment search; see its `fit_das`."""
    from transformer_lens.tools.analysis.interchange import fit_das

    return fit_das(bridge, hook_name, base, source, targets, logits, **settings)
