"""SAELens: `cfg.json` and `sae_weights.safetensors`, version 6 (settings of the model under `metadata`) and older."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mechinterp.base.errors import FormatError, UnsupportedError, clipped
from mechinterp.features.activations import Activation, Gated, JumpRelu, Relu, TopK
from mechinterp.features.basis import Basis
from mechinterp.features.dictionary import Dictionary, transcoder
from mechinterp.features.files import Entries, Files, take
from mechinterp.features.formats.asked import Asked, no_site
from mechinterp.features.hook_points import site_of_hook
from mechinterp.features.matching_pursuit import MatchingPursuit
from mechinterp.models.sites import Site

NAME = "saelens"
WEIGHTS = "sae_weights.safetensors"
_NORMS = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


def matches(files: Files) -> bool:
    """Whether the folder has SAELens's two files."""
    return files.has("cfg.json") and files.has(WEIGHTS)


def read(files: Files, asked: Asked) -> tuple[Basis, ...]:
    """The one dictionary of the folder.

    `batchtopk` and `matryoshka_batchtopk` are saved as `jumprelu`. Activations that were multiplied in training
    (`expected_average_only_in`) are folded with `input_scale`. Raises UnsupportedError for temporal dictionaries, which
    attend to earlier positions, and for whitened activations.
    """
    where = files.label
    cfg = Entries(files.json("cfg.json"), f"{where}/cfg.json")
    about = cfg.inner("metadata") if cfg.get("metadata") is not None else cfg
    architecture = cfg.text("architecture", "standard")
    tensors = files.safetensors(WEIGHTS)
    site, site_out = _sites(cfg, about, architecture, asked, where)
    source = files.source(
        NAME,
        model=about.get("model_name"),
        hook_name=about.get("hook_name") or about.get("hook_point"),
        prepend_bos=about.get("prepend_bos"),
        architecture=architecture,
    )
    norm = cfg.get("normalize_activations")
    norm = {True: "expected_average_only_in", False: "none", None: "none"}.get(norm, norm)
    if norm not in (*_NORMS, "expected_average_only_in"):
        raise UnsupportedError(f"{where} normalizes activations by {clipped(norm)}, which is not supported.")
    subtract = cfg.flag("apply_b_dec_to_input", True)
    if architecture == "matching_pursuit":
        return (_matching_pursuit(cfg, tensors, site, subtract, norm, source, where),)
    W_enc = take(tensors, "W_enc", (None, None), where)
    d_in, n = W_enc.shape
    W_dec = take(tensors, "W_dec", (n, None), where)
    d_out = W_dec.shape[1]
    is_transcoder = architecture in _TRANSCODERS
    if is_transcoder and norm != "none":
        raise UnsupportedError(f"{where} is a transcoder with normalised activations, which is not supported.")
    W_dec = _with_finetuning(cfg, tensors, W_dec, where)
    rule, b_enc, rescaled = _activation(cfg, architecture, tensors, n, where)
    if rescaled:  # activations are multiplied by the decoder's lengths before top-k, and divided in decoding
        lengths = W_dec.norm(dim=-1)
        W_enc, W_dec, b_enc = W_enc * lengths, W_dec / lengths[:, None], b_enc * lengths
    skip = take(tensors, "W_skip", (d_out, d_in), where).T if "W_skip" in tensors else None
    if (skip is not None) != ("skip" in architecture):
        raise FormatError(f"{where} is of architecture {architecture!r}, which does not fit its tensors (W_skip).")
    made = transcoder(
        site,
        site_out,
        W_enc,
        W_dec,
        b_enc=b_enc,
        b_dec=take(tensors, "b_dec", (d_out,), where),
        activation=rule,
        W_skip=skip,
        source=source,
    )
    made = replace(made, subtract_b_dec=subtract and not is_transcoder, normalize=_NORMS.get(norm, "none"))
    return (_scaled(made, norm, asked, where),)


def _scaled(made: Dictionary, norm: str, asked: Asked, where: str) -> Dictionary:
    if asked.input_scale is not None:
        return made.with_input_scale(asked.input_scale)
    if norm == "expected_average_only_in":
        raise FormatError(
            f"{where} was trained on activations scaled to a mean length of sqrt(d), and the factor is not in the "
            "files; give it as input_scale= (sqrt(d) / mean length; 1.0 if it is folded into the weights)."
        )
    return made


