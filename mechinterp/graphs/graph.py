"""The graph of a model: which writers can reach which readers. Immutable; no scores and no membership."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.registry import unknown
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.layout import Dims
from mechinterp.models.sites import Node, Site

REST = "rest"
"""The position of every token that has no name of its own."""
LEVELS = ("edge", "node")
MOST_CELLS = 2**26
"""Readers x writers of the largest graph; a table of scores for it takes 256 MiB. An 8B model has 1.7 million."""


@dataclass(frozen=True, eq=False)
class Graph:
    """Writers and readers of the residual stream in the order in which the model computes them.

    Writers: `input` (or `embed` and `pos_embed`), then per layer its heads, its MLP and the neurons that were taken out
    of the MLP. Readers: per layer the q inputs of its heads, the k and v inputs (per KV head), and its MLP; at last
    `logits`. GPT-2 small has 157 writers, 445 readers and 32,491 edges.

    With named positions each reader is there once per position (`a9.h9<q>@end`, `a9.h9<q>@rest`): an edge is then
    between two nodes at one position. `logits` is one reader, where the answers are.
    """

    dims: Dims
    split_input: bool
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    possible: Bool[Tensor, "reader writer"] = field(repr=False)
    """Whether the edge exists."""
    feeds: Bool[Tensor, "reader writer"] = field(repr=False)
    """Whether the reader is an input of the writer (q of a head: that head; k and v: every head of the group)."""
    positions: tuple[str, ...] = ()
    """The positions that edges are told apart by, the last one `rest`; empty: an edge is one at all positions."""
    answers: str = ""
    """Where the answers are: one of `positions`, or ""."""
    neurons: tuple[tuple[int, ...], ...] = ()
    """Per layer the neurons that are writers by themselves; the MLP's own writer is the others together."""
    level: str = "edge"
    """What is chosen as one: an `edge`, or a `node`: all edges out of it (at one position, where those are named)."""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise unknown("level", self.level, LEVELS)

    def __repr__(self) -> str:
        more = f", {self.n_units} nodes to choose" if self.level == "node" else ""
        where = f", at {', '.join(self.positions)}" if self.positions else ""
        return f"Graph({len(self.writers)} writers, {len(self.readers)} readers, {self.n_edges} edges{more}{where})"

    @property
    def plain(self) -> bool:
        """Whether its edges are at all positions, its level edges and its MLPs whole."""
        return not self.positions and self.level == "edge" and not any(self.neurons)

    @property
    def n_positions(self) -> int:
        """Rows of each reader but `logits`: 1 when positions are not told apart."""
        return max(1, len(self.positions))

    @cached_property
    def position(self) -> Int[Tensor, " reader"]:
        """The row of `positions` of every reader; 0 when positions are not told apart."""
        places = torch.arange(len(self.readers)) % self.n_positions
        places[-1] = self.positions.index(self.answers) if self.positions else 0
        return places

    @cached_property
    def unit(self) -> Int[Tensor, "reader writer"]:
        """Which edges are chosen together: numbers from 0 up in order, -1 where there is no edge."""
        units = torch.full(self.possible.shape, -1)
        if self.level == "edge":
            units[self.possible] = torch.arange(self.n_edges)
            return units
        key = torch.arange(len(self.writers)) * self.n_positions + self.position[:, None]
        units[self.possible] = key[self.possible].unique(return_inverse=True)[1]
        return units

    @cached_property
    def n_units(self) -> int:
        """How many edges, or nodes, there are to choose from."""
        return int(self.unit.max()) + 1

    @cached_property
    def first_of_unit(self) -> Int[Tensor, "unit 2"]:
        """(reader, writer) of the first edge of every unit."""
        flat = self.unit.flatten()
        places = torch.arange(len(flat))
        first = torch.full((self.n_units,), len(flat)).scatter_reduce(0, flat[flat >= 0], places[flat >= 0], "amin")
        return torch.stack([first // len(self.writers), first % len(self.writers)], 1)

    def unit_names(self) -> tuple[str, ...]:
        """Every edge's or node's name, in order of `unit`."""
        if self.level == "edge":
            return self.edge_names()
        return tuple(self.node_name(w, int(self.position[r])) for r, w in self.first_of_unit.tolist())

    def node_name(self, writer: int, position: int) -> str:
        """The name of a writer, at a position where they are told apart: `a9.h9`, `a9.h9@end`."""
        return f"{self.writers[writer]}@{self.positions[position]}" if self.positions else self.writers[writer]

    @property
    def n_edges(self) -> int:
        """How many edges the graph has."""
        return int(self.possible.sum())

    @property
    def inputs(self) -> tuple[str, ...]:
        """The writers that are not components of the model: `input`, or `embed` and `pos_embed`."""
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
        neurons = sum(len(some) for some in self.neurons[:layer])
        first = self.n_inputs + layer * (self.dims.n_heads + self.dims.has_mlp) + neurons
        return slice(first, first + self.dims.n_heads)

    def mlp_writer(self, layer: int) -> int:
        """The row of a layer's MLP among the writers."""
        return self.head_writers(layer).stop

    def neurons_of(self, layer: int) -> tuple[int, ...]:
        """The neurons of a layer that are writers by themselves."""
        return self.neurons[layer] if self.neurons else ()

    @property
    def split_mlps(self) -> tuple[str, ...]:
        """MLPs of which neurons are writers by themselves: `m3` is the others together, not what the MLP writes."""
        return tuple(str(Node("mlp", layer)) for layer, own in enumerate(self.neurons) if own)

    def neuron_writers(self, layer: int) -> slice:
        """The rows of those neurons among the writers."""
        first = self.mlp_writer(layer) + 1
        return slice(first, first + len(self.neurons_of(layer)))

    def layer_of(self, writer: int) -> int:
        """The layer of a writer; 0 for the inputs."""
        layers = range(self.dims.n_layers - 1)
        return sum(writer >= self.head_writers(layer + 1).start for layer in layers)

    def channel_readers(self, layer: int, channel: str) -> slice:
        """The rows of a layer's q, k or v inputs among the readers (by head, then by position)."""
        d, n = self.dims, self.n_positions
        first = layer * (d.n_heads + 2 * d.n_kv_heads + d.has_mlp)
        counts = {"q": d.n_heads, "k": d.n_kv_heads, "v": d.n_kv_heads}
        for name, count in counts.items():
            if name == channel:
                return slice(n * first, n * (first + count))
            first += count
        raise unknown("channel", channel, counts)

    def mlp_readers(self, layer: int) -> slice:
        """The rows of a layer's MLP among the readers, one per position."""
        first = self.channel_readers(layer, "v").stop
        return slice(first, first + self.n_positions)

    def n_writers_before(self, layer: int, *, mlp: bool) -> int:
        """How many writers come before the attention of `layer` (or before its MLP)."""
        heads = self.head_writers(layer)
        return heads.stop if mlp and not self.dims.parallel else heads.start

    def edge_names(self) -> tuple[str, ...]:
        """Every edge's name, in order of reader, then writer."""
        return tuple(self.edge_name(r, w) for r, w in self.possible.nonzero().tolist())

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
        if w >= self._n_before[r]:
            raise InputError(f"There is no edge {name!r}: {writer} is not computed before {reader}.")
        return r, w

    def mask_of(self, names: object) -> Bool[Tensor, "reader writer"]:
        """The mask that is True at the named edges. Raises InputError for unknown and doubled names."""
        found: dict[tuple[int, int], None] = {}
        for name in names if not isinstance(names, str) else [names]:  # type: ignore[union-attr]
            edge = self.edge_index(name)
            if edge in found:
                raise InputError(f"The edge {name!r} is named twice.")
            found[edge] = None
        mask = torch.zeros_like(self.possible)
        mask[tuple(torch.tensor(list(found), dtype=torch.long).reshape(-1, 2).T)] = True
        return mask

    @cached_property
    def _n_before(self) -> list[int]:
        """How many writers every reader has: the first so many."""
        return self.possible.sum(1).tolist()

    def digest(self) -> str:
        """sha256 over writers, readers and edges, and what is chosen as one where that is not edges."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        made = hashlib.sha256()
        if self.plain:  # the JSON of [writers, readers, [[reader, writer], ...]], one reader at a time
            made.update(f"[{json.dumps(self.writers)}, {json.dumps(self.readers)}, [".encode())
            numbers, first = [str(w) for w in range(len(self.writers))], True
            for r, row in enumerate(self.possible):
                writers = list(compress(numbers, row.tolist()))
                if writers:
                    made.update(("" if first else ", ").encode())
                    made.update(f"[{r}, {f'], [{r}, '.join(writers)}]".encode())
                    first = False
            made.update(b"]]")
        else:  # of every reader the first so many writers are possible
            rows = [self.writers, self.readers, self.possible.sum(1).tolist(), self.level, self.answers]
            made.update(json.dumps(rows).encode())
        return made.hexdigest()


def build_graph(
    model: HookManager,
    *,
    split_input: bool = False,
    level: str = "edge",
    positions: Sequence[str] = (),
    answers: str | None = None,
    neurons: Mapping[int, Sequence[int]] | None = None,
) -> Graph:
    """The graph of all edges that the model has.

    Raises InputError for invalid names and numbers and for a graph too large for a dense table; UnsupportedError if
    the model has no position embedding to split off, or its sum is not what enters the first layer (Gemma scales its
    embedding), or an MLP has no separate neurons.

    Args:
        model: The model.
        split_input: Whether `embed` and `pos_embed` are separate writers.
        level: "edge", or "node": then all edges out of a node are chosen together.
        positions: Names of positions that the pairs have. Edges at each of them, and at all other tokens (`rest`), are
            then separate.
        answers: The position where the metric reads; by default `end` if it is among `positions`, else `rest`.
        neurons: Neurons, by layer, that are writers of their own, apart from their MLP; see `top_neurons`.
    """
    if split_input:
        check_input_split(model)
    chosen: list[tuple[int, ...]] = []
    if neurons:
        for layer in sorted(set(neurons)):
            if not 0 <= layer < model.dims.n_layers:
                raise InputError(f"There is no layer {layer}; the model has layers 0 to {model.dims.n_layers - 1}.")
            d_mlp = model.layout.neurons(layer).W_out.shape[0]
            if not all(type(n) is int and 0 <= n < d_mlp for n in neurons[layer]):
                raise InputError(f"Layer {layer} has neurons 0 to {d_mlp - 1}; got {list(neurons[layer])[:5]}.")
        chosen = [tuple(sorted(neurons.get(layer, ()))) for layer in range(model.dims.n_layers)]
    return graph_of(
        model.dims, split_input=split_input, level=level, positions=positions, answers=answers, neurons=chosen
    )


def graph_of(
    dims: Dims,
    *,
    split_input: bool = False,
    level: str = "edge",
    positions: Sequence[str] = (),
    answers: str | None = None,
    neurons: Sequence[Sequence[int]] = (),
) -> Graph:
    """The graph of a model of these dimensions; for the arguments see `build_graph`."""
    names = _position_names(positions)
    where = "" if not names else answers or ("end" if "end" in names else REST)
    if where and where not in names:
        raise unknown("position of the answers", where, names)
    if any(len(set(some)) != len(some) for some in neurons) or len(neurons) not in (0, dims.n_layers):
        raise InputError("`neurons` names each neuron once, layer by layer.")
    if any(neurons) and not dims.has_mlp:
        raise InputError("The model has no MLP, so it has no neurons.")
    _check_size(dims, len(names), sum(map(len, neurons)))
    writers = [Node("embed"), Node("pos_embed")] if split_input else [Node("input")]
    readers: list[str] = []
    before: list[int] = []  # per reader, how many writers come before it
    feeds: list[tuple[int, int]] = []
    grouped = dims.n_kv_heads != dims.n_heads
    group = dims.n_heads // dims.n_kv_heads
    ends = [f"@{name}" for name in names] or [""]

    def add(reader: str, n_before: int, fed: range) -> None:
        for end in ends:
            feeds.extend((len(readers), writer) for writer in fed)
            readers.append(reader + end)
            before.append(n_before)

    for layer in range(dims.n_layers):
        start = len(writers)
        for channel, count in (("q", dims.n_heads), ("k", dims.n_kv_heads), ("v", dims.n_kv_heads)):
            for head in range(count):
                shared = channel != "q" and grouped
                node = Node("kv_head" if shared else "head", layer, head)
                width = group if shared else 1
                add(f"{node}<{channel}>", start, range(start + head * width, start + (head + 1) * width))
        writers += [Node("head", layer, head) for head in range(dims.n_heads)]
        if dims.has_mlp:
            own = neurons[layer] if neurons else ()
            n_before = start if dims.parallel else len(writers)
            add(str(Node("mlp", layer)), n_before, range(len(writers), len(writers) + 1 + len(own)))
            writers.append(Node("mlp", layer))
            writers += [Node("neuron", layer, neuron) for neuron in own]
    readers.append("logits")
    before.append(len(writers))
    possible = torch.arange(len(writers))[None, :] < torch.tensor(before)[:, None]
    fed = torch.zeros_like(possible)
    fed[tuple(torch.tensor(feeds, dtype=torch.long).reshape(-1, 2).T)] = True
    return Graph(
        dims,
        split_input,
        tuple(map(str, writers)),
        tuple(readers),
        possible,
        fed,
        names,
        where,
        tuple(tuple(some) for some in neurons) if any(neurons) else (),
        level,
    )


def _position_names(positions: Sequence[str]) -> tuple[str, ...]:
    names = tuple(name for name in positions if name != REST)
    if positions and not names:
        raise InputError(f"Name positions besides {REST!r}, which is all other tokens.")
    if isinstance(positions, str) or len(set(names)) != len(names):
        raise InputError(f"`positions` are different names, as in ['S2', 'end']; got {positions!r}.")
    for name in names:
        if not 1 <= len(name) <= 30 or any(sign in name for sign in "@<>, ") or not name.isprintable():
            raise InputError(
                f"A position's name has 1 to 30 letters, and no '@', '<', '>', ',' or space; got {name!r}."
            )
    return (*names, REST) if names else ()


def _check_size(dims: Dims, n_positions: int, n_neurons: int) -> None:
    writers = 2 + dims.n_layers * (dims.n_heads + 1) + n_neurons
    readers = 1 + dims.n_layers * (dims.n_heads + 2 * dims.n_kv_heads + 1) * max(1, n_positions)
    if writers * readers > MOST_CELLS:
        raise InputError(
            f"A table of {readers:,} readers x {writers:,} writers takes {4 * writers * readers / 2**30:.1f} GiB "
            "and is not made; take fewer neurons (the strongest first: top_neurons) or positions."
        )


def check_input_split(model: HookManager) -> None:
    """Return None if the input of the first layer is embed + pos_embed. Raises UnsupportedError otherwise."""
    sites = [Site("embed"), Site("pos_embed")]
    for site in sites:
        if not model.has(site):
            raise UnsupportedError(f"{model.info.architecture} has no '{site}' to split off; keep it as one `input`.")
    tokens = torch.arange(min(model.dims.d_vocab, model.dims.n_ctx, 8), device=model.device)[None]
    values = model.run(tokens, record=[*sites, Site("resid_pre", 0)]).values
    total = values[sites[0]] + values[sites[1]]
    if not torch.allclose(total, values[Site("resid_pre", 0)], rtol=1e-4, atol=1e-5):
        raise UnsupportedError(
            f"In {model.info.architecture} embed + pos_embed is not what enters the first layer; keep it as one "
            "`input`."
        )
