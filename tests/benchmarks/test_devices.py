"""What would fail on a GPU, on a machine without one: `OnDevice` tensors refuse to be mixed with those of the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import mechinterp as mi
from benchmarks.device_check import Checked, compared, items, models
from benchmarks.engines import small_gpt2, token_pairs, work_of
from benchmarks.stand_in_device import DEVICE, StandIn

ITEMS = items()
LONG = ("causal_tracing", "heads x positions", "acdc", "cd", "mattr", "pruning", "probing", "path-patching", "atp-star")


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    with StandIn() as active:
        yield active


@pytest.fixture(scope="module")
def both(stand_in: StandIn) -> tuple[mi.Pairs, mi.HookManager, mi.HookManager]:
    return models()["GPT-2"](DEVICE)


def _checked(name: str, model: str, both: tuple[mi.Pairs, mi.HookManager, mi.HookManager]) -> Checked:
    pairs, cpu, other = both
    run, limit = ITEMS[name]
    return compared(model, name, run, limit, (cpu, pairs), (other, pairs.to(DEVICE)))


def _quick(name: str) -> bool:
    return not any(part in name for part in LONG)


@pytest.mark.parametrize("name", [name for name in ITEMS if _quick(name)])
def test_same_on_another_device(name: str, both: Any) -> None:
    found = _checked(name, "GPT-2", both)
    assert found.ok, str(found)


@pytest.mark.slow  # learned masks, sweeps over all positions and ACDC; then grouped queries and post-norms
@pytest.mark.parametrize("model", ["GPT-2", "Llama", "Gemma 2"])
def test_the_rest_is_the_same_on_another_device(model: str, stand_in: StandIn) -> None:
    both = models()[model](DEVICE)
    names = [name for name in ITEMS if not _quick(name) or (model != "GPT-2" and name.startswith(("graph", "run_edges")))]
    wrong = [str(found) for name in names if not (found := _checked(name, model, both)).ok]
    assert not wrong, "\n".join(wrong)


MIXES: dict[str, Callable[[torch.Tensor], Any]] = {
    "added": lambda there: there + torch.zeros(3),
    "indexed by": lambda there: torch.zeros(3)[there.long()],
    "joined": lambda there: torch.cat([there, torch.zeros(3)]),
    "drawn with": lambda there: torch.rand(3, device=there.device, generator=torch.Generator()),
    "read as numpy": lambda there: there.numpy(),
}


@pytest.mark.parametrize("name", MIXES)
def test_the_stand_in_refuses_what_a_gpu_refuses(name: str, stand_in: StandIn) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        MIXES[name](torch.zeros(3, device=DEVICE))


def test_a_difference_and_an_error_are_found(both: Any) -> None:
    pairs, cpu, other = both

    def biased(model: mi.HookManager, pairs: mi.Pairs) -> object:
        return torch.ones(2) + 0.01 * (model is other)

    def mixed(model: mi.HookManager, pairs: mi.Pairs) -> object:
        return model.layout.W_U + torch.zeros(model.layout.W_U.shape)

    def only_there(model: mi.HookManager, pairs: mi.Pairs) -> object:
        if model is other:
            raise mi.InputError("no")
        return 1.0

    for run in (biased, mixed, only_there):
        assert not compared("GPT-2", "wrong", run, 1e-3, (cpu, pairs), (other, pairs.to(DEVICE))).ok


MOST_SYNCS = {"forward": 0, "eap": 25, "eap_ig": 63, "circuit": 62, "gates": 18}
"""Where the host waits for the device once, the queue of kernels runs dry. Three layers, four examples."""


def test_how_often_the_host_waits() -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 100}
    bare, _, _ = small_gpt2(torch.device("cpu"), 2, 5, **sizes)
    with StandIn() as stand_in:
        work = work_of(bare.to(DEVICE), mi.load_model(bare), token_pairs(100, DEVICE, 4, 6))
        found: dict[str, Counter[str]] = {}
        for name in MOST_SYNCS:
            work[name]()
            stand_in.syncs.clear()
            work[name]()
            found[name] = Counter(stand_in.syncs)
    assert {name: count for name, count in found.items() if count.total() > MOST_SYNCS[name]} == {}
