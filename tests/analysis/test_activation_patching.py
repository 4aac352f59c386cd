"""Activation patching against plain patched runs of the whole prompts, one at a time."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.activation_patching import activation_patching, fraction
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.engines.readout import clean_logits, metric_values
from mechinterp.models.components import UNIT_AXES, parse_part
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import (
    ALL_FLOAT64,
    EVERY,
    N_HEADS,
    N_LAYERS,
    SHAPES,
    as_installed,
    pairs,
    snapshot,
    tiny,
    tokens,
)

FINAL = Site("resid_final")


def tolerance(name: str) -> float:
    # Shapes whose norms or rotations run in float32 inside a float64 model round differently with other batches.
    return 1e-9 if name in ALL_FLOAT64 else 2e-5


def naive(
    model: HookManager,
    examples: Pairs,
    where: dict[str, list[tuple[Site, int | None, Any]]],
    *,
    direction: str = "noise",
    metric: str = "logit_diff",
    values: dict[Site, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Per name the effect of replacing (site, unit, mask [batch, pos]) in a whole run of every prompt."""
    base, other = (examples.clean, examples.corrupt) if direction == "noise" else (examples.corrupt, examples.clean)
    measure = get_metric(metric)
    reference = clean_logits(model, examples) if measure.needs_reference else None
    sites = {site for parts in where.values() for site, _, _ in parts}
    given = values or dict(model.run(other, examples.mask, record=list(sites)).values)

    def value(interventions: list[Intervention]) -> torch.Tensor:
        run = model.run(base, examples.mask, interventions=interventions, record=[FINAL], stop=FINAL)
        return metric_values(model, examples, measure, run.values[FINAL], reference)

    def edit(site: Site, unit: int | None, mask: torch.Tensor):
        def write(before: torch.Tensor) -> torch.Tensor:
            after, source = before.clone(), given[site].expand_as(before).to(before)
            for row, pos in mask.nonzero().tolist():
                if site.kind in ("pattern", "scores"):
                    heads = slice(None) if unit is None else unit
                    after[row, heads, pos] = source[row, heads, pos]
                elif unit is None:
                    after[row, pos] = source[row, pos]
                else:
                    after[row, pos, unit] = source[row, pos, unit]
            return after

        return Intervention(site, write)

    plain = value([])
    found: dict[str, torch.Tensor] = {}
    for name, parts in where.items():
        patched = value([edit(*part) for part in parts])
        found[name] = (plain - patched if direction == "noise" else patched - plain) * measure.direction
    return found


def at(examples: Pairs, position: int) -> torch.Tensor:
    mask = torch.zeros_like(examples.mask)
    mask[:, position] = True
    return mask & examples.mask


KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v")
RARER = ("pattern", "scores", "mlp_pre", "mlp_up", "mlp_post", "attn_raw", "mlp_raw")
MISSING = {
    "gpt2": {"mlp_up", "attn_raw", "mlp_raw"},
    "neox": {"resid_mid", "mlp_up", "attn_raw", "mlp_raw"},
    "llama": {"attn_raw", "mlp_raw"},
    "gemma2": set[str](),
    "qwen2": {"attn_raw", "mlp_raw"},
    "attention-only": {"resid_mid", "mlp_out", "scores", "mlp_pre", "mlp_up", "mlp_post", "attn_raw", "mlp_raw"},
    "no-norm": {"scores", "mlp_up", "attn_raw", "mlp_raw"},
}
"""The sites that a shape does not have."""


def present(kinds: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(name, kind) for name in EVERY for kind in kinds if kind not in MISSING[name]]


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in EVERY for kind in sorted(MISSING[name])])
def test_a_site_that_the_model_does_not_have_is_refused_by_name(name: str, kind: str) -> None:
    with pytest.raises(UnsupportedError, match=kind):
        activation_patching(tiny(name), pairs(3, 6), kind)


