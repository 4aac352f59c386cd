"""Gemma Scope: `params.npz` (1); `config.json` and `params.safetensors`, or a cross-layer set (2). All are JumpReLU."""

from __future__ import annotations

import re

from mechinterp.base.errors import FormatError, clip
from mechinterp.features.activations import JumpRelu
from mechinterp.features.basis import Basis
from mechinterp.features.dictionary import cross_layer_features, transcoder
from mechinterp.features.files import Entries, Files, take
from mechinterp.features.formats.asked import Asked, layer_in, no_site
from mechinterp.features.hook_points import site_of_hook
from mechinterp.models.sites import Site

NAME = "gemma-scope"
NAME_2 = "gemma-scope-2"
_KINDS = (("transcoder", "mlp_in"), ("-res", "resid_post"), ("-mlp", "mlp_out"), ("-att", "z"))


def matches(files: Files) -> bool:
    """Whether there is a `params.npz`."""
    return files.has("params.npz") and files.only in ("", "params.npz")


def read(files: Files, asked: Asked) -> tuple[Basis, ...]:
    """The one dictionary of the folder; its site is in the path (`gemma-scope-2b-pt-res/layer_20/...`), or is given.

    Those of the embedding were trained on embeddings without Gemma's factor sqrt(d), which is folded in here, the bias
    of the reconstruction included (SAELens leaves that out), unless `input_scale` says otherwise.
    """
    where, tensors = files.label, files.npz("params.npz")
    W_enc = take(tensors, "W_enc", (None, None), where)
    d_in, n = W_enc.shape
    W_dec = take(tensors, "W_dec", (n, None), where)
    site = asked.site or _site_in(where)
    out = asked.site_out or (Site("mlp_out", site.layer) if site.kind == "mlp_in" else site)
    made = transcoder(
        site,
        out,
        W_enc,
        W_dec,
        b_enc=take(tensors, "b_enc", (n,), where),
        b_dec=take(tensors, "b_dec", (W_dec.shape[1],), where),
        activation=JumpRelu(take(tensors, "threshold", (n,), where)),
        source=files.source(NAME),
    )
    scale = asked.input_scale if asked.input_scale is not None else d_in**-0.5 if site.kind == "embed" else 1.0
    return (made if scale == 1.0 else made.with_input_scale(scale),)


def matches_2(files: Files) -> bool:
    """Whether there is a `params.safetensors` with a `config.json`, or the files of a cross-layer transcoder."""
    return (files.has("params.safetensors") and files.has("config.json")) or bool(_layers(files))


def read_2(files: Files, asked: Asked) -> tuple[Basis, ...]:
    """The dictionary of the folder, or one basis per layer of a cross-layer transcoder."""
    if not files.has("params.safetensors"):
        return _cross_layer(files, asked)
    where = files.label
    cfg, tensors = Entries(files.json("config.json"), f"{where}/config.json"), files.safetensors("params.safetensors")
    if cfg.text("architecture", "jump_relu") != "jump_relu":
        raise FormatError(f"{where} has the architecture {clip(cfg.text('architecture'), 60)!r}; jump_relu is known.")
    W_enc = take(tensors, "w_enc", (None, None), where)
    d_in, n = W_enc.shape
    W_dec = take(tensors, "w_dec", (n, None), where)
    site = asked.site or site_of_hook(cfg.text("hf_hook_point_in"), where)
    out = asked.site_out or (site_of_hook(name, where) if (name := cfg.text("hf_hook_point_out", "")) else site)
    skip = tensors.get("affine_skip_connection")
    made = transcoder(
        site,
        out,
        W_enc,
        W_dec,
        b_enc=take(tensors, "b_enc", (n,), where),
        b_dec=take(tensors, "b_dec", (W_dec.shape[1],), where),
        activation=JumpRelu(take(tensors, "threshold", (n,), where)),
        W_skip=None if skip is None else take(tensors, "affine_skip_connection", (d_in, W_dec.shape[1]), where),
        source=files.source(NAME_2, model=cfg.get("model_name")),
    )
    return (made if asked.input_scale is None else made.with_input_scale(asked.input_scale),)


def _layers(files: Files) -> dict[int, str]:
    """The file of each layer of a cross-layer transcoder."""
    names = [name for name in files.names("*.safetensors") if re.search(r"layer_\d+_width", name)]
    return {layer: name for name in names if (layer := layer_in(name)) is not None}


def _cross_layer(files: Files, asked: Asked) -> tuple[Basis, ...]:
    where, names = files.label, _layers(files)
    n = len(names)
    if sorted(names) != list(range(n)):
        raise FormatError(f"{where} has files of the layers {sorted(names)}; a cross-layer set needs 0 to {n - 1}.")
    cfg = Entries(files.json("config.json"), f"{where}/config.json") if files.has("config.json") else None
    read, written = "mlp_in", "mlp_out"
    if asked.site is not None and asked.site_out is not None:
        read, written = asked.site.kind, asked.site_out.kind
    bases: list[Basis] = []
    for layer in range(n):
        if not asked.wants(layer):
            continue
        tensors, at = files.safetensors(names[layer]), f"{where}/{names[layer]}"
        W_enc = take(tensors, "w_enc", (None, None), at)
        d_in, n_features = W_enc.shape
        W_dec = take(tensors, "w_dec", (n_features, n, None), at)
        d_out = W_dec.shape[2]
        skip = tensors.get("affine_skip_connection")
        bases.append(
            cross_layer_features(
                Site(read, layer),
                [Site(written, later) for later in range(layer, n)],
                W_enc,
                W_dec[:, layer:],
                b_enc=take(tensors, "b_enc", (n_features,), at),
                b_dec=take(tensors, "b_dec", (d_out,), at),
                activation=JumpRelu(take(tensors, "threshold", (n_features,), at)),
                W_skip=None if skip is None else take(tensors, "affine_skip_connection", (d_in, d_out), at),
                source=files.source(NAME_2, model=None if cfg is None else cfg.get("model_name")),
            )
        )
    return tuple(bases)


def _site_in(where: str) -> Site:
    """The site that the path of Gemma Scope 1 names."""
    if "embedding" in where:
        return Site("embed")
    layer = layer_in(where)
    kind = next((kind for part, kind in _KINDS if part in where), None)
    if layer is None or kind is None:
        raise no_site(where)
    return Site(kind, layer)
