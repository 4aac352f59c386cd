"""Every method on models with a known circuit. Run as `python -m benchmarks.ground_truth`, or with `--more`.

Two tables. The eight compiled models have outputs at every position, so the metric is `l2_to_clean` at all of them. It
has no gradient at the clean run, so methods that only use the gradient there are left out, and so are `cd` and
`path-patching`, which need answers or one input. The two models with constructed weights have answers, so the metric is
`logit_diff` and every method takes part. Scores below 1e-5 of the strongest count as 0. Precision and recall are at the
truth's own threshold, 1e-3 of the metric; for scores that are not in the unit of the metric (information flow, weights,
random) look at AUC and at the share of true edges among the strongest ones, as many as the truth has.

`--more` runs the further programs of `benchmarks/programs` (made by `benchmarks.compile_programs`) instead, under
resampling and under zero ablation, each against its own truth. The range is the 95 % interval of Wilson (1927), which
treats the programs as a sample of those that people would write.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from math import sqrt
from statistics import fmean

import pandas as pd

from tests.support.hand_circuits import HAND
from tests.support.known_circuits import MORE, NAMES
from tests.support.truth_table import ANSWERS, ANY_METRIC, Outcome, run


def ground_truth(labels: Iterable[str], names: Iterable[str]) -> pd.DataFrame:
    """Per method the circuits recovered exactly, the mean AUC, precision, recall and share of true edges at the
    truth's size; and the edges that were missed or are too many, by program."""
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


UNDER_ZERO = ("exact", "acdc", "eap-ig", "edge-pruning", "subnetwork-probing")
"""The methods that support zero ablation."""


def further_programs(label: str, names: Iterable[str] = MORE) -> pd.DataFrame:
    """One method on further programs: a row for resampling and, for those of `UNDER_ZERO`, one for zero ablation."""
    kinds = ("corrupt", "zero") if label in UNDER_ZERO else ("corrupt",)
    rows: list[dict[str, object]] = []
    for kind in kinds:
        found = {name: run(label, name, kind) for name in names}
        results = [outcome.against for outcome in found.values()]
        recovered = sum(r.recovered for r in results)
        low, high = wilson(recovered, len(results))
        rows.append(
            {
                "method": label,
                "ablation": "resampling" if kind == "corrupt" else kind,
                "recovered": f"{recovered} of {len(results)}",
                "95 % interval": f"{low:.0%} to {high:.0%}",
                "AUC": fmean(r.auc for r in results),
                "precision": fmean(r.precision for r in results),
                "recall": fmean(r.recall for r in results),
                "not recovered": ", ".join(name for name, one in found.items() if not one.against.recovered),
            }
        )
    return pd.DataFrame(rows)


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of Wilson for a share; within [0, 1] even if all or none are hits."""
    share, more = hits / n, z**2 / n
    middle, half = share + more / 2, z * sqrt(share * (1 - share) / n + more / (4 * n))
    return (middle - half) / (1 + more), (middle + half) / (1 + more)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--more", action="store_true", help="the further programs, under both ablations")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"with --more: of {', '.join(ANY_METRIC)}")
    asked = parser.parse_args()
    if wrong := set(asked.methods) - set(ANY_METRIC):
        parser.error(f"unknown method {sorted(wrong)[0]!r}; known: {', '.join(ANY_METRIC)}")
    if asked.more:
        for label in asked.methods or ANY_METRIC:
            print(markdown(further_programs(label)), "\n", flush=True)
    else:
        print(markdown(ground_truth({**ANY_METRIC, **ANSWERS}, HAND)), "\n", flush=True)
        print(markdown(ground_truth(ANY_METRIC, NAMES)))
