"""Two programs compiled by Tracr, each with two published truths: one per ablation."""

from __future__ import annotations

from mechinterp.circuit_file.provenance import dims_of
from mechinterp.circuit_file.schema import Citation, ModelRecord, Origin, Role
from mechinterp.graphs.graph import graph_of
from tools.published_circuits.entry import Entry
from tools.published_circuits.models import TRACR_REVERSE, TRACR_XPROPORTION
from tools.published_circuits.sources import ACDC_TRACR, CONMY, MILLER, auto_circuit

# Source: ACDC_TRACR, less the entries that join parts of one node.
REVERSE_ZERO = (
    "a3.h0->logits",
    "m2->a3.h0<q>",
    "pos_embed->a3.h0<k>",
    "embed->a3.h0<v>",
    "m1->m2",
    "m0->m1",
    "embed->m1",
    "pos_embed->m1",
    "a0.h0->m0",
    "embed->m0",
    "embed->a0.h0<v>",
)
XPROPORTION_ZERO = (
    "a1.h0->logits",
    "embed->a1.h0<q>",
    "pos_embed->a1.h0<q>",
    "embed->a1.h0<k>",
    "pos_embed->a1.h0<k>",
    "m0->a1.h0<v>",
    "embed->m0",
)
# Source: auto-circuit tracr_reverse_true_edges and tracr_xproportion_official_edges; its 'Resid Start' is both
# embeddings together.
REVERSE_RESAMPLE = ("input->a3.h0<v>", "a3.h0->logits")
XPROPORTION_RESAMPLE = ("input->m0", "m0->a1.h0<v>", "a1.h0->logits")

ABLATION = (
    "Which truth is right depends on the ablation: a method is to be held against the truth of the ablation that it "
    "uses, and never against the other (Miller et al. 2024). "
)
MODEL = (
    "The model is the published program, compiled with Tracr; the weights whose hash is stated are in "
    "tests/data/known-circuits of this project, and the model has to be given. "
)
ZERO = (
    "The edges without which an output changes when they are zeroed, found by a run of ACDC with the metric L2: the "
    "output of a method, taken as a truth. `embed` and `pos_embed` are separate writers. "
)
RESAMPLE = (
    "The edges that must be preserved when all others carry the values of another input. Both embeddings are one "
    "writer, `input`. "
)
REVERSE = "Reverse a sequence (vocabulary 1, 2, 3; length 5; BOS). "
XPROPORTION = "The share of x among the tokens so far (vocabulary w, x, y, z; length 5; BOS). "
REVERSE_POSITIONS = "The source leaves out position 3, which is its own mirror image; edges here are at all positions. "


def entries() -> tuple[Entry, ...]:
    """Both programs under both ablations."""
    reverse = auto_circuit("tracr/reverse_official.py", "tracr_reverse_true_edges.")
    xproportion = auto_circuit("tracr/xproportion_official.py", "tracr_xproportion_official_edges.")
    return (
        _entry("tracr-reverse-zero", REVERSE + ZERO, TRACR_REVERSE, REVERSE_ZERO, CONMY, ACDC_TRACR),
        _entry(
            "tracr-reverse-resample",
            REVERSE + RESAMPLE + REVERSE_POSITIONS,
            TRACR_REVERSE,
            REVERSE_RESAMPLE,
            MILLER,
            reverse,
        ),
        _entry("tracr-xproportion-zero", XPROPORTION + ZERO, TRACR_XPROPORTION, XPROPORTION_ZERO, CONMY, ACDC_TRACR),
        _entry(
            "tracr-xproportion-resample",
            XPROPORTION + RESAMPLE,
            TRACR_XPROPORTION,
            XPROPORTION_RESAMPLE,
            MILLER,
            xproportion,
        ),
    )


def _entry(
    name: str, description: str, model: ModelRecord, edges: tuple[str, ...], citation: Citation, origin: Origin
) -> Entry:
    program, _, ablation = name.removeprefix("tracr-").partition("-")
    graph = graph_of(dims_of(model.dims), split_input=ablation == "zero")
    head = "a3.h0" if program == "reverse" else "a1.h0"
    mover = Role(label="output head", color="#1b7a5a", description="Aggregates the answer.", nodes=(head,))
    return Entry(
        name=name,
        title=f"Tracr's {program}: the circuit under {ablation} ablation",
        description=(description + ABLATION + MODEL).strip(),
        citation=citation,
        derived_from=(origin,),
        model=model,
        graph=graph,
        chosen=graph.mask_of(edges),
        expansion="none: the edges are listed one by one in the source, and named here by writer and reader",
        roles={"output-head": mover},
    )
