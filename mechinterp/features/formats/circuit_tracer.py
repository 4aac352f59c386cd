"""circuit-tracer: `config.yaml` with per-layer transcoders (`layer_3.safetensors`), or a cross-layer transcoder."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs, urlparse

from torch import Tensor

from mechinterp.base.errors import FormatError, UnsupportedError, clip, clipped
from mechinterp.features.activations import Activation, JumpRelu, Relu, TopK
from mechinterp.features.basis import Basis
from mechinterp.features.dictionary import cross_layer_features, transcoder
from mechinterp.features.files import Entries, Files, open_files, take
from mechinterp.features.formats.asked import Asked
from mechinterp.features.hook_points import site_of_layer_hook
from mechinterp.models.sites import Site

NAME = "circuit-tracer"
BEFORE_NORM = "mlp_raw"
"""What an MLP adds, before the norm that comes after it."""


def matches(files: Files) -> bool:
    """Whether there is a `config.yaml`, or a cross-layer transcoder's files without one."""
    return files.has("config.yaml") or files.has("W_enc_0.safetensors")


def read(files: Files, asked: Asked) -> tuple[Basis, ...]:
    """One basis per layer.

    What is read and written is in the config (`feature_input_hook`, `feature_output_hook`). `mlp.hook_out` is before a
    post-norm where the model has one. Per-layer files use `x @ W_skip.T`, cross-layer ones `x @ W_skip`.
    """
    cfg = Entries(files.yaml("config.yaml") if files.has("config.yaml") else {}, f"{files.label}/config.yaml")
    kind = cfg.text("model_kind", "cross_layer_transcoder" if files.has("W_enc_0.safetensors") else None)
    if kind == "cross_layer_transcoder":
        bases = _cross_layer(files, cfg, asked)
    elif kind == "transcoder_set":
        bases = _per_layer(files, cfg, asked)
    else:
        raise UnsupportedError(
            f"{files.label} is a {clip(kind, 60)!r}; known are transcoder_set, cross_layer_transcoder."
        )
    return tuple(_says_its_site(basis, asked) for basis in bases)


def _says_its_site(basis: Basis, asked: Asked) -> Basis:
    """The basis; if the model has decided what it writes to, its source says so, for reading it without the model."""
    written = basis.sites_out[0]
    if asked.has is None or asked.site_out is not None or written.kind != BEFORE_NORM:
        return basis
    return basis.from_source(options={"site_out": str(written)})


def _per_layer(files: Files, cfg: Entries, asked: Asked) -> tuple[Basis, ...]:
    bases: list[Basis] = []
    for layer, (holder, name) in sorted(_places(files, cfg).items()):
        if not asked.wants(layer):
            continue
        tensors, where = _tensors(holder, name), f"{holder.label}/{name}"
        npz = name.endswith(".npz")  # of Gemma Scope: [d, feature], and its threshold by another name
        W_enc = take(tensors, "W_enc", (None, None), where)
        W_enc = W_enc if npz else W_enc.T
        d_in, n = W_enc.shape
        W_dec = take(tensors, "W_dec", (n, None), where)
        d_out = W_dec.shape[1]
        threshold = "threshold" if npz else "activation_function.threshold"
        made = transcoder(
            _site(cfg, "feature_input_hook", "mlp.hook_in", layer, asked.site, asked),
            _site(cfg, "feature_output_hook", "hook_mlp_out", layer, asked.site_out, asked),
            W_enc,
            W_dec,
            b_enc=take(tensors, "b_enc", (n,), where),
            b_dec=take(tensors, "b_dec", (d_out,), where),
            activation=_activation(cfg, tensors, threshold, n, asked, where),
            W_skip=take(tensors, "W_skip", (d_out, d_in), where).T if "W_skip" in tensors else None,
            source=holder.source(NAME, model=cfg.get("model_name")),
        )
        bases.append(made)
    return tuple(bases)


