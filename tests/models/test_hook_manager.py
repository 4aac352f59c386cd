"""The hook manager: what it reads and edits is what the model computes, and the model is afterwards as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mechinterp.base.errors import InputError, SiteNotReached
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.interventions import Intervention
from mechinterp.models.sites import Site
from tests.support.models_tiny import ALL_FLOAT64, EVERY, N_LAYERS, NATIVE, as_installed, build, tiny, tokens

X = tokens(3, 7)
ROUND_TRIP = 1e-12  # the same numbers through the same code, but batched otherwise: float64 rounding only


def run(model: HookManager, *args: Any, **keywords: Any) -> Any:
    """`model.run` as an installed package has it."""
    return as_installed(HookManager.run)(model, *args, **keywords)


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_recording_every_site_changes_no_bit_of_the_logits(name: str) -> None:
    model = tiny(name)
    result = model.run(X, record=model.sites())
    assert torch.equal(result.logits, model.run(X).logits)
    assert set(result.values) == set(model.sites())
    assert not any(value.requires_grad for value in result.values.values())


@pytest.mark.parametrize("name", EVERY)
def test_sites_hold_what_their_names_say(name: str) -> None:
    """The sums of the residual stream, in the model's own numbers."""
    model = tiny(name)
    values = model.run(X, record=model.sites()).values
    for layer in range(model.dims.n_layers):
        resid, after = values[Site("resid_pre", layer)], values[Site("resid_post", layer)]
        total = resid + values[Site("attn_out", layer)]
        if model.dims.has_mlp:
            if not model.dims.parallel:
                torch.testing.assert_close(total, values[Site("resid_mid", layer)], rtol=0, atol=ROUND_TRIP)
            total = total + values[Site("mlp_out", layer)]
        # Hugging Face's RMSNorm returns the dtype of its weight, so also rotary shapes add in float64.
        torch.testing.assert_close(total, after, rtol=0, atol=ROUND_TRIP)
        pattern = values[Site("pattern", layer)]
        # In the rotary shapes the softmax is computed in float32.
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]), rtol=0, atol=1e-6)
        assert bool((pattern.triu(1) == 0).all())
        assert values[Site("z", layer)].shape == (3, 7, model.dims.n_heads, model.dims.d_head)
        assert values[Site("k", layer)].shape == (3, 7, model.dims.n_kv_heads, model.dims.d_head)


@pytest.mark.parametrize("name", EVERY)
def test_writes_sum_to_the_residual(name: str) -> None:
    model = tiny(name)
    values = model.run(X, record=model.sites()).values
    total = values[Site("resid_pre", 0)]
    for layer in range(model.dims.n_layers):
        z = values[Site("z", layer)]
        total = total + model.layout.head_writes(layer, z).sum(0)
        bias = model.layout.attention_bias(layer, z)
        total = total if bias is None else total + bias
        if model.dims.has_mlp:
            total = total + values[Site("mlp_out", layer)]
        # Gemma-2's post-norm is computed in float32 by Hugging Face and in float64 by the layout.
        tolerance = 1e-5 if name == "gemma2" else 1e-10
        torch.testing.assert_close(total, values[Site("resid_post", layer)], rtol=0, atol=tolerance)
    torch.testing.assert_close(total, values[Site("resid_final")], rtol=0, atol=tolerance)


def test_values_are_those_of_a_plain_pytorch_hook() -> None:
    """Independent reading: PyTorch's own hook on the Hugging Face module inside."""
    model = build("gpt2")
    seen: list[torch.Tensor] = []
    inner = model.bridge.original_model.transformer.h[1].mlp
    handle = inner.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    values = model.run(X, record=["mlp_out.1"]).values
    handle.remove()
    assert torch.equal(values["mlp_out.1"], seen[0])


def test_values_are_keyed_as_asked_and_moved() -> None:
    model = tiny("gpt2")
    raw = "blocks.0.attn.hook_z"
    values = model.run(X, record=[raw, "z.0", Site("z", 0)], dtype=torch.float16, device="cpu").values
    assert set(values) == {raw, "z.0", Site("z", 0)}
    assert torch.equal(values[raw], values["z.0"])
    assert values["z.0"].dtype == torch.float16
    assert values["z.0"].device.type == "cpu"


def test_a_filter_records_what_it_matches() -> None:
    model = tiny("gpt2")
    values = model.run(X, record=lambda site: site.startswith("z.")).values
    assert set(values) == {Site("z", layer) for layer in range(N_LAYERS)}


