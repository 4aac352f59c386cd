"""The hook manager: what it reads and edits is what the model computes, and the model is afterwards as before."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mechinterp.base.errors import BusyError, InputError, MechInterpError, SiteNotReached, UnsupportedError
from mechinterp.models.hook_manager import HookManager, load_model
from mechinterp.models.interventions import Intervention
from mechinterp.models.sites import Site
from tests.support.models_tiny import ALL_FLOAT64, EVERY, N_LAYERS, NATIVE, as_installed, build, snapshot, tiny, tokens

X = tokens(3, 7)
ROUND_TRIP = 1e-12  # the same numbers through the same code, but batched otherwise: float64 rounding only


def run(model: HookManager, *args: Any, **keywords: Any) -> Any:
    """`model.run` as an installed package has it."""
    return as_installed(HookManager.run)(model, *args, **keywords)


# -- reading -----------------------------------------------------------------------------------------------------


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


# -- editing -----------------------------------------------------------------------------------------------------


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


# -- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """At every site, in a random direction: the slope of the loss when the value moves there."""
    model = tiny(name)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(model.run(X).logits.shape, generator=generator, dtype=model.dtype)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return (weights * logits).sum((1, 2))

    sites = model.sites()
    result = model.run(X, record=sites, grads=sites, loss=loss)
    assert torch.equal(result.loss, loss(result.logits))
    # Central differences; where Hugging Face computes in float32, noise 1e-7/eps asks for a larger step.
    eps, tolerance = (1e-5, 1e-6) if name in ALL_FLOAT64 else (3e-3, 2e-3)
    for site in sites:
        direction = torch.randn(result.values[site].shape, generator=generator, dtype=model.dtype)
        direction = direction.masked_fill(result.values[site] == -torch.inf, 0)  # masked scores stay masked
        direction /= direction.norm()
        direction[result.values[site] < -1e30] = 0  # as above, where the mask is the lowest number instead

        def at(step: float, site: Site = site, direction: torch.Tensor = direction) -> torch.Tensor:
            edited = model.run(X, interventions={site: lambda value: value + step * direction})
            return loss(edited.logits).sum()

        slope = (at(eps) - at(-eps)) / (2 * eps)
        expected = (result.grads[site] * direction).sum()
        assert float(slope - expected) == pytest.approx(0, abs=tolerance * (1 + float(result.grads[site].norm()))), site


def test_gradients_need_no_trainable_weights_and_leave_none() -> None:
    model = build("gpt2")
    for parameter in model.bridge.parameters():
        parameter.requires_grad_(True)
    trained = model.run(X, grads=["z.0"], loss=lambda logits: logits.sum()).grads["z.0"]
    assert all(parameter.grad is None for parameter in model.bridge.parameters())
    frozen = tiny("gpt2").run(X, grads=["z.0"], loss=lambda logits: logits.sum()).grads["z.0"]
    torch.testing.assert_close(trained, frozen)
    with torch.no_grad():
        inside = model.run(X, grads=["z.0"], loss=lambda logits: logits.sum()).grads["z.0"]
    torch.testing.assert_close(inside, frozen)


def test_an_edited_gradient_flows_on_edited() -> None:
    """Zeroing the gradient at z of layer 2 takes away what went through its attention, and nothing else."""
    model = tiny("gpt2")
    sites = ["q.2", "mlp_in.2", "z.2"]
    keywords: dict[str, Any] = {"grads": sites, "loss": lambda logits: logits[..., 3].sum()}
    plain = model.run(X, **keywords).grads
    stopped = model.run(X, interventions=[Intervention("z.2", grad=torch.zeros_like)], **keywords).grads
    assert float(plain["q.2"].abs().sum()) > 0
    assert float(stopped["q.2"].abs().sum()) == 0
    assert torch.equal(stopped["mlp_in.2"], plain["mlp_in.2"])
    doubled = model.run(X, interventions=[Intervention("z.2", grad=lambda g: 2 * g)], **keywords).grads
    torch.testing.assert_close(doubled["q.2"], 2 * plain["q.2"])
    assert torch.equal(doubled["z.2"], 2 * plain["z.2"])  # edited before it is recorded, like a value
    with pytest.raises(InputError, match="keep shape"):
        model.run(X, interventions=[Intervention("z.2", grad=lambda g: g[:1])], **keywords)


def test_gradient_edits_run_outer_first_also_at_the_stop_site() -> None:
    model = tiny("gpt2")
    keywords: dict[str, Any] = {"grads": ["z.1"], "stop": "z.1", "loss": lambda z: z.sum()}
    with model.intervene(Intervention("z.1", grad=lambda g: g + 1)):
        found = model.run(X, interventions=[Intervention("z.1", grad=lambda g: g * 3)], **keywords).grads["z.1"]
    assert torch.equal(found, torch.full_like(found, 6.0))  # (1 + 1) * 3


def test_the_loss_may_be_of_the_value_at_the_stop_site() -> None:
    model = tiny("gpt2")
    result = model.run(X, grads=["z.1"], stop="resid_final", loss=lambda resid: model.layout.unembed(resid).sum())
    full = model.run(X, grads=["z.1"], loss=lambda logits: logits.sum())
    torch.testing.assert_close(result.grads["z.1"], full.grads["z.1"])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"loss": lambda logits: logits.sum()}, "only one of them"),
        ({"grads": ["z.0"]}, "only one of them"),
        ({"grads": ["z.0"], "loss": lambda logits: 1.0}, "must return a tensor; got float"),
        ({"grads": ["z.0"], "loss": lambda logits: torch.zeros(3)}, "does not depend"),
        ({"grads": "z.0", "loss": lambda logits: logits.sum()}, "a list of sites"),
    ],
)
def test_gradients_that_make_no_sense_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tiny("gpt2"), X, **keywords)


def test_inference_mode_is_named_as_the_reason() -> None:
    model = tiny("gpt2")
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        model.run(X, grads=["z.0"], loss=lambda logits: logits.sum())


# -- nothing is left behind --------------------------------------------------------------------------------------


class Boom(Exception):
    """Not one of ours."""


def fail_with(error: BaseException) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(value: torch.Tensor) -> torch.Tensor:
        raise error

    return edit


@pytest.mark.parametrize("name", EVERY)
def test_the_model_is_as_before_after_success_error_and_interrupt(name: str) -> None:
    model = build(name)
    resid = model.run(X, record=["resid_pre.2"]).values["resid_pre.2"]
    before = snapshot(model.bridge)
    model.run(X, record=model.sites(), grads=["z.0"], loss=lambda logits: logits.sum())
    model.run(X, stop="z.1", at=None)
    model.run(X, start=(2, resid), at=torch.zeros(3, 1, dtype=torch.long))
    assert snapshot(model.bridge) == before
    for error in (Boom(), KeyboardInterrupt(), InputError("x"), SystemExit()):
        with pytest.raises(type(error)):
            model.run(X, record=model.sites(), interventions={"z.2": fail_with(error)}, start=(2, resid))
        with pytest.raises(type(error)):
            model.run(X, grads=["z.0"], loss=fail_with(error))
    with pytest.raises(SiteNotReached):
        model.run(X, start=(2, resid), record=["z.0"])
    assert snapshot(model.bridge) == before


def test_only_our_hooks_are_removed_and_others_fire() -> None:
    model = build("gpt2")
    fired: list[str] = []
    point = model.bridge.hook_dict["blocks.1.attn.hook_z"]
    point.add_hook(lambda value, hook: fired.append("theirs"))
    inner = model.bridge.original_model.transformer.h[0].mlp
    inner.register_forward_hook(lambda module, inputs, output: fired.append("pytorch"))
    before = snapshot(model.bridge)
    model.run(X, record=["z.1"], interventions={"z.1": lambda value: value * 2})
    assert sorted(fired) == ["pytorch", "theirs"]
    with pytest.raises(Boom):
        model.run(X, interventions={"z.1": fail_with(Boom())})
    assert snapshot(model.bridge) == before
    fired.clear()
    model.run(X)
    assert sorted(fired) == ["pytorch", "theirs"]


def test_a_model_in_training_mode_gives_deterministic_results_and_keeps_its_mode() -> None:
    dropout = {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}
    model = build("gpt2", **dropout)
    expected = model.run(X).logits
    model.bridge.train()
    part = model.bridge.original_model.transformer.h[1]
    part.eval()  # one part in another mode, so that 'set all to the same' is not good enough
    before = snapshot(model.bridge)
    assert torch.equal(model.run(X).logits, expected)
    with pytest.raises(Boom):
        model.run(X, interventions={"z.2": fail_with(Boom())})
    assert snapshot(model.bridge) == before
    assert model.bridge.training
    assert not part.training


@pytest.mark.slow
def test_repeated_runs_leave_no_tensors_and_no_hooks() -> None:
    model = build("gpt2")

    def once() -> None:
        model.run(X, record=model.sites(), grads=["z.0"], loss=lambda logits: logits.sum())
        with pytest.raises(Boom):
            model.run(X, interventions={"z.2": fail_with(Boom())})

    def n_tensors() -> int:
        gc.collect()
        return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)

    once()
    first, before = n_tensors(), snapshot(model.bridge)
    for _ in range(5):
        once()
    assert n_tensors() == first
    assert snapshot(model.bridge) == before


def test_a_second_thread_is_refused_and_afterwards_all_is_well() -> None:
    model = build("gpt2")
    plain = model.run(X).logits
    inside, release = threading.Event(), threading.Event()
    results: list[torch.Tensor] = []

    def wait(value: torch.Tensor) -> torch.Tensor:
        inside.set()
        assert release.wait(20)
        return value

    worker = threading.Thread(target=lambda: results.append(model.run(X, interventions={"z.1": wait}).logits))
    worker.start()
    try:
        assert inside.wait(20)
        with pytest.raises(BusyError, match="another thread"):
            model.run(X)
        with pytest.raises(BusyError), model.intervene(Intervention("z.0", torch.zeros_like)):
            pass
    finally:
        release.set()
        worker.join(20)
    assert torch.equal(results[0], plain)
    assert torch.equal(model.run(X).logits, plain)


# -- names and tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "error", "message"),
    [
        ("resid_pree.0", InputError, r"Did you mean 'resid_pre\.0'"),
        ("blocks.0.attn.hook_zz", InputError, r"Did you mean 'blocks\.0\.attn\.hook_z'"),
        ("z.7", InputError, "layers 0 to 2"),
        ("z", InputError, "needs a layer"),
        ("z.x", InputError, "whole number"),
        ("embed.0", InputError, "takes no layer"),
        (Site("z", 99), InputError, "layers 0 to 2"),
    ],
)
def test_unknown_sites_are_refused_by_name(site: Any, error: type[Exception], message: str) -> None:
    model = tiny("gpt2")
    for keywords in (
        {"record": [site]},
        {"stop": site},
        {"interventions": {site: torch.zeros_like}},
        {"grads": [site], "loss": lambda logits: logits.sum()},
    ):
        with pytest.raises(error, match=message):
            model.run(X, **keywords)


def test_sites_that_a_model_lacks_are_refused() -> None:
    assert not tiny("neox").has("resid_mid.0")
    with pytest.raises(UnsupportedError, match="resid_mid"):
        tiny("neox").run(X, record=["resid_mid.0"])
    with pytest.raises(UnsupportedError, match="pos_embed"):
        tiny("llama").run(X, record=["pos_embed"])
    with pytest.raises(UnsupportedError, match="mlp_out"):
        tiny("attention-only").run(X, record=["mlp_out.0"])


def test_a_site_that_fires_and_does_nothing_is_refused() -> None:
    """TransformerLens's native attention computes its scores beside the path that makes the pattern."""
    model = tiny("no-norm")
    assert not model.has("scores.1")
    assert Site("scores", 1) not in model.sites()
    with pytest.raises(UnsupportedError, match="logits do not depend"):
        model.run(X, interventions={"scores.1": torch.zeros_like})


