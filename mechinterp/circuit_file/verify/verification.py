"""`verify`: check a circuit file against its hashes, its model, its pairs, its scores and a new evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mechinterp.base.canonical_json import six_digits
from mechinterp.base.errors import FormatError, HubNotReached, InputError, MechInterpError, ModelNotAvailable, clip
from mechinterp.base.plain_files import is_file, is_folder, read_bounded
from mechinterp.base.progress import Progress, StageProgress, no_stages
from mechinterp.base.settings import check_settings
from mechinterp.circuit_file.bases import check_given_bases, stated_basis
from mechinterp.circuit_file.circuit_file import stated_circuit, stated_graph, stated_scores
from mechinterp.circuit_file.named_files import find_file
from mechinterp.circuit_file.provenance import model_record, tokenizer_record, versions
from mechinterp.circuit_file.readouts import GivenDirection, as_stated, named_model
from mechinterp.circuit_file.records import (
    EVALUATION_COUNTS,
    EVALUATION_NUMBERS,
    evaluation_record,
    metric_record,
    pairs_of,
    score_table,
    task_of,
    tolerance_for,
)
from mechinterp.circuit_file.schema import CircuitFile, TaskPairs, TaskRecord, Tolerance, circuit_sha256
from mechinterp.circuit_file.setting_types import SELECTION
from mechinterp.circuit_file.store import OpenedFile, inside, open_circuit_file
from mechinterp.circuit_file.verify.claims import Ledger, UnverifiedModel, Verification
from mechinterp.circuit_file.verify.coverage import (
    READOUT,
    applies_again,
    basis_claim,
    evaluation_name,
    extent_of,
    refined,
)
from mechinterp.circuit_file.verify.discovery_claims import (
    BOOTSTRAP,
    check_curve,
    check_refinement,
    check_scores_again,
    check_stability,
    check_task_performance,
    stated_limit,
)
from mechinterp.circuit_file.verify.shared_examples import compare_with_discovery, compare_with_task, distinct_prompts
from mechinterp.circuit_file.verify.warnings import stated_warnings
from mechinterp.discovery.method import METHODS
from mechinterp.discovery.stable import STABLE
from mechinterp.evaluation.faithfulness import ablation_of, evaluate
from mechinterp.evaluation.measurements import Checked, check_predictions
from mechinterp.evaluation.predictions import Prediction
from mechinterp.features.basis import Basis
from mechinterp.features.load import load_bases
from mechinterp.graphs.circuit import Circuit, on_paths
from mechinterp.graphs.scores import Scores
from mechinterp.graphs.select import select
from mechinterp.models.direction_readout import DirectionReadout
from mechinterp.models.hook_manager import HookManager, load_model
from mechinterp.models.placement import parse_device
from mechinterp.tasks.pair_files import MAX_BYTES
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.task import Task, load_task


def verify(
    path: str | Path,
    *,
    model: Any = None,
    tolerance: float | None = None,
    rescore: bool = False,
    device: torch.device | str | None = None,
    batch_size: int = 32,
    features: Sequence[Basis | str | Path] = (),
    direction: GivenDirection = None,
    progress: StageProgress = no_stages,
) -> Verification:
    """Which claims of a circuit file hold: hashes, model, tokenizer, task, pairs, scores, selection, every number.

    The evaluation is run again with the circuit in the file. Predictions are measured again: each must hold, and none
    of its negative controls may satisfy it. Other library versions are notes, not failures. `warnings` say what could
    mislead although every claim holds, and `extent` what was recomputed, only hash-checked, or is free text.

    Args:
        path: the circuit file, or the name of a stored circuit.
        model: anything that `load_model` takes. None: loaded as the file states. Required if the file's model was in
            memory only.
        tolerance: relative tolerance for numbers (a tenth of it is absolute). None: the tolerance in the file.
        rescore: also run the discovery again and compare all scores.
        device: where to load the model.
        batch_size: pairs run at once; it does not change the result.
        features: the dictionaries of feature nodes, or where they are. By default they are where the file says.
        direction: the direction that the circuit explains, or its file. By default it is where the file says.
        progress: called with a stage, the steps done and the total.

    Raises:
        FormatError: if the file is not a circuit file at all.
        UnverifiedModel: (a ModelNotAvailable) if all claims that need no model hold, but the model (or a dictionary, as
            the hub is not reached) cannot be loaded.
    """
    opened = open_circuit_file(find_file(path))
    document, ledger = opened.document, Ledger()
    if tolerance is not None and not 0 < tolerance < 1:
        raise InputError(f"tolerance must be between 0 and 1; got {tolerance!r}.")
    progress("file", 0, 1)
    _check_hashes(opened, ledger)
    circuit = _check_circuit(opened, ledger)
    _check_discovery(document, ledger)
    scores = None if circuit is None else circuit.scores
    if circuit is not None:
        check_given_bases(circuit, features)
    progress("model", 0, 1)
    loaded = whole = _loaded(opened, model, device, ledger)
    if loaded is not None:
        _check_model(document, named_model(document, loaded), model is not None, ledger)
        loaded = _reading(opened, loaded, direction, ledger)
    if loaded is not None and circuit is not None and circuit.graph.features:
        circuit = _with_bases(opened, circuit, loaded, features, ledger)
        scores = None if circuit is None else circuit.scores
    pairs = _check_pairs(opened, whole, ledger)
    limit = None if tolerance is None else Tolerance(relative=tolerance, absolute=tolerance / 10)
    if loaded is not None and circuit is not None and loaded.dims == circuit.graph.dims:
        if document.performance is not None:
            progress("task", 0, 1)
            check_task_performance(document, document.performance, loaded, pairs, limit, batch_size, ledger)
        for number in range(len(document.evaluation)):
            told = partial(progress, "evaluation")
            _check_evaluation(document, number, loaded, circuit, pairs, limit, batch_size, told, ledger)
        if document.curve is not None and scores is not None:
            told = partial(progress, "curve")
            check_curve(document, document.curve, loaded, scores, pairs, limit, batch_size, told, ledger)
        if rescore and scores is not None:
            check_scores_again(document, loaded, circuit, scores, pairs, limit, batch_size, progress, ledger)
    elif document.evaluation:
        ledger.failed("evaluation", "not run: it needs the model and the circuit that the file states")
    if loaded is not None and document.predictions:
        progress("predictions", 0, 1)
        _check_predictions(document, loaded, pairs, limit, batch_size, ledger)
    _note_versions(document, ledger)
    return _found(opened, pairs, rescore, ledger)


def _found(opened: OpenedFile, pairs: dict[str, Pairs], rescored: bool, ledger: Ledger) -> Verification:
    """The result: claims, notes, warnings, and how much of the file was checked."""
    document = opened.document
    notes, shared = compare_with_discovery(document, pairs)
    of_task, foreign = compare_with_task(document, pairs)
    stated = stated_warnings(document, distinct_prompts(pairs), rescored=rescored)
    compared = {claim.name for claim in ledger.claims if claim.ok or claim.got}
    extent = extent_of(document, compared | of_task)
    claims = tuple(ledger.claims)
    return Verification(opened.path, claims, (*ledger.notes, *notes), (*stated, *shared, *foreign), extent)


def _check_hashes(opened: OpenedFile, ledger: Ledger) -> None:
    stated = opened.document.integrity
    changed = "the file was changed after it was written"
    ledger.equal("file hash", opened.file_sha256, stated.file_sha256, changed)
    ledger.equal("circuit hash", circuit_sha256(opened.document), stated.circuit_sha256, changed)


def _check_circuit(opened: OpenedFile, ledger: Ledger) -> Circuit | None:
    """The circuit in the file with its scores, or None with a failed claim. Scores that fail a check are left out."""
    document, path = opened.document, opened.path
    graph = ledger.attempt("graph", lambda: stated_graph(document, path))
    if graph is None:
        return None
    ledger.equal("graph", graph.digest(), document.graph.sha256)
    scores = ledger.attempt("sidecar", lambda: stated_scores(document, graph, path))
    circuit = ledger.attempt("edges", lambda: stated_circuit(document, graph, scores, path))
    if circuit is not None:
        if scores is not None:
            _check_scores(document, scores, ledger)
        _check_selection(circuit, document, ledger)
        check_stability(document, circuit, ledger)
        if document.status == "published":
            _check_published(circuit, document, ledger)
    return circuit


def _check_scores(document: CircuitFile, scores: Scores, ledger: Ledger) -> None:
    table, graph = score_table(scores), scores.graph
    stated = {edge.name: edge.score for edge in document.edges}
    found = {name: six_digits(float(table[graph.edge_index(name)])) for name in stated}
    wrong = [name for name in stated if stated[name] != found[name]]
    expected = "the sidecar's scores" if not wrong else f"{wrong[0]} = {found[wrong[0]]}"
    got = "the sidecar's scores" if not wrong else f"{stated[wrong[0]]}"
    ledger.equal("scores of the edges", got, expected, f"{len(wrong)} of {len(stated)} edges differ from the sidecar")


def _check_selection(circuit: Circuit, document: CircuitFile, ledger: Ledger) -> None:
    """Record whether the rule, applied to the scores in the sidecar, gives exactly these edges."""
    ledger.equal("nodes", document.nodes, circuit.nodes)
    parameters: dict[str, Any] = dict(circuit.selection)
    if circuit.scores is not None and refined(document):
        check_refinement(document, circuit, ledger)
    if circuit.scores is None or not applies_again(document):  # a warning says so
        return
    with ledger.claimed("selection"):
        check_settings("select", SELECTION, parameters)
        again = select(circuit.graph, circuit.scores, **parameters)
        differ = sorted(set(again.edges) ^ set(circuit.edges))
        detail = f"{len(differ)} edges differ, first {differ[0]}" if differ else ""
        ledger.equal("selection", _n_of(circuit.edges, differ), _n_of(again.edges, ()), detail)
        ledger.equal("selection.n_selected", document.selection.n_selected, again.n_selected)


def _check_published(circuit: Circuit, document: CircuitFile, ledger: Ledger) -> None:
    """Record whether every edge is on a path and, if nodes were chosen, whether no edge out of one is missing."""
    graph, kept = circuit.graph, circuit.kept
    chosen = kept
    if graph.level == "node":
        chosen = graph.possible & torch.isin(graph.unit, graph.unit[kept].unique())
    differ = (on_paths(graph, chosen) != kept).nonzero().tolist()
    names = sorted(graph.edge_name(r, w) for r, w in differ)
    ledger.equal("paths", f"{len(names)} edges differ", "0 edges differ", f"first {names[0]}" if names else "")
    if graph.level == "edge":
        ledger.equal("selection.n_selected", document.selection.n_selected, int(chosen.sum()))


def _n_of(edges: tuple[str, ...], differ: list[str] | tuple[()]) -> str:
    return f"{len(edges)} edges" + (f" ({', '.join(differ[:3])})" if differ else "")


def _check_discovery(document: CircuitFile, ledger: Ledger) -> None:
    """Record whether method, parameters and metric are known, and whether repeated statements agree."""
    size, curve = document.selection.size, document.curve
    if size is not None and curve is not None:
        ledger.equal("selection.size.pairs", size.pairs, curve.pairs, "the size was chosen on the pairs of the curve")
    stated = document.discovery
    if stated is None:
        return
    with ledger.claimed("discovery.method"):
        method = METHODS.get(stated.method)
        ledger.equal("discovery.method", stated.method, method.name)
        foreign = sorted(set(stated.parameters) - set(method.settings) - {f"{BOOTSTRAP}{name}" for name in STABLE})
        ledger.equal("discovery.parameters", foreign, [], f"method {method.name!r} has no such parameter")
    with ledger.claimed("discovery.metric"):
        ledger.equal("discovery.metric", stated.metric, metric_record(stated.metric.name))
    if "replacement" in stated.parameters:
        ledger.equal("discovery.replacement", stated.replacement, stated.parameters["replacement"])
    if stated.pairs is not None:
        n = document.pairs[stated.pairs].n
        ledger.equal("discovery.n_examples", stated.n_examples, n, f"there are {n} pairs {stated.pairs!r}")


def _loaded(opened: OpenedFile, model: Any, device: torch.device | str | None, ledger: Ledger) -> HookManager | None:
    """The model, or None with a failed claim. Raises UnverifiedModel if it is unavailable and no claim failed."""
    document, device = opened.document, parse_device(device)
    try:
        return load_stated_model(document, opened.path, model, device)
    except MechInterpError as error:
        if model is not None:  # not a claim of the file
            raise
        elsewhere = document.model.origin in ("hub", "file", "memory") or document.status == "published"
        if isinstance(error, ModelNotAvailable) and elsewhere and all(claim.ok for claim in ledger.claims):
            found = f"{opened.path}: the {len(ledger.claims)} claims that need no model hold, the others are unchecked"
            give = {"memory": "; give it: --model PATH, or verify(model=...)", "file": "; give the file: --model PATH"}
            found += f": model not available offline ({document.model.name}){give.get(document.model.origin, '')}."
            raise UnverifiedModel(found, _found(opened, {}, False, ledger)) from error
        ledger.failed("model", str(error))
        return None


def _reading(opened: OpenedFile, model: HookManager, given: GivenDirection, ledger: Ledger) -> HookManager | None:
    """The model with the direction that the file names in place of the logits; None with a failed claim."""
    try:
        reading = as_stated(opened.document, opened.path, model, given)
    except FormatError as error:
        ledger.failed(READOUT, str(error))
        return None
    except InputError as error:
        if opened.document.readout is None:
            raise
        ledger.failed(READOUT, str(error))
        return None
    if isinstance(reading, DirectionReadout) and opened.document.readout is not None:
        ledger.equal(READOUT, reading.direction_sha256, opened.document.readout.direction_sha256)
    return reading


def _with_bases(
    opened: OpenedFile,
    circuit: Circuit,
    model: HookManager,
    given: Sequence[Basis | str | Path],
    ledger: Ledger,
) -> Circuit | None:
    """The circuit with the feature bases that the file states; None if one of them failed its claim.

    Raises UnverifiedModel if no claim failed, but the hub cannot be reached.
    """
    found: list[Basis] = []
    loaded = [basis for one in given for basis in (load_bases(one) if isinstance(one, (str, Path)) else [one])]
    for record in opened.document.graph.features or ():
        name = basis_claim(record)
        try:
            basis = stated_basis(record, opened.path, loaded)
        except HubNotReached as error:
            if all(claim.ok for claim in ledger.claims):
                n = len(ledger.claims)
                text = f"{opened.path}: {n} claims hold, the others are unchecked: {error}"
                raise UnverifiedModel(text, _found(opened, {}, False, ledger)) from error
            ledger.failed(name, str(error))
            continue
        except MechInterpError as error:
            ledger.failed(name, str(error))
            continue
        ledger.equal(name, basis.sha256, record.sha256)
        found.append(basis.to(model.device))
    with ledger.claimed("features"):
        if len(found) == len(circuit.graph.features):
            graph = circuit.graph.with_bases(found)
            for family in graph.features:
                family.check(model)
            return circuit.on_graph(graph)
    return None


def load_stated_model(document: CircuitFile, path: Path, model: Any, device: torch.device | str | None) -> HookManager:
    """The model that a file names, or `model` instead of it (in the dtype of the file, if given by name)."""
    stated = document.model
    if model is not None:
        named = isinstance(model, (str, Path))
        return load_model(model, dtype=stated.dtype if named else None, device=device if named else None)
    if stated.origin == "memory":
        raise ModelNotAvailable(
            f"The model ({clip(stated.name, 200)}) was in memory only and cannot be loaded by name; save it with "
            "save_pretrained and give the folder: --model PATH, or give it in Python: verify(model=...)."
        )
    name = stated.name
    there = {"directory": is_folder, "file": is_file}.get(stated.origin)
    if there is not None and not there(name) and there(path.parent / name):
        name = str(path.parent / name)
    if stated.origin == "file" and stated.file is not None and not is_file(name):
        raise ModelNotAvailable(
            f"The model's file {clip(name, 200)!r} (sha256 {stated.file.sha256[:12]}...) is neither here nor beside "
            "the circuit file; give it with --model, or verify(model=...)."
        )
    revision = stated.revision if stated.origin == "hub" else None
    return load_model(name, revision=revision, dtype=stated.dtype, device=device)


def _check_model(document: CircuitFile, model: HookManager, given: bool, ledger: Ledger) -> None:
    """Record a claim for each part of the model and its tokenizer, and (unless it was given) for its origin."""
    stated, got = document.model, model_record(model)
    for name in ("architecture", "dims", "weights_sha256", "processing", "dtype", "attention", "loader"):
        if name != "weights_sha256" or stated.weights_sha256 is not None:
            ledger.equal(f"model.{name}", getattr(got, name), getattr(stated, name))
    if stated.file is not None and got.file is not None:  # not for a folder with the same weights
        ledger.equal("model.file", got.file.sha256, stated.file.sha256)
    if not given:
        ledger.equal("model.origin", got.origin, stated.origin)
        ledger.equal("model.revision", got.revision, stated.revision)
    tokenizer = document.tokenizer
    if tokenizer is None:
        return
    found = tokenizer_record(model.tokenizer, tokenizer.prepend_bos)
    if found is None and not any(entry.made_from.kind == "task" for entry in document.pairs.values()):
        ledger.notes.append("The model has no tokenizer; the pairs are token ids, so none is needed.")
        return
    ledger.equal("tokenizer", found and found.vocabulary_sha256, tokenizer.vocabulary_sha256)
    ledger.equal("tokenizer.n_tokens", found and found.n_tokens, tokenizer.n_tokens)
    begins = {entry.made_from.prepend_bos for entry in document.pairs.values() if entry.made_from.kind == "task"}
    if begins:  # the pairs are made again in `_check_pairs`; here the file must agree with itself
        got = tokenizer.prepend_bos if tokenizer.prepend_bos in begins else next(iter(begins))
        ledger.equal("tokenizer.prepend_bos", got, tokenizer.prepend_bos)


def _check_pairs(opened: OpenedFile, model: HookManager | None, ledger: Ledger) -> dict[str, Pairs]:
    """The pairs that the file states, made again; a set that differs from what is stated is left out."""
    task = _check_task(opened, ledger)
    made: dict[str, Pairs] = {}
    for name, record in opened.document.pairs.items():
        if model is None and isinstance(record.made_from, TaskPairs):
            ledger.failed(f"pairs.{name}", "not made: the model's tokenizer is needed")
            continue
        with ledger.claimed(f"pairs.{name}"):
            pairs = pairs_of(record, task, model)
            if ledger.equal(f"pairs.{name}", pairs.digest(), record.sha256) and len(pairs) == record.n:
                made[name] = pairs
            ledger.equal(f"pairs.{name}.n", len(pairs), record.n)
    return made


def _check_task(opened: OpenedFile, ledger: Ledger) -> Task | None:
    record = opened.document.task
    task = None
    if isinstance(record, TaskRecord):
        with ledger.claimed("task"):
            task = task_of(record)
            ledger.equal("task", task.digest(), record.sha256, f"task {record.name!r} was changed")
            for name in ("version", "title", "source"):
                ledger.equal(f"task.{name}", getattr(task, name), getattr(record, name))
    if record is None or record.kind == "tokens" or record.path is None:
        return task
    name = Path(record.path).name
    beside = opened.path.parent / name  # only there: an untrusted file must not choose which files are opened
    if name in ("", "..") or not is_file(beside):
        ledger.notes.append(f"{clip(name, 100)} is not beside the circuit file; the copy in that file was used.")
        return task
    with ledger.claimed("task file"):
        found = inside(opened.path, beside)
        if isinstance(record, TaskRecord):
            same = load_task(found).digest() == record.sha256
        else:
            same = hashlib.sha256(read_bounded(found, MAX_BYTES)).hexdigest() == record.sha256
        ledger.holds("task file", same, "the file that was used", "that" if same else f"{beside} was changed")
    return task


def _check_evaluation(
    document: CircuitFile,
    number: int,
    model: HookManager,
    circuit: Circuit,
    pairs: dict[str, Pairs],
    limit: Tolerance | None,
    batch_size: int,
    progress: Progress,
    ledger: Ledger,
) -> None:
    stated = document.evaluation[number]
    name = evaluation_name(document, number)
    absent = [key for key in (stated.pairs, stated.reference) if key is not None and key not in pairs]
    if absent:
        ledger.failed(name, f"not run: the pairs {absent[0]!r} are not what the file states")
        return
    with ledger.claimed(name):
        limit = stated_limit(stated.tolerance, document.model.dtype, limit, name, ledger)
        kind = stated.ablation.value
        ledger.equal(f"{name}.ablation", stated.ablation.model_dump(), asdict(ablation_of(circuit.graph, kind)))
        result = evaluate(
            model,
            circuit,
            pairs[stated.pairs],
            metric=stated.metric.name,
            replacement=kind,
            reference=None if stated.reference is None else pairs[stated.reference],
            n_random=len(stated.random_faithfulness),
            seed=stated.seed,
            batch_size=batch_size,
            progress=progress,
        )
        got = evaluation_record(result, stated.pairs, stated.reference, document.model.dtype)
        ledger.equal(f"{name}.metric", got.metric, stated.metric)
        for field in EVALUATION_COUNTS:
            ledger.equal(f"{name}.{field}", getattr(got, field), getattr(stated, field))
        for field in EVALUATION_NUMBERS:
            ledger.close(f"{name}.{field}", getattr(got, field), getattr(stated, field), limit)


def _check_predictions(
    document: CircuitFile,
    model: HookManager,
    pairs: dict[str, Pairs],
    limit: Tolerance | None,
    batch_size: int,
    ledger: Ledger,
) -> None:
    """Record a claim for every prediction, every control, and every stated measurement."""
    limit = limit or tolerance_for(document.model.dtype)
    by_pairs: dict[str | None, list[Prediction]] = {}
    for prediction in document.predictions or ():
        by_pairs.setdefault(prediction.pairs, []).append(prediction)
    for name, several in by_pairs.items():
        if name is not None and name not in pairs:
            ledger.failed(f"predictions on {name}", "not run: these pairs are not what the file states")
            continue
        own = None if name is None else pairs[name]
        try:
            together = check_predictions(model, several, own, batch_size=batch_size)
        except MechInterpError:  # one by one, to find out which of them fails
            together = ()
            for prediction in several:
                with ledger.claimed(f"prediction {prediction.name}"):
                    together = (*together, *check_predictions(model, [prediction], own, batch_size=batch_size))
        for found in together:
            _record_prediction(found, limit, ledger)


def _record_prediction(found: Checked, limit: Tolerance, ledger: Ledger) -> None:
    stated = found.prediction
    claim = f"prediction {stated.name}"
    ledger.holds(claim, stated.holds(found.value), f"{stated!r}", f"{found.value:.6g}")
    _agrees(claim, found.value, stated.measured, limit, ledger)
    for control, value in zip(stated.controls, found.controls, strict=True):
        claim = f"control of {stated.name}"
        side = "<" if stated.relation == ">=" else ">"
        ledger.holds(claim, stated.refuted(value), f"{control.measure} {side} {stated.value:g}", f"{value:.6g}")
        _agrees(claim, value, control.measured, limit, ledger)


def _agrees(claim: str, got: float, stated: float | None, limit: Tolerance, ledger: Ledger) -> None:
    if stated is not None:
        ledger.close(f"{claim}, measured", six_digits(got), stated, limit)


def _note_versions(document: CircuitFile, ledger: Ledger) -> None:
    stated, here = document.provenance.versions, versions()
    for name in sorted(set(stated) | set(here)) if stated else ():  # no versions are stated if nothing was run
        if stated.get(name) != here.get(name):
            ledger.notes.append(f"{name} is {here.get(name, 'absent')} here, was {stated.get(name, 'absent')}.")
