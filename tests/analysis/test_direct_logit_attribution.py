"""Direct logit attribution: the parts sum to the model's logit, and each is what that part alone adds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.analysis.direct_logit_attribution import direct_logit_attribution, group_parts
from mechinterp.base.errors import InputError, MechInterpError, UnsupportedError
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.logit_directions import _token_ids, logit_direction
from mechinterp.engines.replacement import build_replacement
from mechinterp.graphs.graph import build_graph
from mechinterp.models.hook_manager import HookManager, Intervention, load_model
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import ALL_FLOAT64, EVERY, N_HEADS, N_LAYERS, as_installed, build, pairs, tiny, tokens


def tolerance(name: str) -> float:
    """Hugging Face's RMSNorm and rotary cosines are float32 inside, whatever the dtype of the weights."""
    return 1e-10 if name in ALL_FLOAT64 else 1e-5


def uncapped(model: HookManager, logits: Tensor) -> Tensor:
    cap = model.layout.soft_cap
    return logits if cap is None else cap * torch.atanh(logits / cap)


def last_logits(model: HookManager, given: Pairs, ids: Tensor, **run: Any) -> Tensor:
    """The model's own logit of each row's token at its last real position, before the soft cap."""
    logits = model.run(given.clean, given.mask, **run).logits
    assert logits is not None
    rows = torch.arange(len(given))
    return uncapped(model, logits[rows, given.lengths - 1, ids])


def everything(model: HookManager) -> list[str]:
    heads = [f"a{layer}.h{head}" for layer in range(N_LAYERS) for head in range(N_HEADS)]
    return heads + [f"m{layer}" for layer in range(N_LAYERS)] * model.dims.has_mlp


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_parts_sum_to_the_models_logit(name: str, refined: bool):
    model, given = tiny(name), pairs(4, padded=True)
    refine = everything(model) if refined else []
    assert given.right is not None and given.wrong is not None
    right, wrong = (last_logits(model, given, table[:, 0]) for table in (given.right, given.wrong))
    for direction, expected in (("answers", right - wrong), (given.right[:, 0], right), ("wrong", wrong)):
        parts = direct_logit_attribution(model, given, direction, refine=refine)
        largest = parts.values.nan_to_num().abs().amax(0)
        error = ((parts.values.nansum(0) - expected).abs() / largest).max()
        assert error < tolerance(name)
        assert parts.about["error"] < tolerance(name)


def test_below_a_soft_cap_the_capped_sum_is_the_models_logit():
    model, given = build("gemma2", final_logit_softcapping=3.0), pairs(4)
    parts = direct_logit_attribution(model, given, 5)
    logits = model.run(given.clean).logits
    assert logits is not None
    cap = 3.0
    assert float(logits[:, -1].abs().max()) > 2  # the cap is felt
    # float32 inside Hugging Face's RMSNorm
    torch.testing.assert_close(cap * torch.tanh(parts.values.sum(0) / cap), logits[:, -1, 5], rtol=1e-5, atol=1e-5)
    assert "before the soft cap of 3" in parts.about["sums_to"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "gemma2", "qwen2"])
def test_parts_sum_on_processed_weights_to_the_same_difference(name: str):
    given, bridge = pairs(4), build(name, dtype=torch.float32).bridge
    raw = direct_logit_attribution(load_model(bridge), given)
    bridge.enable_compatibility_mode()
    model = load_model(bridge)
    parts = direct_logit_attribution(model, given, refine=everything(model))
    assert parts.about["weights"] == "compatibility" and raw.about["weights"] == "raw"
    # Folding changes no difference of logits; float32 over three layers.
    torch.testing.assert_close(parts.values.nansum(0), raw.values.sum(0), rtol=1e-4, atol=1e-4)
    if name == "gpt2":  # but folding the value biases moves value from the heads to the attention's bias
        moved = parts.at(node="a1.bias").values - raw.at(node="a1.bias").values
        assert float(moved.abs().max()) > 1e-2


