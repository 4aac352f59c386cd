"""Attribution patching on the GPT-2-small shape, and how well each method ranks the nodes of the bundled model.

Run as `python -m benchmarks attribution`; the ranking by itself as `python -m benchmarks.attribution`.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch

import mechinterp as mi
from benchmarks.engines import Row, measure, small_gpt2
from mechinterp.analysis.attribution import attribution_patching, node_attribution
from mechinterp.analysis.attribution_methods import METHODS
from mechinterp.analysis.integrated_gradients import integrated_gradients
from mechinterp.analysis.relevance import relevance
from mechinterp.edges import metric_values
from mechinterp.metrics import get_metric
from mechinterp.sites import Site


def attribution(device: torch.device, repeats: int) -> list[Row]:
    """All 144 heads, 12 MLPs and the input by each method, in U = 2 forwards and a backward of the bare model.

    The floor of a method is its own count of forwards and backwards, a backward taken as two forwards.
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
        row("AtP, 157 nodes", "atp", "1"),
        row("RelP, 157 nodes", "relp", "1"),
        row("EAP-IG (inputs), 5 steps, 157 nodes", "eap-ig-inputs", "4.5"),
        row("AtP*, 157 nodes", "atp-star", "9.3"),
        row("AtP*, 144 keys x 15 positions", "atp-star keys", "13"),
        row("EAP-IG (activations), 5 steps, 157 nodes", "eap-ig-activations", "53"),
        row("relevance of the tokens", "relevance", "0.75"),
        row("integrated gradients over the tokens, 5 steps", "integrated gradients", "4.8"),
    ]


def ranks(n: int = 100, steps: int = 5) -> pd.DataFrame:
    """Per method the rank correlation with exact node patching on the bundled model's IOI: 16 heads and 4 MLPs.

    Exact patching is by plain runs, one for each node, with its corrupt value at all positions; means over `n` pairs
    of the training split. `spearman` is of the signed effects, `spearman_abs` of their magnitudes (all that AtP* has).
    """
    model = mi.load_model("bundled")
    pairs = mi.load_task("ioi").pairs(model, n=n, split="train", seed=0)
    exact = exact_effects(model, pairs)
    found: list[dict[str, object]] = []
    for method in METHODS:
        scores = node_attribution(model, pairs, method=method, steps=steps).mean().at(pos="all")
        frame = scores.to_frame().set_index("node")["score"].reindex(exact.index)
        found.append(
            {
                "method": method,
                "spearman": spearman(frame, exact),
                "spearman_abs": spearman(frame.abs(), exact.abs()),
                "pearson": float(frame.corr(exact)),
                "forwards": scores.cost["forwards"],
                "backwards": scores.cost["backwards"],
            }
        )
    return pd.DataFrame(found)


def exact_effects(model: mi.HookManager, pairs: mi.Pairs) -> pd.Series:
    """metric(clean) - metric(node patched) of every head and MLP, each by its own run; mean over the examples."""
    metric, end = get_metric("logit_diff"), Site("resid_final")
    dims = model.dims
    sites = [Site(kind, layer) for layer in range(dims.n_layers) for kind in ("z", "mlp_out")]
    corrupt = model.run(pairs.corrupt, pairs.mask, record=sites).values

    def value(edits: dict[Site, Callable[[torch.Tensor], torch.Tensor]]) -> float:
        run = model.run(pairs.clean, pairs.mask, interventions=edits, record=[end], stop=end)
        return float(metric_values(model, pairs, metric, run.values[end]).mean())

    clean, effects = value({}), dict[str, float]()
    for site in sites:
        for head in range(dims.n_heads) if site.kind == "z" else [None]:

            def patch(old: torch.Tensor, site: Site = site, head: int | None = head) -> torch.Tensor:
                if head is None:
                    return corrupt[site]
                new = old.clone()
                new[:, :, head] = corrupt[site][:, :, head]
                return new

            name = f"m{site.layer}" if head is None else f"a{site.layer}.h{head}"
            effects[name] = clean - value({site: patch})
    return pd.Series(effects)


def spearman(left: pd.Series, right: pd.Series) -> float:
    """The rank correlation: the correlation of the ranks, ties sharing their mean rank."""
    return float(left.rank().corr(right.rank()))


def main() -> None:
    """Prints the rank correlations as a table."""
    print(ranks().round(3).to_string(index=False))


if __name__ == "__main__":
    main()
