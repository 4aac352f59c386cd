"""What a run leaves behind: nothing, also after an error, an interrupt or a second thread."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mechinterp.base.errors import BusyError, InputError, SiteNotReached
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.interventions import Intervention
from tests.support.models_tiny import EVERY, as_installed, build, snapshot, tokens

X = tokens(3, 7)
ROUND_TRIP = 1e-12  # the same numbers through the same code, but batched otherwise: float64 rounding only


def run(model: HookManager, *args: Any, **keywords: Any) -> Any:
    """`model.run` as an installed package has it."""
    return as_installed(HookManager.run)(model, *args, **keywords)


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
