"""Greater-than in GPT-2 small (Hanna et al. 2023), as ACDC and auto-circuit spell it out."""

from __future__ import annotations

from mechinterp.circuit_file.provenance import dims_of
from mechinterp.circuit_file.schema import Origin, Role, RoleEdge
from mechinterp.graphs.graph import Graph, graph_of
from tools.published_circuits.entry import Entry, Groups, between, spelled_out
from tools.published_circuits.models import GPT2_SMALL
from tools.published_circuits.sources import ACDC_GREATER_THAN, HANNA, auto_circuit

# Source: ACDC_GREATER_THAN CIRCUIT; the same in auto-circuit.
GROUPS: Groups = {
    "early-heads-3-5": ("a0.h3", "a0.h5"),
    "early-head-1": ("a0.h1",),
    "early-mlps": ("m0", "m1", "m2", "m3"),
    "middle-heads": ("a5.h5", "a6.h1", "a6.h9", "a7.h10", "a8.h11", "a9.h1"),
    "late-mlps": ("m8", "m9", "m10", "m11"),
}
LABELS = {
    "early-heads-3-5": ("early heads 0.3, 0.5", "#6b5b95", "Read the start year; feed the middle heads only."),
    "early-head-1": ("early head 0.1", "#7a6a00", "Reads the start year; feeds early MLPs and middle heads."),
    "early-mlps": ("early MLPs", "#a6611a", "Layers 0 to 3, at the start year."),
    "middle-heads": ("middle heads", "#2f5f8f", "Carry the start year to the end."),
    "late-mlps": ("late MLPs", "#1b7a5a", "Layers 8 to 11, at the end: raise the years that are greater."),
}
QKV = ("q", "k", "v")
# Source: ACDC_GREATER_THAN get_greaterthan_true_edges; the same in auto-circuit. No source states positions.
ROLE_EDGES = (
    RoleEdge(source="input", target="early-heads-3-5", inputs=QKV),
    RoleEdge(source="input", target="early-head-1", inputs=QKV),
    RoleEdge(source="input", target="early-mlps"),
    RoleEdge(source="early-mlps", target="early-mlps", note="each to all later ones"),
    RoleEdge(source="early-head-1", target="early-mlps"),
    RoleEdge(source="early-head-1", target="middle-heads", inputs=QKV),
    RoleEdge(source="early-heads-3-5", target="middle-heads", inputs=QKV),
    RoleEdge(source="early-mlps", target="middle-heads", inputs=QKV),
    RoleEdge(source="middle-heads", target="late-mlps", note="that of the same layer too"),
    RoleEdge(source="late-mlps", target="late-mlps", note="each to all later ones"),
    RoleEdge(source="middle-heads", target="logits"),
    RoleEdge(source="late-mlps", target="logits"),
)
ORIGINS = (
    ACDC_GREATER_THAN,
    auto_circuit("greaterthan_official.py", "greaterthan_true_edges: the same groups, connections and extension."),
    Origin(
        source="https://github.com/hannamw/gpt2-greater-than",
        path="circuit_discovery.py",
        commit="bb9abfbb7436e7671e6c968e2adc8545fbecb709",
        note="The authors' own code, for the caveat only: its middle heads are 5.1, 5.5, 6.9, 7.10, 8.8, 8.11, 9.1.",
    ),
)
CAVEATS = (
    "Edges are at all positions; no source states any. In ACDC's list of middle heads is 6.1, and neither 5.1 nor 8.8; "
    "in the code of the paper's authors it is the other way round. This file follows ACDC, which later work compares "
    "with. The corruption that goes with it: the start year's last two digits become 01. "
)


def entries() -> tuple[Entry, ...]:
    """The core, and the core with the MLPs that keep the middle heads' queries clean."""
    graph = graph_of(dims_of(GPT2_SMALL.dims))
    core = spelled_out(graph, GROUPS, ROLE_EDGES)
    return (
        _entry(
            "greater-than-hanna2023-core",
            "Greater-than in GPT-2 small: the core",
            "188 edges between 9 heads, 8 MLPs, the input and the logits. " + CAVEATS + "The paper leaves the queries "
            "of the middle heads as they are in the clean run, which these edges do not; see "
            "greater-than-hanna2023-extended. ",
            graph,
            core,
            "role edges, literally: every node of the source to the named inputs of every later node of the target",
        ),
        _entry(
            "greater-than-hanna2023-extended",
            "Greater-than in GPT-2 small: with the queries of the middle heads",
            "235 edges (262 with the three links inside each head that ACDC counts too): the core, and 47 more that "
            "stand for the clean queries of the middle heads. " + CAVEATS,
            graph,
            core | extension(graph),
            "the core; then every MLP of layers 0 to 8 to every later one of them, and every MLP before a middle head "
            "to its query",
        ),
    )


def extension(graph: Graph) -> set[str]:
    """The edges that stand for clean queries: MLPs 0 to 8 among each other, and those before each middle head."""
    mlps = tuple(f"m{layer}" for layer in range(9))  # the last middle head is in layer 9
    return between(graph, mlps, mlps) | between(graph, mlps, [f"{head}<q>" for head in GROUPS["middle-heads"]])


def _entry(name: str, title: str, description: str, graph: Graph, edges: set[str], expansion: str) -> Entry:
    return Entry(
        name=name,
        title=title,
        description=description.strip(),
        citation=HANNA,
        derived_from=ORIGINS,
        model=GPT2_SMALL,
        graph=graph,
        chosen=graph.mask_of(sorted(edges)),
        expansion=expansion,
        roles={
            key: Role(label=LABELS[key][0], color=LABELS[key][1], description=LABELS[key][2], nodes=nodes)
            for key, nodes in GROUPS.items()
        },
        role_edges=ROLE_EDGES,
    )
