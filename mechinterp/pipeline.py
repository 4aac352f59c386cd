"""The main job as one straight line: task, model, pairs, graph, scores, circuit, evaluation, file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mechinterp.base.errors import InputError, MechInterpError
from mechinterp.base.plain_files import is_file, is_folder
from mechinterp.base.progress import StageProgress, no_stages
from mechinterp.base.settings import Parameter, unknown_setting
from mechinterp.circuit_file.circuit_file import save_circuit
from mechinterp.circuit_file.records import task_record
from mechinterp.circuit_file.schema import CircuitFile, FileTaskRecord, TaskRecord
from mechinterp.circuit_file.store import SUFFIX, sidecar_name
from mechinterp.circuit_file.verify.verification import verify as verify
from mechinterp.discovery.method import METHODS, Method, score_edges
from mechinterp.discovery.neurons import top_neurons
from mechinterp.evaluation.faithfulness import Evaluation, evaluate
from mechinterp.evaluation.roles import MeasuredRoles, measured_roles
from mechinterp.evaluation.sizes import TARGET, Curve, CurvePoint, size_curve, size_grid, smallest_faithful
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import Graph, build_graph
from mechinterp.graphs.select import check_selection, select, sized, unit_count
from mechinterp.models.hook_manager import HookManager, load_model
from mechinterp.run_spec import NEURONS, RunSpec, command_of
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pair_files import load_pairs
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.source import FileSource
from mechinterp.tasks.task import Task, load_task

OWN_OPTIONS = ("replacement", "steps")
"""Parameters of methods that have their own option."""
ROLE_EXAMPLES = 100
"""Train and test pairs on which roles are measured."""


@dataclass(frozen=True)
class Discovery:
    """The result of a run. `curve` is faithfulness against size on the train pairs."""

    circuit: Circuit
    evaluation: Evaluation
    curve: tuple[CurvePoint, ...]
    model: HookManager
    task: TaskRecord | FileTaskRecord
    train: Pairs
    test: Pairs
    path: Path
    document: CircuitFile
    roles: MeasuredRoles | None = None
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""


def discover(spec: RunSpec, progress: StageProgress = no_stages) -> Discovery:
    """The circuit of a task in a model, evaluated on held-out pairs, and its file, which is written.

    Args:
        spec: The task, the model, the method and all other options of the run.
        progress: Called as `progress(stage, done, total)`.

    Cost: that of the method, the curve over sizes on the train pairs, the evaluation and, by default, the
    roles. A killed run resumes from its last saved scores.

    Raises:
        InputError: If the spec is invalid; nothing is written then.
    """
    settings = _settings(spec)
    path = output_path(spec)
    progress("model", 0, 1)
    model = load_model(spec.model, revision=spec.revision, dtype=spec.dtype, device=spec.device)
    progress("model", 1, 1)
    task, train, test, default_metric = examples_of(spec, model)
    metric = spec.metric or default_metric
    graph = graph_of_run(spec, model, train, metric)
    threshold = spec.threshold
    if spec.edges is None and spec.nodes is None and threshold is None:
        threshold = METHODS.get(spec.method).threshold
    size = _size(spec, graph)
    check_selection(graph, rule=spec.rule, by=spec.by, ratio=spec.ratio, threshold=threshold)
    if spec.restart:
        _forget_unfinished(path)
    scores = score_edges(
        model,
        graph,
        train,
        method=spec.method,
        metric=metric,
        batch_size=spec.batch_size,
        progress=partial(progress, "scores"),
        resume=_state_path(path, spec),
        **settings,
    )
    how: dict[str, Any] = {"rule": spec.rule, "by": spec.by, "ratio": spec.ratio}
    measured: dict[str, Any] = {"metric": metric, "replacement": spec.replacement, "batch_size": spec.batch_size}
    size_given = size is not None or threshold is not None
    scored = max(1, len(graph.unit[scores.values.cpu() != 0].unique()))
    curve = size_curve(model, scores, train, size_grid(scored), **how, **measured, progress=partial(progress, "curve"))
    if not size_given:
        size = smallest_faithful(curve)
    circuit = select(graph, scores, **({} if size is None else sized(graph, size)), threshold=threshold, **how)
    evaluation = evaluate(model, circuit, test, seed=spec.seed, **measured, progress=partial(progress, "evaluation"))
    roles, unmeasured = None, ""
    if spec.roles:
        examples = train[:ROLE_EXAMPLES], test[:ROLE_EXAMPLES]
        try:
            roles = measured_roles(model, circuit, *examples, **measured, progress=partial(progress, "roles"))
        except (MechInterpError, ValueError, ArithmeticError, RuntimeError) as error:  # the circuit is kept
            unmeasured = f"Roles were not measured: {error}"
    document = save_circuit(
        path,
        circuit,
        model=model,
        task=task,
        result=evaluation,
        predictions=roles.predictions if roles else (),
        roles=roles.roles if roles else {},
        curve=Curve(curve, train, metric, spec.replacement, None if size_given else TARGET),
        command=command_of(spec),
    )
    notes = (unmeasured,) if unmeasured else ()
    return Discovery(circuit, evaluation, curve, model, task, train, test, path, document, roles, notes)


def graph_of_run(spec: RunSpec, model: HookManager, train: Pairs, metric: str) -> Graph:
    """The graph to choose from; at level `neuron` with the strongest neurons on the train pairs."""
    named = [] if spec.positions is None else spec.positions.split(",")
    positions = list(train.positions) if named == ["all"] else [name.strip() for name in named]
    if spec.positions is not None and not positions:
        raise InputError(
            "The pairs have no named positions; add `positions` to the task file, or leave --positions out."
        )
    if spec.level != "neuron":
        return build_graph(model, level=spec.level, positions=positions)
    chosen = top_neurons(model, train, spec.neurons or NEURONS, metric=metric, batch_size=spec.batch_size)
    return build_graph(model, level="node", positions=positions, neurons=chosen)


def _size(spec: RunSpec, graph: Graph) -> int | None:
    """The number of edges or nodes to select if one is given, checked before anything slow begins."""
    size = spec.edges if spec.nodes is None else spec.nodes
    if size is None:
        return None
    if spec.nodes is not None and graph.level == "edge":
        raise InputError("`nodes` goes with level 'node' or 'neuron'; give `edges`.")
    return unit_count(graph, int(size) if str(size).isdecimal() else size)


def _state_path(path: Path, spec: RunSpec) -> Path:
    """The file with the state of a long run; every command has its own."""
    key = hashlib.sha256(command_of(spec).encode()).hexdigest()[:8]
    return path.with_name(f".{path.name.removesuffix(SUFFIX)}.{key}.unfinished")


def _forget_unfinished(path: Path) -> None:
    """Delete the states of all unfinished runs that write this file. Raises InputError if one cannot be deleted."""
    name = re.compile(rf"\.{re.escape(path.name.removesuffix(SUFFIX))}\.[0-9a-f]{{8}}\.unfinished")
    for entry in list(path.parent.iterdir()):
        if name.fullmatch(entry.name):
            try:
                entry.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(f"{entry} cannot be deleted: {error.strerror or error}.") from error


def output_path(spec: RunSpec) -> Path:
    """Where the circuit file of a run goes: `OUT/{task}-{model}-{method}.circuit.json`.

    Raises InputError if the folder cannot be made, before anything slow begins.
    """
    given = Path(spec.model)
    if is_folder(given):
        model = given.resolve().name
    elif is_file(given):
        model = given.stem
    else:
        model = spec.model.rpartition("/")[2].replace("@", "-")
    path = spec.out / f"{'-'.join([stem(spec.task), model, spec.method])}{SUFFIX}"
    sidecar_name(path)
    try:
        spec.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot write to {spec.out}: {error.strerror or error}.") from error
    return path


def stem(task: str) -> str:
    return Path(task).stem if Path(task).suffix else task


def _settings(spec: RunSpec) -> dict[str, Any]:
    """The parameters for the method, checked before anything slow begins."""
    method = METHODS.get(spec.method)
    options: dict[str, Any] = {"replacement": spec.replacement, "steps": spec.steps}
    settings = {name: value for name, value in options.items() if value is not None}
    settings |= dict(parsed_setting(setting, method) for setting in spec.settings)
    for name in settings:
        if name not in method.defaults:
            raise InputError(f"Method {spec.method!r} has no parameter {name!r}.")
    if (spec.edges is not None) + (spec.nodes is not None) + (spec.threshold is not None) > 1:
        raise InputError("Give edges, nodes or threshold, but only one of them.")
    if spec.metric is not None:
        get_metric(spec.metric)
    return settings


def parsed_setting(
    setting: str, method: Method, own_options: Sequence[str] = ("replacement", "steps")
) -> tuple[str, Parameter]:
    """`name=value` with the type that the method's default has. Raises InputError for anything else."""
    name, equals, text = setting.partition("=")
    if not equals:
        raise InputError(f"A setting is NAME=VALUE; got {setting!r}.")
    if name in own_options:
        raise InputError(f"{name} has an option of its own: --{name} {text}.")
    if name not in method.settings:
        raise unknown_setting(f"method {method.name!r}", name, method.settings)
    return name, method.settings[name].parse(name, text)


