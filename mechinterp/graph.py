"""The graph of a model: which writers can reach which readers. Immutable; no scores and no membership."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from mechinterp.errors import InputError, UnsupportedError
from mechinterp.hooks import HookManager
from mechinterp.models.layout import Dims
from mechinterp.registry import unknown
from mechinterp.sites import Node, Site


@dataclass(frozen=True, eq=False)
class Graph:
    """Writers and readers of the residual stream in the order in which the model computes them.

    Writers: `input` (or `embed` and `pos_embed`), then per layer its heads and its MLP. Readers: per layer the q
    inputs of its heads, the k and v inputs (per KV head), and its MLP; at last `logits`. GPT-2 small has 157
    writers, 445 readers and 32,491 edges.
    """

    dims: Dims
    split_input: bool
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    possible: Bool[Tensor, "reader writer"] = field(repr=False)
    """Whether the edge exists."""
    feeds: Bool[Tensor, "reader writer"] = field(repr=False)
    """Whether the reader is an input of the writer (q of a head: that head; k and v: every head of the group)."""

    def __repr__(self) -> str:
        return f"Graph({len(self.writers)} writers, {len(self.readers)} readers, {self.n_edges} edges)"

    @property
    def n_edges(self) -> int:
        """How many edges the graph has."""
        return int(self.possible.sum())

    @property
    def inputs(self) -> tuple[str, ...]:
        """The writers that are no component of the model: `input`, or `embed` and `pos_embed`."""
        return self.writers[: self.n_inputs]

    @property
    def n_inputs(self) -> int:
        """1, or 2 when the input is split."""
        return 2 if self.split_input else 1

    @cached_property
    def writer_index(self) -> dict[str, int]:
        """The row of each writer."""
        return {name: i for i, name in enumerate(self.writers)}

    @cached_property
    def reader_index(self) -> dict[str, int]:
        """The row of each reader."""
        return {name: i for i, name in enumerate(self.readers)}

    def head_writers(self, layer: int) -> slice:
        """The rows of a layer's heads among the writers."""
        first = self.n_inputs + layer * (self.dims.n_heads + self.dims.has_mlp)
        return slice(first, first + self.dims.n_heads)

    def mlp_writer(self, layer: int) -> int:
        """The row of a layer's MLP among the writers."""
        return self.head_writers(layer).stop

    def channel_readers(self, layer: int, channel: str) -> slice:
        """The rows of a layer's q, k or v inputs among the readers."""
        d = self.dims
        first = layer * (d.n_heads + 2 * d.n_kv_heads + d.has_mlp)
        counts = {"q": d.n_heads, "k": d.n_kv_heads, "v": d.n_kv_heads}
        for name, count in counts.items():
            if name == channel:
                return slice(first, first + count)
            first += count
        raise unknown("channel", channel, counts)

    def mlp_reader(self, layer: int) -> int:
        """The row of a layer's MLP among the readers."""
        return self.channel_readers(layer, "v").stop

    def n_writers_before(self, layer: int, *, mlp: bool) -> int:
        """How many writers come before the attention of `layer` (or before its MLP)."""
        heads = self.head_writers(layer)
        return heads.stop if mlp and not self.dims.parallel else heads.start

    def edge_names(self) -> tuple[str, ...]:
        """Every edge's name, in order of reader, then writer."""
        return tuple(self.edge_name(int(r), int(w)) for r, w in self.possible.nonzero())

    def edge_name(self, reader: int, writer: int) -> str:
        """The name of one edge, such as `a0.h0->a1.h2<q>`."""
        return f"{self.writers[writer]}->{self.readers[reader]}"

    def edge_index(self, name: str) -> tuple[int, int]:
        """(reader row, writer row) of an edge. Raises InputError for an edge that the graph does not have."""
        writer, _, reader = name.partition("->")
        if writer not in self.writer_index:
            raise unknown("writer", writer, self.writers)
        if reader not in self.reader_index:
            raise unknown("reader", reader, self.readers)
        r, w = self.reader_index[reader], self.writer_index[writer]
        if not self.possible[r, w]:
            raise InputError(f"There is no edge {name!r}: {writer} is not computed before {reader}.")
        return r, w

    def mask_of(self, names: object) -> Bool[Tensor, "reader writer"]:
        """The mask that is True at the named edges. Raises InputError for unknown and doubled names."""
        mask = torch.zeros_like(self.possible)
        for name in names if not isinstance(names, str) else [names]:  # type: ignore[union-attr]
            r, w = self.edge_index(name)
            if mask[r, w]:
                raise InputError(f"The edge {name!r} is named twice.")
            mask[r, w] = True
        return mask

    def digest(self) -> str:
        """sha256 over writers, readers and edges."""
        rows = [self.writers, self.readers, self.possible.nonzero().tolist()]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def build_graph(model: HookManager, *, split_input: bool = False) -> Graph:
    """The graph of all edges that the model has.

    `split_input` makes `embed` and `pos_embed` separate writers. Raises UnsupportedError when the model has no
    position embedding to split off, or its sum is not what enters the first layer (Gemma scales its embedding).
    """
    if split_input:
        _check_split(model)
    return graph_of(model.dims, split_input=split_input)


def graph_of(dims: Dims, *, split_input: bool = False) -> Graph:
    """The graph of a model of these dimensions."""
    writers = [Node("embed"), Node("pos_embed")] if split_input else [Node("input")]
    readers: list[str] = []
    before: list[int] = []  # per reader, how many writers come before it
    feeds: list[tuple[int, int]] = []
    grouped = dims.n_kv_heads != dims.n_heads
    group = dims.n_heads // dims.n_kv_heads
    for layer in range(dims.n_layers):
        start = len(writers)
        for channel, count in (("q", dims.n_heads), ("k", dims.n_kv_heads), ("v", dims.n_kv_heads)):
            for head in range(count):
                shared = channel != "q" and grouped
                node = Node("kv_head" if shared else "head", layer, head)
                width = group if shared else 1
                feeds += [(len(readers), start + head * width + i) for i in range(width)]
                readers.append(f"{node}<{channel}>")
                before.append(start)
        writers += [Node("head", layer, head) for head in range(dims.n_heads)]
        if dims.has_mlp:
            feeds.append((len(readers), len(writers)))
            readers.append(str(Node("mlp", layer)))
            before.append(start if dims.parallel else len(writers))
            writers.append(Node("mlp", layer))
    readers.append("logits")
    before.append(len(writers))
    possible = torch.arange(len(writers))[None, :] < torch.tensor(before)[:, None]
    fed = torch.zeros_like(possible)
    for reader, writer in feeds:
        fed[reader, writer] = True
    return Graph(dims, split_input, tuple(map(str, writers)), tuple(readers), possible, fed)


def _check_split(model: HookManager) -> None:
    sites = [Site("embed"), Site("pos_embed")]
    for site in sites:
        if not model.has(site):
            raise UnsupportedError(
                f"{model.info.architecture} has no '{site}' to split off; build the graph with one `input`."
            )
    tokens = torch.arange(min(model.dims.d_vocab, model.dims.n_ctx, 8), device=model.device)[None]
    values = model.run(tokens, record=[*sites, Site("resid_pre", 0)]).values
    total = values[sites[0]] + values[sites[1]]
    if not torch.allclose(total, values[Site("resid_pre", 0)], rtol=1e-4, atol=1e-5):
        raise UnsupportedError(
            f"In {model.info.architecture} embed + pos_embed is not what enters the first layer; build the graph "
            "with one `input`."
        )
