"""`discover_direction`: the direction of a task, found, chosen, tested, steered with and written to a file."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mechinterp.analysis.directions import two_answers
from mechinterp.base.errors import InputError
from mechinterp.base.progress import StageProgress, no_stages
from mechinterp.base.registry import unknown
from mechinterp.circuit_file.direction_claims import MeasuredDirection, measured_direction
from mechinterp.circuit_file.direction_file import write_direction
from mechinterp.circuit_file.direction_schema import SUFFIX, DirectionFile, FitRecord
from mechinterp.circuit_file.provenance import dtype_name, model_record, provenance_of, tokenizer_record
from mechinterp.circuit_file.records import pairs_record, tolerance_for
from mechinterp.features.direction_fits import FITS
from mechinterp.features.fit_settings import fit_parameters
from mechinterp.models.hook_manager import HookManager, load_model
from mechinterp.models.sites import GLOBAL_SITES, Site
from mechinterp.run_examples import examples_of, stem
from mechinterp.run_spec import RunSpec
from mechinterp.tasks.pairs import Pairs

CLASSES = ("auto", "answer", "clean")


@dataclass(frozen=True)
class DirectSpec:
    """What `direct` does.

    Args:
        task: A task, a task file or a file of pairs; clean prompts are the positive class, corrupt ones the negative.
        model: As of `RunSpec`.
        method: How the direction is fitted; see `fit_direction`.
        settings: Parameters of the method, each as `NAME=VALUE`.
        site: A kind of site (`resid_pre`), or one site (`resid_pre.3`).
        layers: `all`, or numbers separated by commas, for a kind.
        position: Where in each prompt: a name of the task, or a number (-1: the last token).
        classes: `clean`: clean against corrupt prompts; `answer`: prompts of one right answer against those of the
            other, in tasks with the same two answers in all pairs; `auto`: `answer` there, `clean` elsewhere.
        control_position: Whose tokens the control task labels; by default the position.
        examples: Train pairs.
        validation_examples: Pairs on which the site is chosen.
        test_examples: Held-out pairs.
        shuffles: Fits to shuffled labels.
        seed: Of the pairs and the controls.
        device: The model's device.
        revision: Of a hub model.
        dtype: The model's dtype.
        out: Folder for the files.
    """

    task: str
    model: str = "bundled"
    method: str = "mean-difference"
    settings: tuple[str, ...] = ()
    site: str = "resid_pre"
    layers: str = "all"
    position: str = "-1"
    classes: str = "auto"
    control_position: str | None = None
    examples: int = 100
    validation_examples: int = 100
    test_examples: int = 100
    shuffles: int = 5
    seed: int = 0
    device: str | None = None
    revision: str | None = None
    dtype: str | None = None
    out: Path = Path("out")


@dataclass(frozen=True, eq=False)
class DirectResult:
    """The file that was written, what is in it, and what was measured."""

    path: Path
    document: DirectionFile
    measured: MeasuredDirection


def discover_direction(spec: DirectSpec, progress: StageProgress = no_stages, *, model: Any = None) -> DirectResult:
    """Find the direction of a task, choose its site on validation pairs, test it, and write `NAME.direction.json`.

    Args:
        spec: What to do.
        progress: Called with a stage, the steps done and the total.
        model: A model that is loaded already, instead of `spec.model`.

    Cost: ten forwards of the pairs (train, validation, test), and one per random direction.

    Raises InputError for an unknown method, site or position, and if no site separates the prompts.
    """
    if spec.method not in FITS:
        raise unknown("method of finding a direction", spec.method, FITS)
    if spec.classes not in CLASSES:
        raise unknown("kind of classes", spec.classes, CLASSES)
    parameters, path = fit_parameters(spec.method, spec.settings), direction_path(spec)
    progress("model", 0, 1)
    given: dict[str, Any] = dict(revision=spec.revision, dtype=spec.dtype, device=spec.device)
    loaded = load_model(spec.model, **given) if model is None else load_model(model)
    progress("task", 0, 1)
    counts: dict[str, Any] = {k: getattr(spec, k) for k in ("examples", "validation_examples", "test_examples", "seed")}
    found = examples_of(RunSpec(task=spec.task, model=spec.model, **counts), loaded)
    if found.validation is None:
        raise InputError(
            f"{spec.task} has too few pairs for train, validation and test. {' '.join(found.notes)} Ask for fewer."
        )
    sets = {"train": found.train, "validation": found.validation, "test": found.test}
    classes, positive = _classes(spec, found.train)
    tokenizer = loaded.tokenizer
    fit = FitRecord(
        classes=classes,
        positive=positive,
        positive_text=None if positive is None or tokenizer is None else str(tokenizer.decode([positive])) or None,
        method=spec.method,
        parameters=parameters,
        position=spec.position,
        control_position=spec.control_position,
        shuffles=spec.shuffles,
        seed=spec.seed,
    )
    has_answers = found.test.right is not None and found.test.wrong is not None
    progress("scores", 0, 1)
    sites = sites_of(loaded, spec.site, spec.layers)
    measured = measured_direction(loaded, sets, sites, fit, found.metric if has_answers else None)
    progress("saving", 0, 1)
    bos = getattr(found.train.source, "prepend_bos", None)
    content: dict[str, Any] = {
        "id": path.name.removesuffix(SUFFIX),
        "title": f"Direction of {stem(spec.task)} at {measured.direction.site}",
        "model": model_record(loaded),
        "tokenizer": tokenizer_record(loaded.tokenizer, bos),
        "task": found.task,
        "pairs": {key: pairs_record(pairs, found.task) for key, pairs in sets.items()},
        "site": str(measured.direction.site),
        "fit": fit,
        "scan": measured.scan,
        "without_direction": measured.without,
        "test": measured.test,
        "steering": measured.steering,
        "tolerance": tolerance_for(dtype_name(loaded)),
        "provenance": provenance_of(loaded, command_of(spec)),
    }
    content = {key: value for key, value in content.items() if value is not None}
    return DirectResult(path, write_direction(path, content, measured.direction), measured)


def direction_path(spec: DirectSpec) -> Path:
    """Where the file goes: `OUT/{task}-{model}-{method}.direction.json`."""
    name = "-".join([stem(spec.task), Path(spec.model).stem or spec.model, spec.method])
    return spec.out / f"{name.replace('/', '-').replace('@', '-')}{SUFFIX}"


def _classes(spec: DirectSpec, train: Pairs) -> tuple[Literal["clean", "answer"], int | None]:
    """(what the classes are, the token of the positive one). Raises InputError for answers that are not two."""
    two = two_answers(train)
    if spec.classes == "answer" and two is None:
        raise InputError(f"The pairs of {spec.task} do not have the same two answers; give --classes clean.")
    if spec.classes == "clean" or two is None:
        return "clean", None
    return "answer", two[0]


def sites_of(model: HookManager, site: str, layers: str) -> list[Site]:
    """The sites that `--site` and `--layers` name. Raises InputError for what the model does not have."""
    if "." in site or site in GLOBAL_SITES:
        if layers != "all":
            raise InputError(f"--layers goes with a kind of site, such as resid_pre; got --site {site}.")
        return [Site.parse(site)]
    if layers == "all":
        return [Site(site, layer) for layer in range(model.dims.n_layers)]
    numbers = [part.strip() for part in layers.split(",")]
    if not all(part.isdecimal() for part in numbers):
        raise InputError(f"--layers is 'all' or numbers separated by commas, such as 2,3; got {layers!r}.")
    return [Site(site, int(part)) for part in numbers]


def command_of(spec: DirectSpec) -> str:
    """The command that repeats it."""
    words = ["discover-circuit", "direct", spec.task]
    default = DirectSpec(spec.task)
    for name in DirectSpec.__dataclass_fields__:
        value = getattr(spec, name)
        if name == "settings":
            words += [word for setting in spec.settings for word in ("--set", setting)]
        elif name not in ("task", "device", "out") and value != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