@pytest.mark.slow
def test_on_folded_weights_the_numbers_are_transformer_lenss():
    given, bridge = pairs(4), build("gpt2", dtype=torch.float32).bridge
    bridge.enable_compatibility_mode()
    parts = direct_logit_attribution(load_model(bridge), given, refine=["input"])
    assert given.right is not None and given.wrong is not None
    with torch.no_grad():
        _, cache = bridge.run_with_cache(given.clean)
        whole, names = cache.get_full_resid_decomposition(
            layer=-1, pos_slice=-1, expand_neurons=False, return_labels=True
        )
        right, wrong = given.right[:, 0], given.wrong[:, 0]
        theirs = cache.logit_attrs(whole, tokens=right, incorrect_tokens=wrong, pos_slice=-1)
    ours = {"embed": "embed", "pos_embed": "pos_embed"}
    ours |= {f"L{layer}H{head}": f"a{layer}.h{head}" for layer in range(N_LAYERS) for head in range(N_HEADS)}
    ours |= {f"{layer}_mlp_out": f"m{layer}" for layer in range(N_LAYERS)}
    assert set(names) == {*ours, "bias"}
    for name, values in zip(names, theirs, strict=True):
        if name != "bias":
            # float32 on both sides
            torch.testing.assert_close(parts.at(node=ours[name]).values, values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_each_write_alone_is_what_it_takes_away_behind_the_frozen_norm(name: str):
    model, given = tiny(name), pairs(3, padded=True)
    assert given.right is not None
    ids = given.right[:, 0]
    parts = direct_logit_attribution(model, given, ids)
    sites = [Site(kind, layer) for layer in range(N_LAYERS) for kind in ("z", "mlp_out")]
    sites = [site for site in sites if model.has(site)]
    run = model.run(given.clean, given.mask, record=[*sites, Site("resid_final")])
    norm, scale = model.layout.final_norm, model.layout.final_norm.scale(run.values[Site("resid_final")])
    writes: dict[str, Tensor] = {}
    for site in sites:
        if site.kind == "z":
            for head, write in enumerate(model.layout.head_writes(int(site.layer or 0), run.values[site])):
                writes[f"a{site.layer}.h{head}"] = write
        else:
            writes[f"m{site.layer}"] = run.values[site]
    whole = last_logits(model, given, ids)
    for label, write in writes.items():

        def without(value: Tensor, write: Tensor = write) -> Tensor:
            return value - norm.project(write) / scale

        cut = last_logits(model, given, ids, interventions=[Intervention(Site("final_norm"), without)])
        torch.testing.assert_close(
            parts.at(node=label).values, whole - cut, rtol=tolerance(name) * 10, atol=tolerance(name) * 10
        )


def test_without_a_norm_a_part_is_the_direct_effect_of_removing_it_exactly():
    model, given = tiny("no-norm"), pairs(4, padded=True)
    graph = build_graph(model, split_input=True)
    parts = direct_logit_attribution(model, given, refine=["input"])
    nothing = torch.zeros(graph.possible.shape, dtype=torch.bool)
    cuts = torch.stack([nothing, *(graph.mask_of(f"{writer}->logits") for writer in graph.writers)])
    values = run_edges(model, graph, given, cuts, replacement=build_replacement("zero", model, graph))
    for writer, value in zip(graph.writers, values[1:], strict=True):
        torch.testing.assert_close(parts.at(node=writer).values, values[0] - value, rtol=1e-10, atol=1e-10)


def test_without_a_norm_the_difference_of_two_prompts_is_the_exact_edge():
    model, given = tiny("no-norm"), pairs(4)
    graph = build_graph(model)
    clean, corrupt = (direct_logit_attribution(model, given, prompt=prompt) for prompt in ("clean", "corrupt"))
    nothing = torch.zeros(graph.possible.shape, dtype=torch.bool)
    for node in ("a0.h2", "m1", "a2.h0"):
        kept, cut = run_edges(model, graph, given, torch.stack([nothing, graph.mask_of(f"{node}->logits")]))
        expected = clean.at(node=node).values - corrupt.at(node=node).values
        torch.testing.assert_close(kept - cut, expected, rtol=1e-10, atol=1e-10)


def test_a_neuron_is_what_silencing_it_takes_away():
    model, given = tiny("no-norm"), pairs(3)
    assert given.right is not None
    last = N_LAYERS - 1
    parts = direct_logit_attribution(model, given, "right", refine=[f"m{last}"])
    whole = last_logits(model, given, given.right[:, 0])
    for neuron in (0, 7, 31):

        def silence(value: Tensor, neuron: int = neuron) -> Tensor:
            value = value.clone()
            value[..., neuron] = 0
            return value

        cut = last_logits(model, given, given.right[:, 0], interventions=[Intervention(f"mlp_post.{last}", silence)])
        torch.testing.assert_close(parts.at(node=f"m{last}.n{neuron}").values, whole - cut, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["no-norm", "llama"])
def test_a_source_position_is_what_cutting_its_attention_takes_away(name: str):
    model, given = tiny(name), pairs(3, length=6)
    assert given.right is not None
    last, head, key = N_LAYERS - 1, 3, 2
    parts = direct_logit_attribution(model, given, "right", refine=[f"a{last}.h{head}"])
    record = [Site("resid_final"), Site("mlp_out", last)]
    run = model.run(given.clean, record=record)
    norm, resid = model.layout.final_norm, run.values[Site("resid_final")]
    whole = last_logits(model, given, given.right[:, 0])

    def cut_attention(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, head, -1, key] = 0
        return value

    edits = [
        Intervention(f"pattern.{last}", cut_attention),
        Intervention(f"mlp_out.{last}", run.values[Site("mlp_out", last)]),  # the direct effect only
    ]
    changed = model.run(given.clean, interventions=edits, record=record).values[Site("resid_final")]
    # The model's own norm would rescale; put in what the norm of the uncut run does to the changed stream.
    frozen = norm.project(changed) / norm.scale(resid) + (0 if norm.bias is None else norm.bias)
    cut = last_logits(model, given, given.right[:, 0], interventions=[Intervention(Site("final_norm"), frozen)])
    found = parts.at(node=f"a{last}.h{head}@{key}").values
    assert float(found.abs().min()) > 1e-4
    torch.testing.assert_close(found, whole - cut, rtol=tolerance(name) * 10, atol=tolerance(name))


@pytest.mark.parametrize("name", EVERY)
def test_refinements_sum_to_what_they_refine(name: str):
    model, given = tiny(name), pairs(4, padded=True)
    whole = direct_logit_attribution(model, given)
    fine = direct_logit_attribution(model, given, refine=everything(model))
    for node in everything(model):
        own = [
            label
            for label in fine.labels["node"]
            if label.startswith((f"{node}@", f"{node}.n")) or label == f"{node}.bias"
        ]
        assert len(own) > 3
        total = fine.at(node=own).values.nansum(0)
        # Post-norms and rotary cosines are float32 inside, so z and pattern @ v differ by that.
        torch.testing.assert_close(total, whole.at(node=node).values, rtol=tolerance(name), atol=tolerance(name))


def test_named_source_positions_and_the_rest():
    model = tiny("qwen2")
    given = pairs(3, positions={"IO": torch.tensor([1, 2, 3]), "S": torch.tensor([4, 4, 2])})
    each = direct_logit_attribution(model, given, refine=["a1.h2"])
    named = direct_logit_attribution(model, given, refine=["a1.h2"], source_positions=["IO", ("S", -1)])
    assert [n for n in named.labels["node"] if "@" in n] == ["a1.h2@IO", "a1.h2@S,-1", "a1.h2@rest"]
    single = each.at(node=[f"a1.h2@{i}" for i in range(7)]).values
    rows = torch.arange(3)
    io, s = single[given.positions["IO"], rows], single[given.positions["S"], rows] + single[6, rows]
    torch.testing.assert_close(named.at(node="a1.h2@IO").values, io)
    torch.testing.assert_close(named.at(node="a1.h2@S,-1").values, s)
    torch.testing.assert_close(named.at(node="a1.h2@rest").values, single.sum(0) - io - s)


def test_a_position_that_an_example_does_not_have_is_nan():
    given = pairs(3, padded=True)
    parts = direct_logit_attribution(tiny("gpt2"), given, refine=["a0.h1"])
    columns = torch.stack([parts.at(node=f"a0.h1@{i}").values for i in range(7)], 1)
    assert torch.equal(columns.isnan(), ~given.mask)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_several_answer_positions_give_their_mean(name: str):
    model, base = tiny(name), pairs(3)
    at = torch.tensor([[2, 4], [6, -1], [1, 5]])
    given = Pairs(clean=base.clean, corrupt=base.corrupt, right=base.right, wrong=base.wrong, answer_pos=at)
    refine = ["a2.h1", "m0"]
    found = direct_logit_attribution(model, given, refine=refine).values
    single = {p: direct_logit_attribution(model, given, refine=refine, position=p).values for p in range(7)}
    expected = torch.stack([(single[2] + single[4])[:, 0] / 2, single[6][:, 1], (single[1] + single[5])[:, 2] / 2], 1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # batches of other content, float32 inside


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_is_one_by_one_is_padded(name: str):
    model, given = tiny(name), pairs(4, padded=True)
    refine = [n for n in everything(model) if n in ("a1.h3", "m2")]
    whole = direct_logit_attribution(model, given, refine=refine)
    parted = direct_logit_attribution(model, given, refine=refine, batch_size=3)
    assert whole.labels == parted.labels
    torch.testing.assert_close(whole.values, parted.values, rtol=1e-6, atol=1e-7, equal_nan=True)
    for row in range(4):
        length = int(given.lengths[row])
        alone = direct_logit_attribution(
            model,
            given.clean[row : row + 1, :length],
            (given.right[row], given.wrong[row]),
            refine=refine,
        )
        there = [i for i, label in enumerate(whole.labels["node"]) if label in alone.labels["node"]]
        torch.testing.assert_close(whole.values[there, row], alone.values[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_directions_that_mean_the_same_give_the_same():
    model, given = tiny("gpt2"), pairs(3)
    assert given.right is not None and given.wrong is not None
    weights = torch.zeros(3, 50, dtype=torch.float64)
    weights[torch.arange(3), given.right[:, 0]] = 1
    weights[torch.arange(3), given.wrong[:, 0]] = -1
    by_name = direct_logit_attribution(model, given).values
    for direction in ((given.right[:, 0], given.wrong[:, 0]), weights):
        torch.testing.assert_close(direct_logit_attribution(model, given, direction).values, by_name)
    # A direction over all logits alike: linear in the direction.
    dense = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = sum(float(dense[t]) * direct_logit_attribution(model, given, t).values for t in range(50))
    torch.testing.assert_close(direct_logit_attribution(model, given, dense).values, total)


def test_ragged_answers_are_averaged_as_the_metric_does():
    model, base = tiny("gpt2"), pairs(3)
    right, wrong = torch.tensor([[1, 2, 3], [4, -1, -1], [5, 6, -1]]), torch.tensor([[9, -1], [7, 8], [9, 10]])
    given = Pairs(clean=base.clean, corrupt=base.corrupt, right=right, wrong=wrong)
    logits = model.run(given.clean).logits
    assert logits is not None
    expected = mi.get_metric("logit_diff")(logits[:, -1:], given)
    torch.testing.assert_close(direct_logit_attribution(model, given).values.sum(0), expected)


def test_interventions_are_seen_and_a_leak_is_refused():
    model, given = tiny("gpt2"), pairs(3)

    def no_head(value: Tensor) -> Tensor:
        return value * (torch.arange(N_HEADS) != 2)[:, None]

    with model.intervene(Intervention("z.1", no_head)):
        parts = direct_logit_attribution(model, given)
    assert float(parts.at(node="a1.h2").values.abs().max()) == 0
    with (
        model.intervene(Intervention("resid_post.1", lambda value: value + 1e-2 * torch.arange(16))),
        pytest.raises(UnsupportedError, match="something else writes to the residual stream"),
    ):
        direct_logit_attribution(model, given, "right")
    noise = Intervention("resid_pre.0", lambda value: value + 0.1)
    with model.intervene(noise):
        assert direct_logit_attribution(model, given).labels["node"][0] == "input"
        with pytest.raises(UnsupportedError, match="is not what enters the first layer"):
            direct_logit_attribution(model, given, refine=["input"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_in_float32(dtype: torch.dtype):
    model = build("gpt2", dtype=dtype)
    parts = direct_logit_attribution(model, pairs(3), refine=["a0.h0", "m1"])
    assert parts.values.dtype == torch.float32
    assert parts.labels["node"][:2] == ("input", "a0.h0@0")
    exact = direct_logit_attribution(build("gpt2", dtype=torch.float32), pairs(3), refine=["a0.h0", "m1"])
    size = float(exact.values.abs().max())
    assert float((parts.values - exact.values).abs().max()) < 0.1 * size  # a few roundings of 2^-8


def test_labels_name_every_part_and_bias():
    labels = direct_logit_attribution(tiny("gpt2"), pairs(2)).labels["node"]
    assert labels[:6] == ("input", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "a0.bias")
    assert labels[-2:] == ("m2", "final_norm.bias")
    assert "a0.bias" not in direct_logit_attribution(tiny("llama"), pairs(2)).labels["node"]


@pytest.mark.parametrize("name", EVERY)
def test_parts_are_called_as_the_nodes_of_the_graph(name: str):
    model, biases = tiny(name), ("bias",)

    def nodes(**options: Any) -> tuple[str, ...]:
        labels = direct_logit_attribution(model, pairs(2), **options).labels["node"]
        return tuple(label for label in labels if not label.endswith(biases))

    assert nodes() == tuple(map(str, build_graph(model).writers))
    if model.has(Site("pos_embed")) and name != "neox":
        assert nodes(refine=["input"]) == tuple(map(str, build_graph(model, split_input=True).writers))
        whole = direct_logit_attribution(model, pairs(2)).at(node="input").values
        split = direct_logit_attribution(model, pairs(2), refine=["input"]).at(node=["embed", "pos_embed"]).values
        torch.testing.assert_close(split.sum(0), whole)
    else:
        with pytest.raises(UnsupportedError, match="keep it as one `input`"):
            direct_logit_attribution(model, pairs(2), refine=["input"])


def test_groups_conserve_the_sum():
    parts = direct_logit_attribution(tiny("gpt2"), pairs(3), refine=["m1"])
    grouped = group_parts(parts, {"layer 0": ["a0.*", "m0"], "neurons": ["m1.n*"]})
    assert grouped.labels["node"][:3] == ("layer 0", "neurons", "input")
    torch.testing.assert_close(grouped.values.sum(0), parts.values.sum(0))
    own = [n for n in parts.labels["node"] if n.startswith("a0.")] + ["m0"]
    torch.testing.assert_close(grouped.at(node="layer 0").values, parts.at(node=own).values.sum(0))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"x": ["a7.*"]}, "'a7.*' of the group 'x' matches no part"),
        ({"x": ["a0.*"], "y": ["a0.h1"]}, "'a0.h1' is in two groups"),
        ({"m0": ["a0.*"]}, "'m0' has the name of a part"),
        ({"x": "a0.h1"}, "must be a list"),
        ({"x": []}, "must be a list"),
    ],
)
def test_bad_groups_are_refused(groups: Any, message: str):
    parts = direct_logit_attribution(tiny("gpt2"), pairs(2))
    with pytest.raises(InputError, match=message.replace("*", r"\*")):
        as_installed(group_parts)(parts, groups)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown name": ({"direction": "answer"}, "Unknown direction 'answer'. Did you mean 'answers'"),
    "an id beyond the vocabulary": ({"direction": 50}, "Token id 50 is outside the model's 50 logits"),
    "a negative id": ({"direction": torch.tensor([1, -1])}, "Token id -1 is outside"),
    "ids of other examples": ({"direction": torch.tensor([1, 2, 3])}, "one per example \\[2\\]"),
    "the same id twice": ({"direction": (4, torch.tensor([4, 5]))}, "is 0 everywhere in row 0"),
    "weights of another size": ({"direction": torch.ones(16)}, "\\[50\\] or \\[batch, d_vocab\\]"),
    "NaN": ({"direction": torch.full((50,), torch.nan)}, "NaN or infinity"),
    "nothing": ({"direction": torch.zeros(50)}, "is 0 everywhere in row 0"),
    "a bool": ({"direction": torch.tensor([True, False])}, "Token ids must be whole numbers"),
    "a position outside": ({"position": 7}, "Position 7 is outside the prompt of row 0"),
    "a position unknown": ({"position": "S2"}, "Unknown position 'S2'"),
    "a prompt unknown": ({"prompt": "cleen"}, "`prompt` is 'clean' or 'corrupt'"),
    "a head that does not exist": ({"refine": ["a0.h4"]}, "Node 'a0.h4' does not exist: the model has 3 layers"),
    "a layer that does not exist": ({"refine": ["m3"]}, "Node 'm3' does not exist"),
    "no node": ({"refine": ["z.3"]}, "'z.3' is not a node"),
    "a node without parts": ({"refine": ["logits"]}, "Only heads, MLPs and the input can be refined"),
    "a string": ({"refine": "m1"}, "write a list"),
    "overlapping sources": ({"refine": ["a0.h0"], "source_positions": [(0, 1), 1]}, "'0,1' and '1'; it would count"),
    "no batch": ({"batch_size": 0}, "batch_size must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str):
    arguments, message = BAD[case]
    with pytest.raises(MechInterpError, match=message):
        as_installed(direct_logit_attribution)(tiny("gpt2"), pairs(2), **arguments)


def test_a_direction_of_no_kind_is_refused():
    read = as_installed(logit_direction)
    with pytest.raises(InputError, match="got 3 entries"):
        read(pairs(2), (1, 2, 3), tiny("gpt2").layout)
    with pytest.raises(InputError, match="A direction is one of answers"):
        as_installed(_token_ids)(1.5, 2, 50)


def test_prompts_without_answers_are_refused():
    with pytest.raises(InputError, match="needs right answers, but the prompts have none"):
        direct_logit_attribution(tiny("gpt2"), tokens(2))
    with pytest.raises(InputError, match="token ids as a tensor"):
        as_installed(direct_logit_attribution)(tiny("gpt2"), [[1, 2]], 3)
    with pytest.raises(InputError, match="vocabulary"):
        direct_logit_attribution(tiny("gpt2"), tokens(2) + 50, 3)
    with pytest.raises(InputError, match="and no MLPs"):
        direct_logit_attribution(tiny("attention-only"), tokens(2), 3, refine=["m0"])


def test_no_part_is_left_out_of_the_labels_twice():
    for name, refine in itertools.product(EVERY, (False, True)):
        labels = direct_logit_attribution(tiny(name), pairs(2), refine=everything(tiny(name)) if refine else []).labels[
            "node"
        ]
        assert len(labels) == len(set(labels))
