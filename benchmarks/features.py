"""What 500 features as nodes cost: first order and one circuit on that graph, and on the same graph without them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import mechinterp as mi
from benchmarks.engines import Row, extra_memory, measure, small_gpt2
from mechinterp.engines.edge_attribution import edge_gradients
from mechinterp.engines.edge_patching import run_edges
from mechinterp.features.dictionary import cross_layer_features
from mechinterp.tasks.metrics import get_metric

N_FEATURES, WIDTH = 500, 1536
WORDS = {
    "outputs": "of MLP outputs",
    "transcoders": "of transcoders",
    "cross-layer": "of a cross-layer transcoder",
}
STEPS = tuple((step + 1) / 5 for step in range(5))


def features(device: torch.device, repeats: int) -> list[Row]:
    """EAP, EAP-IG and a circuit's evaluation, for features of MLP outputs, of transcoders, and of a cross-layer one."""
    bare, model, pairs = small_gpt2(device)
    generator = torch.Generator().manual_seed(0)
    ids = [list(range(N_FEATURES // 12 + (layer < N_FEATURES % 12))) for layer in range(12)]

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[0] ** 0.5).to(device)

    outputs = {mi.sae(f"mlp_out.{i}", drawn(768, WIDTH), drawn(WIDTH, 768)): own for i, own in enumerate(ids)}
    inputs = {
        mi.transcoder(f"mlp_in.{i}", f"mlp_out.{i}", drawn(768, WIDTH), drawn(WIDTH, 768)): own
        for i, own in enumerate(ids)
    }
    later = [[f"mlp_out.{i}" for i in range(first, 12)] for first in range(12)]
    across = {
        cross_layer_features(f"mlp_in.{i}", later[i], drawn(768, WIDTH), drawn(WIDTH, 12 - i, 768)): own
        for i, own in enumerate(ids)
    }
    graphs = {
        "plain": mi.build_graph(model),
        "outputs": mi.build_graph(model, features=outputs),
        "transcoders": mi.build_graph(model, features=inputs),
        "cross-layer": mi.build_graph(model, features=across),
    }
    metric = get_metric("logit_diff")
    work: dict[str, Callable[[], object]] = {"forward": lambda: bare(pairs.clean).logits}
    for name, graph in graphs.items():
        kept = torch.rand(graph.possible.shape, generator=torch.Generator().manual_seed(0)) < 0.01
        cut = (graph.possible & ~kept)[None].float().to(device)
        work |= {
            f"eap {name}": partial(edge_gradients, model, graph, pairs, metric),
            f"eap-ig {name}": partial(edge_gradients, model, graph, pairs, metric, alphas=STEPS),
            f"circuit {name}": partial(run_edges, model, graph, pairs, cut, metric=metric),
        }
    seconds = measure(work, device, repeats)
    rows: list[Row] = []
    for task, label in (("eap", "EAP"), ("eap-ig", "EAP-IG, 5 steps"), ("circuit", "evaluate one circuit")):
        plain = seconds[f"{task} plain"]
        memory = extra_memory(work[f"{task} plain"], device) / 2**30
        for kind, words in WORDS.items():
            own, own_memory = seconds[f"{task} {kind}"], extra_memory(work[f"{task} {kind}"], device) / 2**30
            note = f"({own / plain:.2f} times the graph without features; {own_memory:.2f} GiB, there {memory:.2f} GiB)"
            target = "1.5 times the graph without" if task != "circuit" else ""
            name = f"{N_FEATURES} features {words} as nodes, {label}, {graphs[kind].n_edges:,} edges"
            rows.append(Row(name, own / seconds["forward"], "F", f"{plain / seconds['forward']:.2f} F", target, note))
    return rows
