"""Hooks that are already on a model in memory: they act in every run, so the user is warned of them."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)
_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LIBRARIES = ("torch", "transformers", "transformer_lens", "accelerate", "mechinterp")


def notes_on_hooks(model: Any, name: str) -> tuple[str, ...]:
    """One note if the model has hooks, otherwise none; it is logged as a warning, too.

    Hooks that libraries register for their own use are not counted.
    """
    roots = (model, getattr(model, "original_model", model))
    modules = {m: label for root in reversed(roots) for label, m in root.named_modules()}  # a bridge's own names last
    hooked = {label: found for module, label in modules.items() if (found := _count(module))}
    if not hooked:
        return ()
    hooked = {label.replace("_original_component.", ""): n for label, n in hooked.items()}
    some = ", ".join(list(hooked)[:3]) + (f" and {len(hooked) - 3} more" if len(hooked) > 3 else "")
    note = (
        f"{name} came with hooks of its own ({sum(hooked.values())}, on {some}); they act in every run. Remove them "
        "before loading if you do not want that."
    )
    logger.warning("%s", note)
    return (note,)


def _count(module: nn.Module) -> int:
    own = [hook for kind in _KINDS for hook in getattr(module, kind, {}).values()]
    lens = [handle.user_hook for kind in ("fwd_hooks", "bwd_hooks") for handle in getattr(module, kind, ())]
    return sum(not str(getattr(hook, "__module__", "")).startswith(_LIBRARIES) for hook in (*own, *lens))
