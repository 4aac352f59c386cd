"""Transfer: circuits of several tasks, each evaluated on the pairs of each task, in one table."""

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
    """The evaluation of every circuit on all pairs; each evaluation states its metric and its ablation."""

    circuits: Mapping[str, Circuit]
    evaluations: Mapping[tuple[str, str], Evaluation] = field(repr=False)
    """By (circuit, pairs)."""

    def to_frame(self) -> pd.DataFrame:
        """One row per circuit and task: size, faithfulness with its interval and that of random circuits, KL, overlap.

        The overlap is with the circuit that has the name of the pairs: the Jaccard index, and the share of the
        circuit's own edges (`shared`); NaN if no circuit has that name.
        """
        rows: list[dict[str, Any]] = []
        for (name, task), result in self.evaluations.items():
            kept, native = self.circuits[name].kept, self.circuits.get(task)
            both = float((kept & native.kept).sum()) if native is not None else float("nan")
            either = float((kept | native.kept).sum()) if native is not None else float("nan")
            random = result.random_faithfulness
            rows.append(
                {
                    "circuit": name,
                    "pairs": task,
                    "edges": result.n_edges,
                    "faithfulness": result.faithfulness,
                    "low": result.faithfulness_ci[0],
                    "high": result.faithfulness_ci[1],
                    "random_mean": sum(random) / len(random) if random else float("nan"),
                    "random_max": max(random, default=float("nan")),
                    "kl": result.kl,
                    "jaccard": both / either if either else float("nan"),
                    "shared": both / result.n_edges if result.n_edges else float("nan"),
                }
            )
        return pd.DataFrame(rows)


def transfer(
    model: HookManager, circuits: Mapping[str, Circuit], pairs: Mapping[str, Pairs], **settings: Any
) -> Transfer:
    """Every circuit evaluated on every task's pairs. Cost: that of `evaluate` for each circuit and task.

    The random circuits have the size of the circuit they are compared with and are the same on all pairs.

    Args:
        model: The model that the circuits were found in.
        circuits: Circuits of one graph, by name; give each the name of the task it was found on to see its overlap
            with the others.
        pairs: The pairs of each task, by name.
        **settings: Keyword arguments of `evaluate`: metric, replacement, seed, ...

    Raises:
        InputError: There are no circuits or no pairs, the circuits are of different graphs, or `evaluate` raises.
    """
    if not circuits or not pairs:
        raise InputError("Give at least one circuit and one set of pairs, by name.")
    if len({circuit.graph.digest() for circuit in circuits.values()}) > 1:
        raise InputError("The circuits are of different graphs; only circuits of one graph can be compared.")
    evaluations = {
        (name, task): evaluate(model, circuit, task_pairs, **settings)
        for name, circuit in circuits.items()
        for task, task_pairs in pairs.items()
    }
    return Transfer(dict(circuits), evaluations)
