"""Every method on models with a known circuit, under resampling. Run as `python -m benchmarks.ground_truth`.

Two tables. Of the eight compiled models the outputs live at every position, so the metric is `l2_to_clean` at all of
them; methods of gradients at the clean run alone have none there, and `cd` and `path-patching` are about answers and
one input. The two whose weights are set by hand have answers, so the metric is `logit_diff` and every method takes
part. Scores below 1e-5 of the strongest count as 0. Precision and recall are at the truth's own threshold, 1e-3 of the
metric; for scores that are in no unit of the metric (information flow, weights, random) look at AUC and at the share
of true edges among as many of the strongest as the truth has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean

import pandas as pd

from tests.hand_circuits import HAND
from tests.known_circuits import NAMES
from tests.truth_table import ANSWERS, ANY_METRIC, Outcome, run


def ground_truth(labels: Iterable[str], names: Iterable[str]) -> pd.DataFrame:
    """Per method the circuits recovered exactly, the mean AUC, precision, recall and share of true edges at the
    truth's size; and what was missed, by name, or is too much, where."""
    names = tuple(names)
    rows: list[dict[str, object]] = []
    for label in labels:
        found = {name: run(label, name) for name in names}
        results = [outcome.against for outcome in found.values()]
        rows.append(
            {
                "method": label,
                "recovered": f"{sum(r.recovered for r in results)} of {len(found)}",
                "AUC": fmean(r.auc for r in results),
                "precision": fmean(r.precision for r in results),
                "recall": fmean(r.recall for r in results),
                "at the truth's size": fmean(outcome.at_size for outcome in found.values()),
                "not recovered": _said(found),
            }
        )
    return pd.DataFrame(rows)


def _said(found: Mapping[str, Outcome]) -> str:
    parts: list[str] = []
    for name, one in found.items():
        missed = ", ".join(f"`{edge}`" for edge in sorted(one.missed)) if len(one.missed) <= 5 else len(one.missed)
        said = [f"misses {missed}"] * bool(one.missed) + [f"{len(one.extra)} too many"] * bool(one.extra)
        parts += [f"{name}: {' and '.join(said)}"] * bool(said)
    return "; ".join(parts)


def markdown(table: pd.DataFrame) -> str:
    """The table as Markdown."""
    lines = [list(table.columns), ["---"] * len(table.columns)]
    lines += [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(markdown(ground_truth({**ANY_METRIC, **ANSWERS}, HAND)), "\n", flush=True)
    print(markdown(ground_truth(ANY_METRIC, NAMES)))
