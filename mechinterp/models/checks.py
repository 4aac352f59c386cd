"""All that is measured on a HookManager's model when it is built, in order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mechinterp.models.layout import build_layout
from mechinterp.models.probe import probe, probe_branches, probe_causal, probe_mlps, probe_past
from mechinterp.models.probe_sites import probe_sites
from mechinterp.models.refusal import refusing


def check_model(model: Any) -> None:
    """Sets the model's `layout`, `branches`, `refused`, `keeps_past` and `bound_mlps`, each checked against its runs.

    Raises UnsupportedError, naming the part, when no analysis would be exact; also for whatever TransformerLens or
    Hugging Face raise on the way.
    """
    architecture, config = model.info.architecture, getattr(model.bridge.original_model, "config", None)
    with refusing(f"The weights of {architecture} cannot be read as q, k, v, output and MLP", config):
        model.layout = build_layout(model.bridge)
    with refusing(f"{architecture} does not pass the checks at load", config):
        model.layout = replace(model.layout, dims=replace(model.layout.dims, causal=probe_causal(model)))
        model.branches = probe_branches(model)
        model.refused = probe(model)
        model.refused = {**model.refused, **probe_sites(model)}
        model.keeps_past, model.bound_mlps = probe_past(model), probe_mlps(model)
