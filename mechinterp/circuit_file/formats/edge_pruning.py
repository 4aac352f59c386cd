"""`edge-pruning` (reading only): the `edges.json` of Edge-Pruning, a list of [writer, reader].

Writers are `tok_embeds` and `pos_embeds` (GPT-2) or `embeds` (Llama), `a3.h4`, `m3`; readers `a3.h4.q`, `m3` and
`resid_post`. Runs without `--with_embedding_nodes`, the default, never cut the embeddings and do not list them: if a
file names no embedding, every edge out of `input` is in the circuit, and the selection says so.

The output of its `acdc_ioi.py`, `{"original": [{"from", "to"}, ...], "extra": [...]}`, is refused: its edges out of the
input no longer say which head they enter. Read the file of ACDC itself (`acdc.py`).

Grouped-query models are refused: one dialect numbers keys and values by key and value head, another by query head,
and the file does not say which. It has no scores.

Source: github.com/princeton-nlp/Edge-Pruning, `src/modeling/modeling_fpt2.py` (`get_edges`),
`baselines_examples/acdc_ioi.py`.
"""

from __future__ import annotations

import re

import torch

from mechinterp.base.canonical_json import parse_json
from mechinterp.base.errors import FormatError, clipped
from mechinterp.circuit_file.formats.foreign import (
    MAX_VALUES,
    bounded_graph,
    check_dims,
    edge_place,
    needed,
    read_file,
)
from mechinterp.circuit_file.formats.format import Import
from mechinterp.circuit_file.formats.score_origin import circuit_from
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.layout import Dims

NAME = "edge-pruning"
TOOL = "Edge-Pruning"
_EMBEDDINGS = {"tok_embeds": "embed", "pos_embeds": "pos_embed", "embeds": "input"}
_HEAD_INPUT = re.compile(r"(a[0-9]{1,4}\.h[0-9]{1,5})\.([qkv])")


def from_edge_pruning(content: bytes, dims: Dims, where: str = "The file") -> Circuit:
    """The circuit in an `edges.json`; the file does not name its model, so `dims` do.

    Raises FormatError, in one line, for anything else and for edges that the model does not have; UnsupportedError for
    a model with grouped-query attention, parallel layers or no MLPs.
    """
    check_dims(dims, TOOL)
    rows = parse_json(content, where, MAX_VALUES)
    if isinstance(rows, dict) and "original" in rows:
        raise FormatError(
            f"{where} is Edge-Pruning's copy of ACDC's graph, in which edges out of the input do not name their heads; "
            "read the file of save_subgraph of ACDC instead."
        )
    if not isinstance(rows, list) or not rows:
        raise FormatError(f"{where} must be a non-empty list of [writer, reader].")
    names: dict[tuple[str, str], str] = {}
    for row in rows:
        if not isinstance(row, list) or len(row) != 2 or not all(isinstance(end, str) for end in row):
            raise FormatError(f"{where}: an edge is [writer, reader]; got {clipped(row)}.")
        ends = (_EMBEDDINGS.get(row[0], str(row[0])), _reader(row[1]))
        if ends in names:
            raise FormatError(f"{where}: the edge {clipped('->'.join(row))} is named twice.")
        names[ends] = "->".join(row)
    inputs = {writer for writer, _ in names} & set(_EMBEDDINGS.values())
    if len(inputs) > 1 and "input" in inputs:
        raise FormatError(f"{where} names both embeds and tok_embeds or pos_embeds; a model has one or the other.")
    graph = bounded_graph(dims, where, split_input=bool(inputs - {"input"}))
    stated = torch.zeros_like(graph.possible)
    for (writer, reader), shown in names.items():
        stated[edge_place(graph, writer, reader, shown, where)] = True
    if not inputs:
        stated[:, 0] = True
    embeddings = "in the file" if inputs else "never cut: every edge out of input was added"
    return circuit_from(graph, stated, None, None, where, format=NAME, embeddings=embeddings)


def _reader(name: str) -> str:
    found = _HEAD_INPUT.fullmatch(name)
    return f"{found[1]}<{found[2]}>" if found else {"resid_post": "logits", "logits": ""}.get(name, name)


IMPORT = Import(
    has_scores=False,
    has_sizes=False,
    read=lambda path, dims, made: from_edge_pruning(read_file(path), needed(dims), str(path)),
)
