"""Contextual decomposition: identities on every shape, the published rules by hand, and ablation as the oracle."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers

import mechinterp as mi
from mechinterp.analysis.contextual import contextual_decomposition
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.engines.decomposition.encoder import Encoder, load_encoder
from mechinterp.engines.decomposition.rules import PRESETS, Preset
from mechinterp.models.sites import Site
from tests.support import models_tiny as tiny_models
from tests.support.two_streams import gpt2

ENCODERS = ("classifier", "masked")
EXACT = 1e-10


def near(name: str) -> float:
    """How close two ways to the same number must come: some shapes compute norms in float32 (see `models_tiny`)."""
    return 1e-9 if name in (*tiny_models.ALL_FLOAT64, *ENCODERS) else 5e-6


@functools.cache
def encoder(name: str) -> Encoder:
    config = transformers.BertConfig(
        vocab_size=tiny_models.D_VOCAB,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=32,
        id2label=dict(enumerate("abc")),
        label2id={label: i for i, label in enumerate("abc")},
    )
    kinds = {"classifier": transformers.BertForSequenceClassification, "masked": transformers.BertForMaskedLM}
    return load_encoder(tiny_models.randomized(kinds[name](config)))


def model_of(name: str) -> Any:
    return encoder(name) if name in ENCODERS else tiny_models.tiny(name)


def direction_of(name: str) -> Any:
    return (1, 0) if name == "classifier" else "answers"


def decompose(name: str, source: Any = "z", *, n: int = 3, padded: bool = True, **keywords: Any) -> Any:
    pairs = keywords.pop("pairs", None) or tiny_models.pairs(n, 7, padded=padded)
    targets = keywords.pop("targets", direction_of(name))
    return contextual_decomposition(model_of(name), pairs, source, targets=targets, **keywords)


def only(found: Any) -> torch.Tensor:
    (value,) = found.relevant.values()
    return value


every = pytest.mark.parametrize("name", [*tiny_models.EVERY, *ENCODERS])
preset_of = pytest.mark.parametrize("preset", list(PRESETS))
NAMES, RULES = [*tiny_models.EVERY, *ENCODERS], list(PRESETS)
# Every model with two presets, every preset with three models or more.
some_of_both = pytest.mark.parametrize(
    ("name", "preset"), [(name, RULES[(i + step) % len(RULES)]) for i, name in enumerate(NAMES) for step in (0, 2)]
)


@pytest.mark.parametrize("at", [None, 2])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_published_rules_are_those_written_out_by_hand(layer: int, at: int | None) -> None:
    module = tiny_models.huggingface("gpt2", n_layer=2)
    model, pairs = mi.load_model(module), tiny_models.pairs(2, 6)
    mean = model.run(pairs.corrupt, record=[f"z.{layer}"]).values[f"z.{layer}"].mean((0, 1))[1]
    with torch.no_grad():
        by_hand = gpt2(module, pairs.clean, layer, 1, at, mean)
    names = [name for name in by_hand if name not in ("resid_pre.0", "resid_pre.1", "logits")]
    found = contextual_decomposition(
        model,
        pairs,
        [f"a{layer}.h1"] if at is None else [f"a{layer}.h1@{at}"],
        targets=[*names, "logits"],
        preset="authors-gpt",
        replacement="mean",
    )
    for name in names:
        r, i = by_hand[name]
        torch.testing.assert_close(found.total[name], (r + i).expand_as(found.total[name]), rtol=0, atol=1e-10)
        torch.testing.assert_close(found.relevant[name][0, 0], r.expand_as(found.total[name]), rtol=0, atol=1e-10)
        torch.testing.assert_close(found.irrelevant(name)[0, 0], i.expand_as(found.total[name]), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.relevant["logits"][0, 0, :, 0], by_hand["logits"][0][:, -1], rtol=0, atol=1e-10)
    assert float(found.relevant["resid_final"].abs().max()) > 1e-2


@every
@preset_of
def test_every_operation_is_complete(name: str, preset: str) -> None:
    found = decompose(name, ["a1.h0"], preset=preset, forward=True)
    assert found.completeness < (EXACT if near(name) < 1e-8 else 1e-6)
    value, total = only(found), next(iter(found.total.values()))
    torch.testing.assert_close(found.irrelevant() + value, total.expand_as(value))


@every
@pytest.mark.parametrize("preset", ["authors-gpt", "authors-bert"])
def test_everything_relevant_gives_the_whole_target(name: str, preset: str) -> None:
    found = decompose(name, ["input"], preset=preset)
    torch.testing.assert_close(only(found)[0, 0], next(iter(found.total.values())), rtol=0, atol=near(name) * 10)


@pytest.mark.parametrize("name", tiny_models.EVERY)
def test_everything_relevant_leaves_only_biases_to_the_linear_preset(name: str) -> None:
    pairs = tiny_models.pairs(3, 7, padded=True)
    found = decompose(name, ["input"], pairs=pairs, forward=True)
    conserved = mi.relevance(model_of(name), pairs)
    biases = conserved.biases.values.sum(0)
    torch.testing.assert_close(only(found)[0, 0] + biases, conserved.output, rtol=0, atol=near(name) * 10)


@every
@preset_of
def test_nothing_relevant_stays_nothing(name: str, preset: str) -> None:
    """A source whose activation is its own replacement has no relevant part anywhere."""
    pairs = tiny_models.pairs(2, 6)
    same = mi.Pairs(clean=pairs.clean, corrupt=pairs.clean, right=pairs.right, wrong=pairs.wrong)
    found = decompose(
        name,
        ["a0.h1", ["a0.h2", "m1"] if model_of(name).dims.has_mlp else "a1.h2"],
        pairs=same,
        replacement="pair",
        preset=preset,
        forward=True,
    )
    assert bool((only(found) == 0).all())


@pytest.mark.parametrize("name", tiny_models.EVERY)
@pytest.mark.parametrize("replacement", ["pair", "mean", "zero"])
def test_the_patch_preset_is_ablation(name: str, replacement: str) -> None:
    model, pairs = model_of(name), tiny_models.pairs(3, 7, padded=True)
    parts: list[Any] = ["a0.h1", "a1.h3@2", ["a0.h0", "a0.h2", "a2.h1"], "input@1"]
    if model.has(Site("resid_mid", 1)) and replacement != "zero":
        parts.append("resid_mid.1")
    if replacement != "zero":  # a whole stream of zeros is where an RMS norm is singular
        parts.append("resid_pre.2")
    if model.dims.has_mlp:
        parts += ["m1", "m0.n5", ["m0", "a1.h1@end"]]
    last = {"end": pairs.lengths - 1}
    pairs = mi.Pairs(
        clean=pairs.clean, corrupt=pairs.corrupt, mask=pairs.mask, right=pairs.right, wrong=pairs.wrong, positions=last
    )
    found = decompose(name, parts, pairs=pairs, preset="patch", replacement=replacement)
    ablated = mi.activation_patching(model, pairs, parts, replacement=replacement)
    torch.testing.assert_close(only(found).double(), ablated.values.double(), rtol=0, atol=near(name))
    assert float(ablated.values.abs().max()) > 1e-2


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("heads", [(1,), (0, 3)])
def test_the_patch_preset_is_ablation_in_an_encoder(name: str, heads: tuple[int, ...]) -> None:
    model = encoder(name)
    pairs = tiny_models.pairs(3, 7, padded=True)
    dense = model.module.bert.encoder.layer[1].attention.output.dense  # type: ignore[union-attr]

    def zero(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        z = inputs[0].unflatten(-1, (4, 4)).clone()
        z[:, :, list(heads)] = 0
        return (z.flatten(-2),)

    def read() -> torch.Tensor:
        with torch.no_grad():
            logits = model.module(pairs.clean, attention_mask=pairs.mask.long()).logits
        if name == "classifier":
            return logits[:, 1] - logits[:, 0]
        rows = torch.arange(len(pairs))
        at = logits[rows, pairs.answer_pos[:, 0]]
        return at[rows, pairs.right[:, 0]] - at[rows, pairs.wrong[:, 0]]  # type: ignore[index]

    before = read()
    handle = dense.register_forward_pre_hook(zero)  # type: ignore[union-attr]
    after = read()
    handle.remove()
    found = decompose(name, [[f"a1.h{head}" for head in heads]], pairs=pairs, preset="patch")
    torch.testing.assert_close(only(found)[0, 0], before - after, rtol=0, atol=1e-10)
    torch.testing.assert_close(next(iter(found.total.values())), before, rtol=0, atol=1e-10)


EVERYWHERE = ("z", "v", "attn_out", "resid_pre", "input")
BACKWARD = [(name, source) for name in tiny_models.EVERY for source in EVERYWHERE]
BACKWARD += [
    (name, source)
    for name in tiny_models.EVERY
    for source in ("resid_mid", "mlp_pre", "mlp_post", "mlp_out")
    if name != "attention-only" and (name, source) != ("neox", "resid_mid")  # which have no such site
]


@pytest.mark.parametrize(("name", "source"), BACKWARD)
def test_one_backward_is_the_forward_walk(name: str, source: str) -> None:
    keywords: dict[str, Any] = {"positions": [0, (1, -1)], "replacement": "mean"}
    what = [source] if source == "input" else source
    backward, forward = decompose(name, what, **keywords), decompose(name, what, forward=True, **keywords)
    assert backward.about["by"] == "one backward" and forward.about["by"] == "forward walk"
    torch.testing.assert_close(only(backward), only(forward), rtol=0, atol=near(name), equal_nan=True)
    total = next(iter(forward.total.values()))
    torch.testing.assert_close(next(iter(backward.total.values())), total, rtol=0, atol=near(name) * 10)


@every
def test_the_linear_preset_adds_up_over_disjoint_sources(name: str) -> None:
    parts = ["a1.h0", "a1.h2@1", "a1.h2@2"]
    single, together = decompose(name, parts, forward=True), decompose(name, [parts], forward=True)
    torch.testing.assert_close(only(single).sum(0), only(together)[0], rtol=0, atol=near(name))


def test_a_frozen_attention_only_model_is_a_product_of_its_maps() -> None:
    """The last layer's heads are their direct effect on the logits; an earlier head goes through the OV circuits."""
    model, pairs = tiny_models.tiny("attention-only"), tiny_models.pairs(2, 6)
    direct = mi.direct_logit_attribution(model, pairs)
    found = decompose("attention-only", "z", pairs=pairs, padded=False)
    for head in range(4):
        expected = direct.at(node=f"a2.h{head}").values
        torch.testing.assert_close(only(found)[2, head, 0], expected, rtol=0, atol=EXACT)
    run = model.run(pairs.clean, record=["z.1", "pattern.2", "resid_pre.2", "resid_final"])
    last, norm = model.layout.attention[2], model.layout.final_norm
    write = run.values["z.1"][:, :, 3] @ model.layout.attention[1].W_O[3]
    read = last.norm.project(write) / last.norm.scale(run.values["resid_pre.2"])
    through = torch.einsum("bhqk,bkd,hde,hef->bqf", run.values["pattern.2"], read, last.W["v"], last.W_O)
    final = norm.project(write + through)[:, -1] / norm.scale(run.values["resid_final"])[:, -1]
    rows = torch.arange(2)
    unembedding = model.layout.W_U[:, pairs.right[:, 0]] - model.layout.W_U[:, pairs.wrong[:, 0]]  # type: ignore[index]
    torch.testing.assert_close(only(found)[1, 3, 0], (final @ unembedding)[rows, rows], rtol=0, atol=EXACT)


