"""Evaluation mode for the time of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def eval_mode(bridge: Any) -> Iterator[None]:
    """Every module of the bridge and of the model that it wraps in evaluation mode; afterwards as they were."""
    # The wrapped model is no submodule of the bridge, and some of its dropouts run there.
    roots = (bridge, getattr(bridge, "original_model", bridge))
    training = [module for root in roots for module in root.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
