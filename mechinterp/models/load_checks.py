"""All that is measured on a HookManager's model when it is built, in order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mechinterp.models.hook_names import HOOK_NAMES
from mechinterp.models.layout import build_layout
from mechinterp.models.probe import probe, probe_branches, probe_causal, probe_mlps, probe_past
from mechinterp.models.probe_sites import probe_sites
from mechinterp.models.refusal import refusing
from mechinterp.models.sites import Site


def check_model(model: Any) -> None:
    """Sets the model's `layout`, `branches`, `refused`, `keeps_past` and `bound_mlps`, each checked against its runs.

    Raises UnsupportedError, naming the part, when no analysis would be exact; also for whatever TransformerLens or
    Hugging Face raise on the way.
    """
    architecture, config = model.info.architecture, getattr(model.bridge.original_model, "config", None)
    with refusing(f"The weights of {architecture} cannot be read as q, k, v, output and MLP", config):
        model.layout = build_layout(model.bridge)
    with refusing(f"{architecture} does not pass the checks at load", config):
        _settle_final_stream(model)
        model.layout = replace(model.layout, dims=replace(model.layout.dims, causal=probe_causal(model)))
        model.branches = probe_branches(model)
        model.refused = probe(model)
        model.refused = {**model.refused, **probe_sites(model)}
        model.keeps_past, model.bound_mlps = probe_past(model), probe_mlps(model)


def _settle_final_stream(model: Any) -> None:
    """Reads `resid_final` at the end of the last layer where the final norm is used more than once (NanoChat)."""
    site, last = Site("resid_final"), Site("resid_post", model.dims.n_layers - 1)
    if not model.has(site) or not model.has(last):
        return
    tokens = torch.zeros(1, 1, dtype=torch.long)
    _, seen = model.survey(tokens.to(model.device), [site], lambda logits: logits.sum())
    if seen[site][0] > 1:
        model._points[HOOK_NAMES[site.kind]] = model._points[model.resolve(last)]