def examples_of(spec: RunSpec, model: HookManager) -> tuple[TaskRecord | FileTaskRecord, Pairs, Pairs, str]:
    """The task's record, train pairs, test pairs and the task's metric."""
    if Path(spec.task).suffix.lower() in (".jsonl", ".csv"):
        return _file_examples(spec, model)
    task: Task = load_task(spec.task)
    train = task.pairs(model, n=spec.examples, split="train", seed=spec.seed, prepend_bos=spec.bos)
    test = task.pairs(model, n=spec.test_examples, split="test", seed=spec.seed, prepend_bos=spec.bos)
    return task_record(task, path=spec.task), train, test, task.metric


def _file_examples(spec: RunSpec, model: HookManager) -> tuple[FileTaskRecord, Pairs, Pairs, str]:
    pairs = load_pairs(spec.task, model, prepend_bos=spec.bos)
    source = pairs.source
    assert isinstance(source, FileSource)
    if len(pairs) < 4:
        raise InputError(f"{spec.task} has {len(pairs)} usable pairs; at least 4 are needed, half of them held out.")
    n_train = min(spec.examples, len(pairs) // 2)
    n_test = min(spec.test_examples, len(pairs) - n_train)
    record = FileTaskRecord(name=stem(spec.task), path=spec.task, sha256=source.sha256)
    metric = "logit_diff" if pairs.right is not None and pairs.wrong is not None else "kl_to_clean"
    return record, pairs[:n_train], pairs[n_train : n_train + n_test], metric
