"""The state of one run of a discovery method: which run it is of."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mechinterp.base.checkpoint import Checkpoint, checkpoint_of
from mechinterp.base.errors import InputError
from mechinterp.base.settings import Parameter
from mechinterp.graphs.graph import Graph
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metric_names import METRICS
from mechinterp.tasks.pairs import Pairs


def open_checkpoint(
    path: str | os.PathLike[str] | None,
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    method: str,
    metric: str,
    settings: Mapping[str, Parameter],
) -> Checkpoint:
    """The checkpoint of one run; its key is a digest of everything that decides the result.

    The batch size does not: a run may go on with another one, except where its state counts batches (`sum_tables`).
    """
    if path is None:
        return Checkpoint()
    if metric not in METRICS:
        raise InputError(
            f"`resume` knows a metric by its name, and {metric!r} is not registered; call mi.register_metric first."
        )
    arguments = [
        model.info.weights_sha256(),
        graph.digest(),
        pairs.digest(),
        method,
        metric,
        sorted((name, str(value)) for name, value in settings.items()),
    ]
    return checkpoint_of(path, arguments)
