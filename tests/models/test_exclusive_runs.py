"""One model, several managers, threads and blocks of edits: right numbers or BusyError, and nothing stays."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import sys
import threading
import weakref
from contextlib import ExitStack
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import BusyError, InputError
from mechinterp.models.exclusive_runs import Turn, use_of
from mechinterp.models.hook_manager import HookManager, load_model
from mechinterp.models.interventions import Intervention
from tests.support.models_tiny import build, pairs, snapshot, tiny, tokens

X = tokens(2, 4)


def doubled(value: torch.Tensor) -> torch.Tensor:
    return value * 2


def two_managers() -> tuple[HookManager, HookManager]:
    model = build("gpt2", n_layer=2)
    return model, load_model(model.bridge)


@pytest.mark.slow
def test_two_managers_of_one_model_in_two_threads_give_the_right_logits_or_refuse() -> None:
    """Each thread edits and records otherwise; the switches between threads come as often as they can."""
    managers, wrong, busy, right = two_managers(), list[Any](), list[Any](), list[Any]()
    edits: list[dict[Any, Any]] = [{"z.1": doubled}, {"mlp_out.0": torch.zeros_like}]
    expected = [m.run(X, interventions=edit).logits for m, edit in zip(managers, edits, strict=True)]
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        for _ in range(60):
            try:
                got = managers[i].run(X, interventions=edits[i]).logits
            except BusyError:
                busy.append(i)
                continue
            (right if torch.equal(got, expected[i]) else wrong).append(i)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        workers = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and right and len(right) + len(busy) == 120
    assert torch.equal(managers[0].run(X, interventions=edits[0]).logits, expected[0])


def test_blocks_of_two_managers_of_one_model_nest() -> None:
    first, second = two_managers()
    z = first.run(X, record=["z.1"]).values["z.1"]
    with first.intervene(Intervention("z.1", lambda value: value + 1)):
        assert second.edited
        with second.intervene(Intervention("z.1", doubled)):
            assert torch.equal(first.run(X, record=["z.1"]).values["z.1"], (z + 1) * 2)
            with pytest.raises(InputError, match="inside `intervene`"):
                second.mlp(0, torch.ones(1, 16, dtype=second.dtype))
        assert torch.equal(second.run(X, record=["z.1"]).values["z.1"], z + 1)
    assert torch.equal(second.run(X, record=["z.1"]).values["z.1"], z)


def test_a_block_belongs_to_its_thread_also_for_the_other_manager() -> None:
    first, second = two_managers()
    found: list[Any] = []

    def other() -> None:
        for busy in (lambda: second.run(X), lambda: second.intervene(Intervention("z.0", doubled)).__enter__()):
            with pytest.raises(BusyError, match="another thread"):
                busy()
            found.append(second.edited)

    with first.intervene(Intervention("z.1", doubled)):
        worker = threading.Thread(target=other)
        worker.start()
        worker.join()
    assert found == [False, False]
    assert not first.edited and not use_of(first.bridge).users[1:]


def test_a_block_works_in_an_exit_stack_and_is_entered_once_at_a_time() -> None:
    model, _ = two_managers()
    plain = model.run(X).logits
    block = model.intervene(Intervention("z.1", doubled))
    with ExitStack() as stack:
        assert stack.enter_context(block) is model
        edited = model.run(X).logits
        with pytest.raises(InputError, match="entered already"):
            block.__enter__()
    assert torch.equal(model.run(X).logits, plain) and not torch.equal(plain, edited)
    with block:
        assert torch.equal(model.run(X).logits, edited)


@pytest.mark.slow
def test_a_generator_that_is_left_midway_in_a_block_holds_it_until_it_is_closed() -> None:
    model, other = two_managers()
    plain = model.run(X).logits

    def edited() -> Any:
        with model.intervene(Intervention("z.1", doubled)):
            yield model.run(X).logits

    some = edited()
    assert not torch.equal(next(some), plain)
    assert other.edited  # said, as long as it is so
    some.close()
    assert not other.edited and torch.equal(other.run(X).logits, plain)


def test_a_run_whose_end_was_lost_does_nothing_and_is_cleared_away() -> None:
    """Not even an interrupt in the midst of an interrupt's cleaning up changes the next run."""
    model = build("gpt2", n_layer=2, resid_pdrop=0.5)
    part = model.bridge.original_model.transformer.h[1]
    part.train()
    expected, before = model.run(X, interventions={"z.1": doubled}).logits, snapshot(model.bridge)
    point = model.bridge.hook_dict["blocks.0.attn.hook_z"]

    def lost() -> None:
        turn = Turn(use_of(model.bridge), model.bridge, "it", sys._getframe())
        turn.__enter__()
        point.add_hook(turn.hook(point, torch.zeros_like))
        turn.replace_forward(model.bridge.blocks[0], torch.zeros_like)

    plain = model.run(X).logits
    lost()
    assert snapshot(model.bridge) != before
    model.bridge.original_model.eval()
    assert torch.equal(model.bridge(X, return_type="logits"), plain)  # the user's own call, which sweeps nothing
    part.train()
    assert torch.equal(model.run(X, interventions={"z.1": doubled}).logits, expected)
    assert snapshot(model.bridge) == before and part.training
    worker = threading.Thread(target=lost)
    worker.start()
    worker.join()
    assert torch.equal(model.run(X, interventions={"z.1": doubled}).logits, expected)
    assert snapshot(model.bridge) == before


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_process_that_was_forked_in_the_midst_of_another_threads_run_can_run_the_model() -> None:
    model, _ = two_managers()
    plain = model.run(X).logits
    inside, go_on = threading.Event(), threading.Event()

    def wait(value: torch.Tensor) -> torch.Tensor:
        inside.set()
        go_on.wait(30)
        return value * 3

    worker = threading.Thread(target=lambda: model.run(X, interventions={"z.1": wait}, start=None))
    worker.start()
    try:
        assert inside.wait(30)
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        child = context.Process(target=lambda: results.put(bool(torch.equal(model.run(X).logits, plain))))
        child.start()
        child.join(60)
        assert child.exitcode == 0 and results.get()
        with pytest.raises(BusyError):
            model.run(X)
    finally:
        go_on.set()
        worker.join()
    assert torch.equal(model.run(X).logits, plain)


