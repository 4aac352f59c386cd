"""Indirect object identification in GPT-2 small (Wang et al. 2022): the heads, their roles, and the edge sets."""

from __future__ import annotations

from mechinterp.circuit_file.provenance import dims_of
from mechinterp.circuit_file.schema import Position, Role, RoleEdge
from mechinterp.graphs.graph import REST, Graph, graph_of
from tools.published_circuits.entry import Entry, Groups, between, inputs_of, out_of, spelled_out
from tools.published_circuits.models import GPT2_SMALL
from tools.published_circuits.sources import ACDC_IOI, EASY_TRANSFORMER_IOI, WANG, auto_circuit

MLPS = tuple(f"m{layer}" for layer in range(12))
AUTO_CIRCUIT_IOI = auto_circuit(
    "ioi_official.py",
    "ioi_true_edges: the positions of the connections ('based on my reading of the paper') and the rule for MLPs.",
)
ORIGINS = (ACDC_IOI, AUTO_CIRCUIT_IOI)

# Source: ACDC_IOI IOI_CIRCUIT. The same 26 are in auto-circuit and, with the name movers in one class, in
# EASY_TRANSFORMER_IOI. One copy of the paper's abstract speaks of 28; every list has 26.
HEADS: Groups = {
    "name-mover": ("a9.h9", "a10.h0", "a9.h6"),
    "backup-name-mover": (
        *("a10.h10", "a10.h6", "a10.h2", "a10.h1", "a11.h2", "a9.h7", "a9.h0"),
        "a11.h9",
    ),
    "negative-name-mover": ("a10.h7", "a11.h10"),
    "s-inhibition": ("a7.h3", "a7.h9", "a8.h6", "a8.h10"),
    "induction": ("a5.h5", "a5.h8", "a5.h9", "a6.h9"),
    "duplicate-token": ("a0.h1", "a0.h10", "a3.h0"),
    "previous-token": ("a2.h2", "a4.h11"),
}
# Source: EASY_TRANSFORMER_IOI NAIVE.
NAIVE: Groups = {
    "name-mover": ("a9.h6", "a9.h9", "a10.h0"),
    "s-inhibition": ("a7.h3", "a7.h9", "a8.h6", "a8.h10"),
    "induction": ("a5.h5", "a5.h9"),
    "duplicate-token": ("a3.h0", "a0.h10"),
    "previous-token": ("a2.h2", "a4.h11"),
}
# Source: EASY_TRANSFORMER_IOI RELEVANT_TOKENS; the same in auto-circuit SEQ_POS_TO_KEEP.
KEPT_AT = {
    "name-mover": "end",
    "backup-name-mover": "end",
    "negative-name-mover": "end",
    "s-inhibition": "end",
    "induction": "S2",
    "duplicate-token": "S2",
    "previous-token": "S1+1",
}
POSITIONS = {
    "S1+1": Position(description="The token after the first mention of the subject."),
    "S2": Position(description="The second mention of the subject."),
    "end": Position(description="The last token, where the answer is read."),
}
# Labels: Wang et al., figure 2. Colours are ours.
LABELS = {
    "name-mover": ("name mover", "#1b7a5a", "Attend to the indirect object and copy it to the output."),
    "backup-name-mover": ("backup name mover", "#3f7f93", "Take over when the name movers are ablated."),
    "negative-name-mover": ("negative name mover", "#a13d63", "Write against the indirect object."),
    "s-inhibition": ("S-inhibition", "#2f5f8f", "Turn the name movers' queries away from the subject."),
    "induction": ("induction", "#a6611a", "Attend from S2 to S1+1: the subject has been there before."),
    "duplicate-token": ("duplicate token", "#6b5b95", "Attend from S2 to S1: the subject has been there before."),
    "previous-token": ("previous token", "#7a6a00", "Copy the subject from S1 to S1+1."),
}