def _activation(
    cfg: Entries, architecture: str, tensors: dict[str, Tensor], n: int, where: str
) -> tuple[Activation, Tensor, bool]:
    """(the activation function, the encoder's bias, whether activations are rescaled by the decoder's lengths)."""
    if architecture == "gated":
        gate, mag, r = (take(tensors, name, (n,), where) for name in ("b_gate", "b_mag", "r_mag"))
        return Gated(gate, mag, r), torch.zeros_like(gate), False
    b_enc = take(tensors, "b_enc", (n,), where)
    if architecture.startswith("jumprelu"):
        return JumpRelu(take(tensors, "threshold", (n,), where)), b_enc, False
    name = cfg.text("activation_fn", cfg.text("activation_fn_str", "relu"))
    if architecture == "topk" or (architecture == "standard" and name == "topk"):
        k = cfg.get("k") if cfg.get("k") is not None else cfg.inner("activation_fn_kwargs").get("k")
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n:
            raise FormatError(f"{where}: k of a top-k dictionary must be from 1 to {n}; got {clipped(k)}.")
        return TopK(k), b_enc, cfg.flag("rescale_acts_by_decoder_norm", False)
    if architecture in ("standard", "transcoder", "skip_transcoder") and name == "relu":
        return Relu(), b_enc, False
    what = f"architecture {clipped(architecture)}" if name == "relu" else f"activation function {clipped(name)}"
    raise UnsupportedError(f"{where} has the {what}, which is not supported.")


def _with_finetuning(cfg: Entries, tensors: dict[str, Tensor], W_dec: Tensor, where: str) -> Tensor:
    factor = tensors.get("scaling_factor", tensors.get("finetuning_scaling_factor"))
    if factor is None or bool((factor == 1).all()):
        return W_dec
    if factor.shape != W_dec.shape[:1] or not cfg.get("finetuning_scaling_factor"):
        raise FormatError(f"{where} has scaling factors, but its cfg.json does not say that they are used.")
    return W_dec * factor[:, None]


def _matching_pursuit(
    cfg: Entries, tensors: dict[str, Tensor], site: Site, subtract: bool, norm: str, source: Any, where: str
) -> MatchingPursuit:
    if norm != "none":
        raise UnsupportedError(f"{where} is a matching pursuit with normalised activations, which is not supported.")
    W_dec = take(tensors, "W_dec", (None, None), where)
    b_dec = take(tensors, "b_dec", (W_dec.shape[1],), where)
    return MatchingPursuit(
        (site,),
        (site,),
        W_dec,
        b_dec if subtract else torch.zeros_like(b_dec),
        residual_threshold=cfg.number("residual_threshold", 1e-2),
        steps=0 if cfg.get("max_iterations") is None else cfg.count("max_iterations"),
        stop_at_old=cfg.flag("stop_on_duplicate_support", True),
        source=source,
    )


def _sites(cfg: Entries, about: Entries, architecture: str, asked: Asked, where: str) -> tuple[Site, Site]:
    if about.get("hook_head_index") is not None or about.get("hook_point_head_index") is not None:
        raise UnsupportedError(f"{where} was trained on one head of a site, which is not supported.")
    site = asked.site or _site(about, ("hf_hook_name", "hook_name", "hook_point"), where)
    if site is None:
        raise no_site(where)
    if architecture not in _TRANSCODERS:
        return site, site
    out = asked.site_out or _site(about, ("hf_hook_name_out", "hook_name_out"), where)
    if out is None:
        raise FormatError(f"{where} does not say which site it writes to; give it, as in site_out='mlp_out.5'.")
    return site, out


def _site(about: Entries, keys: tuple[str, ...], where: str) -> Site | None:
    """The first name that is known; if none is, the error about the last."""
    error = None
    for key in keys:
        if isinstance(name := about.get(key), str) and name:
            try:
                return site_of_hook(name, where)
            except FormatError as caught:
                error = caught
    if error is not None:
        raise error
    return None
