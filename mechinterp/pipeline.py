"""The main job in one straight line: task, model, pairs, graph, scores, circuit, evaluation, file."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from mechinterp.base.errors import InputError, MechInterpError
from mechinterp.base.plain_files import is_folder
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
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pair_files import load_pairs
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.source import FileSource
from mechinterp.tasks.task import Task, load_task

OWN_OPTIONS = ("replacement", "steps")
"""Parameters of methods that have an option of their own."""
ROLE_EXAMPLES = 100
"""Train and test pairs on which roles are measured."""
NEURONS = 50
"""Neurons that become nodes when nobody says how many."""


@dataclass(frozen=True)
class RunSpec:
    """What to discover. `task` is a task's name, a task YAML, or a file of pairs (.jsonl, .csv).

    Without `edges`, `nodes` and `threshold` the circuit has the smallest size on a log grid whose faithfulness on the
    train pairs reaches 0.9, or is the one that the method chose itself (`cd`). `settings` are further parameters of the
    method, as `name=value`. `level` is `edge`, `node`, or `neuron` (nodes, the `neurons` strongest neurons among them);
    `positions` are names with commas between, or `all`. A file of pairs is cut in two: `examples` for the discovery,
    the next `test_examples` to test. A killed run is taken up again unless `restart`, which deletes the states of all
    unfinished runs that write the same file. `roles` are measured (see `measured_roles`) on `ROLE_EXAMPLES` of either.
    """

    task: str
    model: str = "bundled"
    revision: str | None = None
    method: str = "eap-ig"
    metric: str | None = None
    steps: int | None = None
    level: str = "edge"
    positions: str | None = None
    neurons: int | None = None
    edges: int | str | None = None
    nodes: int | str | None = None
    threshold: float | None = None
    rule: str = "top"
    by: str = "magnitude"
    ratio: float | None = None
    examples: int = 200
    test_examples: int = 200
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    batch_size: int = 32
    replacement: str = "corrupt"
    settings: tuple[str, ...] = ()
    roles: bool = True
    restart: bool = False
    out: Path = Path("out")


@dataclass(frozen=True)
class Discovery:
    """All that a run made. `curve` is the faithfulness against size on the train pairs."""

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
    """What could not be done, and why."""


def discover(spec: RunSpec, progress: StageProgress = no_stages) -> Discovery:
    """Find the circuit of a task in a model, evaluate it on held-out pairs and write its file.

    Raises InputError for what `spec` asks for and cannot be had; nothing is written then.
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
    given = size is not None or threshold is not None
    scored = max(1, len(graph.unit[scores.values.cpu() != 0].unique()))
    curve = size_curve(model, scores, train, size_grid(scored), **how, **measured, progress=partial(progress, "curve"))
    if not given:
        size = smallest_faithful(curve)
    circuit = select(graph, scores, **({} if size is None else sized(graph, size)), threshold=threshold, **how)
    evaluation = evaluate(model, circuit, test, seed=spec.seed, **measured, progress=partial(progress, "evaluation"))
    roles, unmeasured = None, ""
    if spec.roles:
        examples = train[:ROLE_EXAMPLES], test[:ROLE_EXAMPLES]
        try:
            roles = measured_roles(model, circuit, *examples, **measured, progress=partial(progress, "roles"))
        except (MechInterpError, ValueError, ArithmeticError, RuntimeError) as error:  # what was found is kept
            unmeasured = f"Roles were not measured: {error}"
    document = save_circuit(
        path,
        circuit,
        model=model,
        task=task,
        result=evaluation,
        predictions=roles.predictions if roles else (),
        roles=roles.roles if roles else {},
        curve=Curve(curve, train, metric, spec.replacement, None if given else TARGET),
        command=command_of(spec),
    )
    notes = (unmeasured,) if unmeasured else ()
    return Discovery(circuit, evaluation, curve, model, task, train, test, path, document, roles, notes)


def graph_of_run(spec: RunSpec, model: HookManager, train: Pairs, metric: str) -> Graph:
    """The graph of what is to be chosen; the neurons are the strongest on the train pairs."""
    named = [] if spec.positions is None else spec.positions.split(",")
    positions = list(train.positions) if named == ["all"] else [name.strip() for name in named]
    if spec.positions is not None and not positions:
        raise InputError(
            "The pairs name no positions; give them as `positions` in a task file, or leave --positions out."
        )
    if spec.level != "neuron":
        return build_graph(model, level=spec.level, positions=positions)
    chosen = top_neurons(model, train, spec.neurons or NEURONS, metric=metric, batch_size=spec.batch_size)
    return build_graph(model, level="node", positions=positions, neurons=chosen)