def test_a_layers_own_forward_comes_back_after_a_run_that_skips_it() -> None:
    """Libraries that move weights about replace `forward` on a layer; ours must not take theirs away."""
    model = build("gpt2", n_layer=2)
    plain = model.run(X, record=["resid_pre.1"])
    layer, calls = model.bridge.blocks[0], list[int]()
    own = layer.forward

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    vars(layer)["forward"] = theirs
    model.run(X, start=(1, plain.values["resid_pre.1"]))
    assert not calls and vars(layer)["forward"] is theirs
    assert torch.equal(model.run(X).logits, plain.logits) and calls


@pytest.mark.slow
def test_copies_of_a_model_are_free_and_a_model_is_let_go() -> None:
    model = build("gpt2", n_layer=1)
    with model.intervene(Intervention("z.0", lambda value: value + 0 * len(repr(model)))):
        other = copy.deepcopy(model)
        assert not other.edited and other.run(X).logits is not None
        assert load_model(other.bridge).edited is False
        with other.intervene(Intervention("z.0", doubled)):
            with pytest.raises(
                InputError, match="inside an `intervene` block"
            ):  # what it would be probed with is edited
                load_model(model.bridge)
            assert model.edited and use_of(other.bridge) is not use_of(model.bridge)
    gone = weakref.ref(model.bridge.original_model)
    del model, other
    gc.collect()
    assert gone() is None


def test_learning_a_subspace_leaves_hooks_flags_and_modes_as_they_were() -> None:
    """Also when it is interrupted, and of a model in training mode."""
    model, some = build("gpt2", n_layer=2, dtype=torch.float32), pairs(4, 4)
    model.bridge.requires_grad_(True)
    model.bridge.train()
    model.bridge.hook_dict["blocks.0.hook_resid_post"].add_hook(lambda value, hook: None)
    before = snapshot(model.bridge)
    mi.learn_subspace(model, some, "resid_post.0", 1, epochs=1)
    assert snapshot(model.bridge) == before

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.bridge.original_model.transformer.h[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        mi.learn_subspace(model, some, "resid_post.0", 1, epochs=1)
    handle.remove()
    assert snapshot(model.bridge) == before


def test_a_run_leaves_no_cycle_that_keeps_its_memory() -> None:
    model, some = tiny("gpt2"), pairs(2)
    graph = mi.build_graph(model)
    gc.collect()
    gc.disable()
    try:
        mi.score_edges(model, graph, some, method="edge-pruning", learning_steps=2, drawings=1)
        left = [type(o).__name__ for o in gc.get_objects() if type(o).__name__ in ("Turn", "OwnHook", "Point")]
    finally:
        gc.enable()
    assert left == []
