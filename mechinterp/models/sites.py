"""The names of sites, nodes and edges, each with one text form.

A *site* is one tensor of the forward pass (`z.3`: the head outputs of layer 3 before the output projection).
A *node* is a unit that writes to the residual stream (`a9.h9`, `m3`, `input`) or `logits`.
An *edge* goes from a writer to one input of a reader: `a0.h0->a5.h5<q>`, `m11->logits`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown

GLOBAL_SITES = ("embed", "pos_embed", "resid_final", "final_norm")
"""Sites without a layer: embeddings, the final norm's input, and its output (the unembedding's input)."""

LAYER_SITES = (
    "resid_pre",
    "attn_in",
    "q",
    "k",
    "v",
    "scores",
    "pattern",
    "z",
    "attn_raw",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_pre",
    "mlp_up",
    "mlp_post",
    "mlp_raw",
    "mlp_out",
    "resid_post",
)
"""Sites of one layer. `attn_in` and `mlp_in` are after the norm; `attn_out` and `mlp_out` are what is added to
the residual stream (after a post-norm where the model has one; `attn_raw` and `mlp_raw` are before it, and exist only
there); `q`, `k` are before any rotation. `mlp_pre` is the input of the activation function, `mlp_up` the factor by
which a gated MLP multiplies its output, `mlp_post` the product (the neurons)."""


@dataclass(frozen=True, order=True)
class Site:
    """One tensor of the forward pass.

    Args:
        kind: One of `LAYER_SITES` or `GLOBAL_SITES`, such as `z` or `resid_final`.
        layer: The layer, counted from 0; None for the sites outside the layers.

    Raises InputError for an unknown kind, a missing layer, or a layer where none belongs.

    >>> str(Site("z", 3)), Site.parse("resid_pre.0")
    ('z.3', Site(kind='resid_pre', layer=0))
    """

    kind: str
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in LAYER_SITES + GLOBAL_SITES:
            raise unknown("site", self.kind, LAYER_SITES + GLOBAL_SITES)
        if (self.layer is None) != (self.kind in GLOBAL_SITES):
            needs = "takes no layer" if self.kind in GLOBAL_SITES else f"needs a layer, as in '{self.kind}.0'"
            raise InputError(f"Site {self.kind!r} {needs}.")

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"

    @staticmethod
    def parse(text: str) -> Site:
        """The site with this text.

        Args:
            text: `kind.layer` (`z.3`), or `kind` alone for a site outside the layers (`resid_final`).

        Raises InputError for anything else.
        """
        kind, dot, layer = text.partition(".")
        if dot and not layer.isdecimal():
            raise InputError(f"Site {text!r} is not 'kind.layer' with a whole number, as in 'z.3'.")
        return Site(kind, int(layer) if dot else None)


_NODE = re.compile(
    r"a(?P<a>\d{1,4})\.(?P<unit>h|kv)(?P<head>\d{1,5})|m(?P<m>\d{1,4})(?:\.n(?P<neuron>\d{1,7}))?"
    r"|input|embed|pos_embed|logits"
)


@dataclass(frozen=True, order=True)
class Node:
    """A node of the graph: a unit that writes to the residual stream, or the logits.

    Args:
        kind: `input`, `embed`, `pos_embed`, `head`, `kv_head`, `mlp`, `neuron` or `logits`. A `kv_head` (`a5.kv1`) is
            a reader only: the key/value head that several query heads share. A `neuron` (`m3.n17`) is a neuron that
            is a separate node of its MLP.
        layer: The layer; -1 for input, embed, pos_embed and logits.
        head: The number of the head or neuron in its layer; -1 for the other kinds.

    >>> Node.parse("a9.h6"), str(Node("mlp", 3))
    (Node(kind='head', layer=9, head=6), 'm3')
    """

    kind: str
    layer: int = -1
    head: int = -1

    def __str__(self) -> str:
        if self.kind == "head":
            return f"a{self.layer}.h{self.head}"
        if self.kind == "kv_head":
            return f"a{self.layer}.kv{self.head}"
        if self.kind == "neuron":
            return f"m{self.layer}.n{self.head}"
        return f"m{self.layer}" if self.kind == "mlp" else self.kind

    @staticmethod
    def parse(text: str) -> Node:
        """The node with this text.

        Args:
            text: `a9.h9`, `a5.kv1`, `m3`, `m3.n17`, `input`, `embed`, `pos_embed` or `logits`.

        Raises InputError for anything else.
        """
        found = _NODE.fullmatch(text)
        if not found:
            raise InputError(f"{text!r} is not a node; nodes look like 'a9.h9', 'm3', 'input' or 'logits'.")
        if found["a"] is not None:
            return Node("head" if found["unit"] == "h" else "kv_head", int(found["a"]), int(found["head"]))
        if found["neuron"] is not None:
            return Node("neuron", int(found["m"]), int(found["neuron"]))
        return Node("mlp", int(found["m"])) if found["m"] is not None else Node(text)


@dataclass(frozen=True, order=True)
class Edge:
    """An edge of the graph, from a writer to one input of a reader.

    Args:
        writer: The node that writes.
        reader: The node that reads.
        channel: Which input of a head is read: `q`, `k` or `v`; empty for MLPs and the logits.
        position: The named position at which the edge reads; empty for all positions.

    >>> Edge.parse("a0.h0->a5.h5<q>").channel
    'q'
    """

    writer: Node
    reader: Node
    channel: str = ""
    position: str = ""

    def __str__(self) -> str:
        channel, at = f"<{self.channel}>" * bool(self.channel), f"@{self.position}" * bool(self.position)
        return f"{self.writer}->{self.reader}{channel}{at}"

    @staticmethod
    def parse(text: str) -> Edge:
        """The edge with this text.

        Args:
            text: `writer->reader`, or `writer->reader<q>` (`<k>`, `<v>`) for heads; with `@position` for one position.

        Raises InputError for anything else.
        """
        whole, position = split_position(text)
        writer, arrow, rest = whole.partition("->")
        found = re.fullmatch(r"([^<>]+)(?:<([qkv])>)?", rest)
        if not arrow or not found:
            raise InputError(f"{text!r} is not an edge; edges look like 'a0.h0->a5.h5<q>' or 'm11->logits'.")
        edge = Edge(Node.parse(writer), Node.parse(found[1]), found[2] or "", position)
        reads = edge.reader.kind in ("head", "kv_head", "mlp", "logits")
        if edge.writer.kind in ("logits", "kv_head") or not reads:
            raise InputError(f"{text!r} is not an edge: it must go from a writer to a reader.")
        if (edge.reader.kind in ("head", "kv_head")) != bool(edge.channel):
            raise InputError(f"{text!r} is not an edge: heads, and only heads, are read through <q>, <k> or <v>.")
        return edge


def split_position(text: str) -> tuple[str, str]:
    """The name without its position, and the position ("" for none).

    >>> split_position("a9.h9@end"), split_position("m3")
    (('a9.h9', 'end'), ('m3', ''))
    """
    name, at, position = text.partition("@")
    if at and not position:
        raise InputError(f"{text!r} names no position after '@'.")
    return name, position


def node_of(name: str) -> Node:
    """The node of a name with or without a position, such as `a9.h9@end`."""
    return Node.parse(split_position(name)[0])