@every
@preset_of
def test_a_source_that_cannot_reach_has_exactly_nothing(name: str, preset: str) -> None:
    model = model_of(name)
    found = decompose(name, ["a2.h1"], preset=preset, targets=["z.1", "resid_pre.2", "a2.h1"])
    assert bool((found.relevant["z.1"].nan_to_num() == 0).all())
    assert bool((found.relevant["resid_pre.2"].nan_to_num() == 0).all())
    assert float(found.relevant["a2.h1"].nan_to_num().abs().max()) > 0
    if model.dims.causal:
        later = decompose(name, ["a0.h1@3"], preset=preset, targets=["resid_pre.2"], padded=False)
        assert bool((later.relevant["resid_pre.2"][:, :, :, :3] == 0).all())
        assert float(later.relevant["resid_pre.2"][:, :, :, 3:].abs().max()) > 0


@pytest.mark.slow
@some_of_both
def test_batches_memory_and_padding_change_nothing(name: str, preset: str) -> None:
    heads = ["a0.h1", "a1.h2", "a2.h0"]
    keywords: dict[str, Any] = {"preset": preset, "positions": "each", "replacement": "pair", "forward": True}
    whole = decompose(name, heads, n=4, **keywords)
    small = decompose(name, heads, n=4, batch_size=3, memory=1, **keywords)
    torch.testing.assert_close(only(whole), only(small), rtol=0, atol=near(name), equal_nan=True)
    pairs = tiny_models.pairs(4, 7, padded=True)
    row = 2
    length = int(pairs.lengths[row])
    alone = mi.Pairs(
        clean=pairs.clean[[row, row], :length],
        corrupt=pairs.corrupt[[row, row], :length],
        right=pairs.right[[row, row]],  # type: ignore[index]
        wrong=pairs.wrong[[row, row]],  # type: ignore[index]
    )[:1]
    single = only(decompose(name, heads, pairs=alone, **keywords))[..., 0]
    torch.testing.assert_close(only(whole)[..., :length, row], single, rtol=0, atol=near(name))


