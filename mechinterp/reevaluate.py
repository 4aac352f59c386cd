"""`discover-circuit eval`: a circuit file on held-out pairs of its own task or of another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from mechinterp.circuit import Circuit
from mechinterp.errors import InputError
from mechinterp.evaluation.against_random import necessity_test, sufficiency_test
from mechinterp.evaluation.completeness import completeness
from mechinterp.evaluation.faithfulness import Evaluation, evaluate
from mechinterp.evaluation.hypotheses import HypothesisTest, equivalence_test, independence_test
from mechinterp.evaluation.minimality import node_minimality
from mechinterp.files.circuit_file import load_circuit
from mechinterp.files.records import pairs_of, task_of
from mechinterp.files.schema import CircuitFile
from mechinterp.files.schema_parts import TaskRecord
from mechinterp.files.store import check_hashes, open_circuit_file
from mechinterp.files.verification import load_stated_model
from mechinterp.hooks import HookManager
from mechinterp.tasks.files import load_pairs
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.task import load_task

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reevaluation:
    """A circuit on some pairs. `tests` has a row per hypothesis test, `nodes` one per node; None when not asked for."""

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
    replacement: str = "corrupt",
    tests: bool = False,
    examples: int = 200,
    seed: int = 0,
    device: str | None = None,
    batch_size: int = 32,
    progress: Progress = lambda stage, done, total: None,
) -> Reevaluation:
    """The circuit of a file on held-out pairs of `task` (a task, a task file, a file of pairs; default: its own task).

    The file's hashes are checked first. A model with other weights than the file's is allowed when its dimensions are
    the same, and noted. Cost: see `evaluate`; the tests take about 300 forwards more.
    """
    opened = open_circuit_file(file)
    check_hashes(opened)
    document, circuit = opened.document, load_circuit(file)
    progress("model", 0, 1)
    manager = load_stated_model(document, opened.path, model, device)
    progress("model", 1, 1)
    notes: list[str] = []
    if document.model.weights_sha256 is None:
        notes.append(f"the file does not state the weights of {document.model.name}; they were not compared.")
    elif manager.info.weights_sha256() != document.model.weights_sha256:
        notes.append(f"the weights of {manager.info.name} are not those of the file's model ({document.model.name}).")
    on, pairs, default = _pairs(document, task, manager, examples, seed)
    chosen = metric or default
    shared: dict[str, Any] = {"metric": chosen, "replacement": replacement, "batch_size": batch_size}
    found = evaluate(manager, circuit, pairs, seed=seed, **shared, progress=partial(progress, "evaluation"))
    if not tests:
        return Reevaluation(circuit, found, on, tuple(notes))
    frame, nodes = _tests(manager, circuit, pairs, seed, shared, progress)
    return Reevaluation(circuit, found, on, tuple(notes), frame, nodes)


def _tests(
    model: HookManager, circuit: Circuit, pairs: Pairs, seed: int, shared: dict[str, Any], progress: Progress
) -> tuple[pd.DataFrame, pd.DataFrame]:
    complete = completeness(model, circuit, pairs, seed=seed, **shared, progress=partial(progress, "completeness"))
    nodes = node_minimality(model, circuit, pairs, **shared, progress=partial(progress, "minimality"))
    rows: list[tuple[str, str, str, str]] = [
        ("completeness", f"worst of {len(complete.sets)} knock-outs", f"{complete.worst.incompleteness:.3g}", "")
    ]
    kinds: list[tuple[str, Callable[..., HypothesisTest]]] = [
        ("equivalence", equivalence_test),
        ("independence", partial(independence_test, seed=seed)),
    ]
    if not circuit.graph.positions:  # random circuits have no positions
        kinds.append(("sufficiency", partial(sufficiency_test, seed=seed)))
        kinds.append(("partial necessity", partial(necessity_test, seed=seed)))
    for name, test in kinds:
        result = test(model, circuit, pairs, **shared, progress=partial(progress, name))
        rows.append((name, result.null, f"p = {result.p_value:.3g}", result.verdict))
    return pd.DataFrame(rows, columns=["test", "null hypothesis", "result", "verdict"]), nodes.to_frame()


def _pairs(document: CircuitFile, task: str | None, model: HookManager, n: int, seed: int) -> tuple[str, Pairs, str]:
    """What the pairs are of, the pairs, and the metric."""
    if task is None:
        metric = document.evaluation[0].metric.name if document.evaluation else "logit_diff"
        if isinstance(document.task, TaskRecord):
            own = task_of(document.task)
            return own.name, own.pairs(model, n=n, split="test", seed=seed), metric
        if not document.evaluation:
            raise InputError("The file names no task and no evaluation; say on what to evaluate: --task.")
        name = document.evaluation[0].pairs
        return f"the file's pairs {name!r}", pairs_of(document.pairs[name], None, model)[:n], metric
    if Path(task).suffix.lower() in (".jsonl", ".csv"):
        pairs = load_pairs(task, model)[:n]
        answered = pairs.right is not None and pairs.wrong is not None
        return task, pairs, "logit_diff" if answered else "kl_to_clean"
    other = load_task(task)
    return other.name, other.pairs(model, n=n, split="test", seed=seed), other.metric
