"""A model of the same architecture whose weights have learned nothing: a control for what a method finds anywhere."""

from __future__ import annotations

import copy

import torch

from mechinterp.base.errors import UnsupportedError
from mechinterp.models.hook_manager import HookManager, load_model


def with_random_weights(model: HookManager, *, seed: int = 0) -> HookManager:
    """The architecture of a model with the first weights of its own initialisation, in the same dtype, on its device.

    Args:
        model: A model of Hugging Face.
        seed: Of the weights.

    Of a model on several devices the main one must have room for all of the new one.

    Cost: memory of a second model. Raises UnsupportedError for another kind of model.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> other = mi.with_random_weights(model)
    >>> other.dims == model.dims, bool((other.W_Q[0] == model.W_Q[0]).all())
    (True, False)
    """
    module = getattr(model.bridge, "original_model", None)
    if module is None or not hasattr(module, "config") or not hasattr(module, "save_pretrained"):
        raise UnsupportedError(
            f"{model.info.name} is not a model of Hugging Face, so it cannot be made again; give a model with random "
            "weights of your own."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = type(module)(copy.deepcopy(module.config))
    return load_model(made.to(model.device, model.dtype).eval(), tokenizer=model.tokenizer)
