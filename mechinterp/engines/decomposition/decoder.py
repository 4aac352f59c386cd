"""The tape of a causal model under a HookManager, and the totals of a run."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.base.errors import UnsupportedError
from mechinterp.engines.decomposition.closed_patterns import keys_by_design
from mechinterp.engines.decomposition.operations import Add, Attention, Function, Gate, Linear, Normalize, Operation
from mechinterp.engines.decomposition.tape import Tape
from mechinterp.models.activation import activation_function
from mechinterp.models.attention import attention_scores, check_pattern
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.layout import Layout, MlpMaps
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs


def decoder_tape(model: HookManager, columns: Int[Tensor, " n_columns"] | None, n_pos: int, *, scores: bool) -> Tape:
    """Every operation from the first layer's input to the logits of `columns` (None: of all tokens).

    `scores` adds the closed form of attention scores, for prompts of `n_pos` tokens. Raises UnsupportedError, naming
    the part, for an MLP that is not a pair of matrices and for an unknown activation function.
    """
    layout, dims = model.layout, model.dims
    operations: list[Operation] = []
    patterns: dict[str, str] = {}
    for layer in range(dims.n_layers):
        resid = f"resid_pre.{layer}"
        after = f"resid_pre.{layer + 1}" if layer + 1 < dims.n_layers else "resid_final"
        operations += _attention(model, layer, n_pos, scores)
        patterns[f"z.{layer}"] = f"pattern.{layer}"
        if not dims.has_mlp:
            operations.append(Add((resid, f"attn_out.{layer}"), after, "attention_sum"))
            continue
        entry = resid
        if not dims.parallel:
            entry = f"resid_mid.{layer}"
            operations.append(Add((resid, f"attn_out.{layer}"), entry, "attention_sum"))
        operations += _mlp(model, layer, entry)
        sums = (resid, f"attn_out.{layer}") if dims.parallel else (entry,)
        operations.append(Add((*sums, f"mlp_out.{layer}"), after, "mlp_sum"))
    return Tape((*operations, *_head(layout, columns)), patterns)


def _attention(model: HookManager, layer: int, n_pos: int, scores: bool) -> list[Operation]:
    maps = model.layout.attention[layer]
    out: list[Operation] = [Normalize((f"resid_pre.{layer}",), f"attn_in.{layer}", maps.norm)]
    for channel in "qkv":
        weight, bias = maps.W[channel], maps.b[channel]
        flat = weight.transpose(0, 1).flatten(1)
        shape = (weight.shape[0], weight.shape[2])
        bias = None if bias is None else bias.flatten()
        out.append(Linear((f"attn_in.{layer}",), f"{channel}.{layer}", flat, bias, shape))
    closed = attention_scores(model.bridge, layer, n_pos) if scores else None
    out.append(Attention((f"q.{layer}", f"k.{layer}", f"v.{layer}"), f"z.{layer}", closed))
    post = maps.post.kind != "none"
    raw = f"attn_raw.{layer}" if post else f"attn_out.{layer}"
    d_model = (model.dims.d_model,)
    weight, bias = _multiplied(maps.post, maps.W_O.flatten(0, 1), maps.b_O)
    out.append(Linear((f"z.{layer}",), raw, weight, bias, d_model, "attention_out", 2))
    if post:
        out.append(Normalize((raw,), f"attn_out.{layer}", maps.post))
    return out


def _mlp(model: HookManager, layer: int, entry: str) -> list[Operation]:
    maps: MlpMaps = model.layout.neurons(layer)
    norm = model.layout.mlp_norm[layer]
    assert norm is not None
    if maps.activation is None:
        raise UnsupportedError(
            f"The MLP of layer {layer} of {model.info.architecture} has an unknown activation function (its "
            f"configuration says {model.bridge.cfg.act_fn!r}), for which contextual decomposition has no rule."
        )
    f = activation_function(maps.activation)
    d_mlp, d_model = (maps.W_out.shape[0],), (model.dims.d_model,)
    inside, pre, up = (f"{kind}.{layer}" for kind in ("mlp_in", "mlp_pre", "mlp_up"))
    out: list[Operation] = [Normalize((entry,), inside, norm)]
    if maps.W_gate is None:
        out.append(Linear((inside,), pre, maps.W_in, maps.b_in, d_mlp, "mlp_in"))
        out.append(Function((pre,), f"mlp_post.{layer}", f))
    else:
        out.append(Linear((inside,), pre, maps.W_gate, maps.b_gate, d_mlp, "mlp_in"))
        out.append(Linear((inside,), up, maps.W_in, maps.b_in, d_mlp, "mlp_in"))
        out.append(Gate((pre, up), f"mlp_post.{layer}", f))
    post = maps.post.kind != "none"
    raw = f"mlp_raw.{layer}" if post else f"mlp_out.{layer}"
    weight, bias = _multiplied(maps.post, maps.W_out, maps.b_out)
    out.append(Linear((f"mlp_post.{layer}",), raw, weight, bias, d_model, "mlp_out"))
    if post:
        out.append(Normalize((raw,), f"mlp_out.{layer}", maps.post))
    return out


def _multiplied(post: Norm, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias times the constant factor of the layer's output; a post-norm is a separate operation."""
    if post.kind != "none":
        return weight, bias
    return post.project(weight), None if bias is None else post.project(bias)


