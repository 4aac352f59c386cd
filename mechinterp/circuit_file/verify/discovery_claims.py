"""What `verify` asks of the stated discovery before anything is run: names that exist, and parts that agree."""

from __future__ import annotations

from mechinterp.circuit_file.records import metric_record
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.circuit_file.verify.claims import Ledger
from mechinterp.discovery.method import METHODS

BOOTSTRAP = ("bootstrap_resamples", "bootstrap_agreement", "bootstrap_seed")
"""How `stable_scores` records its own settings among those of the method."""


def check_discovery(document: CircuitFile, ledger: Ledger) -> None:
    """Record whether method, parameters and metric are known ones, and whether what is stated twice is the same."""
    size, curve = document.selection.size, document.curve
    if size is not None and curve is not None:
        ledger.equal("selection.size.pairs", size.pairs, curve.pairs, "the size was chosen on the pairs of the curve")
    stated = document.discovery
    if stated is None:
        return
    with ledger.claimed("discovery.method"):
        method = METHODS.get(stated.method)
        ledger.equal("discovery.method", stated.method, method.name)
        foreign = sorted(set(stated.parameters) - set(method.settings) - set(BOOTSTRAP))
        ledger.equal("discovery.parameters", foreign, [], f"method {method.name!r} has no such parameter")
    with ledger.claimed("discovery.metric"):
        ledger.equal("discovery.metric", stated.metric, metric_record(stated.metric.name))
    if "replacement" in stated.parameters:
        ledger.equal("discovery.replacement", stated.replacement, stated.parameters["replacement"])
    if stated.pairs is not None:
        n = document.pairs[stated.pairs].n
        ledger.equal("discovery.n_examples", stated.n_examples, n, f"there are {n} pairs {stated.pairs!r}")