@pytest.mark.parametrize("name", EVERY)
def test_padding_is_not_seen(name: str) -> None:
    """Right padding leaves the real tokens' logits; left padding gives the same, moved."""
    # Float32: in float64 Hugging Face's rotary models give NaN for rows that begin with padding.
    model = build(name, dtype=torch.float32)
    plain = model.run(X).logits
    extra = tokens(3, 2, seed=9)
    ones, zeros = torch.ones_like(X, dtype=torch.bool), torch.zeros_like(extra, dtype=torch.bool)
    right = model.run(torch.cat([X, extra], 1), torch.cat([ones, zeros], 1)).logits[:, :7]
    tolerance = 1e-4  # float32, and another length means another order of summation
    torch.testing.assert_close(right, plain, rtol=0, atol=tolerance)
    if name not in NATIVE:  # TransformerLens's native models count positions from the first column
        left = model.run(torch.cat([extra, X], 1), torch.cat([zeros, ones], 1)).logits[:, 2:]
        torch.testing.assert_close(left, plain, rtol=0, atol=tolerance)


def test_at_gives_the_logits_of_those_positions() -> None:
    for name in EVERY:
        model = tiny(name)
        at = torch.tensor([[0, 6], [3, 2], [5, -1]])
        got, full = model.run(X, at=at).logits, model.run(X).logits
        expected = full.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, full.shape[-1]))
        torch.testing.assert_close(got[:, 0], expected[:, 0], rtol=0, atol=ROUND_TRIP)
        torch.testing.assert_close(got[:2, 1], expected[:2, 1], rtol=0, atol=ROUND_TRIP)
        assert bool(got[2, 1].isnan().all())  # no entry: nothing that could be taken for a logit


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_start_with_the_models_own_prefix_is_the_full_run(name: str, layer: int) -> None:
    model = tiny(name)
    site = Site("resid_pre", layer)
    full = model.run(X, record=[site])
    started = model.run(torch.zeros_like(X), start=(layer, full.values[site]))  # the tokens are not read
    assert torch.equal(started.logits, full.logits)


def test_start_skips_the_layers_before_it() -> None:
    model = tiny("gpt2")
    resid = model.run(X, record=["resid_pre.2"]).values["resid_pre.2"]
    with pytest.raises(SiteNotReached, match=r"z\.0"):
        model.run(X, start=(2, resid), record=["z.0"])


def test_stop_ends_the_run() -> None:
    model = tiny("gpt2")
    stopped = model.run(X, record=["z.1"], stop="z.1")
    assert stopped.logits is None
    assert torch.equal(stopped.values["z.1"], model.run(X, record=["z.1"]).values["z.1"])
    with pytest.raises(SiteNotReached, match="after the stop site"):
        model.run(X, record=["z.2"], stop="z.1")


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("neox", "attention-only")])
def test_the_middle_of_the_residual_stream_is_the_whole_stream(name: str) -> None:
    """TransformerLens's hook there is the second norm's input; the stream beside it must follow an edit too."""
    model, ids = tiny(name), tokens()
    sites = ["resid_mid.1", "mlp_out.1", "resid_post.1"]
    run = model.run(ids, record=sites, interventions={"resid_mid.1": lambda x: x * 0.5 + 1})
    plain = model.run(ids, record=["resid_mid.1"])
    torch.testing.assert_close(run.values["resid_mid.1"], plain.values["resid_mid.1"] * 0.5 + 1)
    torch.testing.assert_close(run.values["resid_post.1"], run.values["resid_mid.1"] + run.values["mlp_out.1"])
    same = model.run(ids, interventions={"resid_mid.1": lambda x: x.clone()}).logits
    torch.testing.assert_close(same, model.run(ids).logits, rtol=0, atol=1e-9 if name in ALL_FLOAT64 else 1e-5)
    other = model.run(tokens(seed=5), record=["resid_mid.1"])
    swapped = model.run(ids, interventions={"resid_mid.1": other.values["resid_mid.1"]}).logits
    torch.testing.assert_close(swapped, model.run(tokens(seed=5)).logits, rtol=1e-4, atol=1e-4)
    shape = plain.values["resid_mid.1"].shape
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 3]

    gradient = model.run(ids, loss=loss, grads=["resid_mid.1"]).grads["resid_mid.1"]
    step = 1e-4 if name in ALL_FLOAT64 else 3e-3  # the others' norms are in float32: 1e-7 over 2 steps
    ends = [
        model.run(ids, interventions={"resid_mid.1": lambda x, s=s: x + s * step * direction}).logits for s in (1, -1)
    ]
    slope = (ends[0] - ends[1])[:, -1, 3].sum() / (2 * step)  # type: ignore[operator]
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=2e-2, abs=1e-3)


# -- editing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_an_edit_at_every_site_moves_the_logits(name: str) -> None:
    model = tiny(name)
    plain = model.run(X).logits
    for site in model.sites():
        edited = model.run(X, interventions={site: lambda value: value * 1.5}).logits
        assert not torch.allclose(edited, plain, atol=1e-9), site


@pytest.mark.parametrize("name", EVERY)
def test_writing_the_other_prompts_final_residual_gives_its_logits(name: str) -> None:
    model = tiny(name)
    other = model.run(X.flip(0), record=["resid_final"])
    edited = model.run(X, interventions={"resid_final": other.values["resid_final"]})
    torch.testing.assert_close(edited.logits, other.logits, rtol=0, atol=ROUND_TRIP)


