"""`save_circuit` and `load_circuit`: write a circuit to its two files, and read it back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mechinterp.base.canonical_json import parse_json, six_digits
from mechinterp.base.errors import FormatError, InputError, UnsupportedError, clip
from mechinterp.base.registry import unknown
from mechinterp.base.shards import from_first
from mechinterp.circuit_file.bases import Bases, features_records, stated_bases, stated_features
from mechinterp.circuit_file.named_files import find_file
from mechinterp.circuit_file.provenance import dims_of, dtype_name, model_record, provenance_of, tokenizer_record
from mechinterp.circuit_file.readouts import readout_record, stated_model_of
from mechinterp.circuit_file.records import (
    AnyTaskRecord,
    discovery_record,
    evaluation_record,
    pairs_record,
    score_table,
    task_record,
    tolerance_for,
)
from mechinterp.circuit_file.schema import (
    SCHEMA_VERSION,
    WITH_FEATURES,
    CircuitFile,
    CurvePointRecord,
    CurveRecord,
    GraphRecord,
    PairsRecord,
    PerformanceRecord,
    SelectionRecord,
    Sidecar,
    SizeRule,
    StabilityRecord,
    TaskPairs,
    TemplateRecord,
    TokensTaskRecord,
)
from mechinterp.circuit_file.store import (
    OpenedFile,
    check_hashes,
    open_circuit_file,
    read_sidecar,
    seal,
    sidecar_name,
    write_pair,
)
from mechinterp.discovery.stable import CORE, MeasuredStability
from mechinterp.evaluation.faithfulness import Evaluation
from mechinterp.evaluation.measurements import Checked
from mechinterp.evaluation.predictions import Prediction
from mechinterp.evaluation.sizes import Curve, Levels
from mechinterp.evaluation.task_check import TaskCheck
from mechinterp.graphs.circuit import Circuit, on_paths
from mechinterp.graphs.graph import Graph, graph_of
from mechinterp.graphs.scores import Scores
from mechinterp.models.direction_readout import dims_before
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.layout import Dims
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.task import Task

ABOUT = (
    *("title", "description", "license", "citation", "status", "roles", "positions", "created_utc", "derived_from"),
    "extensions",
)
"""Fields of the file that `save_circuit` takes as keywords and writes unchanged."""
TENSOR = "scores"
MAX_HEADER_BYTES = 2**16
_DTYPES = {"F32": 4, "F64": 8}


def save_circuit(
    path: str | Path,
    circuit: Circuit,
    *,
    model: HookManager,
    task: Task | AnyTaskRecord | None = None,
    result: Evaluation | Sequence[Evaluation] = (),
    curve: Curve | None = None,
    performance: tuple[TaskCheck, Pairs] | None = None,
    stability: MeasuredStability | None = None,
    predictions: Sequence[Checked] = (),
    command: str | None = None,
    **about: Any,
) -> CircuitFile:
    """Write `NAME.circuit.json` and, for a scored circuit, `NAME.scores.safetensors`; return the document written.

    Either both files are replaced or neither is.

    Args:
        path: where to write; the name must end in `.circuit.json`.
        circuit: the circuit to save; its scores, if it has any, go into the second file.
        model: the model that the circuit was found in; its weights are hashed. Of one that reads a direction of a
            direction file, the file names that file; a direction in memory must be given again to `verify`.
        task: the task that made the pairs. None: the file keeps their token ids instead.
        result: one evaluation of this circuit, or several.
        curve: faithfulness at other sizes, with the levels that the size was chosen by.
        performance: how well the full model does the task, and the pairs on which that was measured.
        stability: how alike the circuits of resampled examples are.
        predictions: results of `check_predictions`; every one must hold.
        command: the command line that made the circuit, for the record.
        **about: any of the fields in `ABOUT`, such as `title`, `description`, `license`, `citation` and `roles`.

    Raises:
        InputError: if a result is of another circuit, the circuit of another model, or the pairs of another task; if a
            prediction does not hold; if the files cannot be written.

    Example:
        >>> import mechinterp as mi
        >>> model, task = mi.load_model("bundled"), mi.load_task("ioi")
        >>> pairs = task.pairs(model, n=4)
        >>> graph = mi.build_graph(model)
        >>> circuit = mi.select(graph, mi.score_edges(model, graph, pairs, method="eap"), edges=99)
        >>> path = getfixture("tmp_path") / "ioi.circuit.json"
        >>> document = mi.save_circuit(path, circuit, model=model, task=task, title="A first try")
        >>> mi.load_circuit(path).edges == circuit.edges
        True
    """
    path = Path(path)
    name = sidecar_name(path)
    for field in about:
        if field not in ABOUT:
            raise unknown("field", field, ABOUT)
    results = (result,) if isinstance(result, Evaluation) else tuple(result)
    _check_belongs(circuit, model, results)
    record = task_record(task) if isinstance(task, Task) else task
    examples = _Examples(record)
    scores = circuit.scores
    discovery = None
    if scores is not None:
        discovery = discovery_record(scores, examples.name("discovery", scores.pairs))
    evaluations = [
        evaluation_record(
            entry,
            examples.known("evaluation", entry.pairs),
            examples.name("reference", entry.reference),
            dtype_name(model),
        )
        for entry in results
    ]
    stem = path.name.partition(".circuit")[0]
    readout = readout_record(model)
    content: dict[str, Any] = {
        "schema_version": WITH_FEATURES
        if circuit.graph.features or circuit.graph.dims.layers or readout
        else SCHEMA_VERSION,
        "kind": "circuit",
        "id": stem,
        "title": f"Circuit {stem}" if record is None else f"{record.name} in {model.info.name}",
        "status": "discovered",
        **about,
        "model": model_record(stated_model_of(model)),
        "readout": readout,
        "graph": graph_record(circuit.graph),
        "nodes": circuit.nodes,
        "edges": edge_records(circuit, None if stability is None else stability.found.frequency),
        "task": record,
        "discovery": discovery,
        "selection": SelectionRecord(
            parameters=dict(circuit.selection),
            n_selected=circuit.n_selected,
            n_edges=circuit.n_edges,
            size=None if curve is None or curve.levels is None else _size_rule(curve.levels, curve, examples),
        ),
        "evaluation": evaluations,
        "curve": None if curve is None else _curve_record(curve, examples),
        "performance": None if performance is None else _performance(*performance, examples, dtype_name(model)),
        "stability": None if stability is None else _stability(stability, circuit, examples),
        "predictions": tuple(_prediction(entry, model, examples) for entry in predictions) or None,
        "pairs": examples.records,
        "provenance": provenance_of(model, command),
    }
    content["tokenizer"] = tokenizer_record(model.tokenizer, examples.prepend_bos)
    if record is None and examples.records:
        content["task"] = TokensTaskRecord(name=stem)
    sidecar = None if scores is None else scores_bytes(scores)
    stated = None if sidecar is None else Sidecar(file=name, sha256=hashlib.sha256(sidecar).hexdigest())
    document = seal(content, stated)
    from_first(partial(write_pair, path, document, sidecar))
    return document


def load_circuit(path: str | Path, *, bases: Bases = False) -> Circuit:
    """The circuit in a file, with its graph and its scores; no model is needed.

    Args:
        path: the `NAME.circuit.json`; `NAME.scores.safetensors` is read from the same folder. Or the name of a stored
            circuit (see `discover-circuit list`).
        bases: whether the dictionaries of feature nodes are loaded, from where the file says, or the bases (or where
            they are) to use instead. A circuit with features can be run only with them.

    Raises:
        FormatError: if either file is missing, is not a circuit file, or was changed after it was written; if a basis
            is not the one that the file states.
        InputError: if no stored circuit has that name, or a basis is not where the file says.

    Example:
        >>> import mechinterp as mi
        >>> len(mi.load_circuit("ioi-bundled-mattr"))
        89
    """
    return circuit_of(open_circuit_file(find_file(path)), bases=bases)


def circuit_of(opened: OpenedFile, *, bases: Bases = False) -> Circuit:
    """The circuit in an opened file, whose hashes are checked first. Raises as `load_circuit` does."""
    check_hashes(opened)
    graph = stated_graph(opened.document, opened.path)
    if bases is not False:
        graph = graph.with_bases(stated_bases(opened.document, opened.path, bases))
    return stated_circuit(opened.document, graph, stated_scores(opened.document, graph, opened.path), opened.path)


def stated_circuit(document: CircuitFile, graph: Graph, scores: Scores | None, path: Path) -> Circuit:
    """The circuit that a document describes. Raises FormatError for edges or nodes that the graph does not have."""
    try:
        kept = graph.mask_of([edge.name for edge in document.edges])
        circuit = Circuit(graph, kept, document.selection.n_selected, dict(document.selection.parameters), scores)
    except InputError as error:
        raise FormatError(f"{path}: {error}") from error
    if graph.level == "node" and not torch.equal(circuit.kept, on_paths(graph, circuit.members)):
        raise FormatError(f"{path}: nodes were chosen, but some of the edges between them are missing.")
    if circuit.nodes != document.nodes:
        raise FormatError(f"{path}: the listed nodes are not the ones that the edges connect.")
    return circuit


def stated_graph(document: CircuitFile, path: Path) -> Graph:
    """The graph of a model with the stated dimensions. Raises FormatError if the stated counts do not match it."""
    stated_parts = document.graph
    try:
        dims = stated_dims(document)
        graph = graph_of(
            dims,
            split_input=stated_parts.split_input,
            level=stated_parts.granularity,
            positions=stated_parts.positions or (),
            answers=stated_parts.answers,
            neurons=stated_parts.neurons or (),
            experts=stated_parts.experts or (),
            parts=[stated_features(record, dims) for record in stated_parts.features or ()],
        )
    except (InputError, UnsupportedError) as error:
        raise FormatError(f"{path}: {error}") from error
    got = (len(graph.writers), len(graph.readers), graph.n_edges)
    stated = (document.graph.n_writers, document.graph.n_readers, document.graph.n_edges)
    if got != stated:
        raise FormatError(f"{path}: a model of these dims has {got} writers, readers, edges; the file states {stated}.")
    return graph


def stated_dims(document: CircuitFile) -> Dims:
    """The dimensions that the graph is of: those of the model, or of the model up to the direction that is read.

    Raises InputError for a direction where the model has no residual stream.
    """
    dims = dims_of(document.model.dims)
    return dims if document.readout is None else dims_before(dims, Site.parse(document.readout.site))


def stated_scores(document: CircuitFile, graph: Graph, path: Path) -> Scores | None:
    """The scores in the document's sidecar, or None if it has none."""
    sidecar, discovery = document.integrity.sidecar, document.discovery
    if sidecar is None or discovery is None:
        if (sidecar is None) != (discovery is None):
            raise FormatError(f"{path}: `discovery` and the file of scores go together; one of them is missing.")
        return None
    most = 8 + MAX_HEADER_BYTES + graph.possible.numel() * max(_DTYPES.values())
    where = str(path.parent / sidecar.file)
    values = scores_from_bytes(read_sidecar(path, sidecar, most), graph, where)
    if graph.level == "node":
        first = values[tuple(graph.first_of_unit.T)]
        if not torch.equal(values[graph.possible], first[graph.unit[graph.possible]]):
            raise FormatError(f"{where}: nodes were scored, so all edges out of a node must have the same score.")
    n = discovery.n_examples
    if n < 1:
        raise FormatError(f"{path}: discovery.n_examples is {n}; scores are a mean over at least one example.")
    # In float64, so that dividing by n gives back exactly the number in the file.
    total = values.double() * n
    metric, cost = discovery.metric.name, dict(discovery.cost)
    return Scores(graph, total, n, discovery.method, metric, discovery.replacement, dict(discovery.parameters), cost)


