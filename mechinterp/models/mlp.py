"""Running one MLP by itself."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from mechinterp.base.errors import UnsupportedError
from mechinterp.models.block_parts import mlp_of
from mechinterp.models.layout import MlpMaps
from mechinterp.models.placement import home_of, on_device


def run_mlp(block: Any, maps: MlpMaps | None, mlp_in: Tensor) -> Tensor:
    """The output of a block's MLP for a given input, before any post-norm; only the MLP is run.

    Some MLPs add a residual stream that they receive (Bloom, MPT): it is set to zero. Some mixtures of experts also
    return their routing (GPT-OSS, Llama 4), which is ignored. If the MLP is not a module and its matrices belong to
    the layer (OPT), the output is computed from them.
    """
    mlp = getattr(block, mlp_of(block))
    if getattr(mlp, "name", "mlp") is None:
        if maps is None or maps.activation is None:
            raise UnsupportedError("it is not a module, and its activation function is unknown")
        return maps(mlp_in)
    home = home_of(mlp, mlp_in)
    given = on_device(mlp_in, home)
    component = getattr(mlp, "original_component", None) or mlp
    parameters = inspect.signature(component.forward).parameters.values()
    wants = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL}
    out = mlp(given, torch.zeros_like(given)) if "residual" in wants else mlp(given)
    return on_device(out[0] if isinstance(out, tuple) else out, mlp_in.device)
