"""What a TransformerLens user types works, with its numbers: cache keys, hook functions, weights, names of heads."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.interventions import Hook, Intervention
from mechinterp.models.sites import Address, Edge, Node, Site, canonical
from tests.support.models_tiny import tiny, tokens

X = tokens(2, 6)
HEAD = ("a1.h2", "L1H2", "l1h2", "L1.H2", "1.2")


# -- one value, many names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "hook"),
    [
        (("pattern.1", ("pattern", 1), ("attn", 1), ("pattern", -2)), "blocks.1.attn.hook_pattern"),
        (("z.1", ("z", 1), Site("z", 1), ("z", 1, "attn")), "blocks.1.attn.hook_z"),
        (("mlp_post.2", ("post", 2), ("post", 2, "mlp")), "blocks.2.mlp.hook_post"),
        (("resid_post.0", ("resid_post", 0), ("resid_post", 0, "")), "blocks.0.hook_resid_post"),
        (("embed",), "hook_embed"),
    ],
)
def test_a_cached_value_has_all_its_names(names: tuple[Any, ...], hook: str) -> None:
    model = tiny("gpt2")
    cache = model.cache(X)
    expected = model.bridge.run_with_cache(X)[1][hook]
    for name in (*names, hook):
        assert name in cache and torch.equal(cache[name], expected), name
    one = model.run(X, record=[names[0]])
    assert torch.equal(one[hook], expected) and one.keys() == (names[0],)


def test_record_takes_kind_and_layer() -> None:
    model = tiny("llama")
    run = model.run(X, record=[("pattern", 0), ("resid_post", -1)])
    assert set(run.values) == {("pattern", 0), ("resid_post", -1)}
    assert torch.equal(run["resid_post", -1], run["resid_post.2"])
    graded = model.run(X, grads=[("z", 0)], loss=lambda logits: logits[:, -1, 0])
    plain = model.run(X, grads=["z.0"], loss=lambda logits: logits[:, -1, 0])
    assert torch.equal(graded.grads["z", 0], plain.grads["z.0"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (("patern", 1), "Did you mean 'pattern'"),
        (("pattern", 3), "layers 0 to 2"),
        (("pattern",), "such as \\('pattern', 5\\)"),
        (("pattern", True), "such as \\('pattern', 5\\)"),
        (("result", 1), "not recorded but computed"),
        ("blocks.1.attn.hook_patern", "Did you mean 'blocks.1.attn.hook_pattern'"),
        ("z.1", "z.1 was not recorded in this run; .* Recorded: pattern.0"),
        (0, "Unknown site or hook name|A site is"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(name: Any, said: str) -> None:
    run = tiny("gpt2").run(X, record=["pattern.0"])
    with pytest.raises(InputError, match=said):
        run[name]


def test_a_run_is_not_unpacked() -> None:
    with pytest.raises(InputError, match="A run is one object"):
        _, _ = tiny("gpt2").cache(X)


def test_head_results_of_the_cache_are_the_writes() -> None:
    """The message for `cache["result", 1]` says how to compute them."""
    model = tiny("gpt2")
    run = model.cache(X)
    writes = model.layout.head_writes(1, run["z", 1])
    total = writes.sum(0) + model.b_O[1]
    torch.testing.assert_close(total, run["attn_out", 1], rtol=0, atol=1e-12)


# -- edits of (value, hook) -----------------------------------------------------------------------------------------


def zero_head(value: Tensor, hook: Hook, head: int) -> Tensor:
    """As one writes it in TransformerLens: in place, with the hook."""
    assert hook.layer() == 1
    value[:, :, head] = 0
    return value


@pytest.mark.parametrize("site", ["z.1", ("z", 1), "blocks.1.attn.hook_z"])
def test_an_edit_may_take_its_hook(site: Any) -> None:
    model = tiny("gpt2")
    expected = model.bridge.run_with_hooks(X, fwd_hooks=[("blocks.1.attn.hook_z", partial(zero_head, head=2))])

    def positional(value: Tensor, point: Hook) -> Tensor:
        assert point == Hook("blocks.1.attn.hook_z", site)
        return zero_head(value, point, 2)

    for edit in (partial(zero_head, head=2), positional, lambda value, hook=None: zero_head(value, hook, 2)):
        assert torch.equal(model.run(X, interventions={site: edit}).logits, expected)  # type: ignore[arg-type]
        with model.intervene(Intervention(site, edit)):
            assert torch.equal(model.run(X).logits, expected)  # type: ignore[arg-type]
    grown = model.run(X, interventions=[Intervention(site, lambda value, scale=0.0: scale * value)])
    gone = model.run(X, interventions={site: lambda value: 0 * value})
    assert torch.equal(grown.logits, gone.logits)  # type: ignore[arg-type]


def test_an_edit_in_place_with_its_hook_changes_no_other_site() -> None:
    model = tiny("gpt2")

    def edit(value: Tensor, hook: Hook) -> Tensor:
        value[:] = 0
        return value

    run = model.run(X, record=["resid_post.0", "resid_pre.1"], interventions={"resid_pre.1": edit})
    assert bool((run["resid_pre.1"] == 0).all())
    assert torch.equal(run["resid_post.0"], model.run(X, record=["resid_post.0"])["resid_post.0"])


def test_a_gradient_edit_may_take_its_hook() -> None:
    model, seen = tiny("gpt2"), list[str]()

    def grad(value: Tensor, hook: Hook) -> Tensor:
        seen.append(hook.name)
        return 2 * value

    how: dict[str, Any] = {"grads": ["z.0"], "loss": lambda logits: logits[:, -1, 0]}
    doubled = model.run(X, interventions=[Intervention(("z", 0), grad=grad)], **how).grads["z.0"]
    assert seen == ["blocks.0.attn.hook_z"] and doubled.shape == model.run(X, **how).grads["z.0"].shape


def test_an_edit_of_three_arguments_is_refused() -> None:
    with pytest.raises(InputError, match=r"needs 3 arguments \(value, hook, head\).*functools.partial"):
        tiny("gpt2").run(X, interventions={"z.1": zero_head})


# -- names of heads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEAD)
def test_heads_are_read_as_papers_write_them(name: str) -> None:
    assert canonical(name) == "a1.h2" == str(Node.parse(name))
    assert Address.parse(f"{name}<q>@S2") == Address("head", 1, 2, channel="q", position="S2")
    assert str(Edge.parse(f"{name}->{name.replace('1', '2', 1)}<k>")) == "a1.h2->a2.h2<k>"


@pytest.mark.parametrize("name", ["9", "L9", "L9H", "9.9.9", "9.9\n", "L9H9x", "٣.1", "-1.2", "1e.5", "LH9"])
def test_what_only_looks_like_a_head_is_none(name: str) -> None:
    assert canonical(name) == name
    with pytest.raises(InputError):
        Node.parse(name)


# -- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["gpt2", "llama", "attention-only"])
def test_weights_are_those_of_transformer_lens(shape: str) -> None:
    model = tiny(shape)
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        ours = getattr(model, name)
        for layer, block in enumerate(model.bridge.blocks):
            assert torch.equal(ours[layer], getattr(block.attn, name)), name
        assert ours.stack().shape == ours.shape and torch.equal(ours.stack()[1, 1], ours[1, 1])
    assert torch.equal(model.W_U, model.bridge.W_U) and torch.equal(model.W_E, model.bridge.W_E)
    assert model.cfg.n_layers == model.dims.n_layers and model.cfg is not model.bridge.cfg


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_products_by_head_are_what_a_head_does(shape: str) -> None:
    """`W_OV` maps what a head reads to what it writes: attention to the token itself, no biases."""
    model = tiny(shape)
    group = model.dims.n_heads // model.dims.n_kv_heads
    for layer, head in ((0, 0), (1, 3)):
        OV = model.W_V[layer, head // group] @ model.W_O[layer, head]
        QK = model.W_Q[layer, head] @ model.W_K[layer, head // group].T
        for name in (f"L{layer}H{head}", f"{layer}.{head}", f"a{layer}.h{head}"):
            torch.testing.assert_close(model.W_OV[name], OV, rtol=0, atol=1e-12)
            torch.testing.assert_close(model.W_QK[name], QK, rtol=0, atol=1e-12)
        torch.testing.assert_close(model.W_OV[layer][head], OV, rtol=0, atol=1e-12)


def test_weights_cannot_change_the_model() -> None:
    model: HookManager = tiny("gpt2")
    before = model.W_Q[0]
    model.W_Q[0].zero_()
    model.W_U.zero_()
    model.W_E.zero_()
    assert torch.equal(model.W_Q[0], before) and bool(model.W_U.any()) and bool(model.W_E.any())
    with pytest.raises(AttributeError):
        model.W_Q = before  # type: ignore[misc]
    with pytest.raises(TypeError):
        model.W_Q[0] = before  # type: ignore[index]


@pytest.mark.parametrize(
    ("shape", "wrong", "said"),
    [
        ("gpt2", lambda model: model.W_Q[3], "layers 0 to 2"),
        ("gpt2", lambda model: model.W_Q[0, 4], "heads 0 to 3"),
        ("gpt2", lambda model: model.W_Q["a0.h4"], "heads 0 to 3"),
        ("gpt2", lambda model: model.W_Q["a7.h0"], "layers 0 to 2"),
        ("gpt2", lambda model: model.W_in["a0.h1"], "give a layer"),
        ("llama", lambda model: model.W_K["a0.h1"], "query heads share it"),
        ("llama", lambda model: model.W_K[0, 2], "kv_heads 0 to 1"),
        ("gpt2", lambda model: model.W_Q["m0"], "give a layer"),
    ],
)
def test_a_weight_that_is_not_there_is_one_line(shape: str, wrong: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        wrong(tiny(shape))


def test_an_absent_weight_is_unsupported() -> None:
    for absent in (lambda: tiny("llama").W_pos, lambda: tiny("llama").b_Q[0], lambda: tiny("gpt2").W_gate[0]):
        with pytest.raises(UnsupportedError, match="has no"):
            absent()
