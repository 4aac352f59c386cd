"""What the blocks of a hybrid model are made of, under the names that TransformerLens gives its parts.

A layer mixes tokens by attention, or by something else (a convolution, a state-space layer, linear attention), which is
read as a whole: from the output of its norm to what it adds. Its hook points get the names of an attention's.
"""

from __future__ import annotations

from typing import Any

from mechinterp.models.hook_names import ROUTERS
from mechinterp.models.packed_weights import packed_in

MIXERS = ("mixer", "conv", "linear_attn")
"""What a block calls a part that takes the place of attention."""
HEAD_PARTS = ("q", "k", "v", "o")


def attention_of(block: Any) -> Any:
    """The attention of a block whose heads can be told apart; None if it has none."""
    attn = getattr(block, "attn", None)
    if attn is None or not all(hasattr(attn, part) for part in HEAD_PARTS):
        return None
    if packed_in(getattr(attn, part) for part in HEAD_PARTS) is not None:  # its weights cannot be looked at
        return attn
    try:
        _ = attn.W_Q, attn.W_K
    except ValueError:  # heads of another size or number than the configuration says (some layers of Gemma 4)
        return None
    return None if _is_gated(attn) else attn


def mixer_of(block: Any) -> str:
    """What the block calls the part that mixes tokens, if it is not attention with heads; "" if there is none."""
    if attention_of(block) is not None:
        return ""
    found = [name for name in (*MIXERS, "attn") if _has(block, name)]
    return found[0] if found and not _is_mlp(block, found[0]) else ""


def mlp_of(block: Any) -> str:
    """What the block calls its MLP; "" if it has none."""
    found = [name for name in ("mlp", "shared_mlp", *MIXERS) if _has(block, name)]
    return found[0] if found and (found[0] not in MIXERS or _is_mlp(block, found[0])) else ""


def norm_of(block: Any) -> str:
    """What the block calls the norm before what it does first."""
    return "norm" if not _has(block, "ln1") and _has(block, "norm") else "ln1"


def factor_of(block: Any) -> float:
    """The constant by which what the parts of the block add is multiplied (Granite)."""
    return float(getattr(block, "residual_contribution_scale", 1.0))


def aliases(bridge: Any) -> dict[str, Any]:
    """Hook points by the names of a model with attention and MLP in every layer, where this one has others."""
    first, other = (f".mlp.{name}.hook_in" for name in ROUTERS)
    found = {name.replace(other, first): name for name in bridge.hook_dict if other in name}
    for layer, block in enumerate(bridge.blocks):
        here = f"blocks.{layer}"
        if mixer := mixer_of(block):
            found[f"{here}.attn.hook_in"] = f"{here}.{mixer}.hook_in"
            found[f"{here}.ln1_post.hook_in"] = f"{here}.{mixer}.hook_out"
            if factor_of(block) == 1.0 and not _has(block, "ln1_post"):
                found[f"{here}.hook_attn_out"] = f"{here}.{mixer}.hook_out"
        mlp = mlp_of(block)
        if mlp in ("", "mlp"):
            continue
        inside = [name.removeprefix(f"{here}.{mlp}.") for name in bridge.hook_dict if name.startswith(f"{here}.{mlp}.")]
        found |= {f"{here}.mlp.{name}": f"{here}.{mlp}.{name}" for name in inside}
        found[f"{here}.hook_mlp_out"] = f"{here}.{mlp}.hook_out"
    known = bridge.hook_dict
    return {name: known[given] for name, given in found.items() if given in known and name not in known}


def _has(block: Any, name: str) -> bool:
    return getattr(block, name, None) is not None


def _is_gated(attn: Any) -> bool:
    """Whether what the heads write is multiplied by a gate of their input, so that it is not their values' alone.

    The gate is a projection of its own (AFMoE), or the second half of the one of the queries (Qwen3-Next, Qwen3.5).
    """
    own = getattr(attn, "original_component", None)
    if hasattr(own, "gate_proj"):
        return True
    queries, out = (getattr(getattr(own, name, None), "weight", None) for name in ("q_proj", "o_proj"))
    return queries is not None and out is not None and queries.shape[0] == 2 * out.shape[-1]


def _is_mlp(block: Any, name: str) -> bool:
    """Whether a mixer (Nemotron-H has one slot a layer) is an MLP: two matrices, and nothing that mixes tokens."""
    part = getattr(block, name)
    component = getattr(part, "original_component", None) or part
    return hasattr(component, "up_proj") and hasattr(component, "down_proj") and not hasattr(component, "q_proj")
