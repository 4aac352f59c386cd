"""Our own folder of a basis: `basis.json`, and `basis.<hash>.safetensors` with its tensors.

The JSON is written last and names the tensors by their hash, so an interrupted write leaves the old basis whole, and a
changed byte is refused. Floats of 16 bits stay floats of 16 bits: what is loaded is what was saved, to the bit.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mechinterp.base.atomic_write import write_whole
from mechinterp.base.canonical_json import render_json
from mechinterp.base.errors import FormatError, InputError, UnsupportedError, clip
from mechinterp.features.activations import ACTIVATIONS
from mechinterp.features.basis import Basis
from mechinterp.features.dictionary import Dictionary
from mechinterp.features.files import Entries, Files
from mechinterp.features.formats.asked import Asked
from mechinterp.features.matching_pursuit import MatchingPursuit
from mechinterp.features.neurons import Neurons
from mechinterp.features.snmf import Snmf
from mechinterp.features.supervised import Supervised
from mechinterp.models.feature_basis import BasisSource
from mechinterp.models.sites import Site
from mechinterp.models.source import ModelInfo

NAME = "mechinterp"
FILE = "basis.json"
VERSION = 1
_HASHES = ("sha256", "file", "file_sha256")
_SAID = ("format", "version", "kind", "label", "sites_in", "sites_out", "settings", "source", "model", "card")


def save_basis(
    folder: str | os.PathLike[str], basis: Basis, *, model: ModelInfo | None = None, card: dict[str, Any] | None = None
) -> None:
    """Return None after writing a basis to a folder, whole or not at all; a basis that is there is replaced.

    Args:
        folder: The folder; it is made if it does not exist.
        basis: A basis of this package (not a wrapped object).
        model: `model.info` of the model that it is for; its name, revision and the sha256 of its weights are stored.
        card: Anything about the basis as JSON values, such as how well it reconstructs.

    Raises InputError when the folder cannot be written, UnsupportedError for a wrapped object.

    >>> import tempfile, torch, mechinterp as mi
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     mi.save_basis(folder, mi.sae("resid_pre.1", torch.eye(4), torch.eye(4)))
    ...     mi.load_basis(folder).n_features
    4
    """
    if not basis.stored_as:
        raise UnsupportedError(f"A wrapped {basis.kind} cannot be saved; make a basis of its tensors, as with `sae`.")
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot make the folder {str(place)!r}: {error.strerror or error}.") from error
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in basis.tensors().items()})
    digest = hashlib.sha256(data).hexdigest()
    source = basis.source
    content = {
        "format": "mechinterp-basis",
        "version": VERSION,
        "kind": basis.stored_as,
        "label": basis.label,
        "sites_in": [str(site) for site in basis.sites_in],
        "sites_out": [str(site) for site in basis.sites_out],
        "settings": basis.settings(),
        "source": {
            "where": source.where,
            "format": source.format,
            "revision": source.revision,
            "sha256": dict(source.sha256),
            "about": dict(source.about),
        },
        "card": card or {},
        "sha256": basis.sha256,
        "file": f"basis.{digest[:12]}.safetensors",
        "file_sha256": digest,
    }
    if model is not None:
        content["model"] = {
            "name": model.name,
            "revision": model.revision or "",
            "processing": model.processing,
            "weights_sha256": model.weights_sha256(),
        }
    write_whole(place / str(content["file"]), data)
    write_whole(place / FILE, render_json(content).encode())
    for old in place.glob("basis.*.safetensors"):
        if old.name != content["file"] and re.fullmatch(r"basis\.[0-9a-f]{12}\.safetensors", old.name):
            with suppress(OSError):
                old.unlink()


def matches(files: Files) -> bool:
    """Whether the folder is one of ours."""
    return files.has(FILE) and files.only in ("", FILE)


def read(files: Files, asked: Asked) -> tuple[Basis, ...]:
    """The basis of the folder. Raises FormatError for a changed byte, an unknown version, kind or key."""
    where = files.label
    cfg = stated(files)
    if asked.site is not None or asked.site_out is not None or asked.k is not None or asked.input_scale is not None:
        raise InputError(f"{where} says everything about its basis; leave site, site_out, k and input_scale out.")
    name = cfg.text("file")
    if not re.fullmatch(r"basis\.[0-9a-f]{12}\.safetensors", name):
        raise FormatError(f"{where}: {clip(name, 60)!r} is not the name of a file of tensors.")
    tensors = files.safetensors(name)
    if files.sha256[name] != cfg.text("file_sha256"):
        raise FormatError(
            f"{where}/{name} was changed after it was written: it has sha256 {files.sha256[name][:12]}..., {FILE} "
            f"states {cfg.text('file_sha256')[:12]}.... Take the original."
        )
    kind = cfg.text("kind")
    if kind not in _MAKERS:
        raise FormatError(f"{where} holds a basis of kind {clip(kind, 60)!r}; known are {', '.join(_MAKERS)}.")
    sites = _sites(cfg, "sites_in"), _sites(cfg, "sites_out")
    basis = _MAKERS[kind](sites, tensors, cfg.inner("settings"), cfg.text("label", ""), _source(cfg))
    if basis.sha256 != cfg.text("sha256"):
        raise FormatError(
            f"{where}/{FILE} was changed after it was written: the basis has sha256 {basis.sha256[:12]}..., it states "
            f"{cfg.text('sha256')[:12]}.... Take the original."
        )
    return (basis,)


def stated(files: Files) -> Entries:
    """What `basis.json` says. Raises FormatError for another format, version or key."""
    cfg = Entries(files.json(FILE), f"{files.label}/{FILE}")
    if cfg.get("format") != "mechinterp-basis" or cfg.get("version") != VERSION or isinstance(cfg.get("version"), bool):
        raise FormatError(f"{cfg.where} is not a feature basis of version {VERSION} of this package.")
    if extra := set(cfg.values).difference(_SAID, _HASHES):
        raise FormatError(f"{cfg.where} has the unknown key {clip(min(extra), 60)!r}.")
    return cfg


def _sites(cfg: Entries, key: str) -> tuple[Site, ...]:
    names = cfg.get(key)
    if not isinstance(names, list) or len(names) > 1000 or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{cfg.where}: {key!r} must be a list of sites.")
    try:
        return tuple(Site.parse(name) for name in names)
    except InputError as error:
        raise FormatError(f"{cfg.where}: {clip(str(error), 300)}") from error


def _source(cfg: Entries) -> BasisSource:
    inner = cfg.inner("source")

    def words(key: str) -> dict[str, str]:
        values = inner.inner(key).values
        if len(values) > 10_000 or not all(isinstance(value, str) for value in values.values()):
            raise FormatError(f"{cfg.where}: {key!r} must hold texts.")
        return {name: clip(str(value), 500) for name, value in values.items()}

    where, format, revision = (inner.text(key, "") for key in ("where", "format", "revision"))
    return BasisSource(where, format, revision, words("sha256"), words("about"))


def _dictionary(
    sites: tuple[tuple[Site, ...], tuple[Site, ...]],
    tensors: dict[str, Tensor],
    settings: Entries,
    label: str,
    source: BasisSource,
) -> Dictionary:
    own = {name: value for name, value in tensors.items() if not name.startswith("activation.")}
    rule = {name.removeprefix("activation."): value for name, value in tensors.items() if name not in own}
    chosen = settings.inner("activation")
    name = chosen.text("name")
    numbers = {key: chosen.count(key) for key in chosen.values if key != "name"}
    if name not in ACTIVATIONS or not {"W_enc", "b_enc", "W_dec", "b_dec"} <= own.keys() <= _OWN:
        raise FormatError(
            f"{settings.where}: the tensors {sorted(tensors)} or the activation {clip(name, 60)!r} are not known."
        )
    try:
        return Dictionary(
            *sites,
            **own,
            activation=ACTIVATIONS[name](**rule, **numbers),
            subtract_b_dec=settings.flag("subtract_b_dec"),
            normalize=settings.text("normalize"),
            models=_list(settings, "models", str),
            prefixes=_list(settings, "prefixes", int),
            cross_layer=settings.flag("cross_layer", False),
            label=label,
            source=source,
        )
    except (TypeError, InputError) as error:
        raise FormatError(f"{settings.where}: {clip(' '.join(str(error).split()), 300)}") from error


_OWN = {"W_enc", "b_enc", "W_dec", "b_dec", "W_skip"}


def _list(settings: Entries, key: str, kind: type) -> tuple[Any, ...]:
    values = settings.get(key)
    if not isinstance(values, list) or len(values) > 1000 or not all(type(value) is kind for value in values):
        raise FormatError(f"{settings.where}: {key!r} must be a list of at most 1000 entries.")
    return tuple(values)


def _matching_pursuit(
    sites: tuple[tuple[Site, ...], tuple[Site, ...]],
    tensors: dict[str, Tensor],
    settings: Entries,
    label: str,
    source: BasisSource,
) -> MatchingPursuit:
    if set(tensors) != {"W_dec", "b_dec"}:
        raise FormatError(f"{settings.where}: matching pursuit has W_dec and b_dec; got {sorted(tensors)}.")
    try:
        return MatchingPursuit(
            *sites,
            **tensors,
            residual_threshold=settings.number("residual_threshold"),
            steps=settings.count("steps"),
            stop_at_old=settings.flag("stop_at_old"),
            label=label,
            source=source,
        )
    except InputError as error:
        raise FormatError(f"{settings.where}: {clip(str(error), 300)}") from error


def _neurons(
    sites: tuple[tuple[Site, ...], tuple[Site, ...]],
    tensors: dict[str, Tensor],
    settings: Entries,
    label: str,
    source: BasisSource,
) -> Neurons:
    try:
        return Neurons(*sites, settings.count("n_features"), label, source)
    except InputError as error:
        raise FormatError(f"{settings.where}: {clip(str(error), 300)}") from error


def _snmf(
    sites: tuple[tuple[Site, ...], tuple[Site, ...]],
    tensors: dict[str, Tensor],
    settings: Entries,
    label: str,
    source: BasisSource,
) -> Snmf:
    if set(tensors) != {"W_dec"}:
        raise FormatError(f"{settings.where}: a factorisation has W_dec; got {clip(str(sorted(tensors)), 200)}.")
    try:
        return Snmf(*sites, tensors["W_dec"], label, source)
    except InputError as error:
        raise FormatError(f"{settings.where}: {clip(str(error), 300)}") from error


def _supervised(
    sites: tuple[tuple[Site, ...], tuple[Site, ...]],
    tensors: dict[str, Tensor],
    settings: Entries,
    label: str,
    source: BasisSource,
) -> Supervised:
    listed = settings.get("attributes")
    fits = isinstance(listed, list) and len(listed) <= 1000 and all(map(_is_attribute, listed))
    if not fits or set(tensors) != {"W_dec", "b_dec"}:
        raise FormatError(
            f"{settings.where}: a supervised dictionary has W_dec, b_dec and attributes with their values."
        )
    attributes = tuple((name, tuple(values)) for name, values in listed or ())
    try:
        return Supervised(*sites, tensors["W_dec"], tensors["b_dec"], attributes, label, source)
    except InputError as error:
        raise FormatError(f"{settings.where}: {clip(str(error), 300)}") from error


def _is_attribute(entry: Any) -> bool:
    """Whether it is a name with a list of names."""
    two = isinstance(entry, list) and len(entry) == 2
    return two and isinstance(entry[0], str) and isinstance(entry[1], list) and all(type(v) is str for v in entry[1])


_MAKERS = {
    "dictionary": _dictionary,
    "matching_pursuit": _matching_pursuit,
    "neurons": _neurons,
    "snmf": _snmf,
    "supervised": _supervised,
}
