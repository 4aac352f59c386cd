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
        roots = (model, getattr(model, "original_model", model))
        self.training = [module for root in roots for module in root.modules() if module.training]

    def change(self) -> None:
        for module in self.training:
            module.training = False

    def change_back(self) -> None:
        for module in self.training:
            module.training = True
