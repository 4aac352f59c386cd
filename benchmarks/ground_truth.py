"""Every method on the eight models with a known circuit, under resampling. Run as `python -m benchmarks.ground_truth`.

The outputs live at every position, so the metric is `l2_to_clean` at all of them; methods of gradients at the clean run
alone (`eap`, `relp`, `cd-edges`) have none there, and `cd` decomposes logit differences.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

import mechinterp as mi
from mechinterp.evaluation.truth import against_truth
from tests.known_circuits import NAMES, known

EFFECT = 1e-3
"""The truth's own threshold: an edge counts when it moves an output by more."""
SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "acdc": {"tau": EFFECT},
    "eap-ig": {"steps": 10},
    "eap-ig-activations": {"steps": 10},
    "clean-corrupted": {},
    "weight-magnitude": {},
    "random": {},
}


def ground_truth() -> pd.DataFrame:
    """Per method: the circuits recovered exactly, the mean AUC, precision and recall, and the circuits missed."""
    rows: list[dict[str, object]] = []
    for method, settings in SETTINGS.items():
        found: dict[str, Any] = {}
        for name in NAMES:
            this = known(name)
            graph = mi.build_graph(this.model, split_input=True)
            scores = mi.score_edges(
                this.model, graph, this.pairs, method=method, metric="l2_to_clean", batch_size=64, **settings
            )
            found[name] = against_truth(scores, this.truth("derived_resample"), EFFECT)
        results = found.values()
        rows.append(
            {
                "method": method,
                "recovered": f"{sum(r.recovered for r in results)} of {len(found)}",
                "AUC": sum(r.auc for r in results) / len(found),
                "precision": sum(r.precision for r in results) / len(found),
                "recall": sum(r.recall for r in results) / len(found),
                "not recovered": ", ".join(name for name, r in found.items() if not r.recovered),
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    print(ground_truth().round(3).to_string(index=False))
