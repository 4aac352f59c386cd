"""`dry_run`: what a run will take before it is done: edges, runs of the model, bytes by part, and a time.

The run is prepared as `discover` does it (model, pairs, graph). Then a few examples are run, and the rest follows from
their number: nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from mechinterp.base.progress import StageProgress, no_stages
from mechinterp.base.shown import Shown
from mechinterp.discovery.ensemble import members_asked
from mechinterp.discovery.memory import measure_memory, run_bytes
from mechinterp.discovery.method import METHODS, Method, raw_scores
from mechinterp.engines.edge_patching import plan_runs, run_edges
from mechinterp.engines.readout import clean_logits
from mechinterp.evaluation.faithfulness import random_cuts
from mechinterp.evaluation.sizes import FINE, FOLDS, size_grid
from mechinterp.graphs.scores import Scores
from mechinterp.pipeline import Prepared, asked_run, prepare
from mechinterp.run_spec import RunSpec

MEASURED = 4
"""Examples that are run for the times, and circuits."""
EVALUATED = 9
"""Runs of each held-out pair: the full model, the corrupt prompts, the circuit, the empty one and five random ones."""
ONE_BY_ONE = ("exact", "acdc")
"""Methods that run every edge (or node) by itself."""


@dataclass(frozen=True)
class Stage:
    """The runs of one stage, of one prompt each, and how long they take."""

    name: str
    forwards: int
    backwards: int
    seconds: float


@dataclass(frozen=True, repr=False)
class DryRun(Shown):
    """What a run will take. Roles and the report are not in it.

    `bytes` are by part, with their `total` at one time; `forward_seconds` is one forward of one example.
    """

    model: str
    method: str
    level: str
    n_edges: int
    n_units: int
    n_readers: int
    n_writers: int
    n_train: int
    n_pos: int
    batch_size: int
    forward_seconds: float
    stages: tuple[Stage, ...]
    bytes: Mapping[str, int]
    writes: str
    """How runs with edges cut keep the writes of a batch."""
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def _facts(self) -> Iterable[tuple[str, object]]:
        chosen = "" if self.level == "edge" else f", {self.n_units:,} {self.level}s"
        yield "graph", f"{self.n_edges:,} edges{chosen} ({self.n_writers:,} writers, {self.n_readers:,} readers)"
        yield "pairs", f"{self.n_train} train pairs of {self.n_pos} tokens, {self.batch_size} at once"
        yield "a forward", f"{1000 * self.forward_seconds:.3g} ms for one prompt"
        for stage in self.stages:
            runs = f"{stage.forwards:,} forwards, {stage.backwards:,} backwards"
            yield stage.name, f"{runs}, about {duration(stage.seconds)}"
        left_out = "what the notes name, roles and report" if self.notes else "roles and report"
        yield "time", f"about {duration(self.seconds)}, without {left_out}"
        for part, size in self.bytes.items():
            yield f"memory, {part}", in_words(size)
        yield "patched runs keep", self.writes

    def content(self) -> dict[str, Any]:
        """Every field by name, for `--json`."""
        return {**asdict(self), "bytes": dict(self.bytes), "seconds": self.seconds}

    def lines(self) -> list[str]:
        """One fact a line, for a terminal."""
        return [f"{name}: {value}" for name, value in self._facts()] + [f"note: {note}" for note in self.notes]


def in_words(size: int) -> str:
    """Bytes as MiB or GiB.

    >>> in_words(3 * 2**29), in_words(5 * 2**20)
    ('1.5 GiB', '5 MiB')
    """
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def duration(seconds: float) -> str:
    """A time as seconds, minutes or hours.

    >>> duration(4.2), duration(600), duration(9000)
    ('4.2 s', '10 min', '2.5 h')
    """
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def dry_run(spec: RunSpec | str, progress: StageProgress = no_stages, *, model: Any = None, **options: Any) -> DryRun:
    """What a run of `discover` will take, from a few examples of it.

    Args:
        spec: The task, with all options as a `RunSpec`; or the task alone, as `discover` takes it.
        progress: Called as `progress(stage, done, total)`.
        model: A loaded model, or anything that `load_model` takes; by default the one of the spec.
        **options: Fields of `RunSpec`.

    Cost: the model and the pairs are loaded; then about 4 examples are scored, and run with edges cut. The estimate of
    memory is within a quarter of what is measured; times are those of small batches, so larger ones may be faster.
    Raises InputError for whatever cannot be run.

    >>> import mechinterp as mi
    >>> mi.dry_run("ioi", method="eap", examples=4).stages[0].backwards
    4
    """
    asked, given = asked_run(spec, model, options)
    ready = prepare(asked, progress, given)
    spec, model, graph = ready.spec, ready.model, ready.graph
    train, test, validation = ready.examples.train, ready.examples.test, ready.examples.validation
    method = METHODS.get(str(spec.method))
    memory = measure_memory(model, graph, train, ready.metric, method.name, ready.settings)
    some = train[:MEASURED].to(model.device)
    forward = _seconds(lambda: clean_logits(model, some)) / len(some)
    cuts = torch.stack(random_cuts(graph, graph.n_units // 2, MEASURED, spec.seed))
    # The clean and the corrupt prompts are run, too.
    patched = _seconds(lambda: run_edges(model, graph, some, cuts)) / (len(some) * (len(cuts) + 2))
    scoring, notes = _scoring(ready, method, patched)
    if spec.refine is not None:
        notes.append(
            f"What --refine takes is not known before it is done: about a forward of each of the {len(train)} train "
            f"pairs for every {graph.level} of the circuit, and more where several are dropped and kept in turn."
        )
    stages = [] if scoring is None else [scoring]
    grid = len(size_grid(graph.n_units, fine=1))
    n_sizes = (
        1 + (grid if spec.curve else 0)
        if ready.size is not None or ready.threshold is not None
        else grid + 2 * (FINE - 1)
    )
    on = len(train if validation is None else validation)
    runs = on * (n_sizes + 3)
    stages.append(Stage("size", runs, 0, runs * patched))
    stages.append(Stage("evaluation", EVALUATED * len(test), 0, EVALUATED * len(test) * patched))
    n_at_once, n_pos = min(spec.n_at_once, len(train)), int(train.clean.shape[1])
    return DryRun(
        spec.model,
        method.name,
        graph.level,
        graph.n_edges,
        graph.n_units,
        len(graph.readers),
        len(graph.writers),
        len(train),
        n_pos,
        spec.n_at_once,
        forward,
        tuple(stages),
        run_bytes(model, graph, memory, spec.n_at_once),
        plan_runs(model, graph, (n_at_once, n_pos)).words(n_at_once),
        tuple(notes),
    )


def _seconds(work: Callable[[], object]) -> float:
    """The time of the second of two calls."""
    work()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _scoring(ready: Prepared, method: Method, patched: float) -> tuple[Stage | None, list[str]]:
    """The stage of scoring, from a few examples (or a step); None where it cannot be known before."""
    n, asked = len(ready.examples.train), {**method.defaults, **ready.settings}
    # Without validation pairs, the rest of every fold is scored, too.
    times = 1 if ready.examples.validation is not None else FOLDS
    if method.name in ONE_BY_ONE:
        runs = n * (ready.graph.n_units + 2) * times
        return Stage("scores", runs, 0, runs * patched), []
    some: dict[str, Any] = dict(ready.settings)
    if "learning_steps" in asked:
        n_runs, per_step = int(asked.get("runs", 1)), int(asked["examples"]) * int(asked["drawings"])
        some |= {"learning_steps": 1, **({"runs": 1, "warm_start": "none"} if "runs" in asked else {})}
        found, seconds = _timed(ready, method.name, some, min(n, int(asked["examples"])))
        rows = int(asked["learning_steps"]) * n_runs * per_step * times
        whole = seconds * rows / max(1, found.cost["backwards"])
        forwards, backwards = rows + 2 * n * times, rows
        if (start := asked.get("warm_start", "none")) != "none":
            before, took = _timed(ready, str(start), {}, min(n, MEASURED))
            share = n / min(n, MEASURED) * times
            forwards, backwards = (
                round(before.cost["forwards"] * share) + forwards,
                round(before.cost["backwards"] * share) + backwards,
            )
            whole += took * share
        return Stage("scores", forwards, backwards, whole), []
    if not method.additive and members_asked({"method": method.name, **asked}) is None:
        return None, [f"What scoring by {method.name} takes is not known before it is done."]
    found, seconds = _timed(ready, method.name, some, min(n, MEASURED))
    share = n / min(n, MEASURED) * times
    forwards, backwards = (round(found.cost[name] * share) for name in ("forwards", "backwards"))
    return Stage("scores", forwards, backwards, seconds * share), []


def _timed(ready: Prepared, method: str, settings: Mapping[str, Any], n: int) -> tuple[Scores, float]:
    """The scores of some examples in one batch, and how long they take."""
    how: dict[str, Any] = {"method": method, "metric": ready.metric, "batch_size": ready.spec.n_at_once}
    found: list[Scores] = []
    work = partial(raw_scores, ready.model, ready.graph, ready.examples.train[:n], **how, **settings)
    seconds = _seconds(lambda: found.append(work()))
    return found[-1], seconds
