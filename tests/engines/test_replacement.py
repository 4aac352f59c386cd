"""What a cut edge carries instead, each kind from its definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from mechinterp.base.errors import InputError
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.replacement import Values, build_replacement
from mechinterp.graphs.graph import Graph, build_graph
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import ALL_FLOAT64, EVERY, N_LAYERS, as_installed, pairs, small_cut, tiny, tokens


def replacements(
    model: HookManager, graph: Graph, values: Values
) -> Callable[[str, Mapping[Any, torch.Tensor]], torch.Tensor]:
    """What a node's write is replaced by: the write less its difference to the replacement, `[batch, pos, d_model]`."""

    def replaced(name: str, run: Mapping[Any, torch.Tensor]) -> torch.Tensor:
        family = next(family for family in graph.families if name in family.writers)
        now = {site: run[str(site)] for site in family.sites}
        row = family.writers.index(name)
        return (family.writes(model, now).dense() - values.differences(family, now).dense())[row]

    return replaced


@pytest.mark.parametrize("name", EVERY)
def test_means_are_over_real_tokens_and_per_node(name: str) -> None:
    """One mean per node (not one over all nodes), over prompts and positions that are not padding."""
    model, some = tiny(name), pairs(4, 7, padded=True)
    graph = build_graph(model)
    replaced = replacements(model, graph, build_replacement("mean", model, graph, some, batch_size=3).on(some))
    record = ["resid_pre.0"] + [f"z.{layer}" for layer in range(N_LAYERS)]
    record += [f"mlp_out.{layer}" for layer in range(N_LAYERS)] if model.dims.has_mlp else []
    run = model.run(some.corrupt, some.mask, record=record).values
    real = some.mask
    torch.testing.assert_close(replaced("input", run)[0, 0], run["resid_pre.0"][real].mean(0))
    for layer in range(N_LAYERS):
        writes = model.layout.head_writes(layer, run[f"z.{layer}"])
        means = torch.stack([head[real].mean(0) for head in writes])
        found = torch.stack([replaced(f"a{layer}.h{head}", run) for head in range(4)])
        near = 1e-10 if name in ALL_FLOAT64 else 1e-5
        torch.testing.assert_close(found, means[:, None, None].expand_as(found), rtol=0, atol=near)
        if model.dims.has_mlp:
            torch.testing.assert_close(replaced(f"m{layer}", run)[0, 0], run[f"mlp_out.{layer}"][real].mean(0))
    assert float((means[0] - means[1]).abs().max()) > 1e-3


def test_positional_means_keep_the_positions() -> None:
    model, some = tiny("gpt2"), pairs(4, 6)
    graph = build_graph(model)
    replaced = replacements(
        model, graph, build_replacement("mean-positional", model, graph, some, batch_size=3).on(some)
    )
    run = model.run(some.corrupt, record=["resid_pre.0", "mlp_out.1", "z.1"]).values
    torch.testing.assert_close(replaced("input", run)[0], run["resid_pre.0"].mean(0))
    torch.testing.assert_close(replaced("m1", run)[0], run["mlp_out.1"].mean(0))
    writes = model.layout.head_writes(1, run["z.1"])
    found = torch.stack([replaced(f"a1.h{head}", run) for head in range(4)])
    torch.testing.assert_close(found, writes.mean(1, keepdim=True).expand_as(found))


def test_zero_is_zero() -> None:
    model, some = tiny("gpt2"), pairs(3, 6)
    graph = build_graph(model)
    replaced = replacements(model, graph, build_replacement("zero", model, graph).on(some))
    run = model.run(some.clean, record=["resid_pre.0", "mlp_out.1", "z.1"]).values
    for name in ("input", "a1.h2", "m1"):
        assert not bool(replaced(name, run).any())


@pytest.mark.parametrize("name", EVERY)
def test_all_cut_by_zero_leaves_the_biases(name: str) -> None:
    """Nothing but constants reaches the logits, so every prompt gives the same; without biases, the norm of zero."""
    model, some = tiny(name), pairs(4, 6)
    graph = build_graph(model)
    same = Pairs(clean=some.clean, corrupt=some.corrupt, right=[1] * 4, wrong=[2] * 4)
    got = run_edges(model, graph, same, graph.possible, replacement=build_replacement("zero", model, graph))
    constant = torch.zeros(1, 1, model.dims.d_model, dtype=torch.float64)
    for layer in range(N_LAYERS):
        bias = model.layout.attention_bias(layer, torch.zeros(1, 1, 4, model.dims.d_head, dtype=torch.float64))
        constant = constant if bias is None else constant + bias
    logits = model.layout.unembed(constant)[0, 0]
    near = 1e-10 if name in ALL_FLOAT64 else 1e-5
    torch.testing.assert_close(got, (logits[1] - logits[2]).expand(4), rtol=0, atol=near)


def test_the_reference_may_be_other_pairs_and_its_batches_do_not_matter() -> None:
    model, some, reference = tiny("gpt2"), pairs(3, 6), pairs(7, 9, seed=3, padded=True)
    graph = build_graph(model)
    cut = small_cut(graph)
    results = [
        run_edges(model, graph, some, cut, replacement=build_replacement("mean", model, graph, reference, size))
        for size in (1, 4, None)
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-11)
    own = run_edges(model, graph, some, cut, replacement=build_replacement("mean", model, graph, some))
    assert not torch.allclose(own, results[0])


def test_mean_over_one_repeated_prompt_is_that_prompt() -> None:
    """The positional mean over copies of one corrupt prompt is resampling by that prompt."""
    model = tiny("llama")
    clean, one = tokens(4, 6), tokens(1, 6, seed=4)
    some = Pairs(clean=clean, corrupt=one.repeat(4, 1), right=[1] * 4, wrong=[2] * 4, answer_pos=[4] * 4)
    graph = build_graph(model)
    cut = small_cut(graph)
    mean = build_replacement("mean-positional", model, graph, some)
    torch.testing.assert_close(
        run_edges(model, graph, some, cut, replacement=mean), run_edges(model, graph, some, cut), rtol=0, atol=1e-5
    )


def test_what_makes_no_sense_is_refused() -> None:
    model, some = tiny("gpt2"), pairs(3, 6, padded=True)
    graph = build_graph(model)
    build = as_installed(build_replacement)
    with pytest.raises(InputError, match="Did you mean 'corrupt'"):
        build("corupt", model, graph, some)
    with pytest.raises(InputError, match="reference pairs"):
        build("mean", model, graph)
    with pytest.raises(InputError, match="one length"):
        build("mean-positional", model, graph, some)


def test_a_positional_mean_of_another_length_is_refused() -> None:
    model = tiny("gpt2")
    graph = build_graph(model)
    replacement = build_replacement("mean-positional", model, graph, pairs(3, 6))
    with pytest.raises(InputError, match="6 positions"):
        run_edges(model, graph, pairs(3, 8), graph.possible, replacement=replacement)
    with pytest.raises(InputError, match="6 positions"):  # a length of 1 would broadcast without a word
        run_edges(model, graph, pairs(3, 7), graph.possible, replacement=replacement)