# Every shape with every kind of site, each with one direction; every shape and every kind meets both.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "direction"),
    [(*case, ("noise", "denoise")[i % 2]) for i, case in enumerate(present(KINDS))],
)
def test_sweeps_equal_whole_patched_runs(name: str, kind: str, direction: Any) -> None:
    model, examples = tiny(name), pairs(3, 6, padded=True)
    axis = UNIT_AXES.get(kind)
    units = [None] if axis is None else range(model.dims.n_kv_heads if axis == "kv_head" else N_HEADS)
    where = {
        f"{layer},{unit},{pos}": [(Site(kind, layer), unit, at(examples, pos))]
        for layer in range(N_LAYERS)
        for unit in units
        for pos in range(6)
    }
    grid = activation_patching(model, examples, kind, positions="each", direction=direction)
    got = dict(zip(where, grid.values.reshape(-1, len(examples)), strict=True))
    chosen = random.Random(kind + name + direction).sample(sorted(where), k=8)
    for key, effect in naive(model, examples, {key: where[key] for key in chosen}, direction=direction).items():
        row = got[key]
        there = at(examples, int(key.rpartition(",")[2])).any(1)
        assert torch.equal(row.isnan(), ~there)
        torch.testing.assert_close(row[there], effect[there], rtol=0, atol=tolerance(name))


