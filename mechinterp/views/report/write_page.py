"""`write_page`: the page of a circuit file, with measurements on its prompts if the model is available."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mechinterp.base.errors import MechInterpError, ModelNotAvailable
from mechinterp.base.progress import StageProgress, no_stages
from mechinterp.circuit_file.bases import stated_bases
from mechinterp.circuit_file.circuit_file import circuit_of
from mechinterp.circuit_file.named_files import find_file
from mechinterp.circuit_file.readouts import as_stated, named_model
from mechinterp.circuit_file.records import pairs_of, task_of
from mechinterp.circuit_file.schema import CircuitFile, TaskRecord
from mechinterp.circuit_file.store import SUFFIX, open_circuit_file
from mechinterp.circuit_file.verify.verification import load_stated_model
from mechinterp.graphs.circuit import Circuit
from mechinterp.views.report.node_details import NodeDetails, node_details
from mechinterp.views.report.page import write_report

LEFT_OUT = "Attention patterns and written tokens are left out"


@dataclass(frozen=True)
class WrittenPage:
    """The path of the page; `notes` say what it leaves out and why."""

    path: Path
    notes: tuple[str, ...]


def write_page(
    file: str | Path,
    out: str | Path | None = None,
    *,
    model: Any = None,
    device: Any = None,
    called: str | None = None,
    progress: StageProgress = no_stages,
) -> WrittenPage:
    """Write the page of a circuit file, after checking its hashes; an existing page is replaced.

    Attention patterns and written tokens are measured with the model on the pairs in the file. If either is not
    available, or is not what the file states, they are left out, and the page and `notes` say so.

    Args:
        file: the circuit file, or the name of a stored circuit.
        out: where to write. None: `NAME.report.html` in the folder of the file; for a stored circuit, here.
        model: anything that `load_model` takes. None: the model that the file names.
        device: where to load the model.
        called: the name of the file in the `verify` command on the page. None: as it is given.
        progress: called with a stage, the steps done and the total.

    Raises:
        FormatError: if the file is not a circuit file or was changed after it was written.
        InputError: if the page cannot be written, or a given `model` cannot be loaded.
    """
    path = find_file(file)
    opened = open_circuit_file(path)
    circuit, document = circuit_of(opened), opened.document
    beside = path if path == Path(file) else Path(path.name)  # a stored circuit may be inside the package
    target = beside.with_name(path.name.removesuffix(SUFFIX) + ".report.html") if out is None else Path(out)
    details = _details(path, circuit, document, model, device, progress)
    progress("report", 0, 1)
    write_report(target, circuit, document, called or str(file), details)
    return WrittenPage(target, details.notes)


def _details(
    path: Path, circuit: Circuit, document: CircuitFile, model: Any, device: Any, progress: StageProgress
) -> NodeDetails:
    name = document.evaluation[0].pairs if document.evaluation else next(iter(document.pairs), None)
    if name is None:
        return NodeDetails(notes=(f"{LEFT_OUT}: the file has no prompts to measure them on.",))
    progress("model", 0, 1)
    try:
        manager = load_stated_model(document, path, model, device)
    except MechInterpError as error:
        if model is not None or (device is not None and not isinstance(error, ModelNotAvailable)):
            raise
        why = "is not available" if isinstance(error, ModelNotAvailable) else f"cannot be opened: {error}"
        return NodeDetails(notes=(f"{LEFT_OUT}: the model {document.model.name} {why.rstrip('.')}.",))
    stated = document.model.weights_sha256
    try:
        read = as_stated(document, path, manager)
    except MechInterpError as error:
        return NodeDetails(notes=(f"{LEFT_OUT}: {error}",))
    weights = named_model(document, manager).info.weights_sha256
    if read.dims != circuit.graph.dims or (stated is not None and weights() != stated):
        return NodeDetails(notes=(f"{LEFT_OUT}: {manager.info.name} does not have the weights that the file states.",))
    progress("details", 0, 1)
    left_out: tuple[str, ...] = ()
    if circuit.graph.features:
        try:
            found = [basis.to(manager.device) for basis in stated_bases(document, path)]
            circuit = circuit.on_graph(circuit.graph.with_bases(found))
        except MechInterpError as error:
            left_out = (f"The tokens of features are left out: {error}",)
    try:
        task = task_of(document.task) if isinstance(document.task, TaskRecord) else None
        pairs = pairs_of(document.pairs[name], task, manager)
    except MechInterpError as error:
        return NodeDetails(notes=(f"{LEFT_OUT}: the pairs {name!r} cannot be made: {error}",))
    if pairs.digest() != document.pairs[name].sha256:
        return NodeDetails(notes=(f"{LEFT_OUT}: the pairs {name!r} are not those that the file states.",))
    details = node_details(read, circuit, pairs, name, progress=partial(progress, "details"))
    return replace(details, notes=(*details.notes, *left_out))
