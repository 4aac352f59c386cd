"""Transfer: circuits of several tasks, each on the pairs of each task. `evaluate` for every couple, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from mechinterp.base.errors import InputError
from mechinterp.evaluation.faithfulness import Evaluation, evaluate
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True, eq=False)
class Transfer:
    """What `transfer` found; the six axes and the metric are in each evaluation."""

    circuits: Mapping[str, Circuit]
    evaluations: Mapping[tuple[str, str], Evaluation] = field(repr=False)
    """By (circuit, pairs)."""

    def to_frame(self) -> pd.DataFrame:
        """One row for every circuit and every pairs: size, faithfulness with its interval, the random circuits'.

        `jaccard` and `shared` (the share of the circuit's own edges) are of the edges in common with the circuit that
        has the name of the pairs; NaN where there is none.
        """
        rows: list[dict[str, Any]] = []
        for (name, task), found in self.evaluations.items():
            kept, native = self.circuits[name].kept, self.circuits.get(task)
            both = float((kept & native.kept).sum()) if native is not None else float("nan")
            either = float((kept | native.kept).sum()) if native is not None else float("nan")
            random = found.random_faithfulness
            rows.append(
                {
                    "circuit": name,
                    "pairs": task,
                    "edges": found.n_edges,
                    "faithfulness": found.faithfulness,
                    "low": found.faithfulness_ci[0],
                    "high": found.faithfulness_ci[1],
                    "random_mean": sum(random) / len(random) if random else float("nan"),
                    "random_max": max(random, default=float("nan")),
                    "kl": found.kl,
                    "jaccard": both / either if either else float("nan"),
                    "shared": both / found.n_edges if found.n_edges else float("nan"),
                }
            )
        return pd.DataFrame(rows)


def transfer(
    model: HookManager, circuits: Mapping[str, Circuit], pairs: Mapping[str, Pairs], **settings: Any
) -> Transfer:
    """Every circuit on every task's pairs; `settings` are those of `evaluate` (metric, replacement, seed, ...).

    Random circuits have the size of the circuit they stand beside, and are the same on all pairs. Give a circuit the
    name of the pairs it was found for to see its edges in common with the others. Cost: that of `evaluate`, for every
    couple. Raises InputError for circuits of different graphs, for none, and what `evaluate` raises.
    """
    if not circuits or not pairs:
        raise InputError("Give at least one circuit and one set of pairs, by name.")
    if len({circuit.graph.digest() for circuit in circuits.values()}) > 1:
        raise InputError("The circuits are of different graphs; circuits of one graph can be compared edge by edge.")
    found = {
        (name, task): evaluate(model, circuit, some, **settings)
        for name, circuit in circuits.items()
        for task, some in pairs.items()
    }
    return Transfer(dict(circuits), found)
