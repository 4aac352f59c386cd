"""Model families on tiny random weights: edges, patching and EAP against plain Hugging Face hooks, and what else holds.

The comparison is `benchmarks/families.py`, which makes the table of docs/families.md for all of them.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

import mechinterp as mi
from benchmarks import families as table
from benchmarks.family_models import FAMILIES, Family
from benchmarks.plain_hooks import PlainModel, run_plain
from mechinterp.base.errors import UnsupportedError
from mechinterp.engines.edge_patching import run_edges
from mechinterp.graphs.graph import build_graph
from mechinterp.models import block_parts
from mechinterp.models.hook_manager import HookManager, load_model
from mechinterp.models.layout import Attentions
from mechinterp.models.norm import Norm, measure_norm

BY_LABEL = {family.label: family for family in FAMILIES}
CHOSEN = (
    "GPT-J",
    "CodeGen",
    "Bloom",
    "MPT",
    "Falcon 7B",
    "Llama 4",
    "Phi-1, Phi-2",
    "Cohere (Command R)",
    "Cohere 2 (Command R7B)",
    "OLMo",
    "Granite",
    "GPT-OSS",
    "Granite 4 hybrid",
    "DeepSeek-V3",
    "Qwen3-Next, linear and full attention",
)
"""One of each kind: parallel with one norm, ALiBi, multipliers, norms without weights, experts, no heads, gates."""


@functools.cache
def loaded(label: str) -> HookManager:
    return load_model(BY_LABEL[label].build())


@pytest.mark.slow
@pytest.mark.parametrize("label", CHOSEN)
def test_edges_patching_and_eap_are_those_of_plain_hooks(label: str) -> None:
    row = table.measure(BY_LABEL[label])
    assert not row.refused
    assert row.exact, row
    stale = "docs/families.md is out of date: python -m benchmarks.families --write"
    notes = table.stored_notes()
    assert all(reason in notes for _, reason in row.without), stale
    assert table.comparable(table.line(row, notes)) in table.comparable(table.stored_table()).splitlines(), stale


def test_the_page_has_every_family() -> None:
    stored = table.stored_table()
    assert [family.label for family in FAMILIES if f"| {family.label} |" not in stored] == []
    assert "**" not in stored  # nothing that loads is inexact


@pytest.mark.parametrize("wrong", ["multiplier", "norm", "logits"])
def test_a_wrong_map_is_seen_by_the_comparison(wrong: str) -> None:
    """What the table would show if a map of the layout were wrong, past the checks at load."""
    family = BY_LABEL["Granite"]
    model, pairs = load_model(family.build()), table.random_pairs()
    layout = model.layout
    changed: dict[str, Any] = {
        "multiplier": {
            "attention": Attentions(tuple(replace(maps, post=Norm("none")) for maps in layout.attention.maps))
        },
        "norm": {"mlp_norm": tuple(maps.norm for maps in layout.attention.maps)},
        "logits": {"W_U": layout.W_U * 1.01},
    }[wrong]
    model.layout = replace(layout, **changed)
    plain, graph = plain_of(family, model), build_graph(model)
    with torch.no_grad():
        _, corrupt = run_plain(plain, pairs.corrupt)
        assert table.edges_gap(model, plain, graph, pairs, corrupt) > 1e-3


@pytest.mark.parametrize(("label", "coupled"), [("OLMoE", {0, 1}), ("BitNet", {0, 1}), ("Granite", set())])
def test_an_edge_into_a_cut_head_still_acts_through_a_norm_over_all_heads(label: str, coupled: set[int]) -> None:
    """OLMoE norms the queries of all heads at once, BitNet their outputs: a1.h3 is cut, and still changes a1.h0."""
    family, model, pairs = BY_LABEL[label], loaded(label), table.random_pairs()
    plain, graph = plain_of(family, model), build_graph(model)
    cut = graph.mask_of(["a0.h0->a1.h3<q>", "a1.h3->m1", "a1.h3->logits"])
    with torch.no_grad():
        _, corrupt = run_plain(plain, pairs.corrupt)
        share = table.share_of(graph, cut.double())
        expected = table.logit_diff(run_plain(plain, pairs.clean, share=share, replacement=corrupt)[0], pairs)
    torch.testing.assert_close(run_edges(model, graph, pairs, cut), expected, rtol=0, atol=5e-6)  # norms in float32
    assert model.coupled_heads == coupled


def plain_of(family: Family, model: HookManager) -> PlainModel:
    return PlainModel(family.build(), family.modules, model.dims.n_kv_heads)


def test_a_gate_that_is_not_known_as_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """AFMoE's heads are multiplied by a gate that reads the residual stream: no edge into a head would stand for it."""
    monkeypatch.setattr(block_parts, "_is_gated", lambda attn: False)
    with pytest.raises(UnsupportedError, match=r"heads of layer 0 also read the residual stream other than through"):
        load_model(BY_LABEL["AFMoE"].build())


