"""Mixtures of experts, models that look both ways, and settings that other libraries trip over: exact, or refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformer_lens.model_bridge.sources import _bridge_builder

from mechinterp.analysis.activation_patching import activation_patching
from mechinterp.analysis.attribution import attribution_patching
from mechinterp.analysis.contextual import contextual_decomposition
from mechinterp.analysis.logit_lens import writes_lens
from mechinterp.analysis.relevance import relevance
from mechinterp.analysis.weights import neuron_tokens
from mechinterp.base.errors import InputError, MechInterpError, UnsupportedError
from mechinterp.cli import app as cli
from mechinterp.discovery.method import score_edges
from mechinterp.discovery.neurons import top_neurons
from mechinterp.engines.decomposition.encoder import load_encoder
from mechinterp.engines.decomposition.subject import Decoder
from mechinterp.engines.edge_attribution import edge_gradients
from mechinterp.engines.edge_patching import run_edges
from mechinterp.graphs.graph import build_graph
from mechinterp.models.hook_manager import HookManager, load_model
from mechinterp.models.hook_names import HOOK_NAMES
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import EVERY, as_installed, build, huggingface, pairs, small_cut, tiny
from tests.support.odd_models import EXPERTS, LOADS, REFUSED, odd


@functools.cache
def opened(name: str) -> HookManager:
    return load_model(odd(name))


def unpadded(some: Pairs, row: int) -> Pairs:
    """One example without its padding."""
    length = int(some.mask[row].sum())
    both = torch.tensor([row, row])  # Pairs are two at least
    return Pairs(
        clean=some.clean[both, :length],
        corrupt=some.corrupt[both, :length],
        right=some.right[both],
        wrong=some.wrong[both],
    )[:1]


# -- mixtures of experts -----------------------------------------------------------------------------------------


def layer_of_experts(model: HookManager) -> int:
    return next(layer for layer, maps in enumerate(model.layout.mlp_maps) if maps is None)


@pytest.mark.parametrize("name", EXPERTS)
def test_the_blocks_own_input_and_output_are_no_activation(name: str) -> None:
    model = opened(name)
    layer = layer_of_experts(model)
    for kind in ("mlp_pre", "mlp_post"):
        assert not model.has(Site(kind, layer))
        with pytest.raises(UnsupportedError, match="bit for bit that of"):
            model.resolve(Site(kind, layer))
    for kind in ("mlp_in", "mlp_out", "z", "resid_mid"):
        assert model.has(Site(kind, layer))
    dense = [index for index, maps in enumerate(model.layout.mlp_maps) if maps is not None]
    assert all(model.has(Site(kind, index)) for index in dense for kind in ("mlp_pre", "mlp_up", "mlp_post"))
    assert bool(dense) == ("dense first" in name)


USERS: dict[str, Callable[[HookManager, Pairs, int], Any]] = {
    "relp": lambda model, some, layer: score_edges(model, build_graph(model), some, method="relp"),
    "cd-edges": lambda model, some, layer: score_edges(model, build_graph(model), some, method="cd-edges"),
    "cd": lambda model, some, layer: score_edges(model, build_graph(model), some, method="cd"),
    "weight-magnitude": lambda model, some, layer: score_edges(
        model, build_graph(model), some, method="weight-magnitude"
    ),
    "attribution, relp": lambda model, some, layer: attribution_patching(model, some, "z", method="relp"),
    "attribution of neurons": lambda model, some, layer: attribution_patching(model, some, "mlp_post"),
    "attribution of activations": lambda model, some, layer: attribution_patching(model, some, "mlp_pre"),
    "patching of neurons": lambda model, some, layer: activation_patching(model, some, "mlp_post"),
    "patching of a neuron": lambda model, some, layer: activation_patching(model, some, [f"m{layer}.n0"]),
    "relevance": lambda model, some, layer: relevance(model, some),
    "relevance, attnlrp": lambda model, some, layer: relevance(model, some, rules="attnlrp"),
    "relevance, gradient": lambda model, some, layer: relevance(model, some, rules="gradient"),
    "top neurons": lambda model, some, layer: top_neurons(model, some, 2),
    "neurons in the graph": lambda model, some, layer: build_graph(model, neurons={layer: [0]}),
    "tokens of a neuron": lambda model, some, layer: neuron_tokens(model, layer, [0]),
    "lens of a neuron": lambda model, some, layer: writes_lens(model, some, [f"m{layer}.n0"]),
    "decomposition": lambda model, some, layer: contextual_decomposition(model, some, "z"),
    "decomposition of neurons": lambda model, some, layer: contextual_decomposition(model, some, "mlp_post"),
}


@pytest.mark.parametrize("name", ["Mixtral", "GLM-4-MoE, dense first"])
@pytest.mark.parametrize("user", USERS)
def test_what_needs_neurons_or_activations_refuses_experts_by_name(name: str, user: str) -> None:
    model = opened(name)
    layer = layer_of_experts(model)
    with pytest.raises(UnsupportedError, match=f"[Ll]ayer {layer} |mlp_(pre|post)\\.{layer}|pattern"):
        USERS[user](model, pairs(3), layer)


@pytest.mark.parametrize("name", EXPERTS)
def test_rules_for_activations_say_what_to_take_instead(name: str) -> None:
    """Silently wrong before: up to 6,760 where the largest effect of an edge was 0.88, by the size of the batch."""
    for method in ("relp", "cd-edges"):
        with pytest.raises(UnsupportedError, match="'eap'"):
            score_edges(opened(name), build_graph(opened(name)), pairs(3), method=method)


@pytest.mark.parametrize("name", EXPERTS)
def test_edges_of_experts_do_not_depend_on_the_batch(name: str) -> None:
    """One example alone, seven together, and padded: exact effects and gradients."""
    model = opened(name)
    some, graph, metric = pairs(7, padded=True), build_graph(model), get_metric("logit_diff")
    cut = small_cut(graph)
    whole = run_edges(model, graph, some, cut).flatten()
    for row in (0, 4, 6):
        for one in (some[row : row + 1], unpadded(some, row)):
            found = run_edges(model, graph, one, cut).flatten()
            # float32; experts sum the tokens of a batch in another order
            torch.testing.assert_close(found, whole[row : row + 1], rtol=0, atol=1e-5)
    few = some[3:5]  # lengths 4 and 3 of 7
    together = edge_gradients(model, graph, few, metric)
    apart = sum(edge_gradients(model, graph, unpadded(few, row), metric) for row in range(2))
    torch.testing.assert_close(together, apart, rtol=0, atol=5e-5)


def test_experts_in_float64() -> None:
    """Hugging Face's grouped product of experts has no float64."""
    module = odd("Mixtral", torch.float64)
    x = pairs(2).clean
    with torch.no_grad():
        expected = odd("Mixtral")(x).logits
    torch.testing.assert_close(load_model(module).run(x).logits.float(), expected, rtol=0, atol=1e-4)  # float32


