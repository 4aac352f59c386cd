"""Concept directions of the unembedding in the causal inner product (Park et al. 2024, arXiv 2311.03658).

The inner product `a C^-1 b`, C the covariance of the unembedding vectors, makes what is read (unembedding side) and
what is written (embedding side, `C^-1` times it) the same vector, and does not depend on the basis in which the model
is written. It needs no prompt, only W_U.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.analysis.directions import Direction
from mechinterp.base.errors import InputError
from mechinterp.engines.grid import Grid, numbered
from mechinterp.features.subspaces import direction_basis
from mechinterp.models.feature_basis import BasisSource
from mechinterp.models.hook_manager import HookManager


@dataclass(frozen=True, eq=False)
class CausalInnerProduct:
    """The inner product of unembedding vectors with the inverse of their covariance.

    Args:
        covariance: C, over the vocabulary, in float64.
    """

    covariance: Float[Tensor, "d d"]

    def dual(self, vectors: Float[Tensor, "*axes d"]) -> Float[Tensor, "*axes d"]:
        """`C^-1 v`: of an unembedding direction, the embedding direction that moves it and nothing orthogonal to it."""
        return self._times(-1.0, vectors)

    def whiten(self, vectors: Float[Tensor, "*axes d"]) -> Float[Tensor, "*axes d"]:
        """`C^-1/2 v`: the vectors in coordinates in which the inner product is the ordinary one."""
        return self._times(-0.5, vectors)

    def of(self, a: Float[Tensor, "*axes d"], b: Float[Tensor, "*axes d"]) -> Float[Tensor, "*axes"]:
        """`a C^-1 b`."""
        return (a.to(self.covariance) * self.dual(b)).sum(-1)

    def cosine(self, a: Float[Tensor, "*axes d"], b: Float[Tensor, "*axes d"]) -> Float[Tensor, "*axes"]:
        """The cosine in this inner product."""
        return self.of(a, b) / (self.of(a, a) * self.of(b, b)).sqrt()

    def _times(self, power: float, vectors: Tensor) -> Tensor:
        size, rows = torch.linalg.eigh(self.covariance)
        return vectors.to(self.covariance) @ rows * size**power @ rows.T


def causal_inner_product(model: HookManager) -> CausalInnerProduct:
    """The causal inner product of a model's unembedding.

    Args:
        model: The model.

    Raises InputError for an unembedding of fewer directions than `d_model`, whose covariance has no inverse.

    >>> import mechinterp as mi
    >>> product = mi.causal_inner_product(mi.load_model("bundled"))
    """
    gamma = model.layout.W_U.detach().double().T
    centred = gamma - gamma.mean(0)
    covariance = centred.T @ centred / len(gamma)
    size = torch.linalg.eigvalsh(covariance)
    if not float(size[0]) > 1e-10 * float(size[-1]):
        raise InputError(
            f"The unembedding of {model.info.name} does not span its {gamma.shape[1]} dimensions, so that the causal "
            "inner product is not defined."
        )
    return CausalInnerProduct(covariance)


@dataclass(frozen=True, eq=False)
class ConceptDirection:
    """A concept of word pairs, and how well the pairs agree on it.

    Args:
        direction: At `final_norm`. It reads along the unembedding side (a difference of logits) and writes along the
            embedding side.
        agreement: A Grid (pair, kind) of cosines in the causal inner product: `held out`, the difference of a pair with
            the mean of the other pairs; `random`, a difference of two random tokens with that mean.
    """

    direction: Direction
    agreement: Grid


def concept_direction(model: HookManager, word_pairs: Sequence[tuple[int, int]], *, seed: int = 0) -> ConceptDirection:
    """The direction of a concept from pairs of tokens that differ in it, such as (king, queen), (man, woman).

    The unembedding side is the mean of the pairs' differences `W_U[second] - W_U[first]`, of length 1 in the causal
    inner product; the embedding side is its dual. Adding the direction to the input of the unembedding raises the logit
    of a second word less that of its first word by the pair's product with the concept, and leaves the differences of
    concepts that are causally orthogonal to it.

    Args:
        model: The model.
        word_pairs: Token ids (first, second), at least two pairs.
        seed: Of the random tokens of the control.

    Raises InputError for fewer than two pairs and ids outside the vocabulary.

    Source: Park et al. 2024 (arXiv 2311.03658), definitions 3.1 and 3.3 and theorem 3.2.
    """
    ids = torch.tensor([list(pair) for pair in word_pairs])
    d_vocab = model.layout.W_U.shape[1]
    if ids.ndim != 2 or ids.shape[1] != 2 or len(ids) < 2:
        raise InputError("A concept needs at least two pairs of token ids, as in [(4, 9), (7, 3)].")
    if int(ids.min()) < 0 or int(ids.max()) >= d_vocab or bool((ids[:, 0] == ids[:, 1]).any()):
        raise InputError(f"Each pair has two different token ids from 0 to {d_vocab - 1}.")
    product = causal_inner_product(model)
    gamma = model.layout.W_U.detach().double().T
    differences = gamma[ids[:, 1]] - gamma[ids[:, 0]]
    mean = differences.mean(0)
    size = product.of(mean, mean).sqrt()
    if not float(size) > 1e-12:
        raise InputError("The differences of the pairs cancel: they have no common direction.")
    n = len(ids)
    others = (differences.sum(0) - differences) / (n - 1)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(d_vocab, (n,), generator=generator)
    second = (first + torch.randint(1, d_vocab, (n,), generator=generator)) % d_vocab
    random = gamma[second] - gamma[first]
    cosines = torch.stack([product.cosine(differences, others), product.cosine(random, others)], 1)
    agreement = Grid(cosines, {"pair": numbered(n), "kind": ("held out", "random")}, "cosine")
    read = mean / size
    dtype = torch.promote_types(model.dtype, torch.float32)
    source = BasisSource(format="causal-inner-product", about={"pairs": str(ids.tolist())[:400]})
    basis = direction_basis("final_norm", read.to(dtype), product.dual(read).to(dtype), source=source)
    return ConceptDirection(Direction(basis, -1, "causal-inner-product", {"word_pairs": ids.tolist()}), agreement)
