"""Aggregated attribution graphs as JSON: the tables of nodes and edges, column by column, and what they are of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd

from mechinterp.analysis.attribution_graph.aggregate import EDGE_COLUMNS, NODE_COLUMNS, POSITIONS, AggregatedGraph
from mechinterp.analysis.attribution_graph.graph import KINDS
from mechinterp.base.atomic_write import write_whole
from mechinterp.base.canonical_json import parse_json
from mechinterp.base.errors import FormatError, clip, clipped
from mechinterp.circuit_file.formats.foreign import MAX_VALUES, read_file

FORMAT, VERSION = "mechinterp aggregated attribution graph", 1
HELD = ("norms", "patterns", "nothing")
KEYS = ("format", "version", "model", "bases", "held", "positions", "graphs", "of_errors", "words", "nodes", "edges")
TEXTS = ("node", "kind", "basis", "text", "source", "target")
WHOLE = {"layer": 10_000, "position": 2**20, "feature": 2**31}
"""Columns of whole numbers, each below this; -1 means none."""


def save_aggregated_graph(path: str | Path, graph: AggregatedGraph) -> None:
    """Return None after writing an aggregated graph as JSON, completely or not at all.

    Args:
        path: Where; by convention `NAME.graphs.json`.
        graph: The graph. Its tables are written column by column, as `pandas.DataFrame` takes them.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": graph.model,
        "bases": dict(graph.bases),
        "held": graph.held,
        "positions": graph.positions,
        "graphs": graph.graphs,
        "of_errors": list(graph.of_errors),
        "words": [list(words) for words in graph.words],
        "nodes": {name: graph.nodes[name].tolist() for name in NODE_COLUMNS},
        "edges": {name: graph.edges[name].tolist() for name in EDGE_COLUMNS},
    }
    write_whole(path, json.dumps(content, allow_nan=False, separators=(",", ":")).encode("utf-8"))


def load_aggregated_graph(path: str | Path) -> AggregatedGraph:
    """The aggregated graph in a file of `save_aggregated_graph`.

    Args:
        path: The file.

    Raises FormatError, in one line, for a file that is too large or no such graph.
    """
    where = clip(str(path), 200)
    content = parse_json(read_file(Path(path)), where, MAX_VALUES)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FormatError(f"{where} is not an aggregated attribution graph; `save_aggregated_graph` writes them.")
    try:
        return _read(cast(dict[str, Any], content))
    except _Wrong as error:
        raise FormatError(f"{where} is not an aggregated attribution graph: {error}.") from None


class _Wrong(Exception):
    """What is wrong with a file, without its name."""


def _read(content: Mapping[str, Any]) -> AggregatedGraph:
    _need(content["version"] == VERSION if "version" in content else False, f"its version is not {VERSION}")
    _need(set(content) == set(KEYS), f"it must have the keys {', '.join(KEYS)}; got {clipped(sorted(content))}")
    n = content["graphs"]
    _need(type(n) is int and n >= 1, f"the number of graphs is {clipped(n)}")
    _need(isinstance(content["model"], str), "the model is not a text")
    _need(content["held"] in HELD, f"`held` is {clipped(content['held'])}")
    _need(content["positions"] in POSITIONS, f"`positions` is {clipped(content['positions'])}")
    bases = content["bases"]
    _need(isinstance(bases, dict) and all(isinstance(one, str) for one in bases.values()), "the bases are not texts")
    shares = _column(content["of_errors"], n, "of_errors", float)
    words = content["words"]
    _need(isinstance(words, list) and len(words) == n, f"there must be the words of {n} prompts")
    read = tuple(tuple(_column(one, None, "words", str)) for one in words)
    nodes, edges = _table(content["nodes"], "nodes", NODE_COLUMNS), _table(content["edges"], "edges", EDGE_COLUMNS)
    names = nodes["node"].tolist()
    known = set(names)
    _need(len(known) == len(names), "two nodes have the same name")
    _need(set(nodes["kind"]) <= set(KINDS), f"kinds of nodes are {', '.join(KINDS)}")
    strange = {*edges["source"], *edges["target"]} - known
    _need(not strange, f"an edge names {clipped(min(strange, default=''))}, which is not a node")
    _need(not edges.duplicated(["source", "target"]).any(), "an edge is given twice")
    for name, most in WHOLE.items():
        _need(bool(nodes[name].between(-1, most - 1).all()), f"{name} is a number from -1 to below {most:,}")
    for table in (nodes, edges):
        _need(bool(((table["frequency"] > 0) & (table["frequency"] <= 1)).all()), "a frequency is not a share")
    return AggregatedGraph(
        nodes, edges, n, content["positions"], tuple(shares), read, content["model"], bases, content["held"]
    )


def _table(content: object, name: str, columns: Sequence[str]) -> pd.DataFrame:
    _need(isinstance(content, dict) and set(content) == set(columns), f"{name} must have {', '.join(columns)}")
    given = cast(dict[str, Any], content)
    first = given[columns[0]]
    n = len(first) if isinstance(first, list) else 0
    kinds = {one: str if one in TEXTS else int if one in WHOLE else float for one in columns}
    return pd.DataFrame(
        {one: pd.Series(_column(given[one], n, one, kinds[one]), dtype=_TYPES[kinds[one]]) for one in columns}
    )


_TYPES = {str: object, int: "int64", float: "float64"}


def _column(values: object, n: int | None, name: str, kind: type) -> list[Any]:
    """The values of a column, each of this kind; a number may be whole."""
    fits = (int, float) if kind is float else (kind,)
    given = cast(list[Any], values) if isinstance(values, list) else None
    _need(given is not None and all(type(one) in fits for one in given), f"{name} must be a list of {kind.__name__}")
    assert given is not None
    _need(n is None or len(given) == n, f"{name} must have {n} values")
    _need(kind is not float or all(map(math.isfinite, given)), f"{name} must be finite")
    return [kind(one) for one in given]


def _need(fine: bool, words: str) -> None:
    if not fine:
        raise _Wrong(words)