@some_of_both
def test_starting_late_and_computing_few_positions_is_the_whole_walk(name: str, preset: str) -> None:
    """A site target keeps every position; beside it the direction is computed in full, alone it is not."""
    sources = ["a1.h1@4", "a2.h0"]
    alone = decompose(name, sources, preset=preset, padded=False, forward=True)
    direction = direction_of(name)
    label = direction if isinstance(direction, str) else "direction"
    wide = decompose(name, sources, preset=preset, padded=False, targets=[direction, "z.2"])
    torch.testing.assert_close(alone.relevant[label], wide.relevant[label], rtol=0, atol=EXACT)
    together = decompose(name, ["input@0", *sources], preset=preset, padded=False, forward=True)
    torch.testing.assert_close(alone.relevant[label], together.relevant[label][1:], rtol=0, atol=EXACT)


def test_targets_of_each_kind() -> None:
    model, pairs = tiny_models.tiny("gpt2"), tiny_models.pairs(2, 6)
    found = contextual_decomposition(
        model, pairs, ["a0.h1", "m0"], targets=["logits", "a2.h3<q>", "a2.h3<q>@2", "m1.n4", "resid_post.2"]
    )
    shapes = {name: tuple(value.shape) for name, value in found.relevant.items()}
    assert shapes == {
        "logits": (2, 1, 2, 1, 50),
        "a2.h3<q>": (2, 1, 2, 6, 4),
        "a2.h3<q>@2": (2, 1, 2, 4),
        "m1.n4": (2, 1, 2, 6),
        "resid_post.2": (2, 1, 2, 6, 16),
    }
    torch.testing.assert_close(found.relevant["a2.h3<q>"][:, :, :, 2], found.relevant["a2.h3<q>@2"])
    run = model.run(pairs.clean, record=["q.2"])
    torch.testing.assert_close(found.total["a2.h3<q>"], run.values["q.2"][:, :, 3])
    answers = contextual_decomposition(model, pairs, ["a0.h1", "m0"], forward=True)
    rows = torch.arange(2)
    logits = found.relevant["logits"][:, 0, :, 0]
    difference = logits[:, rows, pairs.right[:, 0]] - logits[:, rows, pairs.wrong[:, 0]]  # type: ignore[index]
    torch.testing.assert_close(only(answers)[:, 0], difference)
    assert answers.to_frame().columns.tolist() == ["node", "pos", "example", "relevance"]
    with pytest.raises(InputError, match="Name a target"):
        found.scores()


