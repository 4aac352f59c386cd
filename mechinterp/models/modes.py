"""Modes that hold inside a block, such as evaluation mode or no gradients, and are always restored afterwards."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Own = TypeVar("Own", bound="Restored")


class Restored:
    """A state that is changed inside a block and restored afterwards, even after Ctrl-C.

    Written `with Mode() as mode, mode:`. Ctrl-C may arrive at any line, also in `__exit__` before it has done anything
    (`torch.no_grad` then leaves gradients off for good); of two exits at least one completes. Both methods may be
    called more than once, and the old state is noted before it is changed.
    """

    def change(self) -> None:
        """Change the state; a second call does nothing."""
        raise NotImplementedError

    def change_back(self) -> None:
        """Restore the old state, if it was changed."""
        raise NotImplementedError

    def __enter__(self: Own) -> Own:
        try:
            self.change()
            return self
        except BaseException:
            self.change_back()
            raise

    def __exit__(self, *_: object) -> None:
        self.change_back()


class Gradients(Restored):
    """Gradients on or off."""

    def __init__(self, on: bool) -> None:
        self.on, self.before = on, torch.is_grad_enabled()

    def change(self) -> None:
        torch.set_grad_enabled(self.on)

    def change_back(self) -> None:
        torch.set_grad_enabled(self.before)


class EvalMode(Restored):
    """Every module of a model (of a bridge: and of the model that it wraps) in evaluation mode."""

    def __init__(self, model: Any) -> None:
        # The wrapped model is not a submodule of the bridge, and some of its dropouts are used.
        self.training = [
            module for module in _modules(model, getattr(model, "original_model", model)) if module.training
        ]

    def change(self) -> None:
        for module in self.training:
            module.training = False

    def change_back(self) -> None:
        for module in self.training:
            module.training = True


def _modules(*roots: Any) -> set[Any]:
    """The modules of both; `Module.modules` also makes their names, which takes longer than a small model's layers."""
    found, left = set[Any](), list(roots)
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            left += [part for part in module._modules.values() if part is not None]
    return found
