"""`reevaluate`: a circuit file evaluated on held-out pairs of its own task or of another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from mechinterp.analysis.directions import Direction
from mechinterp.base.errors import InputError, MechInterpError
from mechinterp.base.progress import StageProgress, no_stages
from mechinterp.circuit_file.bases import check_given_bases, stated_bases
from mechinterp.circuit_file.circuit_file import circuit_of
from mechinterp.circuit_file.named_files import find_file
from mechinterp.circuit_file.readouts import GivenDirection, as_stated, named_model, prompts_of, stated_direction_of
from mechinterp.circuit_file.records import pairs_of, task_of
from mechinterp.circuit_file.schema import CircuitFile, FileTaskRecord, TaskRecord
from mechinterp.circuit_file.store import open_circuit_file
from mechinterp.circuit_file.verify.verification import load_stated_model
from mechinterp.evaluation.against_random import necessity_test, sufficiency_test
from mechinterp.evaluation.completeness import completeness
from mechinterp.evaluation.faithfulness import Evaluation, evaluate
from mechinterp.evaluation.hypotheses import HypothesisTest, equivalence_test, independence_test
from mechinterp.evaluation.minimality import node_minimality
from mechinterp.features.basis import Basis
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.pair_files import load_pairs
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.source import FileSource
from mechinterp.tasks.task import load_task


@dataclass(frozen=True)
class Reevaluation:
    """A circuit evaluated on the pairs of `on`.

    `tests` has a row for completeness and one for each hypothesis test, `nodes` the metric after each node is removed
    from the circuit; both are None unless tests were asked for.
    """

    circuit: Circuit
    evaluation: Evaluation
    on: str
    notes: tuple[str, ...]
    tests: pd.DataFrame | None = None
    nodes: pd.DataFrame | None = None

    def to_frame(self) -> pd.DataFrame:
        """A tidy table: quantity, value."""
        e = self.evaluation
        low, high = e.faithfulness_ci
        rows: list[tuple[str, object]] = [
            ("faithfulness", f"{e.faithfulness:.3f} [{low:.3f}, {high:.3f}]"),
            ("per example, quartiles", " ".join(f"{value:.3f}" for value in e.example_quartiles)),
            (f"{e.metric}: circuit", f"{e.circuit_value:.4g}"),
            (f"{e.metric}: full model", f"{e.full_value:.4g}"),
            (f"{e.metric}: empty circuit", f"{e.empty_value:.4g}"),
            ("KL(full || circuit), nats", f"{e.kl:.4g}"),
        ]
        if e.accuracy is not None and e.accuracy_full is not None:
            rows.append(("accuracy: circuit, full model", f"{e.accuracy:.1%}, {e.accuracy_full:.1%}"))
        if e.random_faithfulness:
            rows.append(("random circuits of this size", " ".join(f"{value:.3f}" for value in e.random_faithfulness)))
        rows.append(("examples", str(e.n_examples)))
        rows.append(("ablation", f"{e.ablation.component} -> {e.ablation.value}; positions: {e.ablation.positions}"))
        return pd.DataFrame(rows, columns=["quantity", "value"])


def reevaluate(
    file: str | Path,
    *,
    task: str | None = None,
    model: Any = None,
    metric: str | None = None,
    replacement: str | None = None,
    tests: bool = False,
    examples: int = 200,
    seed: int = 0,
    device: str | None = None,
    batch_size: int = 32,
    features: Sequence[Basis | str | Path] = (),
    direction: GivenDirection = None,
    progress: StageProgress = no_stages,
) -> Reevaluation:
    """The evaluation of a circuit file on held-out pairs; its hashes are checked first.

    If `task` is the very file of pairs that the circuit was found on, only the pairs of its evaluation are used. Cost:
    see `evaluate`; the tests take about 300 more forwards per batch.

    Args:
        file: the circuit file, or the name of a stored circuit.
        task: the name of a task, a task file, or a file of pairs (.jsonl, .csv). None: the task of the file.
        model: anything that `load_model` takes. None: the model that the file names. A model with other weights but
            the same dimensions is allowed, and noted.
        metric: by default that of the task, or of the file's evaluation on its own task.
        replacement: by default that of the file's evaluation.
        tests: also run completeness, minimality and the hypothesis tests.
        examples: the number of pairs.
        seed: seed of the pairs, the bootstrap and the random circuits.
        device: where to load the model.
        batch_size: pairs run at once; it does not change the result.
        features: the dictionaries of feature nodes, or where they are. By default they are where the file says.
        direction: the direction that the circuit explains, or its file. By default it is where the file says.
        progress: called with a stage, the steps done and the total.

    Raises:
        FormatError: if the file is not a circuit file or was changed after it was written, or a dictionary was.
        ModelNotAvailable: if the model cannot be loaded and none is given.
    """
    opened = open_circuit_file(find_file(file))
    document, circuit = opened.document, circuit_of(opened)
    check_given_bases(circuit, features)
    progress("model", 0, 1)
    manager = load_stated_model(document, opened.path, model, device)
    progress("model", 1, 1)
    if circuit.graph.features:
        found = stated_bases(document, opened.path, features or True)
        circuit = circuit.on_graph(circuit.graph.with_bases(basis.to(manager.device) for basis in found))
    notes: list[str] = []
    if document.model.weights_sha256 is None:
        notes.append(f"the file does not state the weights of {document.model.name}; they were not compared.")
    elif named_model(document, manager).info.weights_sha256() != document.model.weights_sha256:
        notes.append(f"the weights of {manager.info.name} are not those of the file's model ({document.model.name}).")
    whole = named_model(document, manager)
    manager = as_stated(document, opened.path, whole, direction)
    read = None
    if document.readout is not None:
        read = stated_direction_of(document.readout, opened.path, direction)
    on, pairs, default = _pairs(document, task, whole, examples, seed, read)
    if len(pairs) < examples:
        notes.append(f"{on} has {len(pairs)} pairs, all of which were taken; {examples} were asked for.")
    stated = document.evaluation[0].ablation.value if document.evaluation else "corrupt"
    shared: dict[str, Any] = {
        "metric": metric or default,
        "replacement": replacement or stated,
        "batch_size": batch_size,
    }
    found = evaluate(manager, circuit, pairs, seed=seed, **shared, progress=partial(progress, "evaluation"))
    if not tests:
        return Reevaluation(circuit, found, on, tuple(notes))
    frame, nodes = _tests(manager, circuit, pairs, seed, shared, progress)
    return Reevaluation(circuit, found, on, tuple(notes), frame, nodes)


def _tests(
    model: HookManager, circuit: Circuit, pairs: Pairs, seed: int, shared: dict[str, Any], progress: StageProgress
) -> tuple[pd.DataFrame, pd.DataFrame]:
    complete = completeness(model, circuit, pairs, seed=seed, **shared, progress=partial(progress, "completeness"))
    nodes = node_minimality(model, circuit, pairs, **shared, progress=partial(progress, "minimality"))
    worst = complete.worst
    knocked = f"the worst of {len(complete.sets)} knock-outs; 0 if the circuit were complete"
    rows: list[tuple[str, str, str]] = [("incompleteness", f"{worst.incompleteness:.3g}", knocked)]
    kinds: list[tuple[str, Callable[..., HypothesisTest]]] = [
        ("equivalence", equivalence_test),
        ("independence", partial(independence_test, seed=seed)),
    ]
    kinds.append(("sufficiency", partial(sufficiency_test, seed=seed)))
    # Against random circuits of other edges: on a small graph, cutting almost any random circuit is destructive.
    kinds.append(("partial necessity", partial(necessity_test, seed=seed, drawn_from="complement")))
    for name, test in kinds:
        try:
            result = test(model, circuit, pairs, **shared, progress=partial(progress, name))
        except MechInterpError as error:  # a test that does not apply must not stop the others
            rows.append((name, "not run", str(error)))
            continue
        rows.append((name, f"p {result.p_value:.2g}", result.verdict))
    table = nodes.to_frame().filter(["name", "edges", "after", "change", "share"])
    return pd.DataFrame(rows, columns=["test", "result", "verdict"]), table


def _pairs(
    document: CircuitFile, task: str | None, model: HookManager, n: int, seed: int, read: Direction | None
) -> tuple[str, Pairs, str]:
    """(What the pairs are of, the pairs, the metric); as they are read for a direction, if the circuit is of one."""
    if task is None and not isinstance(document.task, TaskRecord) and document.evaluation:
        name = document.evaluation[0].pairs  # as they were when it was found, so the classes are where they belong
        own = pairs_of(document.pairs[name], None, model)[:n]
        return f"the file's pairs {name!r}", own, document.evaluation[0].metric.name
    if task is not None and _found_on(document, task, model):
        return _pairs(document, None, model, n, seed, read)
    on, pairs, metric = _new_pairs(document, task, model, n, seed)
    return (on, pairs, metric) if read is None else (on, prompts_of(read, pairs), "direction")


def _found_on(document: CircuitFile, task: str, model: HookManager) -> bool:
    """Whether this is the very file of pairs that the circuit was found on."""
    if Path(task).suffix.lower() not in (".jsonl", ".csv") or not isinstance(document.task, FileTaskRecord):
        return False
    source = load_pairs(task, model).source
    return isinstance(source, FileSource) and source.sha256 == document.task.sha256


def _new_pairs(
    document: CircuitFile, task: str | None, model: HookManager, n: int, seed: int
) -> tuple[str, Pairs, str]:
    """Pairs of the file's task, or of another one."""
    if task is None:
        metric = document.evaluation[0].metric.name if document.evaluation else "logit_diff"
        if isinstance(document.task, TaskRecord):
            own = task_of(document.task)
            bos = document.tokenizer and document.tokenizer.prepend_bos  # as in the pairs that the file is about
            return own.name, own.pairs(model, n=n, split="test", seed=seed, prepend_bos=bos), metric
        raise InputError("The file has no task and no evaluation; say what to evaluate it on: --task.")
    if Path(task).suffix.lower() in (".jsonl", ".csv"):
        pairs = load_pairs(task, model)[:n]
        answered = pairs.right is not None and pairs.wrong is not None
        return task, pairs, "logit_diff" if answered else "kl_to_clean"
    other = load_task(task)
    return other.name, other.pairs(model, n=n, split="test", seed=seed), other.metric
