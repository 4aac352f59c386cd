"""Models on several devices: layers on the CPU and on a stand-in for a second device (`benchmarks/stand_in_device.py`).

Both compute with the same kernels, so everything must be what it is on one device, to the last bit; and whatever mixes
tensors of the two raises, as on a GPU.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor

import mechinterp as mi
from benchmarks.device_check import numbers
from benchmarks.stand_in_device import CPU, DEVICE, StandIn, over_two_devices
from mechinterp import InputError, UnsupportedError
from mechinterp.engines.mask_gradients import mask_gradients
from mechinterp.engines.replacement import build_replacement
from mechinterp.models.placement import PLACEMENTS, check_placed, place
from tests.support.models_tiny import huggingface, pairs, tiny, tokens

# -- where the parts go ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_name_puts_all_on_the_cpu_without_a_gpu(name: str) -> None:
    module: Any = place(huggingface("llama"), name, None)
    assert module.hf_device_map == {"": "cpu"}


def test_a_file_is_loaded_by_a_device_map() -> None:
    model = mi.load_model("bundled", device_map="auto", max_memory={"cpu": "1GiB"})
    assert model.devices == ("cpu",) and model.info.weights_sha256() == mi.load_model("bundled").info.weights_sha256()


SPLIT: Any = {"model.layers.0": "cpu", "": "meta"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name": ({"device_map": "balance"}, "Unknown device map 'balance'. Did you mean 'balanced'?"),
    "a device": ({"device_map": "cuda:1"}, "Unknown device map 'cuda:1'.*Known: auto, balanced"),
    "both": ({"device_map": "auto", "device": "cpu"}, "one device.*several.*not both"),
    "a list": ({"device_map": ["cpu"]}, r"or a mapping from parts to devices.*got \['cpu'\]"),
    "empty": ({"device_map": {}}, r"mapping from parts to devices.*got \{\}"),
    "no name": ({"device_map": {0: "cpu"}}, "names of modules; got 0"),
    "unknown device": ({"device_map": {"": "tpu9"}}, "Unknown device 'tpu9'"),
    "no GPU of that number": ({"device_map": {"": 7}}, "'cuda:7' cannot be used on this machine"),
    "negative number": ({"device_map": {"": -1}}, "Unknown device 'cuda:-1'"),
    "absent device": ({"device_map": {"": "cuda:99"}}, "'cuda:99' cannot be used on this machine"),
    "memory alone": ({"max_memory": {0: "1GiB"}}, "belongs to a `device_map`"),
    "memory of a mapping": ({"device_map": {"": "cpu"}, "max_memory": {0: "1GiB"}}, "belongs to a name"),
    "unknown memory": ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "LlamaForCausalLM.*size"),
    "no part": ({"device_map": {"model.layer.0": "cpu"}}, "does not give any device for.*embed_tokens"),
    "offloaded to a disk": ({"device_map": {"": "disk"}}, "leaves 1 of 1 parts to the CPU or a disk.*'disk'"),
    "offloaded": ({"device_map": SPLIT}, "leaves 1 of 2 parts to the CPU.*read the weights of all layers"),
    "no memory": ({"device_map": "auto", "max_memory": {"cpu": "1KB"}}, "to the CPU or a disk"),
    "shared": ({"device_map": "auto", "share_weights": True}, "`share_weights` is for a module in memory as it is"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_a_wrong_device_map_is_one_line(name: str) -> None:
    given, said = WRONG[name]
    with pytest.raises((InputError, UnsupportedError), match=said) as error:
        mi.load_model(huggingface("llama"), **given)
    assert "\n" not in str(error.value)


def test_a_bridge_is_used_where_it_is() -> None:
    with pytest.raises(InputError, match="a bridge is used as it is"):
        mi.load_model(tiny("llama").bridge, device_map="auto")


def test_weights_that_are_not_in_memory_are_refused(tmp_path: Path) -> None:
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    places: dict[str, Any] = {part: "disk" if part == "model.layers" else "cpu" for part in parts}
    main: Any = "cpu"  # a string: accelerate compares it with one
    offloaded = dispatch_model(huggingface("llama"), places, main_device=main, offload_dir=tmp_path)
    for module in (offloaded, huggingface("llama").to("meta")):
        with pytest.raises(UnsupportedError, match=r"not in memory \(\d+ of 30, such as 'model.*without `device_map`"):
            mi.load_model(module)


def test_a_module_that_accelerate_placed_is_copied() -> None:
    """Accelerate gives a module a `to` of its own, which returns the original when a copy of it is moved."""
    module = dispatch_model(huggingface("llama"), {"": CPU}, force_hooks=True)
    model = mi.load_model(module, dtype="float32")
    assert all(weight.requires_grad and weight.dtype == torch.float64 for weight in module.parameters())
    assert model.dtype == torch.float32 and model.devices == ("cpu",)


# -- on two devices; from here on the stand-in is active ------------------------------------------------------------

DEVICES = {"gpt2": (DEVICE, CPU), "llama": (CPU, DEVICE), "gemma2": (DEVICE, CPU)}
"""By shape the main device, of the unembedding and the last layers, and that of the first layers."""
Both = tuple[mi.HookManager, mi.HookManager]


@pytest.fixture(scope="module")
def stand_in() -> Iterator[None]:
    with StandIn():
        yield


@functools.cache
def _loaded(shape: str) -> Both:
    layers: dict[str, Any] = {"n_layer" if shape == "gpt2" else "num_hidden_layers": 2}
    made = [huggingface(shape, **layers) for _ in range(2)]
    return mi.load_model(made[0]), mi.load_model(over_two_devices(made[1], *DEVICES[shape]))


@pytest.fixture(scope="module")
def loaded(stand_in: None) -> Callable[[str], Both]:
    """(on the CPU, on two devices) by shape."""
    return _loaded


def _run(model: mi.HookManager) -> object:
    """Every site recorded, edits of a value and of a gradient in each layer, and a gradient at each."""
    seen: list[Tensor] = []

    def halved(value: Tensor) -> Tensor:
        seen.append(value)
        return 0.5 * value

    layers = range(model.dims.n_layers)
    edits = [mi.Intervention(("z", layer), halved, grad=halved) for layer in layers]
    edits += [mi.Intervention(("resid_mid", layer), lambda value: value + 1) for layer in layers]
    taps = [mi.Site(kind, layer) for layer in layers for kind in ("resid_pre", "q", "mlp_in", "mlp_out")]
    whole = model.run(
        tokens(),
        record=model.sites(),
        interventions=edits,
        grads=taps,
        loss=lambda logits: logits[..., 3].sum(),
        at=torch.tensor([[1], [4], [6]]),
    )
    found = [*seen, *whole.values.values(), *whole.grads.values()]
    assert {value.device for value in found} == {model.device}
    stopped = model.run(tokens(), stop="resid_post.0", grads=["z.0"], loss=lambda value: value.pow(2).sum())
    return [*found, whole.logits, *stopped.grads.values()]


def _continued(model: mi.HookManager) -> object:
    """From a past, and from a layer on."""
    whole = model.run(tokens(), keep_past=True, record=["resid_pre.1"])
    assert whole.past is not None
    later = model.run(tokens()[:, 4:], past=whole.past.upto(4))
    started = model.run(tokens(), start=(1, whole["resid_pre", 1]))
    return [later.logits, started.logits, model.generate(tokens(), 3, cache=True).tokens]


def _weights(model: mi.HookManager) -> object:
    parts = [model.W_Q[i] for i in range(model.dims.n_layers)]
    parts += [model.W_OV["L0H1"], model.W_QK["L1H0"], model.W_in[0], model.W_out[1], model.W_E, model.W_U]
    states = torch.ones(2, model.dims.d_model, dtype=model.dtype, device=model.device)
    parts += [model.mlp(layer, states) for layer in range(model.dims.n_layers)]
    assert {part.device for part in parts} == {model.device}
    return parts


def _edges(model: mi.HookManager) -> object:
    graph = mi.build_graph(model, neurons={0: [1, 3]})
    cut = graph.possible & (torch.rand(graph.possible.shape, generator=torch.Generator().manual_seed(0)) < 0.3)
    return mi.run_edges(model, graph, pairs(3, 5), cut, metric="kl_to_clean")


def _masks(model: mi.HookManager) -> object:
    graph, metric, own = mi.build_graph(model), mi.get_metric("logit_diff"), pairs(3, 5).to(model.device)
    gates = torch.rand(2, *graph.possible.shape, generator=torch.Generator().manual_seed(0)) * graph.possible
    values = build_replacement("corrupt", model, graph, own, 32).on(own)
    return mask_gradients(
        model, graph, own, gates, values, lambda logits: torch.stack([metric(one, own) for one in logits])
    )


def _scores(method: str, **how: Any) -> Callable[[mi.HookManager], object]:
    return lambda model: mi.score_edges(model, mi.build_graph(model), pairs(3, 5), method=method, **how).values


RUNS: dict[str, Callable[[mi.HookManager], object]] = {
    "run": _run,
    "run continued": _continued,
    "weights and MLPs": _weights,
    "run_edges": _edges,
    "mask_gradients": _masks,
    "eap": _scores("eap"),
    "eap-ig": _scores("eap-ig", steps=2),
    "activation_patching": lambda model: mi.activation_patching(model, pairs(3, 5)),
    "direct_logit_attribution": lambda model: mi.direct_logit_attribution(model, pairs(3, 5)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("shape", DEVICES)
def test_the_same_on_two_devices_as_on_one(shape: str, name: str, loaded: Callable[[str], Both]) -> None:
    one, two = loaded(shape)
    for got, expected in zip(numbers(RUNS[name](two)), numbers(RUNS[name](one)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("shape", DEVICES)
def test_what_is_known_of_the_model_is_the_same(shape: str, loaded: Callable[[str], Both]) -> None:
    one, two = loaded(shape)
    assert one.devices == ("cpu",) and two.devices == ("cpu", "meta") and two.device == DEVICES[shape][0]
    for known in ("dims", "refused", "branches", "coupled_heads", "keeps_past", "bound_mlps"):
        assert getattr(one, known) == getattr(two, known)
    assert two.info.weights_sha256() == one.info.weights_sha256()
    for layer in range(2):
        maps, mlp = two.layout.attention[layer], two.layout.neurons(layer)
        away = next(two.bridge.blocks[layer].parameters()).device != two.device
        assert (type(maps).__name__ == "AttentionElsewhere") == away == (type(mlp).__name__ == "MlpElsewhere")
        assert {maps.W["q"].device, maps.W_O.device, mlp.W_in.device, mlp.W_out.device} == {two.device}
        assert (maps.W_O is maps.W_O) != away  # a copy each time, and none is kept
        assert mlp.activation == one.layout.neurons(layer).activation is not None


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("shape", ["qwen3-moe", "lfm2"])
def test_experts_and_layers_without_heads_on_two_devices(shape: str, stand_in: None) -> None:
    def edges(model: mi.HookManager) -> object:
        graph = mi.build_graph(model, experts=shape == "qwen3-moe")
        scores = mi.score_edges(model, graph, pairs(3, 5), method="eap").values
        return [scores, mi.run_edges(model, graph, pairs(3, 5), graph.possible)]

    models = [mi.load_model(module) for module in (huggingface(shape), over_two_devices(huggingface(shape)))]
    one, two = map(edges, models)
    assert all(map(torch.equal, numbers(two), numbers(one)))


@pytest.mark.slow
def test_a_run_from_the_pairs_to_the_file(loaded: Callable[[str], Both], tmp_path: Path) -> None:
    rows = [{"clean": [1, 2, 3 + i], "corrupt": [1, 4, 3 + i], "right": 7, "wrong": 9} for i in range(12)]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    how: dict[str, Any] = dict(method="eap", edges=12, examples=4, roles=False, curve=False, resamples=0, anyway=True)
    one, two = (
        mi.discover(str(file), model=model, out=tmp_path / str(i), **how) for i, model in enumerate(loaded("llama"))
    )
    assert one.circuit.digest() == two.circuit.digest()
    assert all(map(torch.equal, numbers(two.evaluation), numbers(one.evaluation)))


@pytest.mark.slow
def test_a_module_is_placed_and_moved_as_asked(stand_in: None) -> None:
    there = mi.load_model(huggingface("llama", num_hidden_layers=1), device_map={"": "meta"})
    split = over_two_devices(huggingface("llama", num_hidden_layers=1))
    here = mi.load_model(split, device="cpu")
    assert there.devices == ("meta",) and here.devices == ("cpu",)
    assert {str(weight.device) for weight in split.parameters()} == {"cpu", "meta"}  # the caller's own
    assert all(map(torch.equal, numbers(there.run(tokens()).logits), numbers(here.run(tokens()).logits)))


def test_weights_between_which_nothing_moves_are_refused(stand_in: None) -> None:
    module = huggingface("llama")
    check_placed(module, "it")
    module.model.layers[2].to(DEVICE)
    for share in (False, True):
        with pytest.raises(UnsupportedError, match=r"several devices \(cpu, meta\), and nothing moves.*device_map="):
            mi.load_model(module, share_weights=share)


def test_a_layer_that_is_split_is_refused(stand_in: None) -> None:
    module = over_two_devices(huggingface("llama"))
    module.model.layers[0].mlp.to(DEVICE)
    with pytest.raises(UnsupportedError, match=r"'model.layers.0' of LlamaForCausalLM is split over cpu and meta"):
        mi.load_model(module)
