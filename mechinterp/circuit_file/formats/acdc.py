"""`acdc` (reading only): the edges that `TLACDCExperiment.save_subgraph` writes, a dictionary by hook points.

Keys are (receiver hook, receiver index, sender hook, sender index), values whether the edge is present. A head's index
is `(None, None, 4)`, anything else's `(None,)`. Senders are `blocks.3.attn.hook_result`, `blocks.3.hook_mlp_out`,
`blocks.0.hook_resid_pre` (or `hook_embed` and `hook_pos_embed`); receivers `blocks.3.hook_q_input`,
`blocks.3.hook_mlp_in` (older files: `hook_resid_mid`) and the last layer's `hook_resid_post`.

Their graph also has edges inside a component (`hook_q_input` to `hook_q` to `hook_result`, `hook_mlp_in` to
`hook_mlp_out`), which ours does not. ACDC may cut these, too, which replaces that whole input, so the edges into it
count as cut. An edge that was cut is False or, more often, missing.

Scores are not read: `save_edges` writes them as a pickle, and pickles are never read.

Source: github.com/ArthurConmy/Automatic-Circuit-Discovery, `acdc/TLACDCExperiment.py`, `TLACDCCorrespondence.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from mechinterp.base.errors import FormatError, clipped
from mechinterp.base.safe_torch import load_plain
from mechinterp.circuit_file.formats.foreign import (
    NO_MLP,
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

NAME = "acdc"
TOOL = "ACDC"
_HOOK = re.compile(r"blocks\.([0-9]{1,4})\.(attn\.)?hook_([a-z_]{1,12})")
_INPUTS = {"hook_embed": "embed", "hook_pos_embed": "pos_embed", "blocks.0.hook_resid_pre": "input"}


def from_acdc(content: bytes, dims: Dims, where: str = "The file") -> Circuit:
    """The circuit in a `.pth` file of `save_subgraph`; the file does not name its model, so `dims` do.

    Nothing in the file is executed. Raises as `circuit_of_acdc` does.
    """
    edges = load_plain(content, where)
    if not isinstance(edges, Mapping):
        raise FormatError(f"{where} must hold a dictionary of edges; got {type(edges).__name__}.")
    return circuit_of_acdc(edges, dims, where)


def circuit_of_acdc(edges: Mapping[object, object], dims: Dims, where: str = "The dictionary") -> Circuit:
    """The circuit of the dictionary that `save_subgraph(return_it=True)` returns.

    Raises FormatError, in one line, for anything else and for edges that the model does not have; UnsupportedError for
    a model with grouped-query attention or parallel layers, which ACDC's graph does not support.
    """
    check_dims(dims, TOOL, (NO_MLP,))
    present: dict[tuple[str, str], bool] = {}
    inside: dict[str, int] = {}  # reader -> edges inside its component that are present
    for key, value in edges.items():
        receiver, sender = _ends(key, where)
        if type(value) is not bool:
            raise FormatError(f"{where}: {clipped(key)} must be true or false; got {clipped(value)}.")
        into = _reader(*receiver, dims)
        out_of = _writer(*sender)
        if into and out_of:
            if (out_of, into) in present:
                raise FormatError(f"{where}: the edge {out_of}->{into} is named twice.")
            present[out_of, into] = value
            continue
        inner = _inside(receiver, sender, dims)
        if not inner:
            raise FormatError(f"{where}: {clipped(key)} is not an edge of ACDC's graph of this model.")
        inside[inner] = inside.get(inner, 0) + value
    if not inside and any(is_there and reader != "logits" for (_, reader), is_there in present.items()):
        raise FormatError(
            f"{where} lists no edge inside a component (hook_q_input to hook_q, hook_mlp_in to hook_mlp_out),"
            " as the files of ACDC do."
        )
    split = {writer for writer, _ in present} & set(_INPUTS.values())
    if len(split) > 1 and "input" in split:
        raise FormatError(f"{where} names both hook_embed and hook_resid_pre; a graph has one of them.")
    graph = bounded_graph(dims, where, split_input=bool(split - {"input"}))
    stated = torch.zeros_like(graph.possible)
    for (writer, reader), is_there in present.items():
        r, w = edge_place(graph, writer, reader, f"{writer}->{reader}", where)
        needed = 0 if reader == "logits" else 2 if reader.endswith(">") else 1
        stated[r, w] = is_there and inside.get(reader, 0) >= needed
    return circuit_from(graph, stated, None, None, where, format=NAME)


Point = tuple[str, int | None]
"""A hook name, and the head in its index (None: no head)."""


def _ends(key: object, where: str) -> tuple[Point, Point]:
    if not isinstance(key, tuple) or len(key) != 4:
        raise FormatError(f"{where}: a key is (receiver, index, sender, index); got {clipped(key)}.")
    found: list[Point] = []
    for name, index in (key[:2], key[2:]):
        head = index[2] if isinstance(index, tuple) and len(index) == 3 else None
        plain = index in ((None,), (None, None, head))
        if type(name) is not str or not plain or not (head is None or (type(head) is int and head >= 0)):
            raise FormatError(f"{where}: a key is (receiver, index, sender, index); got {clipped(key)}.")
        found.append((name, head))
    return found[0], found[1]


def _parts(name: str) -> tuple[int, str]:
    """(layer, the rest) of a hook name: `(3, "attn.result")`; (-1, "") for any other text."""
    found = _HOOK.fullmatch(name)
    return (int(found[1]), (found[2] or "") + found[3]) if found else (-1, "")


def _reader(name: str, head: int | None, dims: Dims) -> str:
    layer, kind = _parts(name)
    if kind in ("q_input", "k_input", "v_input") and head is not None:
        return f"a{layer}.h{head}<{kind[0]}>"
    if kind in ("mlp_in", "resid_mid") and head is None:
        return f"m{layer}"
    return "logits" if kind == "resid_post" and layer == dims.n_layers - 1 and head is None else ""


def _writer(name: str, head: int | None) -> str:
    layer, kind = _parts(name)
    if kind == "attn.result" and head is not None:
        return f"a{layer}.h{head}"
    if kind == "mlp_out" and head is None:
        return f"m{layer}"
    return _INPUTS.get(name, "") if head is None else ""


def _inside(receiver: Point, sender: Point, dims: Dims) -> str:
    """The reader that an edge inside a component belongs to; "" for any other edge."""
    (layer, to), (from_layer, out_of) = _parts(receiver[0]), _parts(sender[0])
    if layer != from_layer or receiver[1] != sender[1] or not 0 <= layer < dims.n_layers:
        return ""
    if to == "mlp_out" and out_of in ("mlp_in", "resid_mid") and receiver[1] is None:
        return f"m{layer}"
    for channel in "qkv":
        steps = ((f"attn.{channel}", f"{channel}_input"), ("attn.result", f"attn.{channel}"))
        if (to, out_of) in steps and receiver[1] is not None and receiver[1] < dims.n_heads:
            return f"a{layer}.h{receiver[1]}<{channel}>"
    return ""


IMPORT = Import(
    has_scores=False,
    has_sizes=False,
    read=lambda path, dims, made: from_acdc(read_file(path), needed(dims), str(path)),
)