# -- one MLP by itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["GPT-OSS", "Llama 4", "Bloom", "MPT", "OPT", "Granite", "GraniteMoE", "GLM-4"])
def test_an_mlp_by_itself_is_the_models_own(label: str) -> None:
    """What the MLP adds to the residual stream at any input, with what comes after it."""
    family, model = BY_LABEL[label], loaded(label)
    assert model.bound_mlps == {}
    plain = plain_of(family, model)
    names = plain.names
    x = torch.randn(2, 3, model.dims.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = model.mlp(1, x)
    with torch.no_grad():
        if label == "OPT":
            expected = plain.part(1, "fc2")(torch.relu(plain.part(1, "fc1")(x)))
        elif label in ("Bloom", "MPT"):
            expected = plain.part(1, names.mlp)(x, torch.zeros_like(x))
        else:
            out = plain.part(1, names.mlp)(x)
            expected = (out[0] if isinstance(out, tuple) else out).reshape(x.shape) * plain.factor
        if names.mlp_post:
            expected = plain.part(1, names.mlp_post)(expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)  # RMSNorm and routing are in float32


@pytest.mark.parametrize(
    ("label", "name"), [("Bloom", "gelu_new"), ("MPT", "gelu"), ("OPT", "relu"), ("Granite", "silu")]
)
def test_the_activation_function_is_measured(label: str, name: str) -> None:
    """TransformerLens's configuration says `gelu_new` of MPT and nothing of the sort of Bloom."""
    maps = loaded(label).layout.mlp_maps[0]
    assert maps is not None
    assert maps.activation == name
    x = torch.linspace(-3, 3, 16, dtype=torch.float64)
    torch.testing.assert_close(maps(x[None]), loaded(label).mlp(0, x[None]) / multiplier(label), rtol=0, atol=1e-6)


def multiplier(label: str) -> float:
    return float(BY_LABEL[label].settings.get("residual_multiplier", 1.0))


def test_an_activation_function_that_has_no_rule_is_refused_by_name() -> None:
    model = loaded("Apertus")
    with pytest.raises(UnsupportedError, match=r"unknown activation function.*xielu"):
        mi.contextual_decomposition(model, table.random_pairs(), "nodes")


# -- the analyses on the new shapes ---------------------------------------------------------------------------------


@functools.cache
def granite_with_biases() -> HookManager:
    """All multipliers, and an output bias that they multiply."""
    settings = {**BY_LABEL["Granite"].settings, "attention_bias": True, "mlp_bias": True}
    return load_model(replace(BY_LABEL["Granite"], settings=settings).build())


SHAPES = {
    "multipliers": granite_with_biases,
    "one norm": lambda: loaded("Phi-1, Phi-2"),
    "biased gate": lambda: loaded("Llama, biases"),
}


def run_of(model: HookManager, pairs: mi.Pairs, **keywords: Any) -> torch.Tensor:
    """The logit difference of a run of the clean prompts."""
    logits = model.run(pairs.clean, pairs.mask, **keywords).logits
    assert logits is not None
    return table.logit_diff(logits, pairs)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_direct_paths_are_edges(shape: str) -> None:
    model, pairs = SHAPES[shape](), table.random_pairs()
    graph = build_graph(model)
    plain = mi.run_edges(model, graph, pairs, torch.zeros_like(graph.possible))
    for reader in ("logits", "m1", "a1.h0<q>"):
        got = mi.path_patching(model, pairs, "nodes", reader, meaning="direct").values[:, 0]
        there = graph.possible[graph.reader_index[reader]].nonzero().flatten().tolist()
        cuts = torch.stack([graph.mask_of([f"{graph.writers[i]}->{reader}"]) for i in there])
        effects = plain - mi.run_edges(model, graph, pairs, cuts)
        torch.testing.assert_close(got[there], effects, rtol=0, atol=5e-6)  # norms in float32


@pytest.mark.parametrize("shape", SHAPES)
def test_a_path_through_an_mlp_is_a_run_with_all_heads_frozen(shape: str) -> None:
    model, pairs = SHAPES[shape](), table.random_pairs()
    got = mi.path_patching(model, pairs, ["a0.h1"], "logits").values[0, 0]
    clean, corrupt = (model.run(ids, pairs.mask, record=["z.0", "z.1"]).values for ids in (pairs.clean, pairs.corrupt))
    first = clean["z.0"].clone()
    first[:, :, 1] = corrupt["z.0"][:, :, 1]
    frozen = {"z.0": first, "z.1": clean["z.1"]}
    expected = run_of(model, pairs) - run_of(model, pairs, interventions=frozen)
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_of_a_logit_add_up_neuron_by_neuron(shape: str) -> None:
    model, pairs = SHAPES[shape](), table.random_pairs()
    total = run_of(model, pairs)
    for refine in ([], ["m0", "m1", "a0.h2"]):
        parts = mi.direct_logit_attribution(model, pairs, refine=refine).values
        torch.testing.assert_close(parts.nansum(0), total, rtol=0, atol=1e-5)  # norms in float32


def test_the_lens_of_a_neuron_has_the_multiplier() -> None:
    """What it raises most is what taking it out lowers: its write through the final norm with the scale of the run."""
    model, pairs = granite_with_biases(), table.random_pairs()
    at, rows = pairs.mask.sum(1) - 1, torch.arange(len(pairs))
    values = model.run(pairs.clean, pairs.mask, record=["mlp_post.1", "resid_final"]).values
    maps = model.layout.neurons(1)
    write = values["mlp_post.1"][rows, at, 3, None] * maps.W_out[3] * multiplier("Granite")
    scale = model.layout.final_norm.scale(values["resid_final"][rows, at])
    logits = model.layout.final_norm.project(write) / scale @ model.layout.W_U
    lens = mi.writes_lens(model, pairs, ["m1.n3"], top_k=1)
    expected = logits.max(-1).values
    torch.testing.assert_close(torch.tensor(lens["raised_by"].to_numpy()).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rules", ["relp", "attnlrp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_relevance_is_conserved(shape: str, rules: str) -> None:
    assert mi.relevance(SHAPES[shape](), table.random_pairs(), rules=rules).violation < 1e-5  # norms in float32


@pytest.mark.parametrize("shape", SHAPES)
def test_decomposition_is_complete_and_patch_is_ablation(shape: str) -> None:
    model, pairs = SHAPES[shape](), table.random_pairs()
    parts = mi.contextual_decomposition(model, pairs, "nodes", preset="patch", replacement="pair")
    assert parts.completeness < 1e-5
    effects = mi.activation_patching(model, pairs, list(parts.labels["node"]))
    (relevant,) = parts.relevant.values()
    torch.testing.assert_close(relevant, effects.values, rtol=0, atol=1e-5)


# -- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_a_norm_without_weights_and_without_an_attribute_for_eps(eps: float) -> None:
    def bare(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)

    norm = measure_norm("ln", bare, torch.zeros(1, dtype=torch.float64), 16)
    assert (norm.kind, norm.weight, norm.bias, norm.eps) == ("layer", None, None, eps)


def test_a_multiplier_is_not_rounded_to_the_models_precision() -> None:
    """0.22 is not a bfloat16 number; what a layer adds is multiplied by 0.22 all the same."""
    settings = {**BY_LABEL["Granite"].settings, "residual_multiplier": 0.22}
    model = load_model(replace(BY_LABEL["Granite"], settings=settings, dtype=torch.bfloat16).build())
    weight = model.layout.attention[0].post.weight
    assert weight is not None
    assert float(weight[0]) == pytest.approx(0.22, rel=1e-6)
    x = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(0))
    assert model.mlp(0, x).dtype == torch.bfloat16
