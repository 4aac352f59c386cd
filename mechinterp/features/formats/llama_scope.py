"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`; JumpReLU with one threshold."""

from __future__ import annotations

from dataclasses import replace

import torch

from mechinterp.base.errors import FormatError, UnsupportedError, clip
from mechinterp.features.activations import JumpRelu
from mechinterp.features.basis import Basis
from mechinterp.features.dictionary import transcoder
from mechinterp.features.files import Entries, Files, take
from mechinterp.features.formats.asked import Asked
from mechinterp.features.hook_points import site_of_hook

NAME = "llama-scope"
WEIGHTS = "checkpoints/final.safetensors"


def matches(files: Files) -> bool:
    """Whether the folder has Llama Scope's two files."""
    return files.has("hyperparams.json") and files.has(WEIGHTS)


def read(files: Files, asked: Asked) -> tuple[Basis, ...]:
    """The one dictionary of the folder, with the scale of its training activations folded in.

    Activations were scaled to a mean length of sqrt(d); the threshold is scaled alike, as in SAELens.
    """
    where = files.label
    cfg, tensors = Entries(files.json("hyperparams.json"), f"{where}/hyperparams.json"), files.safetensors(WEIGHTS)
    encoder = take(tensors, "encoder.weight", (None, None), where)
    n, d = encoder.shape
    decoder = take(tensors, "decoder.weight", (None, n), where)
    if (rule := cfg.text("act_fn", "jumprelu")) not in ("jumprelu", "topk"):
        raise UnsupportedError(f"{where} has the activation function {clip(rule, 60)!r}, which is not supported.")
    lengths = cfg.inner("dataset_average_activation_norm")
    scale = asked.input_scale if asked.input_scale is not None else d**0.5 / _positive(lengths, "in")
    site = asked.site or site_of_hook(cfg.text("hook_point_in"), where)
    out = asked.site_out or site_of_hook(cfg.text("hook_point_out", cfg.text("hook_point_in")), where)
    if site != out:
        raise UnsupportedError(f"{where} writes elsewhere than it reads, with scales of both; it is not supported.")
    threshold = torch.tensor(cfg.number("jump_relu_threshold") * scale, dtype=torch.float32)
    made = transcoder(
        site,
        out,
        encoder.T,
        decoder.T,
        b_enc=take(tensors, "encoder.bias", (n,), where),
        b_dec=take(tensors, "decoder.bias", (len(decoder),), where),
        activation=JumpRelu(threshold),
        source=files.source(NAME, input_scale=f"{scale:.6g}"),
    )
    before = cfg.flag("apply_decoder_bias_to_pre_encoder", False)
    return (replace(made, subtract_b_dec=before).with_input_scale(scale),)


def _positive(entries: Entries, key: str) -> float:
    value = entries.number(key)
    if not value > 0:
        raise FormatError(f"{entries.where}: {key!r} must be positive; got {value:g}.")
    return value
