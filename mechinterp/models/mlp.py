"""One MLP run by itself."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from mechinterp.base.errors import UnsupportedError
from mechinterp.models.layout import MlpMaps


def run_mlp(block: Any, maps: MlpMaps | None, mlp_in: Tensor) -> Tensor:
    """What the MLP of a block writes for any input, before any post-norm; only the MLP is run.

    Some add a residual stream that they are given (Bloom, MPT): here it is zero. Mixtures of experts give their
    routing back as well (GPT-OSS, Llama 4); it is left out. An MLP that is no module of its own, its matrices lying in
    the layer (OPT), is computed from them.
    """
    mlp = block.mlp
    if getattr(mlp, "name", "mlp") is None:
        if maps is None or maps.activation is None:
            raise UnsupportedError("it is no module of its own, and what is between its matrices is not known")
        return maps(mlp_in)
    component = getattr(mlp, "original_component", None) or mlp
    parameters = inspect.signature(component.forward).parameters.values()
    wants = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL}
    out = mlp(mlp_in, torch.zeros_like(mlp_in)) if "residual" in wants else mlp(mlp_in)
    return out[0] if isinstance(out, tuple) else out
