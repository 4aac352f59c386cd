"""`best_edges`: the circuit of n edges with the highest total, by integer programming. Nothing in it needs pruning.

Source: the idea of Nikankin et al. 2025 (arXiv 2510.25786, "MIB Shared Task"); the formulation here is our own. A node
is *used* when one of its out-edges is chosen. Then, in a graph without cycles, every chosen edge lies on a path from
an input to the logits exactly when

- a chosen edge's writer is an input or used,
- a used node has a chosen out-edge and a chosen edge into one of the readers that feed it,
- a chosen edge's reader is `logits` or feeds a used node (a shared k or v reader: at least one node of its group).

So there is one 0/1 variable per node and one constraint per edge and condition. Given the nodes, the edges are a cover
problem over two families of disjoint sets, whose corners are whole numbers; so edges need not be declared so, but under
grouped-query attention, where the sets overlap.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, hstack, vstack
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.graphs.circuit import on_paths
from mechinterp.graphs.graph import Graph

TIME_LIMIT = 600.0
"""Seconds that HiGHS may take by default."""
LARGEST = 1e4
"""The largest coefficient of the objective: HiGHS stops at an absolute gap of 1e-6, so totals are exact to 1e-10 of the
strongest edge."""
ROUND = 1e-6
"""How far from 0 or 1 a chosen or left-out edge may be."""


def best_edges(
    graph: Graph, strength: Float[Tensor, "reader writer"], n: int, *, time_limit: float = TIME_LIMIT
) -> Bool[Tensor, "reader writer"]:
    """The n edges of the highest total strength of all sets whose every edge lies on a path from input to logits.

    Exactly n, as with the other rules, so that a size means one thing and all edges are the whole model; with negative
    strengths that can take harmful edges in. Of several best sets HiGHS chooses one, the same each time with the same
    version of scipy.

    Cost: seconds to half a minute on one core for the 32,491 edges of GPT-2 small. Raises InputError when HiGHS does
    not prove within `time_limit` seconds that its set is the best: an unproven one depends on the machine's speed.
    """
    if isinstance(time_limit, bool) or not 0 < time_limit < float("inf"):
        raise InputError(f"time_limit must be a number of seconds above 0; got {time_limit!r}.")
    values = strength[graph.possible].double().numpy()
    constraints = _constraints(graph, n)
    chosen = _solve(values, constraints, n, time_limit, whole=bool((graph.feeds.sum(1) > 1).any()))
    if np.abs(chosen - chosen.round()).max() > ROUND:  # between two equally good corners
        chosen = _solve(values, constraints, n, time_limit, whole=True)
    mask = torch.zeros_like(graph.possible)
    mask[graph.possible] = torch.from_numpy(chosen > 0.5)
    if int(mask.sum()) != n or not torch.equal(on_paths(graph, mask), mask):
        raise InputError(
            "rule='ilp': the edges that HiGHS returned are not a circuit (a numerical failure); use rule='greedy'."
        )
    return mask


def _solve(
    values: Float[np.ndarray, " edge"], constraints: list[Any], n: int, time_limit: float, *, whole: bool
) -> Float[np.ndarray, " edge"]:
    """1 for every chosen edge; `whole` declares the edges' variables whole numbers."""
    n_nodes = constraints[0].A.shape[1] - len(values)
    largest = float(np.abs(values).max()) or 1.0
    found: Any = milp(
        np.concatenate([-values * (LARGEST / largest), np.zeros(n_nodes)]),
        integrality=np.concatenate([np.full(len(values), float(whole)), np.ones(n_nodes)]),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": time_limit, "mip_rel_gap": 0.0},
    )
    if found.status != 0:
        known = found.x is not None and found.mip_gap is not None
        gap = f"the best so far is proven to within {found.mip_gap:.2%}" if known else "none was found so far"
        raise InputError(
            f"rule='ilp': HiGHS did not prove within {time_limit:g} seconds which circuit of {n} edges is the best "
            f"({gap}); give a higher time_limit=, another number of edges, or rule='greedy'."
        )
    return found.x[: len(values)]


def _constraints(graph: Graph, n: int) -> list[Any]:
    """Over the edges' variables (in the order of `Graph.edge_names`), then one per writer: whether it is used."""
    readers, writers = graph.possible.nonzero().numpy().T
    n_edges = len(readers)
    # [edge, writer]: who wrote the edge, and whom it feeds; inputs are always there and need nothing.
    writes = csr_array((np.ones(n_edges), (np.arange(n_edges), writers)), shape=(n_edges, len(graph.writers)))
    feeds = csr_array(graph.feeds.numpy()[readers].astype(float))
    of_node = writers >= graph.n_inputs
    to_node = readers < len(graph.readers) - 1
    edge, used = eye_array(n_edges).tocsr(), eye_array(len(graph.writers)).tocsr()[graph.n_inputs :]
    rows = [
        hstack([edge[of_node], -writes[of_node]]),
        hstack([edge[to_node], -feeds[to_node]]),
        hstack([-writes.T.tocsr()[graph.n_inputs :], used]),
        hstack([-feeds.T.tocsr()[graph.n_inputs :], used]),
    ]
    size = np.concatenate([np.ones(n_edges), np.zeros(len(graph.writers))])
    return [LinearConstraint(vstack(rows, format="csr"), -np.inf, 0), LinearConstraint(size[None], n, n)]