# Source of the connections and their inputs: ACDC_IOI get_ioi_true_edges, 15 of them; of the positions: auto-circuit.
ROLE_EDGES = (
    RoleEdge(
        source="input",
        target="previous-token",
        inputs=("q", "k", "v"),
        positions={"q": "S1+1", "k": "S1", "v": "S1"},
    ),
    RoleEdge(
        source="input", target="duplicate-token", inputs=("q", "k", "v"), positions={"q": "S2", "k": "S1", "v": "S1"}
    ),
    RoleEdge(source="input", target="s-inhibition", inputs=("q",), positions={"q": "end"}),
    *(
        RoleEdge(source="input", target=target, inputs=("k", "v"), positions={"k": "IO", "v": "IO"})
        for target in ("negative-name-mover", "name-mover", "backup-name-mover")
    ),
    RoleEdge(source="previous-token", target="induction", inputs=("k", "v"), positions={"k": "S1+1", "v": "S1+1"}),
    RoleEdge(source="induction", target="s-inhibition", inputs=("k", "v"), positions={"k": "S2", "v": "S2"}),
    RoleEdge(source="duplicate-token", target="s-inhibition", inputs=("k", "v"), positions={"k": "S2", "v": "S2"}),
    *(
        RoleEdge(source="s-inhibition", target=target, inputs=("q",), positions={"q": "end"})
        for target in ("negative-name-mover", "name-mover", "backup-name-mover")
    ),
    *(
        RoleEdge(source=source, target="logits", positions={"logits": "end"})
        for source in ("negative-name-mover", "name-mover", "backup-name-mover")
    ),
)

HEADS_CAVEATS = (
    "Everything is kept but heads: all MLPs and the embeddings at every position, and each head at its own position "
    "only. So the circuit is the named nodes with all edges out of them, less those into heads that write nowhere. "
    "The paper replaces the other heads by their mean over prompts with three different names (ABC), per position; "
    "that is another object than an edge-level circuit, and the two are not to be compared (Miller et al. 2024). "
)
OPEN_HEADS = (
    "Not in it, but named as candidates in the sources: 7.1 (duplicate token); 2.9, 4.3, 4.7, 5.6, 3.3, 3.7, 3.6 "
    "(previous token). "
)
EDGES_CAVEATS = (
    "The publication claims edges between roles (`role_edges`), at positions; the edges here are one way to spell them "
    "out, at all positions. No role edge gives the induction heads their query. "
)


def entries() -> tuple[Entry, ...]:
    """The 26 heads, the naive 13, and three expansions of the role edges."""
    return heads(), naive(), edges_heads_only(), edges_acdc(), edges_auto_circuit()


def heads() -> Entry:
    """26 heads in 7 roles, each at its position."""
    return _of_heads(
        "ioi-wang2022-heads",
        "IOI in GPT-2 small: 26 heads in 7 roles",
        "The circuit for indirect object identification: 26 heads in 7 roles. " + HEADS_CAVEATS + OPEN_HEADS,
        HEADS,
        ROLE_EDGES,
    )


def naive() -> Entry:
    """The 13 heads that are found first; incomplete, which is its use."""
    return _of_heads(
        "ioi-wang2022-naive",
        "IOI in GPT-2 small: the naive circuit of 13 heads",
        "The incomplete circuit that Wang et al. hold theirs against in the test of completeness: 13 heads in 5 roles, "
        "no backup and no negative name movers. " + HEADS_CAVEATS,
        NAIVE,
        None,
    )


def edges_heads_only() -> Entry:
    """The role edges taken literally: input, heads and logits, 124 edges between heads."""
    graph = _edge_graph()
    return _of_edges(
        "ioi-wang2022-edges-heads",
        "IOI in GPT-2 small: the role edges without MLPs",
        "The role edges spelled out head by head, with `input` as the embeddings only and `logits` without the MLPs "
        "before it: 124 edges between heads, 45 from the input, 13 to the logits. " + EDGES_CAVEATS + "The sources "
        "let information pass through MLPs, so this is the skeleton of their circuits and is not expected to do the "
        "task alone. ",
        graph,
        spelled_out(graph, HEADS, ROLE_EDGES),
        "role edges, literally: every node of the source to the named inputs of every node of the target; no MLPs",
    )


def edges_acdc() -> Entry:
    """The 963 edges that ACDC calls the true ones."""
    graph = _edge_graph()
    return _of_edges(
        "ioi-wang2022-edges-acdc",
        "IOI in GPT-2 small: the edges that ACDC compares with",
        "963 edges (1041 with the three links inside each head that ACDC counts too): 124 head to head, 567 MLP to "
        "head, 123 head to MLP, 66 MLP to MLP, 45 input to head, 12 input to MLP, 12 MLP to logits, 13 head to logits, "
        "and input to logits. " + EDGES_CAVEATS + "780 of the edges touch an MLP: every MLP is joined to every member "
        "before and after it, on all of q, k and v, whatever the role edges say (a5.h5's query reads m0 to m4, for "
        "one). The 739 edges of ioi-wang2022-edges-auto-circuit are a part of these: there an MLP is added only "
        "between the two layers of a role edge, and only to the inputs that the role edge names. ",
        graph,
        acdc_edges(graph),
        "ACDC: all edges among input, MLPs, the 26 heads and logits, less those from input or heads to heads and from "
        "heads to logits; then the role edges literally",
    )


