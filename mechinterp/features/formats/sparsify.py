"""eai-sparsify: `cfg.json` and `sae.safetensors` in a folder that is named by the module (`layers.3.mlp`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath

from mechinterp.base.errors import FormatError, UnsupportedError, clip
from mechinterp.features.activations import GroupMax, TopK
from mechinterp.features.basis import Basis
from mechinterp.features.dictionary import transcoder
from mechinterp.features.files import Entries, Files, take
from mechinterp.features.formats.asked import Asked
from mechinterp.features.hook_points import site_of_hook
from mechinterp.models.sites import Site

NAME = "sparsify"
WEIGHTS = "sae.safetensors"


def matches(files: Files) -> bool:
    """Whether the folder has sparsify's two files."""
    return files.has("cfg.json") and files.has(WEIGHTS)


def read(files: Files, asked: Asked) -> tuple[Basis, ...]:
    """The one dictionary of the folder: the k largest of max(pre, 0), or the largest of each of k groups.

    `b_dec` is subtracted before encoding except in transcoders; a skip connection adds `x @ W_skip.T`. (SAELens's
    reader transposes `W_dec` and ignores both; `normalize_decoder` does not change how the dictionary is used.)
    """
    where = files.label
    cfg, tensors = Entries(files.json("cfg.json"), f"{where}/cfg.json"), files.safetensors(WEIGHTS)
    encoder = take(tensors, "encoder.weight", (None, None), where)
    n, d = encoder.shape
    transcode, kind = cfg.flag("transcode", False), cfg.text("activation", "topk")
    k = asked.k or cfg.count("k")
    if cfg.flag("signed", False):
        raise UnsupportedError(f"{where} has signed activations, which are not supported.")
    if kind not in ("topk", "groupmax") or not 1 <= k <= n or (kind == "groupmax" and n % k):
        raise FormatError(f"{where}: activation {clip(kind, 60)!r} with k = {k} of {n} features is not known.")
    site, out = _sites(PurePath(where).name, transcode, asked, where)
    made = transcoder(
        site,
        out,
        encoder.T,
        take(tensors, "W_dec", (n, d), where),
        b_enc=take(tensors, "encoder.bias", (n,), where),
        b_dec=take(tensors, "b_dec", (d,), where),
        activation=TopK(k) if kind == "topk" else GroupMax(k),
        W_skip=take(tensors, "W_skip", (d, d), where).T if "W_skip" in tensors else None,
        source=files.source(NAME, hookpoint=PurePath(where).name, transcode=transcode),
    )
    return (replace(made, subtract_b_dec=not transcode),)


def _sites(folder: str, transcode: bool, asked: Asked, where: str) -> tuple[Site, Site]:
    named = asked.site or site_of_hook(folder, where)
    if not transcode:
        return named, named
    if asked.site is not None and asked.site_out is not None:
        return asked.site, asked.site_out
    if named.kind not in ("mlp_in", "mlp_out"):
        raise FormatError(
            f"{where} transcodes {clip(folder, 60)!r}; give its sites, as in site='mlp_in.3', site_out='mlp_out.3'."
        )
    return asked.site or Site("mlp_in", named.layer), asked.site_out or Site("mlp_out", named.layer)
