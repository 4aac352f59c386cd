"""How the scores in another tool's file were made (the file does not say), and the circuit made from such a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.base.errors import FormatError, InputError
from mechinterp.base.settings import Parameter
from mechinterp.graphs.circuit import Circuit, on_paths
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.scores import Scores


@dataclass(frozen=True)
class Made:
    """How the scores in a file were made, which you must know from elsewhere.

    Args:
        method: the method of discovery.
        metric: the metric of the task.
        replacement: what a replaced edge carries.
        examples: how many examples the scores are a mean over.
        rise_of: what a score is the rise of when the edge is replaced: a `loss` (positive = the edge helps, as in this
            package) or a `performance` such as the logit difference (negative = the edge helps; the sign is reversed).
            The files do not say which, and MIB's own repository has both: see `eap_ig.py`.
    """

    method: str
    metric: str
    replacement: str
    examples: int
    rise_of: Literal["loss", "performance"]

    def __post_init__(self) -> None:
        if type(self.examples) is not int or self.examples < 1:
            raise InputError(
                f"examples is how many examples the scores are a mean over, at least 1; got {self.examples!r}."
            )
        if self.rise_of not in ("loss", "performance"):
            raise InputError(f"rise_of is 'loss' or 'performance'; got {self.rise_of!r}.")


def circuit_from(
    graph: Graph,
    stated: Bool[Tensor, "reader writer"],
    table: Float[Tensor, "reader writer"] | None,
    made: Made | None,
    where: str,
    **selection: Parameter,
) -> Circuit:
    """The circuit of the edges that a file states, without those on no path; with its scores if `made` is given.

    `n_selected` of the circuit is the number of stated edges. A file of scores only gives a circuit without edges;
    `select` makes one from its `graph` and `scores`. Raises FormatError if the file states nothing that can be used.
    """
    kept = on_paths(graph, stated)
    n_stated = int(stated.sum())
    if n_stated and not bool(kept.any()):
        raise FormatError(f"{where}: none of the {n_stated} edges lies on a path from the input to the logits.")
    if not n_stated and (table is None or made is None):
        hint = "" if table is None else " Its scores are read if made= says how they were made."
        raise FormatError(f"{where} states no edge that is in the circuit.{hint}")
    scores = None
    if table is not None and made is not None:
        sign = 1 if made.rise_of == "loss" else -1
        total = sign * table.double() * made.examples
        scores = Scores(graph, total, made.examples, made.method, made.metric, made.replacement)
    return Circuit(graph, kept, n_stated, {"rule": "imported", **selection}, scores)