@pytest.mark.parametrize(("name", "kind"), present(RARER))
def test_rarer_sites_equal_whole_patched_runs(name: str, kind: str) -> None:
    model, examples = tiny(name), pairs(3, 6)
    units = {"pattern": [0, 3], "scores": [1], "mlp_pre": [5], "mlp_up": [4], "mlp_post": [0, 31]}.get(kind, [None])
    where = {f"{unit},{pos}": [(Site(kind, 1), unit, at(examples, pos))] for unit in units for pos in (2, 5)}
    expected = naive(model, examples, where)
    chosen = None if units == [None] else units
    grid = activation_patching(model, examples, kind, layers=[1], units=chosen, positions=[2, 5])
    got = grid.values.reshape(-1, len(examples))
    for row, effect in zip(got, expected.values(), strict=True):
        torch.testing.assert_close(row, effect, rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", SHAPES)
def test_sets_of_parts_equal_whole_patched_runs(name: str) -> None:
    model = tiny(name)
    examples = pairs(3, 7, padded=True, positions={"S": [1, 2, 0], "end": [6, 5, 4]})
    key = "a1.h1<k>" if model.dims.n_kv_heads == N_HEADS else "a1.kv1<k>"
    nodes = [("a0.h2@S", "m1@end"), (key, "resid_post.0@S"), "m2.n3@-1", "input@0", ("a0", "a0.h1<q>")]
    named = {
        "S": torch.zeros_like(examples.mask),
        "end": torch.zeros_like(examples.mask),
    }
    for label in named:
        named[label][torch.arange(3), examples.positions[label]] = True
    every = examples.mask
    where: dict[str, Any] = {
        "0": [(Site("z", 0), 2, named["S"]), (Site("mlp_out", 1), None, named["end"])],
        "1": [(Site("k", 1), 1, every), (Site("resid_pre", 1), None, named["S"])],
        "2": [(Site("mlp_post", 2), 3, named["end"])],
        "3": [(Site("resid_pre", 0), None, at(examples, 0))],
        "4": [(Site("attn_out", 0), None, every), (Site("q", 0), 1, every)],
    }
    for direction in ("noise", "denoise"):
        grid = activation_patching(model, examples, nodes, direction=direction)
        expected = torch.stack(list(naive(model, examples, where, direction=direction).values()))
        torch.testing.assert_close(grid.values[:, 0], expected, rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", SHAPES)
def test_everything_replaced_is_the_other_run(name: str) -> None:
    model, examples = tiny(name), pairs(4, 6, padded=True)
    for direction in ("noise", "denoise"):
        grid = activation_patching(model, examples, ["input", "resid_final"], direction=direction)
        clean = metric_values(model, examples, get_metric("logit_diff"), final(model, examples, examples.clean))
        corrupt = metric_values(model, examples, get_metric("logit_diff"), final(model, examples, examples.corrupt))
        for values in grid.values[:, 0]:
            torch.testing.assert_close(values, clean - corrupt, rtol=0, atol=tolerance(name))
        torch.testing.assert_close(fraction(grid).values, torch.ones(2, 1).double(), rtol=1e-5, atol=1e-5)
        assert grid.about["clean_value"] == pytest.approx(float(clean.mean()), abs=1e-6)


def final(model: HookManager, examples: Pairs, ids: torch.Tensor) -> torch.Tensor:
    return model.run(ids, examples.mask, record=[FINAL], stop=FINAL).values[FINAL]


@pytest.mark.parametrize(
    ("name", "metric"),
    [*((name, "kl_to_clean") for name in SHAPES), ("gpt2", "prob_diff"), ("gemma2", "l2_to_clean")],
)
def test_other_metrics_and_several_answer_positions(name: str, metric: str) -> None:
    model = tiny(name)
    examples = pairs(3, 6, answer_pos=torch.tensor([[1, 5], [3, -1], [5, 0]]))
    where = {str(pos): [(Site("z", 1), 1, at(examples, pos))] for pos in range(6)}
    expected = torch.stack(list(naive(model, examples, where, metric=metric).values()))
    grid = activation_patching(model, examples, "z", layers=[1], units=[1], positions="each", metric=metric)
    torch.testing.assert_close(grid.values[0, 0], expected, rtol=0, atol=tolerance(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_one_by_one_in_batches_and_padded_alike(name: str) -> None:
    model, examples = tiny(name), pairs(7, 7, padded=True)

    def swept(given: Pairs, **keywords: Any) -> torch.Tensor:
        return activation_patching(model, given, "z", layers=[1], units=[0, 2], positions="each", **keywords).values

    whole = swept(examples)
    tight = swept(examples, batch_size=1, memory=1)
    torch.testing.assert_close(whole, tight, rtol=0, atol=tolerance(name), equal_nan=True)
    for row in (1, 4):
        n = int(examples.lengths[row])
        alone = Pairs(  # twice, since Pairs takes no single example
            clean=examples.clean[[row, row], :n],
            corrupt=examples.corrupt[[row, row], :n],
            right=examples.right[[row, row]],  # type: ignore[index]
            wrong=examples.wrong[[row, row]],  # type: ignore[index]
        )
        torch.testing.assert_close(whole[:, :, :n, row], swept(alone)[..., 0], rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "attention-only"])
def test_replacements(name: str) -> None:
    model, examples = tiny(name), pairs(4, 6)
    other = tokens(4, 6, seed=77)
    site, where = Site("z", 1), {"x": [(Site("z", 1), 2, at(examples, 3))]}
    corrupt = model.run(examples.corrupt, record=[site]).values[site]
    clean = model.run(examples.clean, record=[site]).values[site]
    cases: list[tuple[Any, torch.Tensor]] = [
        ("mean", corrupt.mean((0, 1), keepdim=True)),
        ("mean-positional", corrupt.mean(0, keepdim=True)),
        ("zero", torch.zeros_like(corrupt)),
        (other, model.run(other, record=[site]).values[site]),
        (lambda value, _: value * 2 - 1, clean * 2 - 1),
    ]
    for replacement, values in cases:
        grid = activation_patching(model, examples, ["a1.h2@3"], replacement=replacement)
        expected = naive(model, examples, where, values={site: values})["x"]
        torch.testing.assert_close(grid.values[0, 0], expected, rtol=0, atol=tolerance(name))


def test_a_mean_does_not_count_padding() -> None:
    model, examples = tiny("gpt2"), pairs(4, 7, padded=True)
    site = Site("z", 0)
    corrupt = model.run(examples.corrupt, examples.mask, record=[site]).values[site]
    mean = corrupt[examples.mask].mean(0)[None, None]
    grid = activation_patching(model, examples, ["a0.h0"], replacement="mean", batch_size=3)
    expected = naive(model, examples, {"x": [(site, 0, examples.mask)]}, values={site: mean})["x"]
    torch.testing.assert_close(grid.values[0, 0], expected, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_the_model_is_left_as_it_was_and_outer_edits_count() -> None:
    model, examples = tiny("gpt2"), pairs(3, 6)
    before = snapshot(model.bridge)
    plain = activation_patching(model, examples, "z", positions="each")
    assert snapshot(model.bridge) == before
    assert plain.about["positions_before_the_patch"] == "skipped"
    doubled = [Intervention(Site("mlp_out", layer), lambda value: 2 * value) for layer in range(N_LAYERS)]
    with model.intervene(*doubled):
        edited = activation_patching(model, examples, "z", positions="each")
        expected = naive(model, examples, {"x": [(Site("z", 1), 0, at(examples, 2))]})["x"]
    assert edited.about["positions_before_the_patch"] == "run again"
    torch.testing.assert_close(edited.at(layer=1, head=0, pos=2).values, expected, rtol=0, atol=1e-9)
    assert not torch.allclose(edited.values, plain.values)


def test_outer_edits_of_single_rows_and_positions_meet_every_patched_run() -> None:
    model = tiny("gpt2")
    examples = pairs(3, 6, answer_pos=torch.tensor([[3], [2], [3]]))  # a run could end before the last position

    def edit(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[0, 1] *= 2.0
        value[2, -4] *= -1.0
        return value

    with model.intervene(Intervention("mlp_out.1", edit)):
        got = activation_patching(model, examples, "z", layers=[0, 2])
        where = {str((layer, head)): [(Site("z", layer), head, examples.mask)] for layer in (0, 2) for head in range(4)}
        expected = torch.stack(list(naive(model, examples, where).values()))
    torch.testing.assert_close(got.values.reshape(8, 3), expected, rtol=0, atol=1e-9)


def test_embeddings_can_be_patched() -> None:
    model, examples = tiny("gpt2"), pairs(3, 6)
    where = {name: [(Site(name), None, at(examples, 2))] for name in ("embed", "pos_embed")}
    where["both"] = where["embed"] + [(Site("z", 1), 0, at(examples, 4))]
    grid = activation_patching(model, examples, ["embed@2", "pos_embed@2", ("embed@2", "a1.h0@4")])
    expected = torch.stack(list(naive(model, examples, where).values()))
    torch.testing.assert_close(grid.values[:, 0], expected, rtol=0, atol=1e-9)
    assert float(grid.at(node="pos_embed@2").values.abs().max()) < 1e-12  # both prompts have the same positions


def test_the_cost_counts_what_is_run() -> None:
    model, examples = tiny("gpt2"), pairs(3, 6)
    one = activation_patching(model, examples, ["a2.h0@5"])
    # Two forwards, and one layer of three at one position of six.
    assert one.cost["forwards"] == pytest.approx(2 + 1 / 3 * 1 / 6)
    every = activation_patching(model, examples, ["a0.h0"])
    assert every.cost["forwards"] == pytest.approx(3)


@pytest.mark.slow
def test_progress_is_told_and_the_table_is_tidy() -> None:
    model, examples = tiny("gpt2"), pairs(3, 6)
    told: list[tuple[int, int]] = []
    grid = activation_patching(
        model, examples, "z", positions="each", memory=1, progress=lambda *step: told.append(step)
    )
    assert told[-1] == (N_LAYERS * N_HEADS * 6,) * 2
    frame = grid.to_frame()
    assert list(frame.columns) == ["layer", "head", "pos", "example", "effect"]
    assert len(frame) == grid.values.numel()
    row = frame.iloc[100]
    assert float(grid.at(**{axis: int(row[axis]) for axis in grid.axes})) == row["effect"]


BAD: list[tuple[Any, dict[str, Any], str]] = [
    ("zz", {}, "is not a part of a model"),
    ("a9.h0", {}, "layers 0 to 2"),
    ("a1.h4", {}, "heads 0 to 3"),
    ("a1.kv0<k>", {}, "write 'a5.h1<k>'"),
    ("m1.n999", {}, "neurons 0 to 63"),
    ("resid_pre.7", {}, "layers 0 to 2"),
    ("a1.h1@", {}, "no position after"),
    ("a1.h1@S9", {}, "Unknown position 'S9'"),
    ("a1.h1@6", {}, "outside the prompt of row 0, which has 6"),
    ([], {}, "No part is given"),
    ([()], {}, "empty"),
    (["m0", "m0"], {}, "given twice"),
    ("z", {"positions": []}, "No position is given"),
    ("z", {"positions": [[]]}, "set of positions is empty"),
    ("z", {"positions": "S2"}, "Unknown position"),
    ("z", {"positions": [6]}, "outside the prompt"),
    ("z", {"positions": [-7]}, "outside the prompt"),
    ("z", {"positions": [1, 1]}, "given twice"),
    ("z", {"layers": [3]}, "0 to 2"),
    ("z", {"layers": []}, "at least one"),
    ("z", {"units": [4]}, "0 to 3"),
    ("mlp_out", {"units": [0]}, "no heads or neurons"),
    (["m0"], {"layers": [0]}, "a list of parts is taken as it is"),
    (["m0@1"], {"positions": [2]}, "given twice"),
    ("z", {"direction": "noisy"}, "Did you mean 'noise'"),
    ("z", {"replacement": "corupt"}, "Unknown replacement"),
    ("z", {"replacement": tokens(3, 5)}, "like the pairs'"),
    ("z", {"replacement": lambda value, site: value[:1]}, "must be a tensor"),
    ("z", {"replacement": lambda value, site: None}, "got NoneType"),
    ("z", {"metric": "logit_dif"}, "Did you mean 'logit_diff'"),
]


@pytest.mark.parametrize(("what", "keywords", "message"), BAD)
def test_bad_input_gets_one_clear_line(what: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        as_installed(activation_patching)(tiny("gpt2"), pairs(3, 6), what, **keywords)
    assert "\n" not in str(caught.value)


def test_grouped_heads_are_named_by_their_key_value_head() -> None:
    model = tiny("llama")
    assert parse_part(model, "a1.kv1<v>").unit == 1
    with pytest.raises(InputError, match="'kv1<k>'"):
        parse_part(model, "a1.h3<k>")
    with pytest.raises(InputError, match="only <k> and <v>"):
        parse_part(model, "a1.kv0<q>")


def test_what_cannot_be_exact_is_refused() -> None:
    model, examples = tiny("gpt2"), pairs(3, 6)
    with pytest.raises(UnsupportedError, match="no mean over positions"):
        activation_patching(model, examples, "pattern", replacement="mean")
    with pytest.raises(UnsupportedError, match="final_norm"):
        activation_patching(model, examples, ["final_norm"])
    with pytest.raises(InputError, match="prompts of one length"):
        activation_patching(model, pairs(3, 6, padded=True), "z", replacement="mean-positional")
    same = pairs(3, 6)
    same = Pairs(clean=same.clean, corrupt=same.clean, right=same.right, wrong=same.wrong)
    with pytest.raises(InputError, match="difference is not defined"):
        fraction(activation_patching(model, same, ["m0"]))


@pytest.mark.slow
def test_the_bundled_model_s_movers_are_found() -> None:
    model = mi.load_model("bundled")
    examples = mi.load_task("ioi").pairs(model, n=16)
    noise = activation_patching(model, examples, "z", positions="end").mean()
    names = [f"a{row.layer}.h{row.head}" for row in noise.top(4).itertuples()]
    assert {"a2.h1", "a2.h3"} <= set(names)
    rest = fraction(activation_patching(model, examples, "resid_pre", positions="each", direction="denoise"))
    assert rest.values.max() < 1.3


@pytest.mark.parametrize("name", [name for name in EVERY if "resid_mid" not in MISSING[name]])
def test_the_whole_stream_in_the_middle_of_a_layer_carries_the_whole_effect(name: str) -> None:
    """TransformerLens's hook there sees the MLP's branch only; patching that alone gave other numbers by layer."""
    model, some = tiny(name), pairs(3)
    effects = activation_patching(model, some, "resid_mid").values[:, 0]
    whole = activation_patching(model, some, "resid_pre").values[:1, 0]
    torch.testing.assert_close(effects, whole.expand_as(effects), rtol=1e-4, atol=1e-5)
