"""`load_basis`: a feature basis from a folder, the hub or the package, in any known format, measured on a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from mechinterp.base.errors import FormatError, InputError, clip
from mechinterp.base.registry import unknown
from mechinterp.features import store
from mechinterp.features.basis import Basis
from mechinterp.features.dictionary import site_of
from mechinterp.features.files import Files, open_files
from mechinterp.features.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    llama_scope,
    qwen_scope,
    saelens,
    sparsify,
)
from mechinterp.features.formats.asked import Asked
from mechinterp.features.measure import check_basis, check_set, check_sites_of
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Reader:
    """A format of files: whether it is theirs, and the bases in them."""

    matches: Callable[[Files], bool]
    read: Callable[[Files, Asked], tuple[Basis, ...]]


READERS = {
    store.NAME: Reader(store.matches, store.read),
    saelens.NAME: Reader(saelens.matches, saelens.read),
    gemma_scope.NAME: Reader(gemma_scope.matches, gemma_scope.read),
    gemma_scope.NAME_2: Reader(gemma_scope.matches_2, gemma_scope.read_2),
    dictionary_learning.NAME: Reader(dictionary_learning.matches, dictionary_learning.read),
    sparsify.NAME: Reader(sparsify.matches, sparsify.read),
    circuit_tracer.NAME: Reader(circuit_tracer.matches, circuit_tracer.read),
    llama_scope.NAME: Reader(llama_scope.matches, llama_scope.read),
    qwen_scope.NAME: Reader(qwen_scope.matches, qwen_scope.read),
}


def load_bases(
    where: str | Path,
    *,
    model: HookManager | None = None,
    check: bool | Pairs | Int[Tensor, "batch pos"] = True,
    format: str | None = None,
    revision: str | None = None,
    site: str | Site | None = None,
    site_out: str | Site | None = None,
    k: int | None = None,
    input_scale: float | None = None,
    layers: Sequence[int] | None = None,
) -> tuple[Basis, ...]:
    """Every feature basis of a folder: one, or one per layer of a set of transcoders.

    Args:
        where: As in `load_basis`, like all arguments and errors.
        model: The model that they are for.
        check: Whether, or on which prompts, each is measured.
        format: The format of the files.
        revision: The branch, tag or commit of a repository.
        site: What is read.
        site_out: What is written to.
        k: The k of a top-k dictionary.
        input_scale: The factor by which activations were multiplied in training.
        layers: Which layers of a set are read; by default all.

    >>> import mechinterp as mi
    >>> [basis.name for basis in mi.load_bases("bundled:transcoders")]
    ['m0', 'm1', 'm2', 'm3']
    """
    bases = _read(where, model, format, revision, site, site_out, k, input_scale, layers)
    return _measured(bases, model, check, whole=layers is None)


def load_basis(
    where: str | Path,
    *,
    model: HookManager | None = None,
    check: bool | Pairs | Int[Tensor, "batch pos"] = True,
    format: str | None = None,
    revision: str | None = None,
    site: str | Site | None = None,
    site_out: str | Site | None = None,
    k: int | None = None,
    input_scale: float | None = None,
    layer: int | None = None,
) -> Basis:
    """The feature basis of a folder, of a repository or of the package, measured on its model.

    Orientation, scale and hook point are silent errors: a wrong one gives features, but not those that were trained.
    With a model, the basis is therefore run on prompts, and one whose reconstruction is worse than the mean, or that
    has no or nearly all features active, is refused with what would fit. `measure_basis` gives the numbers.

    Args:
        where: A folder, a file in one (`layer3.sae.pt`), `org/name/folder@revision` on the hub, or `bundled:m1` (also
            `bundled:resid_pre.2`, `bundled:a0`): dictionaries of the bundled model.
        model: The model that it is for. None: nothing is measured.
        check: True: measured on a built-in text (the bundled model: on a task), through the model's tokenizer; token
            ids `[batch, pos]` or Pairs: measured on these; False: only sites and widths are compared.
        format: The format of the files; by default found by their names. Known: mechinterp, saelens, gemma-scope,
            gemma-scope-2, dictionary-learning, sparsify, circuit-tracer, llama-scope, qwen-scope.
        revision: The branch, tag or commit of a repository, if it is not after an `@`.
        site: What it reads, if the files do not say it or are wrong.
        site_out: What it writes to, for a transcoder.
        k: The k of a top-k dictionary, if the files do not say it.
        input_scale: The factor by which activations were multiplied in training, if it is not folded in.
        layer: Of a set of transcoders the layer.

    Cost: reading the tensors; with a model one forward of the prompts.

    Raises FormatError for files that do not follow their format (pickled objects are never loaded), InputError for a
    basis that does not fit the model, HubNotReached if the hub cannot be reached.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> basis = mi.load_basis("bundled:m1", model=model)
    >>> basis.kind, basis.address(17)
    ('transcoder', 'm1.f17')
    """
    layers = None if layer is None else [layer]
    found = _read(where, model, format, revision, site, site_out, k, input_scale, layers)
    if len(found) != 1:
        names = clip(", ".join(basis.name for basis in found), 200)
        raise InputError(
            f"{clip(str(where), 200)} holds {len(found)} bases ({names}); give layer=, or use `load_bases` for all."
        )
    return _measured(found, model, check, whole=layer is None)[0]


def _read(
    where: str | Path,
    model: HookManager | None,
    format: str | None,
    revision: str | None,
    site: str | Site | None,
    site_out: str | Site | None,
    k: int | None,
    input_scale: float | None,
    layers: Sequence[int] | None,
) -> list[Basis]:
    """The bases of a place, at least one, as they are in the files."""
    if format is not None and format not in READERS:
        raise unknown("format", format, READERS)
    folders, bundled = _folders(where), str(where).startswith("bundled:")
    asked = Asked(
        None if site is None else site_of(site),
        None if site_out is None else site_of(site_out),
        k,
        input_scale,
        None if layers is None else tuple(layers),
        None if model is None else model.has,
    )
    bases: list[Basis] = []
    for folder in folders:
        files = open_files(folder, revision)
        found = _format_of(files) if format is None else format
        several = READERS[found].read(files, asked)
        options = {"format": format, "k": k, "input_scale": input_scale}
        options |= {name: None if one is None else str(one) for name, one in (("site", site), ("site_out", site_out))}
        address = (
            f"bundled:{Path(folder).name}" if bundled else files.label + f"@{files.revision}" * bool(files.revision)
        )
        for basis in several:
            own = dict(basis.source.options) | {name: value for name, value in options.items() if value is not None}
            if (len(several) > 1 or layers is not None) and (layer := basis.sites_in[0].layer) is not None:
                own["layer"] = layer
            bases.append(basis.from_source(address=address, options=own))
    if not bases:
        raise InputError(f"{clip(str(where), 200)} has no basis of the layers {list(layers or ())}.")
    return bases


def _measured(
    bases: Sequence[Basis], model: HookManager | None, check: bool | Pairs | Tensor, *, whole: bool
) -> tuple[Basis, ...]:
    """The bases on the model's device, once each fits, and all layers of a cross-layer transcoder together."""
    if model is None:
        if not isinstance(check, bool):
            raise InputError("`check` are prompts to measure the basis on; give the model as well.")
        return tuple(bases)
    fitting = [_checked(model, basis, check) for basis in bases]
    if whole and check is not False and any(getattr(basis, "cross_layer", False) for basis in fitting):
        check_set(model, fitting, None if check is True else check)
    return tuple(fitting)


