"""Docstrings in a 4-layer attention-only transformer (Heimersheim & Janiak 2023)."""

from __future__ import annotations

from mechinterp.circuit_file.provenance import dims_of
from mechinterp.circuit_file.schema import Origin, Role
from mechinterp.graphs.graph import graph_of
from tools.published_circuits.entry import Entry, Groups, out_of
from tools.published_circuits.models import ATTN_ONLY_4L
from tools.published_circuits.sources import ACDC_DOCSTRING, HEIMERSHEIM, auto_circuit

# Source: ACDC_DOCSTRING get_docstring_subgraph_true_edges ("the manual graph, from Stefan"), less the 13 entries that
# join parts of one head; the same 24 in auto-circuit.
EDGES = (
    "input->a0.h5<v>",
    "a0.h5->a1.h4<v>",
    "input->a1.h4<v>",
    "input->a1.h2<q>",
    "a0.h5->a1.h2<q>",
    "input->a1.h2<k>",
    "a0.h5->a1.h2<k>",
    "input->a2.h0<q>",
    "a0.h5->a2.h0<q>",
    "input->a2.h0<k>",
    "a0.h5->a2.h0<k>",
    "a1.h4->a2.h0<v>",
    "a1.h4->a3.h0<q>",
    "a1.h4->a3.h6<q>",
    "input->a3.h0<v>",
    "input->a3.h6<v>",
    "a0.h5->a3.h0<v>",
    "a0.h5->a3.h6<v>",
    "a2.h0->a3.h0<k>",
    "a2.h0->a3.h6<k>",
    "a1.h2->a3.h0<k>",
    "a1.h2->a3.h6<k>",
    "a3.h0->logits",
    "a3.h6->logits",
)
# Source of which heads: the edges above; of what they do: the post's own summary. Positions: auto-circuit.
HEADS: Groups = {
    "argument-mover": ("a3.h0", "a3.h6"),
    "fuzzy-previous-token": ("a2.h0",),
    "induction": ("a1.h4",),
    "token-transformation": ("a0.h5",),
    "duplicate-token": ("a1.h2",),
}
# Source: auto-circuit docstring_node_based_official_edges; the post names 0.2 and 0.4 as essential, though patching
# does not show them, and adds the last three for performance.
MORE_HEADS: Groups = {"previous-token": ("a0.h2",), "positional": ("a0.h4",), "extra": ("a1.h0", "a0.h1", "a2.h3")}
LABELS = {
    "argument-mover": ("argument mover", "#1b7a5a", "Copies the argument's name to the output; at param_3."),
    "fuzzy-previous-token": ("fuzzy previous token", "#2f5f8f", "Moves B_def from the comma after it to C_def."),
    "induction": (
        *("induction, fuzzy previous token", "#a6611a"),
        "Moves B_def to the comma after it, and B_doc to param_3 as an induction head does.",
    ),
    "token-transformation": (
        *("token transformation", "#6b5b95"),
        "A duplicate-token head that mostly changes how tokens are embedded; at B_def, C_def and B_doc.",
    ),
    "duplicate-token": (
        *("duplicate token", "#7a6a00"),
        "Keeps the argument movers from arguments that were documented already; at A_doc and B_doc.",
    ),
    "previous-token": ("previous token", "#3f7f93", "At B_doc."),
    "positional": ("positional information", "#a13d63", "At param_3."),
    "extra": ("further heads", "#5c6773", "Added by the authors for performance; no position stated."),
}
AUTO_CIRCUIT = auto_circuit(
    "docstring_official.py",
    "docstring_true_edges: the same 24 edges, with positions. docstring_node_based_official_edges: the 11 heads.",
)
POST = Origin(
    source="https://www.alignmentforum.org/posts/u6KXXmKFbXfWzoAXn",
    note="The post itself. What the heads do was taken from quotations of it, not from the page.",
)
MODEL = (
    "The model is the hub's NeelNanda/Attn_Only_4L512W_C4_Code (TransformerLens's attn-only-4l); its files are not "
    "those of a transformers model, so it has to be given. "
)


def entries() -> tuple[Entry, ...]:
    """The edges between 6 heads, and the 11 heads."""
    return edges(), heads()


def edges() -> Entry:
    """24 edges between 6 heads."""
    graph = graph_of(dims_of(ATTN_ONLY_4L.dims))
    return Entry(
        name="docstring-heimersheim2023-edges",
        title="Docstrings in attn-only-4l: 24 edges between 6 heads",
        description=(
            "The authors' manual graph: 24 edges (37 with the links inside heads that ACDC counts too) between 6 "
            "heads. The circuit recovers up to half of the model's performance (the post). Edges are at all positions; "
            "auto-circuit states positions for each, one of them none and two of them guesses by its own word. " + MODEL
        ).strip(),
        citation=HEIMERSHEIM,
        derived_from=(ACDC_DOCSTRING, AUTO_CIRCUIT, POST),
        model=ATTN_ONLY_4L,
        graph=graph,
        chosen=graph.mask_of(EDGES),
        expansion="none: the edges are listed one by one in the source, and named here by writer and reader",
        roles=_roles(HEADS),
    )


def heads() -> Entry:
    """11 heads, at all positions."""
    graph = graph_of(dims_of(ATTN_ONLY_4L.dims), level="node")
    groups = {**HEADS, **MORE_HEADS}
    return Entry(
        name="docstring-heimersheim2023-heads",
        title="Docstrings in attn-only-4l: 11 heads",
        description=(
            "The heads that the authors leave as they are in their last check: the 6 of the edge circuit, 0.2 and 0.4, "
            "and 3 more for performance. So it is a larger circuit than docstring-heimersheim2023-edges. Heads are "
            "kept at all positions: for 3 of them no position is stated; those of the others, as auto-circuit states "
            "them, are under `roles`. Everything that is no head is kept. " + MODEL
        ).strip(),
        citation=HEIMERSHEIM,
        derived_from=(AUTO_CIRCUIT, POST),
        model=ATTN_ONLY_4L,
        graph=graph,
        chosen=out_of(graph, ["input", *(head for some in groups.values() for head in some)]),
        expansion="all edges out of the named heads and out of the input",
        roles=_roles(groups),
    )


def _roles(groups: Groups) -> dict[str, Role]:
    return {
        key: Role(label=LABELS[key][0], color=LABELS[key][1], description=LABELS[key][2], nodes=nodes)
        for key, nodes in groups.items()
    }