def _size(spec: RunSpec, graph: Graph) -> int | None:
    """The number of edges or nodes that was asked for, checked before anything slow begins."""
    size = spec.edges if spec.nodes is None else spec.nodes
    if size is None:
        return None
    if spec.nodes is not None and graph.level == "edge":
        raise InputError("`nodes` goes with level 'node' or 'neuron'; give `edges`.")
    return unit_count(graph, int(size) if str(size).isdecimal() else size)


def _state_path(path: Path, spec: RunSpec) -> Path:
    """Where a long run keeps its state: another file for every other run."""
    key = hashlib.sha256(command_of(spec).encode()).hexdigest()[:8]
    return path.with_name(f".{path.name.removesuffix(SUFFIX)}.{key}.unfinished")


def _forget_unfinished(path: Path) -> None:
    """Return None after deleting the states of all unfinished runs that write this file."""
    name = re.compile(rf"\.{re.escape(path.name.removesuffix(SUFFIX))}\.[0-9a-f]{{8}}\.unfinished")
    for entry in list(path.parent.iterdir()):
        if name.fullmatch(entry.name):
            try:
                entry.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(f"{entry} cannot be deleted: {error.strerror or error}.") from error


def output_path(spec: RunSpec) -> Path:
    """Where the circuit file of a run goes: `OUT/{task}-{model}-{method}.circuit.json`.

    Raises InputError when there can be no such folder, before anything slow is done for it.
    """
    folder = Path(spec.model)
    model = folder.resolve().name if is_folder(folder) else spec.model.rpartition("/")[2].replace("@", "-")
    path = spec.out / f"{'-'.join([stem(spec.task), model, spec.method])}{SUFFIX}"
    sidecar_name(path)
    try:
        spec.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot write to {spec.out}: {error.strerror or error}.") from error
    return path


def command_of(spec: RunSpec) -> str:
    """The command line that does the same run, without where its files go."""
    words = ["discover-circuit", "run", spec.task]
    for field in fields(RunSpec):
        value = getattr(spec, field.name)
        if field.name == "settings":
            words += [word for setting in spec.settings for word in ("--set", setting)]
        elif field.name == "test_examples" and value == spec.examples:
            continue  # what the command line takes by default
        elif field.name == "roles":
            words += [] if spec.roles else ["--no-roles"]
        elif field.name not in ("task", "out", "device", "restart") and value != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def stem(task: str) -> str:
    return Path(task).stem if Path(task).suffix else task


def _settings(spec: RunSpec) -> dict[str, Any]:
    """The parameters of the method that were asked for; checked before anything slow begins."""
    method = METHODS.get(spec.method)
    wanted: dict[str, Any] = {"replacement": spec.replacement, "steps": spec.steps}
    settings = {name: value for name, value in wanted.items() if value is not None}
    settings |= dict(parsed_setting(setting, method) for setting in spec.settings)
    for name in settings:
        if name not in method.defaults:
            raise InputError(f"Method {spec.method!r} has no parameter {name!r}.")
    if (spec.edges is not None) + (spec.nodes is not None) + (spec.threshold is not None) > 1:
        raise InputError("Give edges, nodes or threshold, and only one of them.")
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
    train = task.pairs(model, n=spec.examples, split="train", seed=spec.seed)
    test = task.pairs(model, n=spec.test_examples, split="test", seed=spec.seed)
    return task_record(task, path=spec.task), train, test, task.metric


def _file_examples(spec: RunSpec, model: HookManager) -> tuple[FileTaskRecord, Pairs, Pairs, str]:
    pairs = load_pairs(spec.task, model)
    source = pairs.source
    assert isinstance(source, FileSource)
    if len(pairs) < 4:
        raise InputError(f"{spec.task} has {len(pairs)} usable pairs; at least 4 are needed, half of them to test.")
    n_train = min(spec.examples, len(pairs) // 2)
    n_test = min(spec.test_examples, len(pairs) - n_train)
    record = FileTaskRecord(name=stem(spec.task), path=spec.task, sha256=source.sha256)
    metric = "logit_diff" if pairs.right is not None and pairs.wrong is not None else "kl_to_clean"
    return record, pairs[:n_train], pairs[n_train : n_train + n_test], metric
