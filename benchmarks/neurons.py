"""What 2,000 neurons as nodes cost: the engines on that graph, and on the same graph without them."""

from __future__ import annotations

from collections.abc import Callable

import torch

import mechinterp as mi
from benchmarks.engines import Row, extra_memory, measure, small_gpt2
from mechinterp.engines.edge_attribution import edge_gradients
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.mask_gradients import mask_gradients
from mechinterp.engines.replacement import corrupt_replacement
from mechinterp.tasks.metrics import get_metric

N_NEURONS, N_ALONE = 2000, 20


def neurons(device: torch.device, repeats: int) -> list[Row]:
    """EAP, a circuit's evaluation, a step of a learned mask and nodes replaced one by one; time and extra memory."""
    bare, model, pairs = small_gpt2(device)
    per_layer = [N_NEURONS // 12 + (layer < N_NEURONS % 12) for layer in range(12)]
    chosen = {layer: tuple(range(0, 3072, 3072 // n))[:n] for layer, n in enumerate(per_layer)}
    plain, graph = mi.build_graph(model), mi.build_graph(model, neurons=chosen)
    metric = get_metric("logit_diff")
    work: dict[str, Callable[[], object]] = {}
    for name, one in (("plain", plain), ("neurons", graph)):
        generator = torch.Generator().manual_seed(0)
        gates = (torch.rand(one.possible.shape, generator=generator) * one.possible)[None].to(device)
        cut = (one.possible & (torch.rand(one.possible.shape, generator=generator) >= 0.01))[None].float().to(device)
        values = corrupt_replacement(model, one).on(pairs)
        alone = torch.zeros(N_ALONE, *one.possible.shape, device=device)
        for i in range(N_ALONE):
            writer = len(one.writers) - 1 - 7 * i if one is graph else one.mlp_writer(i % 12)
            alone[i, :, writer] = one.possible[:, writer].float().to(device)

        def loss(logits: torch.Tensor) -> torch.Tensor:
            return metric(logits[0], pairs)[None]

        work |= {
            f"eap {name}": lambda one=one: edge_gradients(model, one, pairs, metric),
            f"circuit {name}": lambda one=one, cut=cut: run_edges(model, one, pairs, cut, metric=metric),
            f"gates {name}": lambda one=one, gates=gates, values=values: mask_gradients(
                model, one, pairs, gates, values, loss
            ),
            f"alone {name}": lambda one=one, alone=alone: run_edges(model, one, pairs, alone, metric=metric),
        }
    work["forward"] = lambda: bare(pairs.clean).logits
    seconds = measure(work, device, repeats)
    labels = {
        "eap": f"EAP, {graph.n_edges:,} edges",
        "circuit": "evaluate one circuit",
        "gates": "one step of a learned mask",
        "alone": f"{N_ALONE} neurons (there: MLPs) replaced one at a time",
    }
    rows: list[Row] = []
    for name, label in labels.items():
        own, other = (seconds[f"{name} {kind}"] for kind in ("neurons", "plain"))
        memory = [extra_memory(work[f"{name} {kind}"], device) / 2**30 for kind in ("neurons", "plain")]
        note = f"({own / other:.1f} times the graph without neurons; {memory[0]:.2f} GiB, there {memory[1]:.2f} GiB)"
        rows.append(Row(f"{N_NEURONS:,} neurons as nodes, {label}", own / seconds["forward"], "F", "", "", note))
    return rows
