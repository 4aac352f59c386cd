"""After Ctrl-C at any line of a run the model is as before, and the next run gives what it gives otherwise."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_lens
import transformers

import mechinterp as mi
from mechinterp.engines.mask_gradients import mask_gradients
from mechinterp.engines.replacement import build_replacement
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.interventions import Intervention
from mechinterp.models.sites import Site
from tests.support.interrupts import Place, interrupted
from tests.support.models_tiny import build, pairs, snapshot, tokens

OWN = (str(Path(mi.__file__).parent),)
OTHERS = tuple(str(Path(package.__file__).parent) for package in (torch, transformer_lens, transformers))
CHANGING = (*(f"{OWN[0]}/models/{name}.py" for name in ("modes", "exclusive_runs")), torch.autograd.grad_mode.__file__)
X = tokens(2, 4)
DROPOUT = {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}


def doubled(value: torch.Tensor) -> torch.Tensor:
    return value * 2


def a_model() -> HookManager:
    """Small, with dropout, and in training mode: what a run must set and give back."""
    model = build("gpt2", n_layer=2, **DROPOUT)
    model.bridge.original_model.transformer.h[1].train()
    return model


def edits_and_records(model: HookManager) -> list[Any]:
    run = model.run(X, record=["resid_post.1", "z.0"], interventions={"z.1": doubled}, at=X[:, :1] * 0 + 2)
    return [run.logits, *run.values.values()]


def with_a_loss(model: HookManager) -> list[Any]:
    edit = Intervention("z.1", grad=doubled)
    run = model.run(X, grads=["z.0", "q.1"], interventions=[edit], loss=lambda logits: logits[:, -1, 3])
    return [run.logits, run.loss, *run.grads.values()]


def within_blocks(model: HookManager) -> list[Any]:
    with model.intervene(Intervention("z.1", doubled)):
        inside = model.run(X, record=["z.1"]).values["z.1"]
        with model.intervene(Intervention("mlp_out.0", torch.zeros_like)):
            both = model.run(X).logits
    return [inside, both, model.run(X).logits]


def started_late(model: HookManager) -> list[Any]:
    first = model.run(X[:, :2], keep_past=True).past
    assert first is not None
    resid = model.run(X[:, 2:], past=first, record=["resid_pre.1"]).values["resid_pre.1"]
    return [model.run(X[:, 2:], past=first, start=(1, doubled(resid))).logits]


def one_mlp(model: HookManager) -> list[Any]:
    with torch.no_grad():
        return [model.mlp(1, torch.ones(3, 16, dtype=model.dtype))]


def a_survey(model: HookManager) -> list[Any]:
    logits, found = model.survey(X, [Site("z", 0), Site("z", 1)], lambda logits: logits.sum())
    return [logits, *(gradient for _, gradient in found.values())]


def the_exact_engine(model: HookManager) -> list[Any]:
    some, graph = pairs(2, 4), mi.build_graph(model)
    cut = graph.possible.clone()
    cut[: len(cut) // 2] = False
    values = build_replacement("corrupt", model, graph, some, 2)
    _, gradient = mask_gradients(model, graph, some, cut[None].float(), values.on(some), lambda x: x.sum((2, 3)))
    return [mi.run_edges(model, graph, some, cut), gradient]


def first_order(model: HookManager) -> list[Any]:
    some, graph = pairs(2, 4), mi.build_graph(model)
    return [
        mi.score_edges(model, graph, some, method="eap-ig", steps=1).total,
        mi.attribution_patching(model, some, method="relp").values,
    ]


def patching(model: HookManager) -> list[Any]:
    some = pairs(2, 4)
    return [
        mi.activation_patching(model, some, "z").values,
        mi.path_patching(model, some, ["a0.h0"], ["m1"]).values,
    ]


RUNS = [edits_and_records, with_a_loss, within_blocks, started_late, one_mlp, a_survey]
ENGINES = [first_order, the_exact_engine, patching]


def check(
    model: HookManager,
    run: Callable[[HookManager], list[Any]],
    files: tuple[str, ...],
    every: int = 1,
    done: set[Place] | None = None,
) -> int:
    """Interrupts `run` all over `files`; afterwards all is as it was, and it gives the same again, bit for bit."""
    expected, before, n = run(model), snapshot(model.bridge), 0
    for n, place in enumerate(interrupted(lambda: run(model), files, every, done), 1):
        assert torch.is_grad_enabled(), place
        assert not model.edited, place
        assert snapshot(model.bridge) == before, place
        got = run(model)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), place
        if n % 20 == 1:
            assert free(model), place
    return n


def free(model: HookManager) -> bool:
    """Whether another thread can run the model."""
    found: list[Any] = []
    worker = threading.Thread(target=lambda: found.append(model.run(X[:, :1])))
    worker.start()
    worker.join()
    return bool(found)


@pytest.mark.slow
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_ctrl_c_at_every_line_of_a_run(every: int) -> None:
    """At every one in `make test-all`, at one in three in `make test`."""
    model, done = a_model(), set[Place]()
    n = sum(check(model, run, OWN, every, done) for run in RUNS)
    assert n > 250 / every


@pytest.mark.slow
def test_ctrl_c_inside_the_libraries() -> None:
    model, done = a_model(), set[Place]()
    n = sum(check(model, run, OTHERS, 31, done) for run in (with_a_loss, started_late))
    assert n > 30


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ctrl_c_where_an_engine_changes_the_state() -> None:
    model, done = a_model(), set[Place]()
    n = sum(check(model, run, CHANGING, 5, done) for run in ENGINES)
    assert n > 30
