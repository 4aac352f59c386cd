"""Quantised models.

A quantised model is compared with its twin: the same model with the numbers that its packed weights stand for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mechinterp as mi
from mechinterp import InputError, UnsupportedError
from mechinterp.models.packed_weights import is_packed
from tests.support.models_tiny import huggingface, pairs, tokens

MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Packed(nn.Module):
    """A Linear whose weight is int8, with a scale for each output: as bitsandbytes keeps it, or without `.weight`."""

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.name = linear.in_features, linear.out_features, name
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        whole = (linear.weight.detach() / scale).round().to(torch.int8)
        self.register_buffer("scale", scale)
        if name == "weight":
            self.weight = nn.Parameter(whole, requires_grad=False)
        else:
            self.register_buffer(name, whole)
        self.bias = linear.bias

    def numbers(self) -> Tensor:
        return getattr(self, self.name).to(self.scale) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.numbers().to(x.dtype), self.bias)


def quantised(shape: str, which: tuple[str, ...], name: str = "weight") -> tuple[Any, Any]:
    """(a model with some of its products packed, the same model in plain numbers)."""
    module = huggingface(shape)
    plain = copy.deepcopy(module)
    for path, part in list(module.named_modules()):
        if path.rpartition(".")[2] in which:
            packed = Packed(part, name)
            module.get_submodule(path.rpartition(".")[0]).add_module(path.rpartition(".")[2], packed)
            plain.get_submodule(path).weight.data = packed.numbers()
    return module, plain


def same(run: Callable[[mi.HookManager], Any], *models: mi.HookManager) -> None:
    ours, expected = map(run, models)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))  # all is float64


ACTIVATIONS: dict[str, Callable[[mi.HookManager], Any]] = {
    "run": lambda model: model.run(tokens()).logits,
    "gradients": lambda model: model.run(tokens(), grads=["z.1"], loss=lambda logits: logits[..., 3].sum()).grads[
        "z.1"
    ],
    "activation_patching": lambda model: mi.activation_patching(model, pairs(3, 5)).values,
    "heads": lambda model: mi.activation_patching(model, pairs(3, 5), "z").values,
    "logit_lens": lambda model: mi.logit_lens(model, pairs(3, 5)).entropy.values,
}
EDGES: dict[str, Callable[[mi.HookManager], Any]] = {
    "eap": lambda model: mi.score_edges(model, mi.build_graph(model), pairs(3, 5), method="eap").values,
    "run_edges": lambda model: mi.run_edges(model, graph := mi.build_graph(model), pairs(3, 5), graph.possible),
    "attribution": lambda model: mi.direct_logit_attribution(model, pairs(3, 5)).values,
}


@pytest.mark.parametrize(
    ("shape", "name"), [("llama", "weight"), pytest.param("gemma2", "qweight", marks=pytest.mark.slow)]
)
def test_what_reads_activations_takes_a_quantised_model_and_weights_are_refused_by_name(shape: str, name: str) -> None:
    models = [mi.load_model(module) for module in quantised(shape, MLP + ATTENTION, name)]
    assert models[0].dims == models[1].dims
    assert models[0].refused.keys() == models[1].refused.keys()
    for run in ACTIVATIONS.values():
        same(run, *models)
    refusal = rf"attention of layer \d are quantised \(Packed keeps '{name}' as torch.int8\)"
    for run in (*EDGES.values(), lambda model: model.W_Q[0], lambda model: model.W_OV["L0H1"]):
        with pytest.raises(UnsupportedError, match=refusal):
            run(models[0])
    with pytest.raises(UnsupportedError, match="the MLP of layer 2 are quantised"):
        _ = models[0].W_in[2]


def test_edges_need_no_weights_of_the_mlps() -> None:
    models = [mi.load_model(module) for module in quantised("llama", MLP)]
    for run in EDGES.values():
        same(run, *models)
    with pytest.raises(UnsupportedError, match="the MLP of layer 0 are quantised"):
        mi.build_graph(models[0], neurons={0: [1]})


def test_another_scale_is_another_model_and_damaged_scales_are_refused() -> None:
    module, plain = quantised("llama", MLP, "qweight")
    first = mi.load_model(module).info
    assert {key for key in first.weights if "up_proj" in key} >= {"model.layers.0.mlp.up_proj.qweight"}
    assert set(mi.load_model(plain).info.weights) == set(dict(plain.named_parameters()))
    module.model.layers[1].mlp.up_proj.scale[3] *= 2
    assert mi.load_model(module).info.weights_sha256() != first.weights_sha256()
    module.model.layers[1].mlp.up_proj.scale[3] = torch.nan
    with pytest.raises(InputError, match=r"up_proj.scale.*NaN"):
        mi.load_model(module)


def test_a_quantised_unembedding_is_refused_with_what_to_do() -> None:
    with pytest.raises(UnsupportedError, match=r"unembedding of LlamaForCausalLM is quantised.*skip_modules"):
        mi.load_model(quantised("llama", ("lm_head",))[0])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int32])
def test_what_is_packed(dtype: torch.dtype) -> None:
    assert is_packed(torch.zeros(2, dtype=dtype))
    assert not any(is_packed(torch.zeros(2, dtype=plain)) for plain in (torch.bfloat16, torch.int64, torch.bool))
