"""The experts of a mixture of experts one by one, by the model's own router and experts."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import UnsupportedError
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.placement import home_of
from mechinterp.models.sites import Site


def is_routed(model: HookManager, layer: int) -> bool:
    """Whether the MLP of a layer is a mixture of experts."""
    return _routed(model, layer) is not None


def _routed(model: HookManager, layer: int) -> tuple[Any, Any] | None:
    """(router, experts) of a layer, as modules; None for another MLP."""
    mlp = getattr(model.bridge.blocks[layer], "mlp", None)
    component = getattr(mlp, "original_component", None) or mlp
    router = getattr(component, "gate", None) or getattr(component, "router", None)
    experts = getattr(component, "experts", None)
    if router is None or experts is None:
        return None
    return getattr(router, "original_component", None) or router, experts


def routed_mlp(model: HookManager, layer: int) -> tuple[Any, Any]:
    """(router, experts) of a layer, as modules. Raises UnsupportedError for an MLP that has none."""
    found = _routed(model, layer)
    if found is None:
        raise UnsupportedError(f"The MLP of layer {layer} of {model.info.architecture} is not a mixture of experts.")
    return found


def n_experts(model: HookManager, layer: int) -> int:
    """How many experts a layer has. Raises UnsupportedError for an MLP that is not a mixture of experts."""
    _, experts = routed_mlp(model, layer)
    found = getattr(experts, "num_experts", None)
    if not isinstance(found, int):
        raise UnsupportedError(
            f"The experts of layer {layer} of {model.info.architecture} cannot be told apart; keep the MLP as one node."
        )
    return found


def expert_writes(
    model: HookManager,
    layer: int,
    mlp_in: Float[Tensor, "*axes d_model"],
    router_in: Float[Tensor, "*axes d_model"],
) -> Float[Tensor, "expert *axes d_model"]:
    """What each expert adds to the residual stream: its output times the router's weight, 0 where it is not chosen.

    `router_in` is what the router reads, which is `mlp_in` unless one of them is edited. Cost: the router once, and
    every expert on every token.
    """
    router, experts = routed_mlp(model, layer)
    home = home_of(model.bridge.blocks[layer], mlp_in)
    flat, routed = (value.to(home, model.dtype).reshape(-1, value.shape[-1]) for value in (mlp_in, router_in))
    _, weights, chosen = router(routed)
    count = n_experts(model, layer)
    by_expert = weights.new_zeros(len(flat), count).scatter(1, chosen, weights)
    post, written = model.layout.mlp_post[layer], []
    for expert in range(count):
        out = experts(flat, torch.full_like(chosen[:, :1], expert), by_expert[:, expert : expert + 1])
        written.append(post.project(out.to(mlp_in)))
    return torch.stack(written).unflatten(1, mlp_in.shape[:-1])


def check_experts(model: HookManager, layer: int) -> None:
    """Return None if the experts of a layer add up to what its MLP writes. One forward of 2 x 4 tokens.

    Raises UnsupportedError if they do not (a shared expert, another routing), or the experts cannot be run one by one.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.dims.d_vocab, (2, min(4, model.dims.n_ctx)), generator=generator).to(model.device)
    given, routed, written = (Site(kind, layer) for kind in ("mlp_in", "router_in", "mlp_out"))
    model.resolve(routed)  # raises where the router's input cannot be read
    run = model.run(tokens, record=[given, routed, written], stop=written)
    label = f"The experts of layer {layer} of {model.info.architecture}"
    if model.layout.mlp_post[layer].kind != "none":
        raise UnsupportedError(f"{label} are under a post-norm, which is not supported; keep the MLP as one node.")
    try:
        total = expert_writes(model, layer, run.values[given], run.values[routed]).detach().sum(0)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedError(f"{label} cannot be run one by one ({reason}); keep the MLP as one node.") from error
    expected = run.values[written]
    worst = float((total - expected).abs().max()) / (float(expected.abs().max()) + 1e-6)
    if not worst < (1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2):
        raise UnsupportedError(
            f"{label} do not add up to what the MLP writes (off by {worst:.2g} of its size; is there a shared "
            "expert?); keep the MLP as one node."
        )