def _checked(model: HookManager, basis: Basis, check: bool | Pairs | Tensor) -> Basis:
    """The basis on the model's device, once it fits."""
    basis = basis.to(model.device)
    if isinstance(check, bool):
        (check_basis if check else check_sites_of)(model, basis)
    else:
        check_basis(model, basis, check)
    return basis


def bundled_names() -> tuple[str, ...]:
    """The names of the dictionaries of the bundled model, as after `bundled:`."""
    return tuple(sorted(path.name for path in BUNDLED.iterdir() if path.is_dir())) if BUNDLED.is_dir() else ()


def _folders(where: str | Path) -> list[str | Path]:
    text = str(where)
    if not text.startswith("bundled:"):
        return [where]
    name, known = text.removeprefix("bundled:"), bundled_names()
    if name == "transcoders":
        return [BUNDLED / one for one in known if one.startswith("m")]
    if name not in known:
        raise unknown("bundled dictionary", name, [*known, "transcoders"])
    return [BUNDLED / name]


def _format_of(files: Files) -> str:
    found = [name for name, reader in READERS.items() if reader.matches(files)]
    if not found:
        some = ", ".join(files.names("*")[:5]) or "no files"
        raise FormatError(
            f"{clip(files.label, 200)} holds no known feature basis (it has {clip(some, 200)}). Known formats: "
            f"{', '.join(READERS)}."
        )
    if len(found) > 1:
        raise FormatError(f"{clip(files.label, 200)} could be {' or '.join(found)}; say which with format=.")
    return found[0]