# -- sites that hold something else ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "instead"),
    [
        ("attn_in", "blocks.{}.hook_resid_pre"),
        ("attn_out", "blocks.{}.hook_resid_mid"),
        ("resid_mid", "blocks.{}.hook_resid_pre"),
        ("scores", "blocks.{}.attn.hook_pattern"),
        ("pattern", "blocks.{}.attn.hook_attn_scores"),
        ("mlp_pre", "blocks.{}.mlp.hook_in"),
        ("mlp_pre", "blocks.{}.mlp.in.hook_out"),
        ("mlp_up", "blocks.{}.mlp.gate.hook_out"),
        ("mlp_up", "blocks.{}.mlp.hook_in"),
        ("mlp_post", "blocks.{}.mlp.hook_in"),
        ("mlp_post", "blocks.{}.mlp.hook_out"),
        ("final_norm", "ln_final.hook_in"),
    ],
)
def test_a_site_that_holds_another_value_is_refused(kind: str, instead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HOOK_NAMES, kind, instead)
    refused = {site.kind for site in build("llama", num_hidden_layers=1, dtype=torch.float32).refused}
    assert kind in refused


EXPECTED = {"gpt2": set[str](), "no-norm": {"scores"}, "attention-only": {"scores"}}
"""What was refused before: scores that nothing depends on; rotary models have no position embedding."""


@pytest.mark.parametrize("name", EVERY)
def test_no_site_is_refused_on_the_plain_shapes(name: str) -> None:
    """No norm, no MLP, norms after: sites that are the same because the model has nothing in between."""
    assert {site.kind for site in tiny(name).refused} == EXPECTED.get(name, {"pos_embed"})


