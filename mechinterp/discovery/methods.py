"""`METHODS`: the discovery methods by name. Listing them needs no torch; a method is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechinterp.base.registry import Entry, Registry

if TYPE_CHECKING:
    from mechinterp.discovery.method import Method

HERE = "mechinterp.discovery"
METHODS: Registry[Method] = Registry(
    "method",
    {
        "eap": Entry(f"{HERE}.eap:EAP", "edge attribution patching, the gradient at the clean run (Syed et al. 2023)"),
        "eap-ig": Entry(
            f"{HERE}.eap:EAP_IG",
            "the same with integrated gradients over the inputs (Hanna et al. 2024)",
        ),
        "acdc": Entry(
            f"{HERE}.acdc:ACDC",
            "every edge cut for good unless that costs tau (Conmy et al. 2023); best with --metric kl_to_clean",
        ),
        "cd": Entry(f"{HERE}.cd:CD", "contextual decomposition of nodes, from the logits back (Hsu et al. 2024)"),
        "cd-edges": Entry(
            f"{HERE}.cd_edges:CD_EDGES", "contextual decomposition along edges, linear rules in one backward"
        ),
        "path-patching": Entry(
            f"{HERE}.path_search:PATH_PATCHING", "path patching from the logits back (Wang et al. 2022)"
        ),
        "relp": Entry(f"{HERE}.cd_edges:RELP", "edge attribution with LRP coefficients (Rezaei Jafari et al. 2025)"),
        "gim": Entry(
            f"{HERE}.cd_edges:GIM",
            "edge attribution with a softer softmax and constant norms in the backward (GIM 2025)",
        ),
        "clean-corrupted": Entry(
            f"{HERE}.eap:CLEAN_CORRUPTED", "the mean of the gradients at the clean and the corrupt run"
        ),
        "eap-ig-activations": Entry(
            f"{HERE}.eap:EAP_IG_ACTIVATIONS", "integrated gradients over each layer's activations (MIB)"
        ),
        "eap-gp": Entry(
            f"{HERE}.eap:EAP_GP", "gradients along a path that descends to the corrupt output (Zhang et al. 2025)"
        ),
        "random": Entry(f"{HERE}.baselines:RANDOM", "random scores, a baseline"),
        "weight-magnitude": Entry(
            f"{HERE}.baselines:WEIGHT_MAGNITUDE", "size of the weights between writer and reader, a baseline"
        ),
        "exact": Entry(f"{HERE}.exact:EXACT", "every edge replaced alone; as many runs as edges"),
        "edge-pruning": Entry(
            f"{HERE}.mask_learning:EDGE_PRUNING", "mask over edges learned by gradient descent, to a target share"
        ),
        "subnetwork-probing": Entry(
            f"{HERE}.mask_learning:SUBNETWORK_PROBING", "mask learned by gradient descent, each open gate at a price"
        ),
        "mattr": Entry(
            f"{HERE}.matryoshka:MATTR",
            "one learned order of the edges, for circuits of all sizes (Matryoshka); the default",
        ),
        "ensemble": Entry(
            f"{HERE}.ensemble:ENSEMBLE",
            "several methods' scores combined by rank or mean (MIB shared task 2025); --effort quick",
        ),
        "information-flow": Entry(
            f"{HERE}.information_flow:INFORMATION_FLOW",
            "how near each write is to what a reader reads (clean run alone)",
        ),
    },
    plugins="mechinterp.methods",
    type=f"{HERE}.method:Method",
)
