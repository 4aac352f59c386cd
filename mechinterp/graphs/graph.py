"""The graph of a model: which writers can reach which readers. Immutable; no scores and no membership."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, compress
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.registry import unknown
from mechinterp.graphs.families.experts import Experts, RoutedMlp
from mechinterp.graphs.families.family import Moment, NodeFamily, Ports
from mechinterp.graphs.families.features import Features, check_together, features_of
from mechinterp.graphs.families.heads import Heads, WholeAttention
from mechinterp.graphs.families.inputs import Input
from mechinterp.graphs.families.mixer import Mixer
from mechinterp.graphs.families.mlp import Mlp
from mechinterp.graphs.families.neurons import Neurons
from mechinterp.graphs.input_split import check_input_split
from mechinterp.models.experts import check_experts, is_routed, n_experts
from mechinterp.models.feature_basis import NodeBasis
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.layout import Dims
from mechinterp.models.sites import Site

REST = "rest"
"""The position of every token that has no name of its own."""
LEVELS = ("edge", "node")
MOST_CELLS = 2**26
"""Readers x writers of the largest graph; a table of scores for it takes 256 MiB. An 8B model has 1.7 million."""


@dataclass(frozen=True, eq=False)
class Graph:
    """Writers and readers of the residual stream in the order in which the model computes them.

    Writers: `input` (or `embed` and `pos_embed`), then per layer its heads, its MLP and the neurons or features that
    were taken out of the MLP. Readers: per layer the q inputs of its heads, the k and v inputs (per KV head), and its
    MLP; at last `logits`. GPT-2 small has 157 writers, 445 readers and 32,491 edges. Both come from `families`, which
    know what their nodes read and write.

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
    """Whether the reader is an input of the writer (q of a head: that head; k and v: every head of the group). With a
    cross-layer transcoder an MLP's reader is also one of later MLPs: their rests are less what its features write."""
    positions: tuple[str, ...] = ()
    """The positions that edges are told apart by, the last one `rest`; empty: an edge is one at all positions."""
    answers: str = ""
    """Where the answers are: one of `positions`, or ""."""
    families: tuple[NodeFamily, ...] = field(default=(), repr=False)
    """The kinds of nodes in the order of the model, with their maps."""
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
        """Whether its edges are at all positions, its level edges and its heads and MLPs whole."""
        return not self.positions and self.level == "edge" and not self.split_writers

    @property
    def neurons(self) -> tuple[tuple[int, ...], ...]:
        """Per layer the neurons that are writers by themselves; () if there are none at all."""
        own = {family.layer: family.numbers for family in self.families if isinstance(family, Neurons)}
        return tuple(own.get(layer, ()) for layer in range(self.dims.n_layers)) if own else ()

    @property
    def experts(self) -> tuple[int, ...]:
        """Per layer how many experts are writers by themselves; () if there are none at all."""
        own = {family.layer: family.count for family in self.families if isinstance(family, Experts)}
        return tuple(own.get(layer, 0) for layer in range(self.dims.n_layers)) if own else ()

    @property
    def features(self) -> tuple[Features, ...]:
        """The features of dictionaries that are writers by themselves, a family for every basis."""
        return tuple(family for family in self.families if isinstance(family, Features))

    def with_bases(self, bases: Iterable[NodeBasis]) -> Graph:
        """The same graph with the bases of its features, so that it can be run.

        Raises InputError, naming it, for a basis that is missing or has another sha256 or other sites.
        """
        known = {basis.sha256: basis for basis in bases}
        families: list[NodeFamily] = []
        for family in self.families:
            if isinstance(family, Features):
                if family.sha256 not in known:
                    raise InputError(
                        f"The basis '{family.basis}' with sha256 {family.sha256[:12]}... is not among those given."
                    )
                chosen = known[family.sha256].chosen(family.numbers)
                if (*chosen.sites_in, *chosen.sites_out) != (family.site_in, family.site_out, *family.later):
                    raise InputError(f"The basis '{family.basis}' has other sites than the graph says.")
                family = replace(family, chosen=chosen)
            families.append(family)
        return replace(self, families=tuple(families))

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

    # -- rows by family -------------------------------------------------------------------------------------------

    @cached_property
    def _rows(self) -> dict[NodeFamily, tuple[slice, slice]]:
        """The writers and the ports of each family."""
        rows: dict[NodeFamily, tuple[slice, slice]] = {}
        writer = port = 0
        for family in self.families:
            n_writers, n_ports = len(family.writers), sum(len(ports.names) for ports in family.ports)
            rows[family] = slice(writer, writer + n_writers), slice(port, port + n_ports)
            writer, port = writer + n_writers, port + n_ports
        return rows

    def writers_of(self, family: NodeFamily) -> slice:
        """The rows of a family among the writers."""
        return self._rows[family][0]

    def ports_of(self, family: NodeFamily) -> slice:
        """The rows of a family's inputs among the ports: the readers without their positions."""
        return self._rows[family][1]

    def readers_of(self, family: NodeFamily) -> slice:
        """The rows of a family's inputs among the readers: by port, then by position."""
        ports, n = self._rows[family][1], self.n_positions
        return slice(n * ports.start, n * ports.stop)

    def sites_of(self, family: NodeFamily) -> Iterator[tuple[Ports, slice]]:
        """The inputs of a family with their rows among the ports, a site at a time."""
        first = self._rows[family][1].start
        for ports in family.ports:
            yield ports, slice(first, first + len(ports.names))
            first += len(ports.names)

    @property
    def n_ports(self) -> int:
        """How many readers there are, positions not told apart; the last one is the logits."""
        return self._rows[self.families[-1]][1].stop + 1

    @cached_property
    def everywhere(self) -> tuple[bool, ...]:
        """Whether each reader serves its writers at all later positions, as keys and values do."""
        sites = [ports for family in self.families for ports in family.ports]
        return (*(p.everywhere for p in sites for _ in range(len(p.names) * self.n_positions)), False)

    @cached_property
    def readers_before(self) -> tuple[int, ...]:
        """How many readers come before each layer; the last entry: before the logits."""
        counts = [0] * (self.dims.n_layers + 1)
        for family in self.families:
            counts[family.layer + 1] += sum(len(ports.names) for ports in family.ports)
        return tuple(n * self.n_positions for n in accumulate(counts))

    def layer_of_reader(self, reader: int) -> int:
        """The layer of a reader; the number of layers for the logits."""
        return bisect_right(self.readers_before, reader) - 1 if reader < len(self.readers) - 1 else self.dims.n_layers

    def layer_of(self, writer: int) -> int:
        """The layer of a writer; 0 for the inputs."""
        return next(family.layer for family, (rows, _) in self._rows.items() if writer < rows.stop)

    def n_writers_at(self, moment: Moment) -> int:
        """How many writers are in the residual stream there: the first so many."""
        return sum(len(family.writers) for family in self.families if family.written <= moment)

    @cached_property
    def split_writers(self) -> tuple[str, ...]:
        """Writers of which parts are writers by themselves: `m3` is then the rest, not what the MLP writes."""
        rows = (row for family in self.families for row in family.rows)
        return tuple(dict.fromkeys(row.part_of for row in rows if row.part_of is not None))

    def parts_of(self, family: NodeFamily) -> Iterator[NodeFamily]:
        """The families that are parts of writers of this one."""
        return (part for part in self.families if part.part_of in family.writers)

    # -- rows by layer --------------------------------------------------------------------------------------------

    def _family(self, kind: type[NodeFamily], layer: int) -> NodeFamily:
        for family in self.families:
            if isinstance(family, kind) and family.layer == layer:
                return family
        raise InputError(f"Layer {layer} has no {'MLP' if kind is Mlp else 'heads'}.")

    def head_writers(self, layer: int) -> slice:
        """The rows of a layer's heads among the writers; the one of what takes their place."""
        return self.writers_of(self._family(Mixer if self.dims.layer(layer).mixer else Heads, layer))

    def cells(self, layer: int) -> list[int | None]:
        """The rows among the writers of a layer's heads and its MLP; None where a layer lacks one that others have.

        Of heads that are one writer (or of what takes their place), its row for each.
        """
        own, n_heads = self.dims.layer(layer), self.dims.n_heads
        rows = self.head_writers(layer) if own.n_heads or own.mixer else slice(0, 0)
        heads: list[int | None] = list(range(rows.start, rows.stop))
        heads = heads * n_heads if len(heads) == 1 else [*heads, *[None] * (n_heads - len(heads))]
        mlp = self.mlp_writer(layer) if own.mlp else None
        return [*heads, *[mlp] * self.dims.has_mlp]

    def mlp_writer(self, layer: int) -> int:
        """The row of a layer's MLP among the writers."""
        return self.writers_of(self._family(Mlp, layer)).start

    def neuron_writers(self, layer: int) -> slice:
        """The rows among the writers of the neurons that are writers by themselves."""
        first = self.mlp_writer(layer) + 1
        return slice(first, first + (len(self.neurons[layer]) if self.neurons else 0))

    def channel_readers(self, layer: int, channel: str) -> slice:
        """The rows of a layer's q, k or v inputs among the readers (by head, then by position)."""
        sites = self.sites_of(self._family(Heads, layer))
        found = {ports.site.kind: rows for ports, rows in sites if isinstance(ports.site, Site)}
        if channel not in found:
            raise unknown("channel", channel, found)
        return slice(found[channel].start * self.n_positions, found[channel].stop * self.n_positions)

    def mlp_readers(self, layer: int) -> slice:
        """The rows of a layer's MLP among the readers, one per position."""
        return self.readers_of(self._family(Mlp, layer))

    def n_writers_before(self, layer: int, *, mlp: bool) -> int:
        """How many writers come before the attention of `layer` (or before its MLP)."""
        return self.n_writers_at((layer, int(mlp and not self.dims.mlp_reads_input(layer))))

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
            rows += [marks] if any(marks := [family.fingerprint for family in self.families]) else []
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
    experts: bool = False,
    features: Mapping[Any, Sequence[int]] | Sequence[NodeBasis] = (),
    parts: Sequence[NodeFamily] = (),
) -> Graph:
    """The graph of all edges that the model has.

    Raises InputError for invalid names and numbers and for a graph too large for a dense table; UnsupportedError if
    the model has no position embedding to split off, or its sum is not what enters the first layer (Gemma scales its
    embedding), an MLP has no separate neurons, its experts cannot be told apart exactly, or a basis has features that
    are not parts of MLPs or of one attention (of a state of the residual stream, for instance).

    Args:
        model: The model.
        split_input: Whether `embed` and `pos_embed` are separate writers.
        level: "edge", or "node": then all edges out of a node are chosen together.
        positions: Names of positions that the pairs have. Edges at each of them, and at all other tokens (`rest`), are
            then separate.
        answers: The position where the metric reads; by default `end` if it is among `positions`, else `rest`.
        neurons: Neurons, by layer, that are writers of their own, apart from their MLP; see `top_neurons`.
        experts: Whether every expert of a mixture of experts is a writer of its own (`m3.e5`), and the router's input a
            reader (`m3<router>`).
        features: Features of dictionaries that are writers of their own (`m3.f17`): the numbers of each basis, such as
            `top_features` gives them, or bases, of which all features are then nodes. What is left of the MLP (other
            features and the error) stays its writer, `m3`. Features of a transcoder also have an input, `m3.f17<in>`.
            Where features are of the attention's output, all heads of the layer are one writer, `a3`. A feature of a
            cross-layer transcoder is one writer, of what it writes in all its layers.
        parts: Families of nodes that are parts of what heads or MLPs write, as `mechinterp.graphs.families` describes.
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
    taken = features.items() if isinstance(features, Mapping) else [(basis, None) for basis in features]
    own = [features_of(basis, numbers, model.dims) for basis, numbers in taken]
    for part in (*own, *parts):
        part.check(model)
    return graph_of(
        model.dims,
        split_input=split_input,
        level=level,
        positions=positions,
        answers=answers,
        neurons=chosen,
        experts=experts_of(model) if experts else (),
        parts=(*own, *parts),
    )


def graph_of(
    dims: Dims,
    *,
    split_input: bool = False,
    level: str = "edge",
    positions: Sequence[str] = (),
    answers: str | None = None,
    neurons: Sequence[Sequence[int]] = (),
    experts: Sequence[int] = (),
    parts: Sequence[NodeFamily] = (),
) -> Graph:
    """The graph of a model of these dimensions; for the arguments see `build_graph`.

    `neurons` and `experts` are given layer by layer: the numbers of the neurons, and how many experts there are.
    Features are given as families among `parts`.
    """
    names = _position_names(positions)
    where = "" if not names else answers or ("end" if "end" in names else REST)
    if where and where not in names:
        raise unknown("position of the answers", where, names)
    if any(len(set(some)) != len(some) for some in neurons) or len(neurons) not in (0, dims.n_layers):
        raise InputError("`neurons` names each neuron once, layer by layer.")
    if len(experts) not in (0, dims.n_layers) or any(count < 0 for count in experts):
        raise InputError("`experts` is the number of experts, layer by layer.")
    if (any(neurons) or any(experts)) and not dims.has_mlp:
        raise InputError("The model has no MLP, so it has no neurons or experts.")
    inputs = sum(len(ports.names) for part in parts for ports in part.ports)
    n_parts = sum(map(len, neurons)) + sum(experts) + sum(len(part.writers) for part in parts)
    _check_size(dims, len(names), n_parts, inputs)
    features = [part for part in parts if isinstance(part, Features)]
    check_together(dims, features)
    whole = {part.layer for part in features if part.of_attention}
    families = _with_parts(
        whole_families(dims, split_input=split_input, experts=experts, whole_attention=whole),
        [
            *(Neurons(layer, tuple(own)) for layer, own in enumerate(neurons) if own),
            *(Experts(layer, count) for layer, count in enumerate(experts) if count),
            *parts,
        ],
    )
    readers: list[str] = []
    before: list[int] = []  # per reader, how many writers come before it
    feeds: list[tuple[int, int]] = []
    writers = [name for family in families for name in family.writers]
    row = {name: i for i, name in enumerate(writers)}
    if len(row) != len(writers):
        raise InputError(f"Two families have a node {next(n for n in row if writers.count(n) > 1)!r}.")
    shared = [(family.part_of, name) for family in families for name in family.writers if not family.ports]
    # What is written later than it is read: the rest there depends on the reader that the parts follow, too.
    rests = {
        (ports.follows, row.part_of) for one in families for row in one.rows[1:] for ports in one.ports if ports.follows
    }
    written = [family.written for family in families for _ in family.writers]
    if written != sorted(written):
        raise InputError("The families are not in the order in which the model computes their nodes.")
    for family in families:
        n_before = 0 if family.reads is None else bisect_right(written, family.reads)
        for ports in family.ports:
            for name, own in zip(ports.names, ports.feeds, strict=True):
                fed = [family.writers[i] for i in own]
                fed += [part for whole, part in shared if whole in fed]
                if ports.follows is None:
                    fed += [rest for site, rest in rests if ports.site == site and rest is not None]
                for end in [f"@{position}" for position in names] or [""]:
                    feeds.extend((len(readers), row[node]) for node in fed)
                    readers.append(name + end)
                    before.append(n_before)
    readers.append("logits")
    before.append(len(writers))
    possible = torch.arange(len(writers))[None, :] < torch.tensor(before)[:, None]
    fed = torch.zeros_like(possible)
    fed[tuple(torch.tensor(feeds, dtype=torch.long).reshape(-1, 2).T)] = True
    return Graph(dims, split_input, tuple(writers), tuple(readers), possible, fed, names, where, tuple(families), level)


def experts_of(model: HookManager) -> list[int]:
    """How many experts every layer has. Raises UnsupportedError if no layer has some, or they do not add up."""
    layers = [layer for layer in range(model.dims.n_layers) if is_routed(model, layer)]
    if not layers:
        raise UnsupportedError(f"{model.info.architecture} has no mixture of experts; leave out `experts`.")
    for layer in layers:
        check_experts(model, layer)
    return [n_experts(model, layer) if layer in layers else 0 for layer in range(model.dims.n_layers)]


def whole_families(
    dims: Dims, *, split_input: bool = False, experts: Sequence[int] = (), whole_attention: Collection[int] = ()
) -> list[NodeFamily]:
    """The inputs, and layer by layer the heads (or one writer, that of what takes their place) and the MLP."""
    families: list[NodeFamily] = [Input("embed"), Input("pos_embed")] if split_input else [Input()]
    for layer in range(dims.n_layers):
        own = dims.layer(layer)
        if own.n_heads:
            heads = WholeAttention if layer in whole_attention else Heads
            families.append(heads(layer, own.n_heads, own.n_kv_heads, dims.parallel))
        elif own.mixer:
            families.append(Mixer(layer, dims.parallel))
        mlp = RoutedMlp if experts and experts[layer] else Mlp
        families += [mlp(layer, dims.mlp_reads_input(layer))] * own.mlp
    return families


def _with_parts(families: list[NodeFamily], parts: Sequence[NodeFamily]) -> list[NodeFamily]:
    """The families, each followed by the parts of its writers."""
    nodes = {name for family in families for name in family.writers}
    for part in parts:
        for whole in (row.part_of for row in part.rows):
            if whole not in nodes:
                raise InputError(f"{part.writers[0]!r} is part of {whole!r}, which is not a node of the model.")
    found: list[NodeFamily] = []
    for family in families:
        found += [family, *(part for part in parts if part.part_of in family.writers)]
    return found


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


def _check_size(dims: Dims, n_positions: int, n_parts: int, n_inputs: int) -> None:
    layers = [dims.layer(layer) for layer in range(dims.n_layers)]
    writers = 2 + sum(max(own.n_heads, 1) + 1 for own in layers) + n_parts
    in_layers = sum(max(own.n_heads + 2 * own.n_kv_heads, 1) + 1 for own in layers)
    readers = 1 + (in_layers + n_inputs) * max(1, n_positions)
    if writers * readers > MOST_CELLS:
        raise InputError(
            f"A table of {readers:,} readers x {writers:,} writers takes {4 * writers * readers / 2**30:.1f} GiB "
            "and is not made; take fewer neurons or features (the strongest first: top_neurons, top_features) or "
            "positions."
        )
