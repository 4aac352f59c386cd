"""Attribution patching on the GPT-2-small shape, and how well each method ranks the nodes of the bundled model.

Run as `python -m benchmarks attribution`; the ranking by itself as `python -m benchmarks.attribution`.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch

import mechinterp as mi
from benchmarks.engines import Row, measure, small_gpt2
from mechinterp.analysis.attribution import METHODS, attribution_patching, node_attribution
from mechinterp.analysis.integrated_gradients import integrated_gradients
from mechinterp.analysis.relevance import relevance
from mechinterp.engines.decomposition.rules import PRESETS
from mechinterp.engines.readout import metric_values
from mechinterp.models.hook_manager import Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import get_metric


def attribution(device: torch.device, repeats: int) -> list[Row]:
    """All 144 heads, 12 MLPs and the input by each method, in U = 2 forwards and a backward of the bare model.

    A floor is the number of forwards and backwards that the method takes, each without the unembedding (0.23 U); runs
    that begin at a later layer count in part. AtP* and EAP-IG (activations) are timed once.
    """
    bare, model, pairs = small_gpt2(device)
    rows = torch.arange(len(pairs), device=device)

    def unit() -> object:
        with torch.no_grad():
            bare(pairs.clean)
        embedded = bare.transformer.wte(pairs.clean).requires_grad_()
        logits = bare(inputs_embeds=embedded).logits[:, -1]
        difference = logits[rows, pairs.right[:, 0]] - logits[rows, pairs.wrong[:, 0]]
        return torch.autograd.grad(difference.sum(), embedded)

    work: dict[str, Callable[[], object]] = {
        "unit": unit,
        "atp": lambda: node_attribution(model, pairs),
        "relp": lambda: node_attribution(model, pairs, method="relp"),
        "eap-ig-inputs": lambda: node_attribution(model, pairs, method="eap-ig-inputs"),
        "relevance": lambda: relevance(model, pairs),
        "integrated gradients": lambda: integrated_gradients(model, pairs, steps=5),
    }
    seconds = measure(work, device, repeats)
    slow: dict[str, Callable[[], object]] = {
        "unit": unit,
        "atp-star": lambda: node_attribution(model, pairs, method="atp-star"),
        "atp-star keys": lambda: attribution_patching(model, pairs, "k", method="atp-star", positions="each"),
        "eap-ig-activations": lambda: node_attribution(model, pairs, method="eap-ig-activations"),
    }
    once = measure(slow, device, 1, warm=False)

    def row(name: str, key: str, floor: str) -> Row:
        times = seconds if key in seconds else once
        return Row(name, times[key] / times["unit"], "U", floor, "")

    return [
        row("AtP, 157 nodes", "atp", "0.69"),
        row("RelP, 157 nodes", "relp", "0.69"),
        row("EAP-IG (inputs), 5 steps, 157 nodes", "eap-ig-inputs", "3.0"),
        row("AtP*, 157 nodes", "atp-star", "5.7"),
        row("AtP*, 144 keys x 15 positions", "atp-star keys", "9.2"),
        row("EAP-IG (activations), 5 steps, 157 nodes", "eap-ig-activations", "30"),
        row("relevance of the tokens", "relevance", "0.46"),
        row("integrated gradients over the tokens, 5 steps", "integrated gradients", "2.8"),
    ]


def ranks(n: int = 100, steps: int = 5) -> pd.DataFrame:
    """Per method the rank correlation with exact node patching on the bundled model's IOI.

    The nodes are the 16 heads and 4 MLPs, the 16 queries, and the 16 keys. Exact patching uses plain runs, one for
    each node, with its corrupt value at all positions, on `n` pairs of the training split. `mean` ranks the means over
    the examples; `magnitude` the means of |effect| (Kramar et al. 2024; all that AtP* has). `size` is the mean of
    |estimate| over that of |exact effect|.
    """
    model = mi.load_model("bundled")
    pairs = mi.load_task("ioi").pairs(model, n=n, split="train", seed=0)
    found: list[dict[str, object]] = []
    for kinds in (("z", "mlp_out"), ("q",), ("k",)):
        exact = exact_effects(model, pairs, kinds)
        for method in METHODS:
            if method == "relp" and kinds != ("z", "mlp_out"):
                continue  # it holds the patterns constant
            grids = [attribution_patching(model, pairs, kind, method=method, steps=steps) for kind in kinds]
            values = torch.cat([grid.values.reshape(-1, len(pairs)) for grid in grids])
            found.append(_row(", ".join(kinds), method, values, exact))
    return pd.DataFrame([*found, *preset_ranks(model, pairs)])


def preset_ranks(model: mi.HookManager, pairs: mi.Pairs) -> list[dict[str, object]]:
    """The same for every preset of contextual decomposition, with the corrupt run and with means as replacement."""
    found: list[dict[str, object]] = []
    for replacement in ("pair", "mean"):
        kinds, nodes = ("z", "mlp_out"), f"z, mlp_out ({replacement})"
        grids = [mi.activation_patching(model, pairs, kind, replacement=replacement) for kind in kinds]
        exact = torch.cat([grid.values.reshape(-1, len(pairs)) for grid in grids])
        for method in ("atp", "relp"):
            chosen = [attribution_patching(model, pairs, k, method=method, replacement=replacement) for k in kinds]
            values = torch.cat([grid.values.reshape(-1, len(pairs)) for grid in chosen])
            found.append(_row(nodes, method, values, exact))
        for preset in PRESETS:
            split = [
                mi.contextual_decomposition(model, pairs, kind, preset=preset, replacement=replacement, forward=True)
                for kind in kinds
            ]
            values = torch.cat([part.scores().values.reshape(-1, len(pairs)) for part in split])
            found.append(_row(nodes, f"cd {preset}", values, exact))
    return found


def _row(nodes: str, method: str, values: torch.Tensor, exact: torch.Tensor) -> dict[str, object]:
    return {
        "nodes": nodes,
        "method": method,
        "mean": spearman(values.mean(1), exact.mean(1)),
        "magnitude": spearman(values.abs().mean(1), exact.abs().mean(1)),
        "size": float(values.abs().mean() / exact.abs().mean()),
    }


def exact_effects(model: mi.HookManager, pairs: mi.Pairs, kinds: tuple[str, ...]) -> torch.Tensor:
    """metric(clean) - metric(node patched), each head or layer of the kinds by its own run: [node, example]."""
    metric, end = get_metric("logit_diff"), Site("resid_final")
    sites = [Site(kind, layer) for kind in kinds for layer in range(model.dims.n_layers)]
    corrupt = model.run(pairs.corrupt, pairs.mask, record=sites).values

    def value(edits: list[Intervention]) -> torch.Tensor:
        run = model.run(pairs.clean, pairs.mask, interventions=edits, record=[end], stop=end)
        return metric_values(model, pairs, metric, run.values[end])

    clean, effects = value([]), list[torch.Tensor]()
    for site in sites:
        for head in range(corrupt[site].shape[2]) if corrupt[site].ndim == 4 else [slice(None)]:

            def patch(old: torch.Tensor, site: Site = site, head: int | slice = head) -> torch.Tensor:
                new = old.clone()
                new[:, :, head] = corrupt[site][:, :, head]
                return new

            effects.append(clean - value([Intervention(site, patch)]))
    return torch.stack(effects)


def spearman(left: torch.Tensor, right: torch.Tensor) -> float:
    """The rank correlation: the correlation of the ranks, ties sharing their mean rank."""
    return float(pd.Series(left.tolist()).rank().corr(pd.Series(right.tolist()).rank()))


def main() -> None:
    """Prints the rank correlations as a table."""
    print(ranks().round(3).to_string(index=False))


if __name__ == "__main__":
    main()
