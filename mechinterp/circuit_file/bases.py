"""The feature bases of a circuit file: where they are, and whether they are the ones that the file states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechinterp.base.errors import FormatError, HubNotReached, InputError, clip
from mechinterp.base.plain_files import exists
from mechinterp.circuit_file.schema import CircuitFile, FeaturesRecord
from mechinterp.features.basis import Basis
from mechinterp.features.load import load_bases
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.families.features import Features, reads_input
from mechinterp.graphs.graph import Graph
from mechinterp.models.layout import Dims
from mechinterp.models.sites import Site
from mechinterp.tasks.schema import checked

Bases = bool | Sequence[Basis | str | Path]
"""True: from where the file says; or bases and places that hold them; False: none are loaded."""


def features_records(graph: Graph) -> tuple[FeaturesRecord, ...] | None:
    """The features of a graph as a file describes them; None if it has none.

    Raises InputError for a basis that is in memory only: a file must say where to load it from.
    """
    return tuple(_record(family) for family in graph.features) or None


def _record(family: Features) -> FeaturesRecord:
    source = family.loaded().source
    if not source.address:
        raise InputError(
            f"The basis '{family.basis}' is in memory only, and a circuit file says where to load it from. Save it "
            "with mi.save_basis(folder, basis), load it with mi.load_basis(folder), and build the graph with that one."
        )
    stated = {
        "basis": family.basis,
        "where": source.address if is_inside(source.address) else Path(source.address).name,
        "options": dict(source.options) or None,
        "format": source.format,
        "sha256": family.sha256,
        "site_in": str(family.site_in),
        "site_out": str(family.site_out),
        "later_sites": tuple(map(str, family.later)) or None,
        "numbers": family.numbers,
    }
    return checked(FeaturesRecord, stated, f"What the circuit file says of the basis '{family.basis}'")


def stated_features(record: FeaturesRecord, dims: Dims) -> Features:
    """The family that a record describes, without its basis. Raises InputError or UnsupportedError if it is invalid."""
    site_in, site_out, *later = map(Site.parse, (record.site_in, record.site_out, *(record.later_sites or ())))
    parallel = reads_input(site_out, dims)
    return Features(record.basis, site_in, site_out, record.numbers, record.sha256, parallel, later=tuple(later))


def stated_bases(document: CircuitFile, path: Path, bases: Bases = True) -> list[Basis]:
    """The bases that a file states, in its order. Raises as `stated_basis` does."""
    given = () if isinstance(bases, bool) else bases
    loaded = [basis for one in given for basis in (load_bases(one) if isinstance(one, (str, Path)) else [one])]
    return [stated_basis(record, path, loaded) for record in document.graph.features or ()]


def stated_basis(record: FeaturesRecord, path: Path, given: Sequence[Basis] = ()) -> Basis:
    """The basis that a record describes: the one of `given` with its sha256, or else from where the file says.

    Raises FormatError if what is there has other bytes or is not a basis, InputError if nothing is there, HubNotReached
    if the hub cannot be reached.
    """
    for basis in given:
        if basis.sha256 == record.sha256:
            return basis
    if any(basis.name == record.basis for basis in given):
        raise _another(record, [basis for basis in given if basis.name == record.basis], "that was given")
    where = record.where
    if not is_inside(where):  # an untrusted file must not choose which files are opened
        raise FormatError(
            f"{path}: the basis '{record.basis}' is said to be in {clip(where, 200)!r}, outside the working folder. If "
            "you trust it, give it: --features WHERE."
        )
    beside = path.parent / where
    if not where.startswith("bundled:") and not exists(where) and exists(beside):
        where = str(beside)
    options: Any = dict(record.options or {})
    if (layer := options.pop("layer", None)) is not None:
        options["layers"] = [layer]
    try:
        found = load_bases(where, **options)
    except (FormatError, HubNotReached):
        raise
    except InputError as error:
        raise InputError(f"The basis '{record.basis}' is not here: {error} Or give it: --features WHERE.") from error
    except TypeError as error:
        raise FormatError(f"{path}: {clip(str(error), 200)}") from error
    matching = [basis for basis in found if basis.sha256 == record.sha256]
    if not matching:
        raise _another(record, found, f"in {clip(where, 200)}")
    return matching[0]


def is_inside(where: str) -> bool:
    """Whether a place is in the package, on the hub, or below the working folder."""
    place = Path(where)
    return not place.is_absolute() and ".." not in place.parts and not where.startswith("~")


def _another(record: FeaturesRecord, found: Sequence[Basis], where: str) -> FormatError:
    got = ", ".join(f"{basis.sha256[:12]}..." for basis in found[:3])
    return FormatError(
        f"The basis '{record.basis}' {where} is not the one of the circuit: it has sha256 {got}, the file states "
        f"{record.sha256[:12]}.... Take the original."
    )


def check_given_bases(circuit: Circuit, given: Sequence[object]) -> None:
    """Return None if there is something to do with bases that are given. Raises InputError otherwise."""
    if given and not circuit.graph.features:
        raise InputError("The circuit has no feature nodes, so there is nothing to do with --features; leave it out.")
