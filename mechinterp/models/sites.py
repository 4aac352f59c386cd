"""The names of sites, nodes and edges, each with one text form, and the one parser of names.

A *site* is one tensor of the forward pass (`z.3`: the head outputs of layer 3 before the output projection).
A *node* is a unit that writes to the residual stream (`a9.h9`, `m3`, `input`) or `logits`.
An *edge* goes from a writer to one input of a reader: `a0.h0->a5.h5<q>`, `m11->logits`.
An *address* is any name that a user writes: `a9.h9`, `a9.h9<q>`, `m3`, `m3.n17`, `m3.f17`, `m3.err`, `m3.e5`,
`resid_pre.5`, `resid_pre.5.f17`, each with `@S2`. `L9H9` and `9.9` are `a9.h9` (see `canonical`).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from mechinterp.base.errors import InputError, clip
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
    "router_in",
    "mlp_pre",
    "mlp_up",
    "mlp_post",
    "mlp_raw",
    "mlp_out",
    "resid_post",
)
"""Sites of one layer. `attn_in` and `mlp_in` are after the norm; `attn_out` and `mlp_out` are what is added to
the residual stream (after a post-norm where the model has one; `attn_raw` and `mlp_raw` are before it, and exist only
there; in a layer without heads `attn_in` and `attn_raw` are what takes their place reads and writes); `q`, `k` are
before any rotation. `router_in` is what the router of a mixture of experts reads, by itself. `mlp_pre` is the input of
the activation function, `mlp_up` the factor by which a gated MLP multiplies its output, `mlp_post` the product (the
neurons)."""


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


_NUMBERED = {
    "head": "a{layer}.h{number}",
    "kv_head": "a{layer}.kv{number}",
    "neuron": "m{layer}.n{number}",
    "expert": "m{layer}.e{number}",
    "attention": "a{layer}",
    "mlp": "m{layer}",
    "feature": "{base}.f{number}",
    "error": "{base}.err",
}
"""How names with numbers are written, kind by kind; the names of other kinds are the kind."""
_HEAD_AS_IN_PAPERS = re.compile(r"(?:[Ll](?P<a>[0-9]{1,4})\.?[Hh]|(?P<b>[0-9]{1,4})\.)(?P<head>[0-9]{1,9})(?=[<@]|\Z)")
BARE = ("input", "embed", "pos_embed", "logits")
_PARTS = {"layer": r"(?P<layer>[0-9]{1,4})", "number": r"(?P<number>[0-9]{1,9})", "base": r"(?P<base>[^@<>]{1,200})"}
_PATTERNS = {kind: re.compile(text.replace(".", r"\.").format(**_PARTS)) for kind, text in _NUMBERED.items()}
_AROUND = re.compile(r"(?P<name>[^@<>]+)(?:<(?P<channel>[a-z]{1,10})>)?(?P<at>@(?P<position>.*))?", re.DOTALL)
LOOKS = {
    "node": "nodes look like 'a9.h9', 'm3', 'm3.n17', 'input' or 'logits'",
    "part of a model": (
        "parts look like 'a9.h9', 'a9.h9<q>', 'm3', 'm3.n17' or 'resid_pre.5', each with an optional '@S2' or '@4'"
    ),
    "feature": "features look like 'm3.f17' or 'm3.err', with an optional '@S2'",
    "edge": "edges look like 'a0.h0->a5.h5<q>' or 'm11->logits'",
}
"""What is said of a name that is none, by what was expected."""


@dataclass(frozen=True)
class Address:
    """A name taken apart: `a9.h9<q>@S2`, `m3.f17`, `resid_pre.5`.

    Args:
        kind: `head`, `kv_head`, `attention` (`a9`; also what takes its place), `mlp`, `neuron`, `expert` (`m3.e5`),
            `feature`, `error` (`m3.err`), `input`, `embed`, `pos_embed`, `logits` or `site`.
        layer: The layer; -1 where the name has none.
        number: The number of the head, neuron, expert or feature; -1 for the others.
        base: Of a feature or an error, the name of its basis; of a site, its name.
        channel: What stands between `<` and `>`: which input of a node, or which of its values.
        position: What stands after the `@`; "" for all positions.
    """

    kind: str
    layer: int = -1
    number: int = -1
    base: str = ""
    channel: str = ""
    position: str = ""

    @staticmethod
    def parse(text: str, expected: str = "part of a model") -> Address:
        """The parts of a name. This is the only parser of names; it knows no model.

        Args:
            text: The name.
            expected: What it should be (of `LOOKS`), for the message.

        Raises InputError for anything else, with the nearest name.

        >>> Address.parse("a9.h6<q>@S2")
        Address(kind='head', layer=9, number=6, base='', channel='q', position='S2')
        """
        around = _AROUND.fullmatch(canonical(text))
        if around is None:
            raise not_a_name(text, expected)
        if around["at"] and not around["position"]:
            raise InputError(f"{clip(text, 60)!r} has no position after the '@'; write 'a9.h9@S2' or 'a9.h9@4'.")
        name, channel, position = around["name"], around["channel"] or "", around["position"] or ""
        if name in BARE:
            return Address(name, channel=channel, position=position)
        for kind, pattern in _PATTERNS.items():
            if (found := pattern.fullmatch(name)) is not None:
                part: dict[str, str] = found.groupdict()
                layer, number = (int(part.get(key, -1)) for key in ("layer", "number"))
                return Address(kind, layer, number, part.get("base", ""), channel, position)
        if name.partition(".")[0] in LAYER_SITES + GLOBAL_SITES:
            site = Site.parse(name)
            return Address("site", -1 if site.layer is None else site.layer, -1, str(site), channel, position)
        raise not_a_name(text, expected)


def canonical(text: str) -> str:
    """The name with a head written as the package writes it; every other text is returned as it is.

    >>> canonical("L9H9"), canonical("9.9<q>@S2"), canonical("a9.h9"), canonical("resid_pre.5")
    ('a9.h9', 'a9.h9<q>@S2', 'a9.h9', 'resid_pre.5')
    """
    found = _HEAD_AS_IN_PAPERS.match(text)
    return text if found is None else f"a{found['a'] or found['b']}.h{found['head']}{text[found.end() :]}"


def canonical_edge(text: str) -> str:
    """The name of an edge with its heads written as the package writes them; of a node as `canonical` gives it.

    >>> canonical_edge("L0H0->5.5<q>@end")
    'a0.h0->a5.h5<q>@end'
    """
    writer, arrow, reader = text.partition("->")
    return canonical(writer) + arrow + canonical(reader)


def not_a_name(text: str, expected: str) -> InputError:
    """The error for a text that is not a name of the expected sort, with the nearest name.

    >>> print(not_a_name("a9.g6", "node"))
    'a9.g6' is not a node; nodes look like 'a9.h9', 'm3', 'm3.n17', 'input' or 'logits'. Did you mean 'a9.h6'?
    """
    numbers = re.findall(r"[0-9]+", text[:60])
    shape = re.sub(r"[0-9]+", "#", text[:60])
    forms = [re.sub(r"{(layer|number)}", "#", form).replace("{base}", "m#") for form in _NUMBERED.values()]
    forms += [*BARE, *(f"{kind}.#" for kind in LAYER_SITES), *GLOBAL_SITES]
    near = difflib.get_close_matches(shape, [form for form in forms if form.count("#") == len(numbers)], n=1)
    for number in numbers if near else ():
        near[0] = near[0].replace("#", number, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    article = "an" if expected == "edge" else "a"
    return InputError(f"{clip(text, 60)!r} is not {article} {expected}; {LOOKS[expected]}.{hint}")


@dataclass(frozen=True, order=True)
class Node:
    """A node of the graph: a unit that writes to the residual stream, or the logits.

    Args:
        kind: `input`, `embed`, `pos_embed`, `head`, `kv_head`, `attention`, `mlp`, `neuron`, `expert`, `feature`,
            `error` or `logits`. A `kv_head` (`a5.kv1`) is a reader only: the key/value head that several query heads
            share. A `neuron` (`m3.n17`), an `expert` (`m3.e5`) or a `feature` (`m3.f17`) is a part of an MLP that is a
            separate node; features may also be parts of an `attention` (`a5`: all its heads).
        layer: The layer; -1 for input, embed, pos_embed and logits.
        head: The number of the head, neuron, expert or feature in its layer; -1 for the other kinds.
        base: The name of a feature's basis.

    >>> Node.parse("a9.h6"), str(Node("mlp", 3))
    (Node(kind='head', layer=9, head=6, base=''), 'm3')
    """

    kind: str
    layer: int = -1
    head: int = -1
    base: str = ""

    def __str__(self) -> str:
        form = _NUMBERED.get(self.kind, self.kind)
        return form.format(layer=self.layer, number=self.head, base=self.base)

    @property
    def in_mlp(self) -> bool:
        """Whether it is an MLP or a part of one."""
        return str(self).startswith("m")

    @staticmethod
    def parse(text: str) -> Node:
        """The node with this text.

        Args:
            text: `a9.h9`, `a5.kv1`, `a5`, `m3`, `m3.n17`, `m3.e5`, `m3.f17`, `m3.err`, `input`, `embed`, `pos_embed`
                or `logits`.

        Raises InputError for anything else.
        """
        found = Address.parse(text, "node")  # `L9H9` and `9.9`, too
        if found.kind == "site" or found.channel or found.position:
            raise not_a_name(text, "node")
        return Node(found.kind, _layer_of(found), found.number, found.base)


def _layer_of(address: Address) -> int:
    """Its layer; of a feature that of its basis, where the name says it."""
    if address.kind not in ("feature", "error"):
        return address.layer
    found = re.fullmatch(r"(?:[am]|[a-z_]+\.)([0-9]{1,4})", address.base)
    return -1 if found is None else int(found[1])


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
        writer, arrow, rest = text.partition("->")
        if not arrow or not rest:
            raise not_a_name(text, "edge")
        read = Address.parse(rest, "edge")
        bare = rest.partition("@")[0].partition("<")[0]
        edge = Edge(Node.parse(writer), Node.parse(bare), read.channel, read.position)
        if edge.writer.kind in ("logits", "kv_head") or edge.reader.kind in BARE[:-1]:
            raise InputError(f"{text!r} is not an edge: it must go from a writer to a reader.")
        if edge.reader.kind in ("head", "kv_head"):
            if edge.channel not in ("q", "k", "v"):
                raise InputError(f"{text!r} is not an edge: a head is read through <q>, <k> or <v>.")
        elif edge.channel not in ("", *_CHANNELS.get(edge.reader.kind, ())):
            raise InputError(f"{text!r} is not an edge: <{edge.channel}> is not an input of {edge.reader}.")
        elif edge.reader.kind in ("neuron", "expert", "error"):
            raise InputError(f"{text!r} is not an edge: it must go from a writer to a reader.")
        return edge


_CHANNELS = {"mlp": ("router",), "feature": ("in",)}
"""The inputs that a node has besides its own: a mixture of experts also reads for its router."""


def split_position(text: str) -> tuple[str, str]:
    """The name without its position, and the position ("" for none).

    >>> split_position("a9.h9@end"), split_position("m3")
    (('a9.h9', 'end'), ('m3', ''))
    """
    name, at, position = text.partition("@")
    if at and not position:
        raise InputError(f"{clip(text, 60)!r} has no position after the '@'; write 'a9.h9@S2' or 'a9.h9@4'.")
    return name, position


def node_of(name: str) -> Node:
    """The node of a name with or without a position, such as `a9.h9@end`."""
    return Node.parse(split_position(name)[0])