def graph_record(graph: Graph) -> GraphRecord:
    """The graph as a file describes it. Raises UnsupportedError for one that it cannot describe."""
    described = graph_of(
        graph.dims,
        split_input=graph.split_input,
        level=graph.level,
        positions=graph.positions,
        answers=graph.answers or None,
        neurons=graph.neurons,
        experts=graph.experts,
        parts=graph.features,
    )
    if described.digest() != graph.digest():
        others = next(name for name in graph.writers if name not in described.writer_index)
        raise UnsupportedError(
            f"A circuit file describes graphs of heads, MLPs, neurons, experts and features; this graph has {others!r},"
            " so the circuit cannot be stored. Evaluate it here, or store one of a graph without such nodes."
        )
    return GraphRecord(
        granularity="node" if graph.level == "node" else "edge",
        split_input=graph.split_input,
        positions=graph.positions or None,
        answers=graph.answers or None,
        neurons=graph.neurons or None,
        experts=graph.experts or None,
        features=features_records(graph),
        n_writers=len(graph.writers),
        n_readers=len(graph.readers),
        n_edges=graph.n_edges,
        sha256=graph.digest(),
    )


def edge_records(circuit: Circuit, frequency: Tensor | None = None) -> list[dict[str, Any]]:
    """The name and score (6 significant digits) of every edge, sorted by name, and its share of resamples if known."""
    rows: list[dict[str, Any]] = [{"name": name} for name in circuit.edges]
    scores = None if circuit.scores is None else score_table(circuit.scores)
    for key, table in (("score", scores), ("frequency", frequency)):
        if table is None:
            continue
        for row in rows:
            row[key] = six_digits(float(table[circuit.graph.edge_index(row["name"])]))
    return rows


