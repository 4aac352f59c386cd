"""What a direction file states, measured; and `verify_direction`, which measures it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mechinterp.analysis.directions import Direction, direction_of, direction_values, orient_pairs
from mechinterp.analysis.probes import Probes, held_out, probe_directions
from mechinterp.analysis.steering_sweep import steering_sweep
from mechinterp.base.canonical_json import six_digits
from mechinterp.base.errors import InputError
from mechinterp.base.progress import StageProgress, no_stages
from mechinterp.circuit_file.direction_file import position_of, stated_direction
from mechinterp.circuit_file.direction_schema import (
    SETS,
    DirectionFile,
    FitRecord,
    OpenedDirection,
    ProbeRecord,
    SteeringRecord,
    open_direction_file,
)
from mechinterp.circuit_file.named_files import find_file
from mechinterp.circuit_file.provenance import model_record, tokenizer_record, versions
from mechinterp.circuit_file.records import pairs_of, task_of
from mechinterp.circuit_file.schema import TaskRecord, Tolerance
from mechinterp.circuit_file.verify.claims import Ledger, Verification
from mechinterp.circuit_file.verify.coverage import Extent, Part
from mechinterp.circuit_file.verify.verification import load_stated_model
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

CONTROLS = 5
"""Random directions beside the steering of a file."""
COSINE = 0.9999
"""The least cosine of a direction that is fitted again with the stated one."""


@dataclass(frozen=True, eq=False)
class MeasuredDirection:
    """A direction, chosen on the validation pairs, and everything that a file states of it."""

    direction: Direction
    scan: tuple[ProbeRecord, ...]
    without: tuple[str, ...]
    test: ProbeRecord
    steering: SteeringRecord | None


def measured_direction(
    model: HookManager, sets: Mapping[str, Pairs], sites: Sequence[str | Site] | str, fit: FitRecord, metric: str | None
) -> MeasuredDirection:
    """The direction of the site that is most accurate on the validation pairs, with all that is stated of it.

    Args:
        model: The model.
        sets: The pairs `train`, `validation` and `test`.
        sites: A kind, or a list of sites.
        fit: Method, settings, position, seeds.
        metric: The metric that steering is measured with; None: not measured (the pairs have no answers).

    Raises InputError if no site separates the classes.
    """
    position = position_of(fit.position)
    sets = prepared(sets, fit)
    how: dict[str, Any] = dict(method=fit.method, shuffles=fit.shuffles, seed=fit.seed, **fit.parameters)
    if fit.control_position is not None:
        how["control_position"] = position_of(fit.control_position)
    found = probe_directions(model, sets["train"], sets["validation"], sites, position, **how)
    best = found.best()
    judged = probe_directions(model, sets["train"], sets["test"], [best.site], position, **how)
    steering = None
    if metric is not None:
        swept = steering_sweep(
            model, best, [1.0], sets["test"], None, positions=position, metric=metric, controls=CONTROLS, seed=fit.seed
        )
        change = swept.at(strength="1", measure="change").values.tolist()
        steering = SteeringRecord(
            metric=metric,
            strength=1.0,
            without=six_digits(float(swept.about["without the edit"])),
            change=six_digits(change[0]),
            random=tuple(map(six_digits, change[1:])),
        )
    names = found.grid.labels["site"]
    n = len(sets["validation"])
    scan = tuple(_record(found, name, n) for name in names if (name, str(position)) in found.directions)
    without = tuple(name for name in names if (name, str(position)) not in found.directions)
    return MeasuredDirection(best, scan, without, _record(judged, str(best.site), len(sets["test"])), steering)


def prepared(sets: Mapping[str, Pairs], fit: FitRecord) -> dict[str, Pairs]:
    """The pairs with the positive class clean; of validation and test only those whose prompts are not in train."""
    oriented = dict(sets)
    if fit.classes == "answer":
        oriented = {name: orient_pairs(pairs, fit.positive) for name, pairs in sets.items()}
    return {name: pairs if name == "train" else held_out(oriented["train"], pairs) for name, pairs in oriented.items()}


def _record(found: Probes, site: str, n: int) -> ProbeRecord:
    values = found.grid.at(site=site, pos=found.grid.labels["pos"][0])
    row = dict(zip(values.labels["measure"], values.values.tolist(), strict=True))
    numbers: Any = {name: None if value != value else six_digits(value) for name, value in row.items()}
    return ProbeRecord(site=site, n=n, **numbers)


def verify_direction(
    path: str | Path,
    *,
    model: Any = None,
    tolerance: float | None = None,
    device: torch.device | str | None = None,
    progress: StageProgress = no_stages,
) -> Verification:
    """Which claims of a direction file hold: hashes, model, pairs, the fit run again, every number measured again.

    Args:
        path: The `NAME.direction.json`, or the name of a stored direction.
        model: Anything that `load_model` takes; by default the model that the file names.
        tolerance: Relative tolerance for numbers (a tenth of it is absolute); by default that of the file.
        device: Where to load the model.
        progress: Called with a stage, the steps done and the total.

    Raises:
        FormatError: if the file is not a direction file at all.
        ModelNotAvailable: if the model cannot be loaded here.
    """
    opened, ledger = open_direction_file(find_file(path)), Ledger()
    stated = opened.document
    if tolerance is not None and not 0 < tolerance < 1:
        raise InputError(f"tolerance must be between 0 and 1; got {tolerance!r}.")
    limit = stated.tolerance if tolerance is None else Tolerance(relative=tolerance, absolute=tolerance / 10)
    progress("file", 0, 1)
    changed = "the file was changed after it was written"
    ledger.equal("file hash", opened.file_sha256, stated.file_sha256, changed)
    direction = ledger.attempt("numbers", lambda: stated_direction(opened))
    if direction is not None:
        ledger.equal("direction hash", direction.sha256, stated.direction_sha256, "the numbers are others")
    progress("model", 0, 1)
    loaded = load_stated_model(cast(Any, stated), opened.path, model, device)
    record = model_record(loaded)
    for name in ("weights_sha256", "architecture", "processing", "dtype", "dims"):
        ledger.equal(f"model.{name}", getattr(record, name), getattr(stated.model, name))
    if stated.tokenizer is not None:
        got = tokenizer_record(loaded.tokenizer, stated.tokenizer.prepend_bos)
        ledger.equal("tokenizer", got, stated.tokenizer)
    sets = _sets(stated, loaded, ledger)
    if sets is not None and direction is not None:
        progress("evaluation", 0, 1)
        with ledger.claimed("measurements"):
            _check_numbers(opened, loaded, direction, sets, limit, ledger)
    _note_versions(stated, ledger)
    words = ("hashes", "model and tokenizer", "pairs", "fit", "scan of the sites", "test", "steering")
    extent = Extent(
        tuple(Part(name, name) for name in words),
        (Part("provenance", "provenance"),),
        (Part("title", "title and text"),),
    )
    return Verification(opened.path, tuple(ledger.claims), tuple(ledger.notes), (), extent)


def _sets(stated: DirectionFile, model: HookManager, ledger: Ledger) -> dict[str, Pairs] | None:
    """The pairs made again, or None with a failed claim."""
    task = None
    if isinstance(stated.task, TaskRecord):
        record = stated.task
        task = ledger.attempt("task", lambda: task_of(record))
        if task is not None:
            ledger.equal("task hash", task.digest(), record.sha256)
    found: dict[str, Pairs] = {}
    for name in SETS:
        entry = stated.pairs[name]
        pairs = ledger.attempt(f"pairs.{name}", lambda entry=entry: pairs_of(entry, task, model.tokenizer))
        if pairs is None or not ledger.equal(f"pairs.{name}", pairs.digest(), entry.sha256):
            return None
        found[name] = pairs
    return found


def _check_numbers(
    opened: OpenedDirection,
    model: HookManager,
    direction: Direction,
    sets: Mapping[str, Pairs],
    limit: Tolerance,
    ledger: Ledger,
) -> None:
    stated = opened.document
    tried = [*(row.site for row in stated.scan), *stated.without_direction]
    metric = None if stated.steering is None else stated.steering.metric
    # The stated site is fitted again first: a file of another site fails here, whatever the scan says.
    train = prepared(sets, stated.fit)["train"]
    values = direction_values(model, train, [direction.site], [direction.position])
    pairs = values[direction.site, direction.position]
    again = direction_of(
        direction.site, direction.position, *pairs, stated.fit.method, train, model, **stated.fit.parameters
    )
    for side in ("read", "write"):
        cosine = _cosine(getattr(again, side), getattr(direction, side))
        ledger.holds(f"fit.{side}", cosine >= COSINE, f"cosine of at least {COSINE}", f"{cosine:.6f}")
        lengths = [float(getattr(one, side).norm()) for one in (again, direction)]
        ledger.close(f"fit.length of {side}", lengths[0], lengths[1], limit)
    ledger.close("fit.offset", again.offset, direction.offset, limit)
    measured = measured_direction(model, sets, tried, stated.fit, metric)
    ledger.equal("site", str(measured.direction.site), stated.site, "another site is the most accurate one")
    ledger.equal("sites without a direction", measured.without, stated.without_direction)
    for where, rows, expected in (("scan", measured.scan, stated.scan), ("test", (measured.test,), (stated.test,))):
        here, there = ([(row.site, row.n) for row in side] for side in (rows, expected))
        if not ledger.equal(f"{where}.sites", here, there, "other sites, or other numbers of pairs"):
            continue
        for got, row in zip(rows, expected, strict=True):
            for name in sorted(set(ProbeRecord.model_fields) - {"site", "n"}):
                _close_share(f"{where}.{row.site}.{name}", getattr(got, name), getattr(row, name), row.n, limit, ledger)
    if measured.steering is not None and stated.steering is not None:
        for name in ("without", "change", "random"):
            ledger.close(f"steering.{name}", getattr(measured.steering, name), getattr(stated.steering, name), limit)


def _close_share(name: str, got: object, expected: object, n: int, limit: Tolerance, ledger: Ledger) -> None:
    """An accuracy is a count: besides the tolerance, one of 2 n prompts may be on the other side of the boundary."""
    one = 0.0 if name.endswith(".gap") else 1 / (2 * n)
    ledger.close(name, got, expected, Tolerance(relative=limit.relative, absolute=min(0.1, limit.absolute + one)))


def _cosine(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return 0.0
    return float(torch.nn.functional.cosine_similarity(a.double().cpu(), b.double().cpu(), dim=0))


def _note_versions(stated: DirectionFile, ledger: Ledger) -> None:
    now = versions()
    differ = [
        f"{name} {was} then, {now.get(name, 'none')} now"
        for name, was in stated.provenance.versions.items()
        if now.get(name) != was
    ]
    if differ:
        ledger.notes.append("other versions: " + ", ".join(differ))
