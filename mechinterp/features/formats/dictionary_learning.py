"""dictionary_learning: `ae.pt` (a state_dict of `torch.save`) and `config.json`, whose trainer names the class."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from mechinterp.base.errors import FormatError, UnsupportedError, clip
from mechinterp.features.activations import Gated, JumpRelu, TopK
from mechinterp.features.basis import Basis
from mechinterp.features.dictionary import sae
from mechinterp.features.files import Entries, Files, take
from mechinterp.features.formats.asked import Asked, no_site
from mechinterp.features.hook_points import site_of_hook
from mechinterp.models.sites import Site

NAME = "dictionary-learning"
_SUBMODULES = {"resid_post": "resid_post", "mlp_out": "mlp_out", "attention_out": "attn_out", "attn_out": "attn_out"}


def matches(files: Files) -> bool:
    """Whether there is an `ae.pt`."""
    return files.has("ae.pt") and files.only in ("", "ae.pt")


def read(files: Files, asked: Asked) -> tuple[Basis, ...]:
    """The one dictionary of the folder.

    All classes but `JumpReluAutoEncoder` and `AutoEncoderNew` subtract the decoder's bias before encoding. `TopK`
    stores a threshold too, and does not use it; `BatchTopK` and `Matryoshka` do. Weights are as they are stored: the
    library itself first makes all directions of an `AutoEncoder` of length 1 (see `Dictionary.with_unit_decoder`).
    """
    where, tensors = files.label, files.torch("ae.pt")
    trainer = _trainer(files)
    kind = str(trainer.get("dict_class") or _class_of(tensors, asked, where))
    site = asked.site or _site(trainer, where)
    about: dict[str, Any] = {"model": trainer.get("lm_name"), "class": kind}
    if kind not in _READERS:
        raise UnsupportedError(f"{where} is a {clip(kind, 60)}, which is not supported. Known: {', '.join(_READERS)}.")
    parts = _READERS[kind](tensors, trainer, asked, where)
    made = sae(site, **parts, source=files.source(NAME, **about))
    return (made if asked.input_scale is None else made.with_input_scale(asked.input_scale),)


def _linear(tensors: dict[str, Tensor], where: str) -> tuple[Tensor, Tensor]:
    """(W_enc, W_dec) from torch's linear layers."""
    encoder = take(tensors, "encoder.weight", (None, None), where)
    n, d = encoder.shape
    return encoder.T, take(tensors, "decoder.weight", (d, n), where).T


def _relu(tensors: dict[str, Tensor], trainer: Entries, asked: Asked, where: str) -> dict[str, Any]:
    W_enc, W_dec = _linear(tensors, where)
    d, n = W_enc.shape
    b_enc, bias = take(tensors, "encoder.bias", (n,), where), take(tensors, "bias", (d,), where)
    return {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": bias, "subtract_b_dec": True}


def _relu_new(tensors: dict[str, Tensor], trainer: Entries, asked: Asked, where: str) -> dict[str, Any]:
    W_enc, W_dec = _linear(tensors, where)
    d, n = W_enc.shape
    b_enc, b_dec = take(tensors, "encoder.bias", (n,), where), take(tensors, "decoder.bias", (d,), where)
    return {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}


def _gated(tensors: dict[str, Tensor], trainer: Entries, asked: Asked, where: str) -> dict[str, Any]:
    W_enc, W_dec = _linear(tensors, where)
    d, n = W_enc.shape
    rule = Gated(*(take(tensors, name, (n,), where) for name in ("gate_bias", "mag_bias", "r_mag")))
    b_dec = take(tensors, "decoder_bias", (d,), where)
    return {"W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec, "activation": rule, "subtract_b_dec": True}


def _jumprelu(tensors: dict[str, Tensor], trainer: Entries, asked: Asked, where: str) -> dict[str, Any]:
    return _direct(tensors, where, JumpRelu(take(tensors, "threshold", (None,), where)), False)


def _direct(tensors: dict[str, Tensor], where: str, rule: Any, subtract: bool) -> dict[str, Any]:
    W_enc = take(tensors, "W_enc", (None, None), where)
    d, n = W_enc.shape
    return {
        "W_enc": W_enc,
        "W_dec": take(tensors, "W_dec", (n, d), where),
        "b_enc": take(tensors, "b_enc", (n,), where),
        "b_dec": take(tensors, "b_dec", (d,), where),
        "activation": rule,
        "subtract_b_dec": subtract,
    }


def _topk(tensors: dict[str, Tensor], trainer: Entries, asked: Asked, where: str) -> dict[str, Any]:
    stored = tensors.get("k")
    k = asked.k or (int(stored) if stored is not None and not stored.ndim else trainer.count("k"))
    W_enc, W_dec = _linear(tensors, where)
    d, n = W_enc.shape
    if not 1 <= k <= n:
        raise FormatError(f"{where}: k of a top-k dictionary must be from 1 to {n}; got {k}.")
    b_enc, b_dec = take(tensors, "encoder.bias", (n,), where), take(tensors, "b_dec", (d,), where)
    return {
        "W_enc": W_enc,
        "W_dec": W_dec,
        "b_enc": b_enc,
        "b_dec": b_dec,
        "activation": TopK(k),
        "subtract_b_dec": True,
    }


def _batch_topk(tensors: dict[str, Tensor], trainer: Entries, asked: Asked, where: str) -> dict[str, Any]:
    found = _topk({**tensors, "k": take(tensors, "threshold", (), where).new_ones(())}, trainer, asked, where)
    return {**found, "activation": _threshold(tensors, where)}


def _matryoshka(tensors: dict[str, Tensor], trainer: Entries, asked: Asked, where: str) -> dict[str, Any]:
    found = _direct(tensors, where, _threshold(tensors, where), True)
    sizes = tensors.get("group_sizes")
    if sizes is not None and sizes.ndim == 1 and len(sizes) < 1000:
        found["prefixes"] = [int(n) for n in sizes.cumsum(0)]
    return found


def _threshold(tensors: dict[str, Tensor], where: str) -> JumpRelu:
    threshold = take(tensors, "threshold", (), where)
    if float(threshold) < 0:
        raise FormatError(f"{where} has no threshold (it is {float(threshold):g}): its training ended too early.")
    return JumpRelu(threshold)


_READERS = {
    "AutoEncoder": _relu,
    "AutoEncoderNew": _relu_new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jumprelu,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}


def _class_of(tensors: dict[str, Tensor], asked: Asked, where: str) -> str:
    """The class by its tensors, where no config says it."""
    if "gate_bias" in tensors:
        return "GatedAutoEncoder"
    if "group_sizes" in tensors:
        return "MatryoshkaBatchTopKSAE"
    if "W_enc" in tensors:
        return "JumpReluAutoEncoder"
    if "k" in tensors:
        if asked.k is None:
            raise FormatError(
                f"{where} has no config.json to say whether it is top-k or batch-top-k; add it, or give k=."
            )
        return "AutoEncoderTopK"
    return "AutoEncoder" if "bias" in tensors else "AutoEncoderNew"


def _trainer(files: Files) -> Entries:
    if not files.has("config.json"):
        return Entries({}, files.label)
    return Entries(files.json("config.json"), f"{files.label}/config.json").inner("trainer")


def _site(trainer: Entries, where: str) -> Site:
    name = trainer.get("submodule_name")
    if not isinstance(name, str):
        raise no_site(where)
    found = re.fullmatch(r"(\w+?)_layer_(\d{1,4})", name)
    if found and found[1] in _SUBMODULES:
        return Site(_SUBMODULES[found[1]], int(found[2]))
    return site_of_hook(name, where)
