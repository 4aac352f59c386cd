"""Attention patterns of models that do not expose them, in closed form; and the keys that a query attends to."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from mechinterp.base.errors import UnsupportedError
from mechinterp.engines.decomposition.tape import HEAD, Tape
from mechinterp.models.attention import attention_scores, softmax_where
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs


def complete_totals(model: HookManager, pairs: Pairs, tape: Tape, totals: dict[str, Tensor]) -> None:
    """Adds the patterns that a run cannot record (OPT, GPT-Neo), from queries and keys.

    They cannot be compared with the model's own; `Tape.check` compares the attention output that they give.
    Raises UnsupportedError, naming the site, for any other value of the tape that a run cannot record.
    """
    for op in tape.operations:
        pattern = tape.visible.get(op.output)
        if pattern is not None and pattern not in totals:
            layer = int(op.output.partition(".")[2])
            closed = attention_scores(model.bridge, layer, pairs.clean.shape[1])
            scores = closed(totals[op.inputs[0]], totals[op.inputs[1]])
            totals[pattern] = softmax_where(scores, keys_by_design(model, pairs, layer))
        for name in (*op.inputs, op.output):
            if name not in totals and name not in HEAD:
                model.resolve(Site.parse(name))  # raises with the reason
                raise UnsupportedError(f"'{name}' of {model.info.architecture} is not recorded, so it cannot be split.")


def keys_by_design(model: HookManager, pairs: Pairs, layer: int) -> Bool[Tensor, "batch 1 query key"]:
    """The keys that each query of a layer attends to: real tokens, not later ones, a window in GPT-Neo's local layers.

    Other sliding windows are not included: for models that expose their scores, `visible_keys` reads them.
    """
    n_pos = pairs.clean.shape[1]
    seen = torch.ones(n_pos, n_pos, dtype=torch.bool, device=model.device)
    if model.dims.causal:
        seen = seen.tril()
    attn = model.bridge.blocks[layer].attn
    component = getattr(attn, "original_component", None) or attn
    if getattr(component, "attention_type", None) == "local":
        seen = seen.triu(1 - int(component.config.window_size))
    return seen & pairs.mask[:, None, None]
