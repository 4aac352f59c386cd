"""Several methods compared on the same pairs of a task: `compare_methods`, and the command `compare` with its page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechinterp.base.errors import InputError
from mechinterp.base.progress import StageProgress, no_stages
from mechinterp.base.settings import Parameter
from mechinterp.discovery.method import METHODS, check_graph, score_edges
from mechinterp.evaluation.comparison import MIB_SHARES, Comparison, MethodResult, top_edges
from mechinterp.evaluation.faithfulness import faithfulness_curve
from mechinterp.graphs.circuit import on_paths
from mechinterp.graphs.graph import Graph
from mechinterp.models.hook_manager import HookManager, load_model
from mechinterp.pipeline import check_task, graph_of_run, parsed_setting
from mechinterp.run_examples import examples_of, explaining
from mechinterp.run_spec import RunSpec, check_shares, compare_command, comparison_path, parsed_sizes
from mechinterp.tasks.own_metric import MetricLike, as_metric
from mechinterp.tasks.pairs import Pairs
from mechinterp.views.report.comparison import write_comparison


def compare_methods(
    model: HookManager,
    graph: Graph,
    train: Pairs,
    test: Pairs,
    methods: Sequence[str],
    *,
    metric: MetricLike = "logit_diff",
    replacement: str = "corrupt",
    shares: Sequence[float] = MIB_SHARES,
    settings: Mapping[str, Mapping[str, Parameter]] | None = None,
    batch_size: int = 32,
    progress: StageProgress = no_stages,
) -> Comparison:
    """Every method's scores on `train`, and how faithful its circuits of each size are on `test`.

    Edges with score 0 are never selected, except at share 1, the whole graph. Circuits are pruned to the edges on a
    path from the input to the logits. Positive scores help.

    Args:
        model: The model.
        graph: The graph whose edges (or nodes, see `Graph.level`) are ranked.
        train: Pairs on which every method scores.
        test: Held-out pairs on which every circuit is evaluated.
        methods: Names in `METHODS`, each only once.
        metric: Task performance, or its name.
        replacement: What a cut edge carries: `corrupt`, `mean`, `mean-positional` or `zero`.
        shares: Sizes as shares of the graph's edges (or nodes), increasing, the last one 1.
        settings: Further parameters, by method.
        batch_size: Pairs per forward; the result does not depend on it.
        progress: Called as `progress(stage, done, total)`.

    Cost: that of the methods, and two forwards of `test` for every size and order (value, magnitude).

    Raises:
        InputError: If a method is unknown or given twice, or the shares do not increase from above 0 to 1.
    """
    if not methods or len(set(methods)) != len(methods):
        raise InputError("Give at least one method, and each only once.")
    shares = tuple(float(share) for share in shares)
    check_shares(shares)
    for name in methods:
        check_graph(name, graph)
    sizes = tuple(int(share * graph.n_units) for share in shares)
    results: dict[str, MethodResult] = {}
    for name in methods:
        start = time.perf_counter()
        parameters: dict[str, Any] = {"replacement": replacement, **(settings or {}).get(name, {})}
        scores = score_edges(
            model,
            graph,
            train,
            method=name,
            metric=metric,
            batch_size=batch_size,
            progress=lambda done, total, name=name: progress(name, done, total),
            **parameters,
        )
        seconds = time.perf_counter() - start
        orders = ("value", "magnitude")
        masks = [on_paths(graph, top_edges(scores, size, order)) for order in orders for size in sizes]
        values = faithfulness_curve(
            model,
            masks,
            graph,
            test,
            metric=metric,
            replacement=replacement,
            batch_size=batch_size,
            progress=lambda done, total, name=name: progress(f"{name}: faithfulness", done, total),
        )
        results[name] = MethodResult(scores, values[: len(sizes)], values[len(sizes) :], seconds)
    about: dict[str, Parameter] = {
        "metric": as_metric(metric).name,
        "replacement": replacement,
        "train": len(train),
        "test": len(test),
        "units": f"{graph.level}s",
        graph.level + "s": graph.n_units,
    }
    return Comparison(results, shares, sizes, about)


def compare(
    spec: RunSpec, methods: Sequence[str], sizes: str = "mib", progress: StageProgress = no_stages
) -> tuple[Comparison, Path]:
    """A comparison of several methods on one task, and the path of its page.

    Args:
        spec: The task, the model, the pairs and the graph; `settings` are `METHOD.NAME=VALUE`.
        methods: Names in `METHODS`.
        sizes: `mib`, or shares of all edges, separated by commas.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: If the request is invalid; nothing is written then.
    """
    shares = MIB_SHARES if sizes == "mib" else parsed_sizes(sizes)
    settings = _settings_by_method(spec, methods)
    try:
        spec.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot write to {spec.out}: {error.strerror or error}.") from error
    progress("model", 0, 1)
    place: dict[str, Any] = {"device": spec.device, "device_map": spec.device_map}
    model = load_model(spec.model, revision=spec.revision, dtype=spec.dtype, **place)
    progress("model", 1, 1)
    examples = examples_of(spec, model)
    if spec.direction is not None:
        model, examples = explaining(spec.direction, model, examples)
    train, metric = examples.train, spec.metric or examples.metric
    check_task(spec, model, examples, metric)
    comparison = compare_methods(
        model,
        graph_of_run(spec, model, train, metric),
        train,
        examples.test,
        methods,
        metric=metric,
        settings=settings,
        replacement=spec.replacement,
        shares=shares,
        batch_size=spec.n_at_once,
        progress=progress,
    )
    path = comparison_path(spec)
    command = compare_command(spec, methods, sizes)
    write_comparison(path, comparison, f"Methods compared on {examples.task.name} in {spec.model}", command)
    return comparison, path


def _settings_by_method(spec: RunSpec, methods: Sequence[str]) -> dict[str, dict[str, Parameter]]:
    """The settings `METHOD.NAME=VALUE`, parsed, by method."""
    settings: dict[str, dict[str, Parameter]] = {}
    for setting in spec.settings:
        name, dot, rest = setting.partition(".")
        if not dot or name not in methods:
            raise InputError(f"A setting is METHOD.NAME=VALUE, for one of the methods compared; got {setting!r}.")
        parameter, value = parsed_setting(rest, METHODS.get(name), own_options=())
        settings.setdefault(name, {})[parameter] = value
    return settings