def scores_bytes(scores: Scores) -> bytes:
    """The sidecar: one tensor `scores` [reader, writer], the mean over examples, 0 where there is no edge."""
    # Only one metadata key: safetensors writes several in no fixed order, and equal scores must give equal bytes.
    note = f"mean score per edge [reader, writer]; positive = the edge helps the task; graph {scores.graph.digest()}"
    return safetensors.torch.save({TENSOR: score_table(scores)}, metadata={"mechinterp": note})


def scores_from_bytes(content: bytes, graph: Graph, where: str) -> Tensor:
    """The tensor `scores` of a sidecar; the header is checked before it is used to read anything."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 2 <= size <= min(MAX_HEADER_BYTES, len(content) - 8):
        raise FormatError(f"{where} is not a safetensors file, or it is incomplete.")
    header = parse_json(content[8 : 8 + size], f"The header of {where}")
    entry = header.get(TENSOR) if isinstance(header, dict) else None
    shape = list(graph.possible.shape)
    if not isinstance(entry, dict) or set(header) - {TENSOR, "__metadata__"}:
        raise FormatError(f"{where} must hold one tensor named {TENSOR!r}.")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES or entry.get("shape") != shape:
        got = clip(f"{dtype} {entry.get('shape')}", 80)
        raise FormatError(f"{where}: {TENSOR!r} must be F32 or F64 of shape {shape}; got {got}.")
    n_bytes = graph.possible.numel() * _DTYPES[dtype]
    if entry.get("data_offsets") != [0, n_bytes] or len(content) != 8 + size + n_bytes:
        raise FormatError(f"{where}: {TENSOR!r} must have {n_bytes} bytes; the file is incomplete or has extra bytes.")
    try:
        values = safetensors.torch.load(content)[TENSOR]
    except (safetensors.SafetensorError, ValueError) as error:
        raise FormatError(f"{where} is not a safetensors file: {error}.") from error
    if not bool(torch.isfinite(values).all()) or bool((values[~graph.possible] != 0).any()):
        raise FormatError(f"{where} has a score that is not finite, or a score where the graph has no edge.")
    return values


def _curve_record(curve: Curve, examples: _Examples) -> CurveRecord:
    rounded = [point.rounded() for point in curve.points]
    points = tuple(
        CurvePointRecord(
            n_selected=p.n_selected,
            n_edges=p.n_edges,
            faithfulness=p.faithfulness,
            faithfulness_ci=p.interval,
            kl=p.kl,
            passing=p.passing,
        )
        for p in rounded
    )
    name = examples.known("validation", curve.pairs)
    kl_empty = None if curve.kl_empty is None else six_digits(curve.kl_empty)
    return CurveRecord(
        pairs=name,
        metric=curve.metric,
        replacement=curve.replacement,
        points=points,
        kl_empty=kl_empty,
        seed=None if kl_empty is None else curve.seed,
        folds=curve.folds if curve.folds > 1 else None,
    )


def _performance(check: TaskCheck, pairs: Pairs, examples: _Examples, dtype: str) -> PerformanceRecord:
    """The record of a task check, at 6 significant digits."""
    low, high = check.difference_ci
    return PerformanceRecord(
        pairs=examples.known("discovery", pairs),
        metric=check.metric,
        n_examples=check.n_examples,
        clean=six_digits(check.clean),
        corrupt=six_digits(check.corrupt),
        difference=six_digits(check.difference),
        difference_ci=(six_digits(low), six_digits(high)),
        accuracy=None if check.accuracy is None else six_digits(check.accuracy),
        accuracy_ci=None if check.accuracy_ci is None else tuple(map(six_digits, check.accuracy_ci)),  # pyright: ignore[reportArgumentType]
        by_template=tuple(
            TemplateRecord(
                template=text,
                n_examples=n,
                accuracy=None if accuracy is None else six_digits(accuracy),
                difference=six_digits(difference),
            )
            for text, n, accuracy, difference in check.by_template
        ),
        seed=check.seed,
        tolerance=tolerance_for(dtype),
    )


def _stability(measured: MeasuredStability, circuit: Circuit, examples: _Examples) -> StabilityRecord:
    """The record of a stability, at 6 significant digits. The core is that of `circuit`, which may be a refined one."""
    found = replace(measured.found, circuit=circuit)
    return StabilityRecord(
        pairs=examples.known("discovery", measured.pairs),
        kind=measured.kind,  # pyright: ignore[reportArgumentType]
        resamples=found.resamples,
        seed=measured.seed,
        jaccard=six_digits(found.jaccard),
        jaccard_by_chance=six_digits(measured.found.jaccard_by_chance),
        core_share=CORE,
        n_core=found.n_core,
        n_often_outside=measured.found.n_often_outside,
    )


def _prediction(found: Checked, model: HookManager, examples: _Examples) -> Prediction:
    """The prediction with its measured numbers, at 6 significant digits."""
    if found.model is not model and found.model.info.weights_sha256() != model.info.weights_sha256():
        raise InputError(f"Prediction {found.prediction.name!r} was measured on another model than {model.info.name}.")
    if not found.ok:
        raise InputError(f"A file states predictions that hold; {found.prediction.name!r} does not: {found}.")
    controls = tuple(
        control.model_copy(update={"measured": six_digits(value)})
        for control, value in zip(found.prediction.controls, found.controls, strict=True)
    )
    name = examples.name("predictions", found.pairs)
    update = {"measured": six_digits(found.value), "controls": controls, "pairs": name}
    return found.prediction.model_copy(update=update)


def _size_rule(levels: Levels, curve: Curve, examples: _Examples) -> SizeRule:
    return SizeRule(
        rule="smallest size that passes, as does the next larger one",
        **asdict(levels),
        spread=curve.spread,
        pairs=examples.known("validation", curve.pairs),
    )


class _Examples:
    """The sets of examples in one file, each kept once, under the name of its first use."""

    def __init__(self, task: AnyTaskRecord | None) -> None:
        self.task = task
        self.records: dict[str, PairsRecord] = {}

    def name(self, use: str, pairs: Pairs | None) -> str | None:
        """The name of these examples in the file; None if `pairs` is None."""
        return None if pairs is None else self.known(use, pairs)

    def known(self, use: str, pairs: Pairs) -> str:
        """The name of these examples in the file; new examples are added."""
        record = pairs_record(pairs, self.task)
        for name, known in self.records.items():
            if known.sha256 == record.sha256:
                return name
        name = use if use not in self.records else f"{use}-{1 + sum(k.startswith(use) for k in self.records)}"
        self.records[name] = record
        return name

    @property
    def prepend_bos(self) -> bool | None:
        """Whether the task's pairs begin with BOS; None if no task made them."""
        made = [r.made_from.prepend_bos for r in self.records.values() if isinstance(r.made_from, TaskPairs)]
        return made[0] if made else None


def _check_belongs(circuit: Circuit, model: HookManager, results: Sequence[Evaluation]) -> None:
    if circuit.graph.dims != model.dims:
        raise InputError(f"The circuit belongs to a model whose dimensions differ from those of {model.info.name}.")
    if circuit.n_edges == 0:
        raise InputError("The circuit has no edges, so there is nothing to save.")
    for result in results:
        if result.circuit_digest != circuit.digest():
            raise InputError(
                f"The result is of another circuit ({result.n_edges} edges), not of the one to be saved "
                f"({circuit.n_edges} edges); evaluate this circuit and save that result."
            )