class Aside(torch.nn.Module):
    """A hook point that fires on a copy nobody reads."""

    def __init__(self, point: torch.nn.Module) -> None:
        super().__init__()
        self.point = point

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.point(value.clone())
        return value


def test_a_needed_site_off_the_path_refuses_the_model() -> None:
    bridge = build("gpt2").bridge
    point = bridge.hook_dict["blocks.1.attn.hook_v"]
    bridge.blocks[1].attn.v.hook_out = Aside(point)
    assert bridge.hook_dict["blocks.1.attn.hook_v"] is point
    with pytest.raises(UnsupportedError, match=r"'v\.1' cannot be used.*logits do not depend"):
        load_model(bridge)


def test_a_filter_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="matches no site"):
        tiny("gpt2").run(X, record=lambda site: site.startswith("Z"))


def test_one_string_is_not_a_list_of_sites() -> None:
    with pytest.raises(InputError, match="take a list"):
        run(tiny("gpt2"), X, record="z.0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X + 60,), "Token id .* vocabulary of 50"),
        ((-X,), "Token id -"),
        ((torch.ones(1, 33, dtype=torch.long),), "33 tokens.*reads 32"),
        ((X.float(),), "whole numbers"),
        ((X > 3,), "whole numbers"),
        ((X[0],), r"\[batch, pos\]"),
        (([[1, 2], [1]],), "do not form a rectangle"),
        ((X[:0],), "whole numbers"),
        (("hello",), "no tokenizer for texts"),
        ((X, torch.ones(3, 6)), "must agree"),
        ((X, torch.tensor([[1] * 7, [0] * 7, [1] * 7])), "no real token"),
    ],
)
def test_bad_tokens_and_masks_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tiny("gpt2"), *arguments)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"at": torch.full((3, 1), 7)}, "from 0 to 6"),
        ({"at": torch.full((3, 1), -2)}, "from 0 to 6"),
        ({"at": torch.tensor([1, 2, 3])}, r"\[batch, n\]"),
        ({"at": torch.zeros(2, 1, dtype=torch.long)}, "batch = 3"),
        ({"at": torch.zeros(3, 1)}, "whole numbers"),
        ({"start": (3, torch.zeros(3, 7, 16, dtype=torch.float64))}, "layers 0 to 2"),
        ({"start": (-1, torch.zeros(3, 7, 16, dtype=torch.float64))}, "layers 0 to 2"),
        ({"start": (1, torch.zeros(3, 7, 8, dtype=torch.float64))}, r"\[3, 7, 16\]"),
        ({"start": (1, torch.zeros(3, 7, 16))}, "float64"),
    ],
)
def test_bad_positions_and_starts_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tiny("gpt2"), X, **keywords)


def test_every_refusal_is_one_of_ours() -> None:
    for error in (InputError, UnsupportedError, SiteNotReached, BusyError):
        assert issubclass(error, MechInterpError)


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