def _cross_layer(files: Files, cfg: Entries, asked: Asked) -> tuple[Basis, ...]:
    n = len(files.names("W_enc_*.safetensors"))
    bases: list[Basis] = []
    for layer in range(n):
        if not asked.wants(layer):
            continue
        where = f"{files.label}/W_enc_{layer}.safetensors"
        tensors = files.safetensors(f"W_enc_{layer}.safetensors")
        W_enc = take(tensors, f"W_enc_{layer}", (None, None), where)
        n_features, d = W_enc.shape
        decoder = files.safetensors(f"W_dec_{layer}.safetensors")
        skip = tensors.get(f"W_skip_{layer}")
        bases.append(
            cross_layer_features(
                _site(cfg, "feature_input_hook", "hook_resid_mid", layer, asked.site, asked),
                [
                    _site(cfg, "feature_output_hook", "hook_mlp_out", later, asked.site_out, asked)
                    for later in range(layer, n)
                ],
                W_enc.T,
                take(decoder, f"W_dec_{layer}", (n_features, n - layer, d), where),
                b_enc=take(tensors, f"b_enc_{layer}", (n_features,), where),
                b_dec=take(tensors, f"b_dec_{layer}", (d,), where),
                activation=_activation(cfg, tensors, f"threshold_{layer}", n_features, asked, where),
                W_skip=None if skip is None else take(tensors, f"W_skip_{layer}", (d, d), where),
                source=files.source(NAME, model=cfg.get("model_name")),
            )
        )
    return tuple(bases)


def _activation(
    cfg: Entries, tensors: dict[str, Tensor], threshold: str, n: int, asked: Asked, where: str
) -> Activation:
    k = asked.k if asked.k is not None else cfg.get("k")
    if k is not None:
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n:
            raise FormatError(f"{where}: k of a top-k transcoder must be from 1 to {n}; got {clipped(k)}.")
        return TopK(k)
    return JumpRelu(take(tensors, threshold, (n,), where)) if threshold in tensors else Relu()


def _site(cfg: Entries, key: str, default: str, layer: int, given: Site | None, asked: Asked) -> Site:
    if given is not None:
        return Site(given.kind, layer)
    name = cfg.text(key, default)
    site = site_of_layer_hook(name, layer, cfg.where)
    before = Site(BEFORE_NORM, layer)
    return before if name == "mlp.hook_out" and asked.has is not None and asked.has(before) else site


def _places(files: Files, cfg: Entries) -> dict[int, tuple[Files, str]]:
    """Per layer, where its file is: beside the config, or where the config says (`hf://org/name/path`)."""
    names = {re.fullmatch(r"layer_(\d{1,4})\.safetensors", name): name for name in files.names("layer_*.safetensors")}
    own = {int(found[1]): name for found, name in names.items() if found}
    listed: Any = cfg.get("transcoders")
    if listed is None:
        return {layer: (files, name) for layer, name in own.items()}
    if not isinstance(listed, list) or len(listed) > 10_000 or not all(isinstance(one, str) for one in listed):
        raise FormatError(f"{cfg.where}: 'transcoders' must be a list of addresses.")
    places: dict[int, tuple[Files, str]] = {}
    for layer, address in enumerate(listed):
        name = address.rpartition("/")[2].partition("?")[0]
        named = re.fullmatch(r"layer_(\d{1,4})\.safetensors", name)
        if named and int(named[1]) != layer:
            raise FormatError(
                f"{cfg.where}: place {layer} of 'transcoders', which is its layer, has {name!r}. List one file per "
                "layer from layer 0 on, or leave the list out: files beside the config are then found by their names."
            )
        if address.startswith("hf://") and not files.has(name):
            places[layer] = _remote(address, cfg.where)
        else:
            places[layer] = (files, address if not address.startswith("hf://") else name)
    return places


def _remote(address: str, where: str) -> tuple[Files, str]:
    parsed = urlparse(address)
    path = f"{parsed.netloc}{parsed.path}"
    revision = parse_qs(parsed.query).get("revision", [None])[0]
    if path.count("/") < 2:
        raise FormatError(f"{where}: {clip(address, 100)!r} is not the address of a file (hf://org/name/path).")
    holder = open_files(path, revision)
    return holder, holder.only


def _tensors(files: Files, name: str) -> dict[str, Tensor]:
    return files.npz(name) if name.endswith(".npz") else files.safetensors(name)