def test_edits_come_before_records_and_outer_edits_before_inner() -> None:
    model = tiny("gpt2")
    z = model.run(X, record=["z.1"]).values["z.1"]
    with model.intervene(Intervention("z.1", lambda value: value + 1)):
        with model.intervene(Intervention("z.1", lambda value: value * 2)):
            inner = model.run(X, record=["z.1"], interventions={"z.1": lambda value: value * 3}).values["z.1"]
        outer = model.run(X, record=["z.1"]).values["z.1"]
    torch.testing.assert_close(inner, (z + 1) * 2 * 3)
    torch.testing.assert_close(outer, z + 1)
    assert torch.equal(model.run(X, record=["z.1"]).values["z.1"], z)


def test_intervene_ends_with_its_block_also_after_an_error() -> None:
    model = tiny("gpt2")
    plain = model.run(X).logits
    with pytest.raises(RuntimeError, match="inside"), model.intervene(Intervention("z.1", torch.zeros_like)):
        raise RuntimeError("inside")
    assert torch.equal(model.run(X).logits, plain)
    with pytest.raises(InputError, match="zz"), model.intervene(Intervention("zz.1", torch.zeros_like)):
        pass


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda value: None, "returned NoneType"),
        (lambda value: value[:, :1], "keep shape"),
        (lambda value: value.float(), "keep shape, dtype"),
        (lambda value: value.to("meta"), "device"),
        (lambda value: [1.0], "returned list"),
        (torch.zeros(3, 7, 4), "keep shape"),
    ],
)
def test_an_edit_that_gives_something_else_is_refused(edit: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tiny("gpt2"), X, interventions={"z.1": edit})


def test_an_intervention_that_edits_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="has no edit"):
        Intervention("z.0")


def test_a_failing_edit_keeps_its_own_error() -> None:
    def fail(value: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        tiny("gpt2").run(X, interventions={"z.1": fail})


def test_a_run_inside_an_edit_is_right_or_refused() -> None:
    model = tiny("gpt2")
    plain = model.run(X, record=["z.0"])
    other = model.run(X.flip(0), record=["z.0"]).values["z.0"]

    def from_other_prompt(value: torch.Tensor) -> torch.Tensor:
        return model.run(X.flip(0), record=["z.0"], stop="z.0").values["z.0"]

    got = model.run(X, interventions={"z.1": from_other_prompt}).logits
    assert torch.equal(got, model.run(X, interventions={"z.1": other}).logits)
    z = model.run(X, record=["z.2"]).values["z.2"]  # the inner run passes the outer run's own site, and is plain there
    got = model.run(X, interventions={"z.1": lambda value: model.run(X, record=["z.2"]).values["z.2"]}).logits
    assert torch.equal(got, model.run(X, interventions={"z.1": z}).logits)
    resid = torch.zeros_like(model.run(X, record=["resid_pre.2"]).values["resid_pre.2"])
    late: dict[str, Any] = {"start": (2, resid)}  # the outer run skips layers that the inner one needs
    got = model.run(X, interventions={"z.2": lambda value: model.run(X, record=["z.2"]).values["z.2"]}, **late).logits
    assert torch.equal(got, model.run(X, interventions={"z.2": z}, **late).logits)
    assert torch.equal(model.run(X).logits, plain.logits)


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_an_edit_in_place_changes_its_own_site_alone(name: str) -> None:
    """Sites may share memory (`resid_post.0` is `resid_pre.1`), and so may the gradients of the summands of a sum."""
    model = tiny(name)
    asked: dict[str, Any] = {"record": model.sites(), "grads": model.sites(), "loss": lambda logits: logits.square()}
    for site in (site for site in model.sites() if site.layer in (None, 1)):
        results = [
            model.run(X[:1], interventions=[Intervention(site, edit, edit)], **asked)
            for edit in (lambda value: value.mul_(1.5), lambda value: 1.5 * value)
        ]
        for kind in ("values", "grads"):
            in_place, apart = (getattr(result, kind) for result in results)
            assert not [str(one) for one in asked["record"] if not torch.equal(in_place[one], apart[one])], (site, kind)
        assert torch.equal(results[0].logits, results[1].logits)


def test_an_edit_that_changes_nothing_leaves_the_tensor_itself() -> None:
    model, seen = tiny("gpt2"), []
    run(model, X, interventions={"z.0": lambda value: value, "z.1": lambda value: seen.append(value) or value})
    record = run(model, X, record=["z.1"], interventions=[Intervention("z.1", lambda value: value)]).values["z.1"]
    assert torch.equal(seen[0], record)
    seen[0].zero_()  # afterwards, too, the edit's copy is its own
    assert torch.equal(record, run(model, X, record=["z.1"]).values["z.1"])
