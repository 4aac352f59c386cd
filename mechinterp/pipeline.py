"""The main job as one straight line: task, model, pairs, graph, scores, circuit, evaluation, file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.base.checkpoint import Checkpoint
from mechinterp.base.errors import InputError, MechInterpError, NoSmallCircuit, TaskNotDone
from mechinterp.base.keep import Compute
from mechinterp.base.progress import Progress, StageProgress, no_stages
from mechinterp.base.registry import unknown
from mechinterp.base.settings import Parameter, check_settings, unknown_setting
from mechinterp.base.shards import from_first
from mechinterp.base.shown import Shown
from mechinterp.circuit_file.circuit_file import save_circuit
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.circuit_file.store import SUFFIX
from mechinterp.circuit_file.summary import finding, steadiness
from mechinterp.circuit_file.verify.verification import verify as verify
from mechinterp.discovery.ensemble import members_asked
from mechinterp.discovery.features import top_features
from mechinterp.discovery.finished_parts import FinishedParts
from mechinterp.discovery.memory import auto_batch_size
from mechinterp.discovery.method import METHODS, Method, check_graph, score_edges
from mechinterp.discovery.neurons import top_neurons
from mechinterp.discovery.refine import REFINE, refine_circuit
from mechinterp.discovery.score_pieces import adds_up
from mechinterp.discovery.stable import (
    BLOCKS,
    RUNS,
    MeasuredStability,
    block_resamples,
    resampled_scores,
    stability_at,
)
from mechinterp.engines.edge_patching import check_model
from mechinterp.evaluation.ablation import AblationSetup
from mechinterp.evaluation.faithfulness import Evaluation, evaluate_in
from mechinterp.evaluation.roles import MeasuredRoles, measured_roles
from mechinterp.evaluation.sizes import FOLDS, Curve, Levels, SizeSearch, search_size
from mechinterp.evaluation.task_check import TaskCheck, check_performance
from mechinterp.features.load import load_bases
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import Graph, build_graph
from mechinterp.graphs.scores import Scores
from mechinterp.graphs.select import check_selection, select, sized, unit_count
from mechinterp.models.hook_manager import HookManager, load_model
from mechinterp.run_examples import Examples, examples_of, explaining, stem
from mechinterp.run_spec import AUTO, FEATURES, NEURONS, RESAMPLES, RunSpec, command_of, declared, resolved
from mechinterp.run_spec import output_path as output_path
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs

Parts = Mapping[str, Tensor]
"""Tensors by name."""
OWN_OPTIONS = ("replacement", "steps")
"""Parameters of methods that have their own option."""
ROLE_EXAMPLES = 100
"""Train and test pairs on which roles are measured."""


@dataclass(frozen=True, repr=False)
class Discovery(Shown):
    """The result of a run.

    `performance` is how well the model does the task, `curve` faithfulness against size on the pairs that chose the
    size, `stability` how alike the circuits of resampled train pairs are (None: not measured).
    """

    circuit: Circuit
    evaluation: Evaluation
    performance: TaskCheck
    curve: Curve
    stability: MeasuredStability | None
    model: HookManager
    examples: Examples
    path: Path
    document: CircuitFile
    roles: MeasuredRoles | None = None
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""

    def _facts(self) -> list[tuple[str, object]]:
        return [("", finding(self.document)), *(("", line) for line in steadiness(self.document)), ("file", self.path)]

    @property
    def train(self) -> Pairs:
        """The pairs that the circuit was found with."""
        return self.examples.train

    @property
    def test(self) -> Pairs:
        """The held-out pairs that it was evaluated on."""
        return self.examples.test


@dataclass(frozen=True)
class Prepared:
    """A run before anything is measured: its options are checked, its model and its examples are there.

    `threshold` is the run's own, or its method's.
    """

    spec: RunSpec
    settings: Mapping[str, Any]
    path: Path
    model: HookManager
    examples: Examples
    metric: str
    graph: Graph
    threshold: float | None
    size: int | None = None
    """How many edges (or nodes) are selected, if that is given."""

    @cached_property
    def key(self) -> str:
        """A digest of everything that decides the results."""
        return _key(self.spec, self.model, self.graph, self.examples, self.metric)


def prepare(spec: RunSpec, progress: StageProgress = no_stages, given: HookManager | None = None) -> Prepared:
    """The run of a spec, before anything is measured. Raises InputError for whatever cannot be run.

    Args:
        spec: The options of the run.
        progress: Called as `progress(stage, done, total)`.
        given: The model if it is loaded already.
    """
    spec = resolved(spec)
    if spec.batch_size == AUTO and spec.shard is not None:
        raise InputError("Shards must have one batch size: give --batch-size a number, the same for all of them.")
    settings = _settings(spec)
    path = output_path(spec)
    progress("model", 0, 1)
    place: dict[str, Any] = {"device": spec.device, "device_map": spec.device_map}
    model = given or load_model(spec.model, revision=spec.revision, dtype=spec.dtype, **place)
    progress("model", 1, 1)
    examples = examples_of(spec, model)
    if spec.direction is not None:
        model, examples = explaining(spec.direction, model, examples)
    train, metric = examples.train, spec.metric or examples.metric
    graph = graph_of_run(spec, model, train, metric)
    threshold = spec.threshold
    if spec.edges is None and spec.nodes is None and threshold is None:
        threshold = METHODS.get(_method(spec)).threshold
    size = _size(spec, graph)
    check_selection(graph, rule=spec.rule, by=spec.by, ratio=spec.ratio, threshold=threshold)
    check_graph(_method(spec), graph)
    check_model(model, graph, train)
    if spec.batch_size == AUTO:
        spec = replace(spec, batch_size=_auto_batch_size(spec, settings, model, graph, train, metric))
    return Prepared(spec, settings, path, model, examples, metric, graph, threshold, size)


def _auto_batch_size(
    spec: RunSpec, settings: Mapping[str, Any], model: HookManager, graph: Graph, train: Pairs, metric: str
) -> int:
    """The batch that fits this device; where processes share the work, that of the first one."""
    how: dict[str, Any] = {"metric": metric, "method": _method(spec), "settings": settings}
    found = from_first(lambda: {"size": torch.tensor(auto_batch_size(model, graph, train, **how))})
    assert found is not None
    return int(found["size"])


def discover(
    spec: RunSpec | str,
    progress: StageProgress = no_stages,
    *,
    model: Any = None,
    scoring: Callable[[Prepared], Parts] | None = None,
    **options: Any,
) -> Discovery:
    """The circuit of a task in a model, evaluated on held-out pairs, and its file, which is written.

    First the model must do the task. Then edges are scored on the train pairs, the size is chosen on the validation
    pairs, and the circuit is evaluated on the test pairs; its stability is measured by drawing the train pairs again.

    Args:
        spec: The task, with the model, method and all other options of the run as a `RunSpec`; or the task alone: its
            name, a task file, a file of pairs.
        progress: Called as `progress(stage, done, total)`.
        model: A loaded model, or anything that `load_model` takes; by default the one of the spec.
        scoring: Gives what scoring gives, if shards have done it (see `mechinterp.shard_files`).
        **options: Fields of `RunSpec`, such as `method="eap-ig"` and `edges=60`; `settings` may be a mapping. As on the
            command line, `examples` also counts for the validation and the test pairs.

    Where processes share the work (see `mechinterp.base.processes`), all of them return the result, and the first one
    writes the file.

    Cost: that of the method, about ten sizes on the validation pairs, the evaluation and, by default, the roles. A
    killed run resumes: finished stages are not computed again, and scoring goes on from its last saved state.

    Raises:
        InputError: If the spec is invalid; nothing is written then.
        TaskNotDone: If the model does not do the task (and `spec.anyway` is false).
        NoSmallCircuit: If no size up to half of the graph reaches the levels.

    `mi.discover("ioi", effort="quick")` is the run of `discover-circuit run ioi --effort quick`.
    """
    spec, given = asked_run(spec, model, options)
    ready = prepare(spec, progress, given)
    spec, model, graph, metric, examples = ready.spec, ready.model, ready.graph, ready.metric, ready.examples
    train, path, threshold, size = examples.train, ready.path, ready.threshold, ready.size
    progress("task", 0, 1)
    performance = check_task(spec, model, examples, metric)
    progress("task", 1, 1)
    if spec.restart:
        from_first(partial(_forget_unfinished, path))
    done = FinishedParts(_state_path(path, spec), ready.key)
    ranking = Ranking(spec, model, graph, metric, ready.settings, done, progress, scoring and scoring(ready))
    scores, samples = ranking.scores(train)
    how: dict[str, Any] = {"rule": spec.rule, "by": spec.by, "ratio": spec.ratio}
    measured: dict[str, Any] = {"metric": metric, "replacement": spec.replacement, "batch_size": spec.n_at_once}
    on = train if examples.validation is None else examples.validation
    parts = ranking.folds(train) if examples.validation is None else [(scores, on)]
    search = SizeSearch(
        model, scores, parts, how, metric, spec.replacement, spec.n_at_once, seed=spec.seed, keep=done.keep
    )
    scored = max(1, len(graph.unit[scores.values.cpu() != 0].unique()))
    levels = None if size is not None or threshold is not None else search.levels
    first = "curve" if spec.curve or size is not None else "curve, at most"
    told = {"progress": partial(progress, first), "progress_near": partial(progress, "sizes near")}
    found = search_size(search, scored, curve=spec.curve, given=size, **told)
    curve = search.curve(on, levels)
    if levels is not None:
        if found is None:
            raise NoSmallCircuit(no_small_circuit(spec, graph, curve, levels))
        size = found
    circuit = select(graph, scores, **({} if size is None else sized(graph, size)), threshold=threshold, **how)
    stability = None
    if samples is not None:
        n_units = circuit.selection.get(f"{graph.level}s", circuit.n_units)
        alike = stability_at(scores, samples.scores, int(n_units), **how)
        stability = MeasuredStability(alike, train, samples.kind, samples.seed)
    if spec.refine is not None:
        circuit = refined(spec, model, circuit, train, done, partial(progress, "refine"))
    setup = AblationSetup.of(
        model, graph, examples.test, metric, spec.replacement, None, spec.n_at_once, partial(progress, "evaluation")
    )
    evaluation = evaluate_in(setup, circuit, seed=spec.seed, keep=done.keep)
    roles, unmeasured = None, list(examples.notes)
    if spec.roles:
        some = train[:ROLE_EXAMPLES], examples.test[:ROLE_EXAMPLES]
        try:
            report = partial(progress, "roles")
            roles = measured_roles(model, circuit, *some, **measured, progress=report, keep=done.keep)
        except (MechInterpError, ValueError, ArithmeticError, RuntimeError) as error:  # the circuit is kept
            unmeasured.append(f"Roles were not measured: {error}")
    document = save_circuit(
        path,
        circuit,
        model=model,
        task=examples.task,
        result=evaluation,
        predictions=roles.predictions if roles else (),
        roles=roles.roles if roles else {},
        curve=curve,
        performance=(performance, train),
        stability=stability,
        command=None if model.info.origin == "memory" else command_of(spec),
    )
    done.clear()
    return Discovery(
        circuit, evaluation, performance, curve, stability, model, examples, path, document, roles, tuple(unmeasured)
    )


def asked_run(spec: RunSpec | str, model: Any, options: Mapping[str, Any]) -> tuple[RunSpec, HookManager | None]:
    """(the spec with these options, the model if it is loaded already). Raises InputError for unknown options."""
    known = declared()
    for name in options:
        if name not in known or name == "task":
            raise unknown("option of a run", name, [*known, "model"])
    changes = dict(options)
    for name, field in known.items():
        if isinstance(spec, str) and field.option.default_of in options:
            changes.setdefault(name, options[field.option.default_of])
    if isinstance(settings := changes.get("settings"), Mapping):
        changes["settings"] = tuple(f"{name}={value}" for name, value in settings.items())
    if isinstance(positions := changes.get("positions"), (list, tuple)):
        changes["positions"] = ",".join(positions)
    spec = RunSpec(task=spec, **changes) if isinstance(spec, str) else replace(spec, **changes)
    if model is None:
        return spec, None
    if isinstance(model, (str, Path)):
        return replace(spec, model=str(model)), None
    loaded = load_model(model)
    names = ("revision", "dtype", "device", "device_map")
    if model_options := [name for name in names if getattr(spec, name) is not None]:
        raise InputError(f"The model is loaded already; give {', '.join(model_options)} to load_model.")
    info, dtype = loaded.info, str(loaded.dtype).removeprefix("torch.")
    own: dict[str, Any] = {"revision": info.revision} if info.origin == "hub" else {}
    return replace(spec, model=info.name, dtype=None if dtype == "float32" else dtype, **own), loaded


def _method(spec: RunSpec) -> str:
    assert spec.method is not None  # `resolved` has named it
    return spec.method


def check_task(spec: RunSpec, model: HookManager, examples: Examples, metric: str) -> TaskCheck:
    """How well the model does the task. Raises TaskNotDone if it does not, unless the run goes on anyway."""
    found = check_performance(
        model, examples.train, metric=metric, templates=examples.templates, batch_size=spec.n_at_once, seed=spec.seed
    )
    if found.failures and not spec.anyway:
        raise TaskNotDone(
            f"{spec.model} does not do {stem(spec.task)} on {found.n_examples} pairs: {'; '.join(found.failures)}. A "
            "circuit would explain noise. Take another model, task or metric, or go on with --anyway."
        )
    return found


def refined(
    spec: RunSpec, model: HookManager, circuit: Circuit, train: Pairs, done: FinishedParts, progress: Progress
) -> Circuit:
    """The circuit after the exact pass that was asked for; a killed pass goes on where it was."""
    about = json.dumps([spec.refine, spec.refine_add, circuit.digest()])
    state = done.path.with_name(f"{done.path.name}.{hashlib.sha256(about.encode()).hexdigest()[:8]}")
    return refine_circuit(
        model,
        circuit,
        train,
        tau=float(spec.refine or 0),
        add=spec.refine_add,
        replacement=spec.replacement,
        batch_size=spec.n_at_once,
        progress=progress,
        resume=state,
        keep=done.keep,
    )


def no_small_circuit(spec: RunSpec, graph: Graph, curve: Curve, levels: Levels) -> str:
    """The answer where no size reaches the levels, with what came nearest and what to try."""
    assert curve.kl_empty is not None
    most = int(levels.most * graph.n_units)
    small = [p for p in curve.points if p.n_selected <= most] or list(curve.points)
    best = min(small, key=lambda p: (abs(1 - p.faithfulness), p.n_selected))
    kl_empty = f"{curve.kl_empty:.3g}"
    low, high = best.interval or (best.faithfulness, best.faithfulness)
    tries = ["more --examples", "another --method"]
    if spec.by == "value" and "keystones" in METHODS.get(_method(spec)).settings and graph.level == "edge":
        tries += ["--set keystones=true (an estimate with the wrong sign puts an edge that all need last)"]
    tries += ["--level node"] if graph.level == "edge" else []
    tries += ["--positions all"] if not graph.positions and len(curve.pairs.positions) else []
    return (
        f"No small circuit at this level by {_method(spec)}: no size up to {most:,} of {graph.n_units:,} "
        f"{graph.level}s has, on {levels.agreement:.0%} of resamples of the validation pairs, its whole interval of "
        f"faithfulness in [{levels.low:g}, {levels.high:g}] and a KL divergence up to {levels.kl_share:g} of the empty "
        f"circuit's {kl_empty}. The nearest, {best.n_selected:,} {graph.level}s, has {best.faithfulness:.2f} "
        f"[{low:.2f}, {high:.2f}] and {best.kl or 0:.2g}. Try {', '.join(tries)}; or --{graph.level}s "
        f"{best.n_selected} for that one as it is (what was measured is kept for it; --restart deletes it)."
    )


@dataclass(frozen=True)
class Samples:
    """Scores of resampled train pairs."""

    scores: Tensor
    kind: str
    seed: int


@dataclass(frozen=True)
class Ranking:
    """How the edges of a run are scored."""

    spec: RunSpec
    model: HookManager
    graph: Graph
    metric: str
    settings: Mapping[str, Any]
    done: FinishedParts
    progress: StageProgress
    given: Parts | None = None
    """What scoring the train pairs gives, if it is known."""

    def scores(self, pairs: Pairs) -> tuple[Scores, Samples | None]:
        """The scores on all train pairs, and those on resamples of them where these cost little or were asked for."""
        spec, method = self.spec, METHODS.get(_method(self.spec))
        wanted = spec.resamples
        averages = "runs" in method.settings
        if averages and wanted is not None:
            raise InputError(f"Method {method.name!r} draws the pairs again itself: give --set runs={wanted}.")
        if averages or wanted == 0 or (wanted is None and not adds_up(self.asked)):
            scores = self.scored(pairs, "scores")
            if scores.samples is None:
                return scores, None
            return scores, Samples(scores.samples, RUNS, int(scores.parameters["seed"]))
        rows = self.resamples(pairs)
        kept = Checkpoint(self.done.path.with_name(f"{self.done.path.name}.scores"), self.done.key)

        def compute() -> dict[str, Tensor]:
            report = partial(self.progress, "scores")
            scores, samples = resampled_scores(self.model, self.graph, pairs, rows, self.asked, report, kept)
            return {**tensors_of(scores), "samples": samples}

        found = self._kept("scores", compute)
        scores = self._scores_of(found, pairs, method.additive)
        return scores, Samples(found["samples"], BLOCKS, spec.seed)

    @property
    def asked(self) -> dict[str, Any]:
        """The arguments of `score_edges`."""
        about = {"method": _method(self.spec), "metric": self.metric, "batch_size": self.spec.n_at_once}
        return {**about, **self.settings}

    def resamples(self, pairs: Pairs) -> Tensor:
        """The examples of every resample."""
        n = self._affordable(RESAMPLES if self.spec.resamples is None else self.spec.resamples)
        return block_resamples(len(pairs), n, self.spec.seed)

    def _affordable(self, wanted: int) -> int:
        """At most so many resamples that their scores take a quarter of a GiB, but at least two."""
        return max(2, min(wanted, 2**28 // (8 * self.graph.n_edges * len(members_asked(self.asked) or [0]))))

    def scored(self, pairs: Pairs, name: str) -> Scores:
        """The scores on these pairs."""
        method = METHODS.get(_method(self.spec))
        checkpoint = self.done.path.with_name(f"{self.done.path.name}.{name}")

        def compute() -> dict[str, Tensor]:
            scores = score_edges(
                self.model,
                self.graph,
                pairs,
                **self.asked,
                progress=partial(self.progress, "scores"),
                resume=checkpoint,
            )
            return tensors_of(scores)

        return self._scores_of(self._kept(name, compute), pairs, method.additive)

    def _kept(self, name: str, compute: Compute) -> Parts:
        return self.given if name == "scores" and self.given is not None else self.done.keep(name, compute)

    def folds(self, pairs: Pairs) -> list[tuple[Scores, Pairs]]:
        """Every fold of the pairs with the scores of the others."""
        found: list[tuple[Scores, Pairs]] = []
        for fold in range(FOLDS):
            rest = [i for i in range(len(pairs)) if i % FOLDS != fold]
            held_out = list(range(fold, len(pairs), FOLDS))
            found.append((self.scored(pairs[rest], f"fold {fold}"), pairs[held_out]))
        return found

    def _scores_of(self, found: Mapping[str, Tensor], pairs: Pairs, additive: bool) -> Scores:
        method = METHODS.get(_method(self.spec))
        settings = check_settings(f"method {method.name!r}", method.settings, self.settings)
        return Scores(
            self.graph,
            found["total"],
            len(pairs),
            method.name,
            self.metric,
            str(settings["replacement"]),
            settings,
            {name.removeprefix("cost "): int(value) for name, value in found.items() if name.startswith("cost ")},
            additive,
            pairs,
            found.get("samples"),
        )


def tensors_of(scores: Scores) -> dict[str, Tensor]:
    """What of scores depends on the examples."""
    costs = {f"cost {name}": torch.tensor(n) for name, n in scores.cost.items()}
    samples = {} if scores.samples is None else {"samples": scores.samples}
    return {"total": scores.total.cpu(), **costs, **samples}


def _key(spec: RunSpec, model: HookManager, graph: Graph, examples: Examples, metric: str) -> str:
    """A digest of everything that decides the results of a run; the metric may be that of a task file."""
    pairs = [None if some is None else some.digest() for some in (examples.train, examples.validation, examples.test)]
    parts = [
        metadata.version("mechinterp-circuits"),
        command_of(_measured(spec)),
        model.info.weights_sha256(),
        graph.digest(),
        pairs,
        metric,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def graph_of_run(spec: RunSpec, model: HookManager, train: Pairs, metric: str) -> Graph:
    """The graph to choose from, with the strongest neurons (at level `neuron`) and features on the train pairs."""
    named = [] if spec.positions is None else spec.positions.split(",")
    positions = list(train.positions) if named == ["all"] else [name.strip() for name in named]
    if spec.positions is not None and not positions:
        raise InputError(
            "The pairs have no named positions; add `positions` to the task file, or leave --positions out."
        )
    if spec.level == "feature" and not spec.features:
        raise InputError("Level 'feature' needs `features`: where dictionaries are, such as 'bundled:m1'.")
    how: dict[str, Any] = {"metric": metric, "batch_size": spec.n_at_once}
    neurons = top_neurons(model, train, spec.neurons or NEURONS, **how) if spec.level == "neuron" else None
    bases = [basis for where in spec.features for basis in load_bases(where, model=model)]
    features = top_features(model, train, bases, spec.top or FEATURES, **how) if bases else {}
    level = "edge" if spec.level == "edge" else "node"
    return build_graph(model, level=level, positions=positions, neurons=neurons, features=features)


def _size(spec: RunSpec, graph: Graph) -> int | None:
    """The number of edges or nodes to select if one is given, checked before anything slow begins."""
    size = spec.edges if spec.nodes is None else spec.nodes
    if size is None:
        return None
    if spec.nodes is not None and graph.level == "edge":
        raise InputError("`nodes` goes with level 'node', 'neuron' or 'feature'; give `edges`.")
    return unit_count(graph, int(size) if str(size).isdecimal() else size)


def _state_path(path: Path, spec: RunSpec) -> Path:
    """The file with the state of a long run; commands that measure the same share it."""
    key = hashlib.sha256(command_of(_measured(spec)).encode()).hexdigest()[:8]
    return path.with_name(f".{path.name.removesuffix(SUFFIX)}.{key}.unfinished")


def _measured(spec: RunSpec) -> RunSpec:
    """The spec without what changes no score: `--edges N` goes on from the scores of a search, and a run that had not
    enough memory with a smaller `--batch-size`."""
    same: dict[str, Any] = {"curve": True, "roles": True, "anyway": False, "batch_size": RunSpec.batch_size}
    return replace(spec, edges=None, nodes=None, threshold=None, refine=None, refine_add=0, **same)


def _forget_unfinished(path: Path) -> None:
    """Delete the states of all unfinished runs that write this file. Raises InputError if one cannot be deleted."""
    name = re.compile(rf"\.{re.escape(path.name.removesuffix(SUFFIX))}\.[0-9a-f]{{8}}\.unfinished(\..*)?")
    for entry in list(path.parent.iterdir()):
        if name.fullmatch(entry.name):
            try:
                entry.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(f"{entry} cannot be deleted: {error.strerror or error}.") from error


def _settings(spec: RunSpec) -> dict[str, Any]:
    """The parameters for the method, checked before anything slow begins."""
    method = METHODS.get(_method(spec))
    options: dict[str, Any] = {"replacement": spec.replacement, "steps": spec.steps}
    settings = {name: value for name, value in options.items() if value is not None}
    settings |= dict(parsed_setting(setting, method) for setting in spec.settings)
    for name in settings:
        if name not in method.defaults:
            raise InputError(f"Method {method.name!r} has no parameter {name!r}.")
    check_settings(f"method {method.name!r}", method.settings, settings)
    if (spec.edges is not None) + (spec.nodes is not None) + (spec.threshold is not None) > 1:
        raise InputError("Give edges, nodes or threshold, but only one of them.")
    if spec.metric is not None:
        get_metric(spec.metric)
    if spec.refine is not None:
        REFINE["tau"].check("refine", spec.refine)
    elif spec.refine_add:
        raise InputError("`refine_add` goes with `refine`: give both, such as refine=0.001.")
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
