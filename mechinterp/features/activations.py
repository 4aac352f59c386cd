"""The activation functions of dictionaries: from what the encoder's matrix gives to the activations of the features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError


class Activation(ABC):
    """Maps the encoder's outputs (the bias included) to activations."""

    name: ClassVar[str]
    competes: ClassVar[bool] = False
    """Whether the value of a feature depends on the other features."""

    def slopes(self, values: Float[Tensor, "*axes feature"]) -> Float[Tensor, "*axes feature"]:
        """The derivative of the activations, at these activations: 1 where a feature is active, else 0."""
        return (values > 0).to(values)

    @property
    @abstractmethod
    def about(self) -> str:
        """One line about it."""

    @abstractmethod
    def __call__(self, pre: Tensor, /) -> Tensor:
        """The activations."""

    @abstractmethod
    def keep(self, ids: Tensor) -> Activation:
        """The same for some of the features. Raises InputError where one feature's value depends on the others."""


@dataclass(frozen=True)
class Identity(Activation):
    """The activation is the encoder's output: subspaces, concept directions."""

    name: ClassVar[str] = "identity"

    @property
    def about(self) -> str:
        """One line about it."""
        return "linear"

    def __call__(self, pre: Float[Tensor, "*axes feature"]) -> Float[Tensor, "*axes feature"]:
        return pre

    def slopes(self, values: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(values)

    def keep(self, ids: Tensor) -> Identity:
        """Itself."""
        return self


@dataclass(frozen=True)
class Relu(Activation):
    """max(pre, 0)."""

    name: ClassVar[str] = "relu"

    @property
    def about(self) -> str:
        """One line about it."""
        return "ReLU"

    def __call__(self, pre: Float[Tensor, "*axes feature"]) -> Float[Tensor, "*axes feature"]:
        return pre.relu()

    def keep(self, ids: Tensor) -> Relu:
        """Itself."""
        return self


@dataclass(frozen=True, eq=False)
class JumpRelu(Activation):
    """max(pre, 0) where pre > threshold, else 0 (Rajamanoharan et al. 2024, arXiv 2407.14435).

    Batch-top-k and Matryoshka dictionaries are used with the one threshold that their training has estimated.

    Args:
        threshold: One per feature, or one number for all.
    """

    threshold: Tensor
    name: ClassVar[str] = "jumprelu"

    def __post_init__(self) -> None:
        if self.threshold.ndim > 1:
            raise InputError(f"A threshold is one number or one per feature; got shape {list(self.threshold.shape)}.")

    @property
    def about(self) -> str:
        """One line about it."""
        one = self.threshold.ndim == 0
        return f"JumpReLU (one threshold, {float(self.threshold):.4g})" if one else "JumpReLU (a threshold per feature)"

    def __call__(self, pre: Float[Tensor, "*axes feature"]) -> Float[Tensor, "*axes feature"]:
        return torch.where(pre > self.threshold.to(pre), pre.relu(), 0)

    def keep(self, ids: Tensor) -> JumpRelu:
        """The thresholds of some features."""
        return self if self.threshold.ndim == 0 else JumpRelu(self.threshold[ids])


@dataclass(frozen=True)
class TopK(Activation):
    """max(pre, 0) of the k largest of each token, else 0 (Gao et al. 2024, arXiv 2406.04093).

    Args:
        k: How many features a token has at most.
    """

    k: int
    name: ClassVar[str] = "topk"
    competes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"Top-k needs k of at least 1; got {self.k}.")

    @property
    def about(self) -> str:
        """One line about it."""
        return f"top {self.k}"

    def __call__(self, pre: Float[Tensor, "*axes feature"]) -> Float[Tensor, "*axes feature"]:
        best = pre.topk(min(self.k, pre.shape[-1]), dim=-1)
        return torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())

    def keep(self, ids: Tensor) -> TopK:
        """Raises InputError: which features are among the k largest depends on all of them."""
        raise InputError("The features of a top-k dictionary compete; some of them alone are not a dictionary.")


@dataclass(frozen=True)
class GroupMax(Activation):
    """max(pre, 0) of the largest of each of k groups of neighbouring features, else 0 (eai-sparsify's `groupmax`).

    Args:
        k: The number of groups; it divides the number of features.
    """

    k: int
    name: ClassVar[str] = "groupmax"
    competes: ClassVar[bool] = True

    @property
    def about(self) -> str:
        """One line about it."""
        return f"the largest of each of {self.k} groups"

    def __call__(self, pre: Float[Tensor, "*axes feature"]) -> Float[Tensor, "*axes feature"]:
        if self.k < 1 or pre.shape[-1] % self.k:
            raise InputError(f"{pre.shape[-1]} features cannot be {self.k} groups of the same size.")
        groups = pre.unflatten(-1, (self.k, -1))
        best = groups.max(-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, best.indices, best.values.relu()).flatten(-2)

    def keep(self, ids: Tensor) -> GroupMax:
        """Raises InputError: the features of a group compete."""
        raise InputError("The features of a groupmax dictionary compete; some of them alone are not a dictionary.")


@dataclass(frozen=True, eq=False)
class Gated(Activation):
    """max(pre * exp(r_mag) + b_mag, 0) where pre + b_gate > 0, else 0 (Rajamanoharan et al. 2024, arXiv 2404.16014).

    Args:
        b_gate: The bias of the gate, per feature.
        b_mag: The bias of the magnitude.
        r_mag: The logarithm of the magnitude's scale.
    """

    b_gate: Float[Tensor, " feature"]
    b_mag: Float[Tensor, " feature"]
    r_mag: Float[Tensor, " feature"]
    name: ClassVar[str] = "gated"

    @property
    def about(self) -> str:
        """One line about it."""
        return "gated"

    def __call__(self, pre: Float[Tensor, "*axes feature"]) -> Float[Tensor, "*axes feature"]:
        magnitude = (pre * self.r_mag.to(pre).exp() + self.b_mag.to(pre)).relu()
        return torch.where(pre + self.b_gate.to(pre) > 0, magnitude, 0)

    def slopes(self, values: Tensor) -> Tensor:
        """exp(r_mag) where a feature is active."""
        return torch.where(values > 0, self.r_mag.to(values).exp(), 0)

    def keep(self, ids: Tensor) -> Gated:
        """The biases of some features."""
        return Gated(self.b_gate[ids], self.b_mag[ids], self.r_mag[ids])


ACTIVATIONS: dict[str, Any] = {kind.name: kind for kind in (Identity, Relu, JumpRelu, TopK, GroupMax, Gated)}


def tensors_of(activation: Activation) -> dict[str, Tensor]:
    """The tensors of an activation function by name."""
    values = {one.name: getattr(activation, one.name) for one in fields(activation)}  # pyright: ignore[reportArgumentType]
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def numbers_of(activation: Activation) -> dict[str, int]:
    """The whole numbers of an activation function by name."""
    values = {one.name: getattr(activation, one.name) for one in fields(activation)}  # pyright: ignore[reportArgumentType]
    return {name: value for name, value in values.items() if isinstance(value, int)}
