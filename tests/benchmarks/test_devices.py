"""What would fail on a GPU, on a machine without one: `OnDevice` tensors refuse to be mixed with those of the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import mechinterp as mi
from benchmarks.device_check import Checked, compared, items, models
from benchmarks.engines import work_of
from benchmarks.stand_in_device import DEVICE, StandIn

ITEMS = items()
TRIED = (
    *("method eap", "method relp", "method information-flow", "method weight-magnitude", "method edge-pruning"),
    *("run_edges, corrupt", "run_edges, mean-positional", "graph with named positions", "graph with neurons"),
    "graph with features",
    *("mask_gradients", "run continued from its past", "activation_patching, mean", "attribution_patching, relp"),
    *("path_patching, MLPs recomputed", "direct_logit_attribution", "relevance", "logit_lens", "weights", "steering"),
    *("attention edits", "contextual_decomposition, patch", "contextual_decomposition, one backward", "evaluate"),
    *("size_curve", "check_performance"),
)
"""The rest, on all models: `python -m benchmarks.gpu check --device stand-in`."""


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


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_same_on_another_device(name: str, both: Any) -> None:
    found = _checked(name, "GPT-2", both)
    assert found.ok and not found.refused, str(found)


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


MOST_SYNCS = {"eap": 20, "eap_ig": 35, "circuit": 24, "gates": 8}
"""The host waits for the device: meanwhile the queue of kernels runs dry. None of them may grow with the layers."""


@pytest.mark.slow
def test_how_often_the_host_waits(both: Any, stand_in: StandIn) -> None:
    pairs, _, model = both
    work = work_of(model.bridge.original_model, model, pairs.to(DEVICE))
    found: dict[str, Counter[str]] = {}
    for name in MOST_SYNCS:
        work[name]()
        stand_in.syncs.clear()
        work[name]()
        found[name] = Counter(stand_in.syncs)
    assert {name: count for name, count in found.items() if count.total() > MOST_SYNCS[name]} == {}