@pytest.mark.parametrize("name", ["GPT-2, no activation", "OLMo 3", "Llama with biases", "GPT-2, one token"])
def test_sites_that_agree_because_nothing_lies_between_stay(name: str) -> None:
    assert {site.kind for site in opened(name).refused} <= {"pos_embed"}


def test_identity_weights_are_no_aliases() -> None:
    """Neurons that are the MLP's input, and its output, are still neurons."""
    module = huggingface("gpt2", n_inner=16, activation_function="linear", dtype=torch.float32)
    for block in module.transformer.h:
        for part in (block.mlp.c_fc, block.mlp.c_proj):
            part.weight.data.copy_(torch.eye(16))
            part.bias.data.zero_()
    assert load_model(module).refused == {}


def test_a_norm_between_gate_and_output_is_no_activation() -> None:
    """BitNet: neurons stay neurons, but none is a function of one pre-activation, and heads are normed together."""
    model = opened("BitNet (norms inside)")
    assert {site.kind for site in model.refused} == {"pos_embed", "pattern", "mlp_pre", "mlp_up"}
    with pytest.raises(UnsupportedError, match="also depends on its other entries"):
        score_edges(model, build_graph(model), pairs(3), method="relp")


# -- causality ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "causal"), [("Gemma-3", True), ("Gemma-3, both ways", False)])
def test_causality_is_measured(name: str, causal: bool) -> None:
    """Off by 3.1 before: a model that looks both ways was taken for causal, and its padding was not masked."""
    module, model, some = odd(name), opened(name), pairs(4, padded=True)
    assert (model.dims.causal, model.keeps_past) == (causal, causal)
    assert (model.run(some.clean, keep_past=True).past is not None) == causal
    logits = model.run(some.clean, some.mask).logits
    for row in range(4):
        length = int(some.mask[row].sum())
        with torch.no_grad():
            expected = module(some.clean[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(logits[row, :length], expected, rtol=0, atol=1e-5)  # float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma-3", "Gemma-3, both ways"])
def test_analyses_of_a_padded_batch_are_those_of_its_examples(name: str) -> None:
    model, some, metric = opened(name), pairs(4, padded=True)[2:], get_metric("logit_diff")
    graph = build_graph(model)
    cut = small_cut(graph)
    alone = [unpadded(some, row) for row in range(2)]
    torch.testing.assert_close(
        run_edges(model, graph, some, cut).flatten(),
        torch.cat([run_edges(model, graph, one, cut).flatten() for one in alone]),
        rtol=0,
        atol=1e-5,  # float32
    )
    torch.testing.assert_close(
        edge_gradients(model, graph, some, metric),
        sum(edge_gradients(model, graph, one, metric) for one in alone),
        rtol=0,
        atol=1e-5,
    )
    patched = activation_patching(model, some, "z", positions="each").values  # (layer, head, pos, example)
    for row, one in enumerate(alone):
        length = one.clean.shape[1]
        own = activation_patching(model, one, "z", positions="each").values[..., 0]
        torch.testing.assert_close(patched[:, :, :length, row], own, rtol=0, atol=1e-5)


def test_a_later_token_reaches_an_earlier_answer() -> None:
    """Nothing after the answer's position may be left out where the model looks both ways."""
    model, some = opened("Gemma-3, both ways"), pairs(3, answer_pos=torch.full((3, 1), 2))
    found = activation_patching(model, some, "resid_pre", layers=[0], positions="each").values[0]  # (pos, example)
    assert float(found[3:].abs().amax(1).min()) > 1e-4


# -- what other libraries raise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADS)
def test_odd_settings_load_and_stay_exact(name: str) -> None:
    module, model = odd(name), opened(name)
    length = min(6, model.dims.n_ctx)
    x = torch.randint(1, 50, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(x).logits
    torch.testing.assert_close(model.run(x).logits, expected, rtol=0, atol=2e-4)  # float32
    if length > 1:
        some, graph = pairs(3), build_graph(model)
        cuts = torch.stack([torch.zeros_like(graph.possible), graph.possible])
        kept, cut = run_edges(model, graph, some, cuts)
        metric = get_metric("logit_diff")
        for found, ids in ((kept, some.clean), (cut, some.corrupt)):
            with torch.no_grad():
                last = module(ids).logits[:, -1:]
            torch.testing.assert_close(found, metric(last, some), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_every_other_setting_is_refused_in_one_line_that_names_the_part(name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        as_installed(load_model)(odd(name))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700
    assert REFUSED[name][0] in text


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("Falcon, new decoder", "new_decoder_architecture=True"),
        ("GPT-BigCode, all keys", "multi_query=False"),
        ("Phi with q and k norms", "qk_layernorm=True"),
        ("OPT, norm after", "do_layer_norm_before=False"),
    ],
)
def test_the_setting_behind_a_refusal_is_named(name: str, setting: str) -> None:
    with pytest.raises(UnsupportedError, match=f"Unlike the family's defaults: .*{setting}"):
        load_model(odd(name))


@pytest.mark.parametrize(
    "error", [AssertionError(), KeyError("q"), RuntimeError("a\nb"), TypeError("x" * 900), RecursionError("deep")]
)
def test_any_exception_of_another_library_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr(_bridge_builder, "build_bridge_from_module", fail)
    with pytest.raises(UnsupportedError, match=rf"cannot bridge GPT2LMHeadModel.*{type(error).__name__}") as caught:
        as_installed(load_model)(huggingface("gpt2"))
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_an_interrupt_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_bridge_builder, "build_bridge_from_module", fail)
    with pytest.raises(KeyboardInterrupt):
        load_model(huggingface("gpt2"))


@pytest.mark.parametrize(
    "error", [AssertionError(), TypeError("no"), AttributeError("no"), ImportError("no"), ZeroDivisionError("no")]
)
def test_any_exception_while_files_are_read_is_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(InputError, match=f"Cannot load the model.*{type(error).__name__}"):
        load_model(tmp_path)


def test_a_module_that_cannot_be_copied_is_one_line() -> None:
    module = huggingface("gpt2")
    module.kept = module(pairs(2).clean).logits  # no leaf: deepcopy refuses it
    with pytest.raises(MechInterpError, match="Cannot use this GPT2LMHeadModel"):
        as_installed(load_model)(module)


def test_on_the_command_line_it_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd("Phi with q and k norms").save_pretrained(tmp_path / "phi")
    capsys.readouterr()
    assert cli.main(["run", "ioi", "--model", str(tmp_path / "phi"), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "qk_layernorm=True" in err and "Traceback" not in err


# -- models that show no patterns --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["OPT", "GPT-Neo"])
def test_patterns_in_closed_form_are_the_models_own(name: str) -> None:
    """KeyError: 'pattern.0' before. GPT-Neo does not scale its scores, and its second layer looks back 4 tokens."""
    module, model, some = odd(name), opened(name), pairs(4, padded=True)
    assert not model.has(Site("pattern", 0))
    totals = Decoder(model).run_pass(some, some.answer_pos, None, scores=True).totals
    with torch.no_grad():
        expected = module(some.clean, attention_mask=some.mask.long(), output_attentions=True).attentions
    for layer, pattern in enumerate(expected):
        real = some.mask[:, None, :, None]
        torch.testing.assert_close(
            torch.where(real, totals[f"pattern.{layer}"], 0), torch.where(real, pattern, 0), rtol=0, atol=1e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["OPT", "GPT-Neo"])
@pytest.mark.parametrize("preset", ["frozen-remove", "patch"])
def test_cd_works_where_no_pattern_is_shown(name: str, preset: str) -> None:
    model, some = opened(name), pairs(3, padded=True)
    graph = build_graph(model)
    whole, one = (
        score_edges(model, graph, some, method="cd", preset=preset, top=2, batch_size=n).values for n in (3, 1)
    )
    torch.testing.assert_close(whole, one, rtol=0, atol=1e-5)  # float32
    assert float(whole.abs().max()) > 1e-3


def test_an_encoder_with_odd_parts_is_one_line() -> None:
    module = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, vocab_size=50
        )
    ).eval()
    module.classifier.bias = None
    with pytest.raises(UnsupportedError, match=r"BertForSequenceClassification cannot be read.*AttributeError"):
        as_installed(load_encoder)(module)
