"""Shared parts of the readers of other tools' files: what a format supports, size limits, untrusted names."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path

from mechinterp.base.errors import FormatError, InputError, UnsupportedError, clipped
from mechinterp.base.plain_files import read_bounded
from mechinterp.circuit_file.limits import MAX_GRAPH_CELLS
from mechinterp.graphs.graph import Graph, graph_of
from mechinterp.models.layout import Dims

MAX_BYTES = 128 * 2**20
"""The largest file that is read; the JSON of EAP-IG for an 8B model has 117 MB."""
MAX_VALUES = 2**23
"""Values in a JSON file; that file has 7 million."""
PARALLEL = "parallel attention and MLP"
HYBRID = "layers that differ (a hybrid model)"
SPLIT_INPUT = "separate token and position embeddings"
NO_MLP = "layers without an MLP"
GROUPED = "grouped-query attention (a key or value head that several query heads share)"


def read_file(path: Path) -> bytes:
    """The content of a file of another tool. Raises FormatError for one that is too large or cannot be read."""
    return read_bounded(path, MAX_BYTES)


def needed(dims: Dims | None) -> Dims:
    """The dimensions. Raises InputError if they are missing, for a format that does not hold them."""
    if dims is None:
        raise InputError("This format does not say of what model it is; give dims=, such as model.dims.")
    return dims


def check_holds(graph: Graph, tool: str, takes: Collection[str] = ()) -> None:
    """Return None if the format of `tool` supports this graph.

    All formats support heads, MLPs and edges at all positions; `takes` lists what this one supports besides. Raises
    UnsupportedError, which names what is not supported.
    """
    if not graph.plain:
        part = "edges at named positions" if graph.positions else "nodes chosen as one"
        if graph.split_writers:
            part = "neurons as separate nodes" if graph.neurons else "parts of MLPs as separate nodes"
            part = "features of dictionaries as nodes" if graph.features else part
        raise _unsupported(tool, part)
    if graph.split_input and SPLIT_INPUT not in takes:
        raise _unsupported(tool, SPLIT_INPUT)
    check_dims(graph.dims, tool, takes)


def check_dims(dims: Dims, tool: str, takes: Collection[str] = ()) -> None:
    """Return None if the format of `tool` supports models of these dimensions. Raises UnsupportedError otherwise."""
    for part, present in (
        (GROUPED, dims.n_kv_heads != dims.n_heads),
        (PARALLEL, dims.parallel),
        (NO_MLP, not dims.has_mlp),
        (HYBRID, bool(dims.layers)),
    ):
        if present and part not in takes:
            raise _unsupported(tool, part)


def bounded_graph(dims: Dims, where: str, *, split_input: bool = False) -> Graph:
    """The plain graph of these dimensions. Raises FormatError, before it is built, if it is too large."""
    writers = 2 + dims.n_layers * (dims.n_heads + 1)
    readers = 1 + dims.n_layers * (dims.n_heads + 2 * dims.n_kv_heads + 1)
    if writers * readers > MAX_GRAPH_CELLS:
        raise FormatError(f"{where} describes a model of {writers} writers and {readers} readers, which is too large.")
    return graph_of(dims, split_input=split_input)


def edge_place(graph: Graph, writer: str, reader: str, shown: str, where: str) -> tuple[int, int]:
    """(Reader row, writer row) of an edge, called `shown` in the file. Raises FormatError for an unknown edge."""
    for name, kind, known in ((writer, "writer", graph.writer_index), (reader, "reader", graph.reader_index)):
        if name not in known:
            near = difflib.get_close_matches(name[:40], list(known), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise FormatError(f"{where}: edge {clipped(shown)} has a {kind} that the model does not have.{hint}")
    r, w = graph.reader_index[reader], graph.writer_index[writer]
    if not graph.possible[r, w]:
        raise FormatError(f"{where}: {clipped(shown)} is not an edge: {writer} is not computed before {reader}.")
    return r, w


def _unsupported(tool: str, part: str) -> UnsupportedError:
    return UnsupportedError(
        f"The format of {tool} does not support {part}; such a circuit is neither written nor read."
    )