def test_own_presets_and_neurons() -> None:
    mine = Preset(activation="remove", norm="remove")
    found = decompose("llama", "mlp_post", preset=mine, positions=[-1])
    assert only(found).shape == (3, 32, 1, 3)
    assert not torch.allclose(only(found), only(decompose("llama", "mlp_post", positions=[-1])))


@pytest.mark.parametrize(
    ("source", "keywords", "message"),
    [
        ("z", {"preset": "best"}, "preset"),
        ("z", {"replacement": "noise"}, "replacement"),
        (["a9.h0"], {}, "layers 0 to 2"),
        (["a0.h1@9"], {}, "outside the prompt"),
        ([], {}, "No part is given"),
        (["a0.h1", "a0.h1"], {}, "given twice"),
        ("q", {}, "nothing of 'q.0' reaches"),
        ("pattern", {}, "does not split the site"),
        ("z", {"targets": []}, "No target"),
        ("z", {"targets": ["answers", "logits"]}, "one direction at a time"),
        ("z", {"targets": "a0.h9"}, "heads 0 to 3"),
        ("z", {"preset": "patch", "forward": False}, "needs preset 'linear'"),
        ([["a0.h1", "m1"]], {"forward": False}, "needs preset 'linear'"),
    ],
)
def test_bad_requests_get_one_clear_line(source: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, UnsupportedError), match=message) as error:
        decompose("gpt2", source, **keywords)
    assert "\n" not in str(error.value)


