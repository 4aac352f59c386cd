"""`EXPORTS` and `IMPORTS`: the formats by name. Listing them needs no torch; each is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechinterp.base.registry import Entry, Registry

if TYPE_CHECKING:
    from mechinterp.circuit_file.formats.format import Export, Import

HERE = "mechinterp.circuit_file.formats"
EXPORTS: Registry[Export] = Registry(
    "export format",
    {
        "eap-ig-json": Entry(f"{HERE}.eap_ig_json:EXPORT", "EAP-IG's and MIB's graph as JSON"),
        "eap-ig-pt": Entry(f"{HERE}.eap_ig_pt:EXPORT", "the same as tensors (.pt)"),
        "mib": Entry(f"{HERE}.mib:EXPORT", "a submission folder of MIB"),
        "dot": Entry(f"{HERE}.dot:EXPORT", "Graphviz"),
        "graphml": Entry(f"{HERE}.graphml:EXPORT", "GraphML"),
        "cytoscape": Entry(f"{HERE}.cytoscape:EXPORT", "Cytoscape JSON"),
        "neuronpedia": Entry(f"{HERE}.neuronpedia:EXPORT", "an attribution graph as JSON"),
        "csv": Entry(f"{HERE}.edge_csv:EXPORT", "the edges as a table"),
        "latex": Entry(f"{HERE}.latex:EXPORT", "a table for a paper"),
        "tikz": Entry(f"{HERE}.tikz:EXPORT", "a figure for a paper"),
    },
    plugins="mechinterp.exports",
    type=f"{HERE}.format:Export",
)
IMPORTS: Registry[Import] = Registry(
    "import format",
    {
        "eap-ig-json": Entry(f"{HERE}.eap_ig_json:IMPORT", "EAP-IG's graph as JSON"),
        "eap-ig-pt": Entry(f"{HERE}.eap_ig_pt:IMPORT", "EAP-IG's graph as .pt"),
        "mib": Entry(f"{HERE}.mib:IMPORT", "one task's folder of a MIB submission"),
        "acdc": Entry(f"{HERE}.acdc:IMPORT", "ACDC's save_subgraph (.pth)"),
        "edge-pruning": Entry(f"{HERE}.edge_pruning:IMPORT", "Edge-Pruning's edges.json"),
    },
    plugins="mechinterp.imports",
    type=f"{HERE}.format:Import",
)