def edges_auto_circuit() -> Entry:
    """The 739 edges of auto-circuit without token positions."""
    graph = _edge_graph()
    return _of_edges(
        "ioi-wang2022-edges-auto-circuit",
        "IOI in GPT-2 small: auto-circuit's edges, at all positions",
        "739 edges, a part of ACDC's 963. " + EDGES_CAVEATS + "Known defect of the source, kept here: for role edges "
        "into the logits the layer up to which MLPs are added is read from a token index, which is 0 when positions "
        "are off; so no MLP and not the input itself has an edge to the logits, and no MLP from layer 11 is in it. ",
        graph,
        auto_circuit_edges(graph),
        "auto-circuit without positions: per role edge, the MLPs from the first layer of the source (0 for input) to "
        "before the last of the target (none for logits) join both ends; then every edge from source to target ends",
    )


def acdc_edges(graph: Graph) -> set[str]:
    """ACDC's rule: what touches an MLP freely, and the role edges.

    Its rule starts from all edges among the members and takes away input to head, head to head and head to logits;
    what is left touches an MLP, or goes from the input straight to the logits.
    """
    members = [head for group in HEADS.values() for head in group]
    everything = [reader for node in (*MLPS, *members, "logits") for reader in inputs_of(node)]
    through_mlps = between(graph, MLPS, everything) | between(graph, ("input", *members), MLPS)
    return through_mlps | {"input->logits"} | spelled_out(graph, HEADS, ROLE_EDGES)


def auto_circuit_edges(graph: Graph) -> set[str]:
    """auto-circuit's rule without positions: MLPs between the layers of each role edge."""
    found: set[str] = set()
    for edge in ROLE_EDGES:
        sources = HEADS.get(edge.source, ("input",))
        targets = HEADS.get(edge.target, ("logits",))
        first = 0 if edge.source == "input" else min(map(_layer, sources))
        last = 0 if edge.target == "logits" else max(map(_layer, targets))
        mlps = MLPS[first:last]
        readers = [reader for node in targets for reader in inputs_of(node, edge.inputs)]
        found |= between(graph, (*sources, *mlps), (*readers, *mlps))
    return found


def _layer(head: str) -> int:
    return int(head[1:].partition(".")[0])


def _edge_graph() -> Graph:
    return graph_of(dims_of(GPT2_SMALL.dims))


def _of_heads(
    name: str, title: str, description: str, groups: Groups, role_edges: tuple[RoleEdge, ...] | None
) -> Entry:
    graph = graph_of(dims_of(GPT2_SMALL.dims), level="node", positions=tuple(POSITIONS), answers="end")
    everywhere = [f"{node}@{place}" for node in ("input", *MLPS) for place in (*POSITIONS, REST)]
    placed = {key: tuple(f"{head}@{KEPT_AT[key]}" for head in some) for key, some in groups.items()}
    # Nothing reads the last MLP but the logits, so at other positions it is no node to choose.
    known = set(graph.unit_names())
    nodes = [node for node in everywhere if node in known] + [node for some in placed.values() for node in some]
    return Entry(
        name=name,
        title=title,
        description=description.strip(),
        citation=WANG,
        derived_from=(EASY_TRANSFORMER_IOI,) if role_edges is None else (EASY_TRANSFORMER_IOI, *ORIGINS),
        model=GPT2_SMALL,
        graph=graph,
        chosen=out_of(graph, nodes),
        expansion="all edges out of the named heads at their positions, out of all MLPs and out of the input",
        roles=_roles(placed),
        role_edges=role_edges,
        positions=POSITIONS,
    )


def _of_edges(
    name: str,
    title: str,
    description: str,
    graph: Graph,
    edges: set[str],
    expansion: str,
) -> Entry:
    return Entry(
        name=name,
        title=title,
        description=description.strip(),
        citation=WANG,
        derived_from=ORIGINS,
        model=GPT2_SMALL,
        graph=graph,
        chosen=graph.mask_of(sorted(edges)),
        expansion=expansion,
        roles=_roles(HEADS),
        role_edges=ROLE_EDGES,
    )


def _roles(groups: Groups) -> dict[str, Role]:
    return {
        key: Role(label=LABELS[key][0], color=LABELS[key][1], description=LABELS[key][2], nodes=nodes)
        for key, nodes in groups.items()
    }
