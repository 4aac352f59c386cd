"""EAP-IG's graph (MIB uses the same), which both its JSON and its `.pt` files hold.

Nodes (`input`, `a{L}.h{H}`, `m{L}`, `logits`) and edges (`a0.h0->m1`, `a0.h0->a5.h5<q>`) have the same names as in this
package; `input` is what enters the first layer. Their tables are `[writer, reader]` in the order of our graph, the
transpose of ours. Every head has its own q, k and v inputs: models with grouped-query attention are run "ungrouped",
which is another graph, so these are refused. `cfg` gives layers, heads, d_model and whether attention and MLP are
parallel.

Scores: a score is the rise, when the edge is replaced, of the metric that was passed to `attribute`, and the file does
not name that metric. MIB's `run_attribution.py` passes a loss (`loss=True`: minus the logit difference), so positive
= the edge helps, as in this package; MIB's evaluation (CPR) takes the largest signed scores first, so this is the sign
that is written. But the example in MIB's repository, `circuits/ioi-eap-ig.json`, has the opposite sign:
`a9.h9->logits`, a name mover of IOI, has -0.28, and `a10.h7->logits`, a negative name mover, +0.20. So scores are
read only with `Made.rise_of`.

Source: github.com/hannamw/EAP-IG, `src/eap/graph.py` and `attribute.py`; github.com/hannamw/MIB-circuit-track.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.base.errors import FormatError, clipped
from mechinterp.circuit_file.formats.foreign import PARALLEL, bounded_graph, check_dims, check_holds
from mechinterp.circuit_file.formats.score_origin import Made, circuit_from
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import Graph, graph_of
from mechinterp.models.layout import Dims

TOOL = "EAP-IG"
TAKES = (PARALLEL,)
SIZES = ("n_layers", "n_heads", "d_model")
LOST = "Lost: the model, task, metric, ablation, how the scores were made, roles, results."
"""What of a circuit file no file of EAP-IG's can hold."""


@dataclass(frozen=True, eq=False)
class EapIgFile:
    """The content of such a file on our graph (every head with its own key and value); the sign of scores is unchanged.

    Sizes that `cfg` does not state (d_head, d_vocab, d_vocab_out, n_ctx) are 0 in the dims of the graph.
    """

    graph: Graph
    in_graph: Bool[Tensor, "reader writer"] = field(repr=False)
    scores: Float[Tensor, "reader writer"] | None = field(repr=False)


def cfg_of(graph: Graph) -> dict[str, int | bool]:
    """The `cfg` for a graph. Raises UnsupportedError if EAP-IG does not support such a graph."""
    check_holds(graph, TOOL, TAKES)
    d = graph.dims
    return {
        "n_layers": d.n_layers,
        "n_heads": d.n_heads,
        "parallel_attn_mlp": d.parallel,
        "d_model": d.d_model,
    }


def nodes_in_graph(circuit: Circuit) -> dict[str, bool]:
    """Whether each node is in the circuit, in the order of EAP-IG; `logits` always is."""
    used = set(circuit.nodes)
    return {**{name: name in used for name in circuit.graph.writers}, "logits": True}


def graph_of_cfg(cfg: object, where: str) -> Graph:
    """The graph that a `cfg` describes. Raises FormatError if a size is missing, invalid or too large."""
    if not isinstance(cfg, Mapping):
        raise FormatError(f"{where}: cfg must be a mapping; got {type(cfg).__name__}.")
    found: dict[str, int] = {}
    for name in SIZES:
        value = cfg.get(name)
        if type(value) is not int or not 1 <= value <= 2**31:
            raise FormatError(f"{where}: cfg.{name} must be a whole number, at least 1; got {clipped(value)}.")
        found[name] = value
    parallel = cfg.get("parallel_attn_mlp")
    if type(parallel) is not bool:
        raise FormatError(f"{where}: cfg.parallel_attn_mlp must be true or false; got {clipped(parallel)}.")
    layers, heads, d_model = (found[name] for name in SIZES)
    kv_heads = cfg.get("n_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        raise FormatError(f"{where}: cfg states {clipped(kv_heads)} key and value heads for {heads} heads.")
    dims = Dims(layers, heads, heads, d_model, 0, 0, 0, 0, has_mlp=True, parallel=parallel, causal=True)
    return bounded_graph(dims, where)


def circuit_of_file(found: EapIgFile, dims: Dims | None, made: Made | None, name: str, where: str) -> Circuit:
    """The circuit in such a file, on the graph of `dims`.

    Without `dims` the unknown sizes of the graph are 0: the circuit can be shown and compared, but not run on a model.
    Raises FormatError if `dims` are those of another model, UnsupportedError if the format does not support them.
    """
    graph = found.graph
    if dims is not None:
        check_dims(dims, TOOL, TAKES)
        got = (graph.dims.n_layers, graph.dims.n_heads, graph.dims.d_model, graph.dims.parallel)
        wanted = (dims.n_layers, dims.n_heads, dims.d_model, dims.parallel)
        if got != wanted:
            raise FormatError(
                f"{where} is of another model: it has (layers, heads, d_model, parallel) {got}, the model {wanted}."
            )
        graph = graph_of(dims)
    return circuit_from(graph, found.in_graph, found.scores, made, where, format=name)


def mapping_with(value: object, needed: set[str], allowed: set[str], where: str) -> Mapping[str, Any]:
    """The mapping. Raises FormatError, which names the key, if one is missing or not allowed."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise FormatError(f"{where} must be a mapping of names; got {type(value).__name__}.")
    for key in sorted(needed - set(value)):
        raise FormatError(f"{where} lacks the key {key!r}.")
    for key in value:
        if key in ("neurons", "neurons_scores", "neurons_in_graph", "nodes_scores"):
            raise FormatError(
                f"{where} has {key}: only circuits and scores of edges are read, not of neurons or nodes."
            )
        if key not in needed | allowed:
            raise FormatError(f"{where} has an unknown key: {clipped(key)}.")
    return value