def test_an_operation_without_a_rule_is_named() -> None:
    """An edit of z makes it another thing than pattern @ v; one of the pattern is a pattern like any other."""
    model, pairs = tiny_models.tiny("gpt2"), tiny_models.pairs(2, 6)
    halved = mi.Intervention(Site("z", 1), lambda z: z * 0.5)
    with model.intervene(halved), pytest.raises(UnsupportedError, match=r"'z\.1' is not the attention"):
        contextual_decomposition(model, pairs, "z")
    blind = mi.knock_out_attention(model, pairs, -1, 0)
    with model.intervene(*blind):
        knocked = contextual_decomposition(model, pairs, "z")
    assert not torch.allclose(only(knocked), only(contextual_decomposition(model, pairs, "z")))


def test_encoders_of_other_kinds_are_refused() -> None:
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(UnsupportedError, match="BertForTokenClassification is not supported"):
        load_encoder(transformers.BertForTokenClassification(config))
    with pytest.raises(InputError, match="no model directory"):
        load_encoder("./nowhere")
    with pytest.raises(InputError, match="Cannot load an encoder from int"):
        load_encoder(3)


def test_an_encoder_from_a_directory_is_the_one_that_was_saved(tmp_path: Any) -> None:
    for name in ENCODERS:
        module = encoder(name).module
        module.save_pretrained(tmp_path / name)  # type: ignore[operator]
        loaded = load_encoder(str(tmp_path / name), dtype="float64")
        pairs = tiny_models.pairs(3, 7, padded=True)
        found = contextual_decomposition(loaded, pairs, "z", targets=direction_of(name))
        torch.testing.assert_close(only(found), only(decompose(name, "z", pairs=pairs)), rtol=0, atol=1e-12)
        assert loaded.info.origin == "directory" and loaded.info.architecture == type(module).__name__


def test_progress_counts_sources_and_examples_once() -> None:
    told: list[tuple[int, int]] = []
    pairs = tiny_models.pairs(4, 7)
    decompose(
        "gpt2", "z", pairs=pairs, forward=True, batch_size=3, progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (4 * 12, 4 * 12) and told == sorted(told) and len(set(told)) == len(told)
    with pytest.raises(InputError, match="read at its first token"):
        decompose("classifier", "z", position=2)


@pytest.mark.parametrize("several", [["a1.h1", "a1.h1@2"], ["z.1", "a1.h1"]])
def test_a_part_that_is_named_twice_in_a_set_counts_once(several: list[str]) -> None:
    twice, once = decompose("gpt2", [several], replacement="pair"), decompose("gpt2", several[:1], replacement="pair")
    torch.testing.assert_close(only(twice), only(once), rtol=0, atol=EXACT)


def test_presets_and_prompts_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="rule for norm"):
        Preset(norm="removed")
    with pytest.raises(InputError, match="kind of operation"):
        Preset(settle=frozenset({"everything"}))
    long = torch.ones(2, 40, dtype=torch.long)
    for name in ("gpt2", "classifier"):
        with pytest.raises(InputError, match="40 tokens; the model reads 32"):
            contextual_decomposition(model_of(name), long, "z", targets=1)
    with pytest.raises(InputError, match="token id 77"):
        contextual_decomposition(model_of("masked"), torch.full((2, 5), 77), "z", targets=1)
    strange = mi.Pairs(clean=torch.full((2, 5), 77), corrupt=torch.full((2, 5), 77))
    with pytest.raises(InputError, match="Token id 77"):
        decompose("masked", "z", targets=1, replacement="mean", reference=strange)
