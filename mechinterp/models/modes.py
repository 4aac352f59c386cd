"""Modes for the time of a block: evaluation mode, gradients on or off. They come back whatever happens in the block."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Own = TypeVar("Own", bound="Restored")


class Restored:
    """Something that is changed for the time of a block and is certain to be changed back, Ctrl-C or not.

    Written `with Mode() as mode, mode:`. Ctrl-C may come at any line, so also in `__exit__` before it has done anything
    (`torch.no_grad` then leaves gradients off for good). A block that is left twice is left once for certain.
    Both methods may be called again and again, and what will be changed back is known before it is changed.
    """

    def change(self) -> None:
        """Change it; nothing happens the second time."""
        raise NotImplementedError

    def change_back(self) -> None:
        """Change back what was changed, if anything was."""
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
        # The wrapped model is no submodule of the bridge, and some of its dropouts run there.
        roots = (model, getattr(model, "original_model", model))
        self.training = [module for root in roots for module in root.modules() if module.training]

    def change(self) -> None:
        for module in self.training:
            module.training = False

    def change_back(self) -> None:
        for module in self.training:
            module.training = True