def _head(layout: Layout, columns: Tensor | None) -> list[Operation]:
    weight, bias = layout.W_U, layout.b_U
    if columns is not None:
        weight, bias = weight[:, columns], None if bias is None else bias[columns]
    uncapped = "uncapped" if layout.soft_cap else "logits"
    out: list[Operation] = [
        Normalize(("resid_final",), "final_norm", layout.final_norm),
        Linear(("final_norm",), uncapped, weight, bias, (weight.shape[1],)),
    ]
    if layout.soft_cap:
        out.append(Function((uncapped,), "logits", partial(soft_cap, layout.soft_cap), "cap"))
    return out


def soft_cap(cap: float, x: Tensor) -> Tensor:
    """cap tanh(x / cap)."""
    return cap * torch.tanh(x / cap)


def recorded_sites(model: HookManager) -> list[Site]:
    """The sites of every value of the tape that a run can record."""
    kinds = ["resid_pre", "attn_in", "q", "k", "v", "pattern", "z", "attn_raw", "attn_out", "resid_mid"]
    kinds += ["mlp_in", "mlp_pre", "mlp_up", "mlp_post", "mlp_raw", "mlp_out"]
    sites = [Site(kind, layer) for layer in range(model.dims.n_layers) for kind in kinds]
    return [*(site for site in sites if model.has(site)), Site("resid_final")]


def named_totals(values: dict[Site, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The values by name, in float32 or better."""
    return {str(site): value.to(dtype) for site, value in values.items()}


def visible_keys(
    model: HookManager, pairs: Pairs, tape: Tape, totals: dict[str, Tensor], tolerance: float
) -> dict[str, Bool[Tensor, "batch 1 query key"]]:
    """The keys that each query of each layer attends to; the closed form of the scores is checked against the patterns.

    Cost: one forward up to the last attention. Raises UnsupportedError if the closed form does not hold.
    """
    sites = [Site("scores", layer) for layer in range(model.dims.n_layers)]
    sites = [site for site in sites if model.has(site)]
    last = Site("z", model.dims.n_layers - 1)
    masked = model.run(pairs.clean, pairs.mask, record=sites, stop=last).values if sites else {}
    found: dict[str, Tensor] = {}
    for op in tape.operations:
        if not isinstance(op, Attention) or op.scores is None:
            continue
        layer = op.output.partition(".")[2]
        scores = masked.get(Site("scores", int(layer)))
        seen = (
            keys_by_design(model, pairs, int(layer))
            if scores is None
            else (scores > torch.finfo(scores.dtype).min / 2).any(1, keepdim=True)
        )
        own = op.scores(totals[op.inputs[0]], totals[op.inputs[1]])
        label = f"layer {layer} of {model.info.architecture}"
        check_pattern(label, own, seen, totals[tape.visible[op.output]], pairs.mask, tolerance)
        found[op.output] = seen
    return found
