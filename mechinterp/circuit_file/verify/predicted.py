"""The predictions of a circuit file, measured again: each must hold, no control may show it, and the numbers agree."""

from __future__ import annotations

from mechinterp.base.canonical_json import six_digits
from mechinterp.base.errors import MechInterpError
from mechinterp.circuit_file.records import tolerance_for
from mechinterp.circuit_file.schema import CircuitFile, Tolerance
from mechinterp.circuit_file.verify.claims import Ledger
from mechinterp.evaluation.measurements import Checked, check_predictions
from mechinterp.evaluation.predictions import Prediction
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.pairs import Pairs


def check_stated_predictions(
    document: CircuitFile,
    model: HookManager,
    pairs: dict[str, Pairs],
    limit: Tolerance | None,
    batch_size: int,
    ledger: Ledger,
) -> None:
    """Record a claim for every prediction, for every control, and for every number that was measured before."""
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
        except MechInterpError:  # one by one, so that it is known which
            together = ()
            for prediction in several:
                with ledger.claimed(f"prediction {prediction.name}"):
                    together = (*together, *check_predictions(model, [prediction], own, batch_size=batch_size))
        for found in together:
            _record(found, limit, ledger)


def _record(found: Checked, limit: Tolerance, ledger: Ledger) -> None:
    stated = found.prediction
    claim = f"prediction {stated.name}"
    ledger.holds(claim, stated.holds(found.value), f"{stated!r}", f"{found.value:.6g}")
    _agree(claim, found.value, stated.measured, limit, ledger)
    for control, value in zip(stated.controls, found.controls, strict=True):
        claim = f"control of {stated.name}"
        side = "<" if stated.relation == ">=" else ">"
        ledger.holds(claim, stated.refuted(value), f"{control.measure} {side} {stated.value:g}", f"{value:.6g}")
        _agree(claim, value, control.measured, limit, ledger)


def _agree(claim: str, got: float, stated: float | None, limit: Tolerance, ledger: Ledger) -> None:
    if stated is not None:
        ledger.close(f"{claim}, measured", six_digits(got), stated, limit)
