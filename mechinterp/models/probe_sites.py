"""What each site is, compared with its value in a run: a site that holds something else is refused by name.

TransformerLens gives some hook points a name that another model's hook point has, with another value in it: on a
mixture of experts its `mlp.hook_pre` and `mlp.hook_post` are the block's own input and output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import einsum
from torch import Tensor

from mechinterp.models.sites import Site

STREAM = ("embed", "resid_pre", "resid_mid", "resid_post", "resid_final")
"""Values of one residual stream: two of them are the same where nothing was written in between."""

Definition = tuple[Site, str, Tensor, Tensor]


def probe_sites(model: Any) -> dict[Site, str]:
    """The sites that do not hold what their name says, each with the reason.

    - A site with a closed form (`attn_in` is the norm of `resid_pre`, `mlp_pre` the weights times `mlp_in`, ...) must
      have its value.
    - A site without one must not be bit for bit a site of another kind. Where weights make two kinds the same (an
      identity, no norm), both have their closed forms, which then agree.
    - `mlp_post` must depend on `mlp_pre` neuron by neuron, and be proportional to `mlp_up`.

    Cost: one forward on 2 x 4 tokens, and one forward and backward of each layer.
    """
    length = min(4, model.dims.n_ctx)
    tokens = torch.randint(model.dims.d_vocab, (2, length), generator=torch.Generator().manual_seed(0))
    values: dict[Site, Tensor] = model.run(tokens, record=model.sites()).values
    exact = model.dtype in (torch.float32, torch.float64)
    refused: dict[Site, str] = {}
    known = {site for site in values if site.kind in (*STREAM, "q", "k", "v", "z", "mlp_in", "mlp_out")}  # `probe` did
    for site, what, got, expected in _definitions(model, values):
        if got.shape == expected.shape and _gap(got, expected) < (1e-4 if exact else 5e-2):
            known.add(site)
        else:
            refused[site] = f"its value is not {what}"
    known |= {s for s in values if s.kind == "mlp_post" and model.layout.mlp_maps[s.layer] is not None}
    for site in values:
        if site not in known and site not in refused and (twin := _twin(site, values)) is not None:
            refused[site] = (
                f"its value is that of '{twin}', bit for bit, so it is another name for it and no "
                f"{_MEANING.get(site.kind, site.kind)}"
            )
    for layer in range(model.dims.n_layers if model.dims.has_mlp else 0):
        pre, up, post = (Site(kind, layer) for kind in ("mlp_pre", "mlp_up", "mlp_post"))
        if pre in values and post in values and not refused.keys() & {pre, post}:
            why = _not_pointwise(model, tokens, values, layer)
            refused |= {site: why for site in (pre, up) if why is not None and site in values}
    return refused


_MEANING = {
    "mlp_pre": "input of an activation function",
    "mlp_up": "factor of a gate",
    "mlp_post": "value of single neurons",
    "pattern": "attention pattern",
    "scores": "attention score",
}


def _gap(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).abs().max()) / (float(expected.float().abs().max()) + 1e-6)


def _twin(site: Site, values: Mapping[Site, Tensor]) -> Site | None:
    own = values[site]
    for other, value in values.items():
        if other.kind != site.kind and value.shape == own.shape and torch.equal(value, own):
            return other
    return None


def _definitions(model: Any, values: Mapping[Site, Tensor]) -> Iterator[Definition]:
    """(site, what it is, that from other sites and the weights, what it must equal) of every site that has such."""
    layout, dims = model.layout, model.dims
    for layer in range(dims.n_layers):
        here = {site.kind: value for site, value in values.items() if site.layer == layer}
        maps, mlp, resid = layout.attention[layer], layout.mlp_maps[layer], here["resid_pre"]
        heads = layout.attention_total(layer, here["z"])
        given: dict[str, tuple[str, Tensor]] = {
            "attn_in": ("the norm of 'resid_pre'", maps.norm(resid)),
            "attn_raw": ("the sum of the heads", heads),
            "attn_out": ("what the heads add to the residual stream", maps.post(heads)),
        }
        if not dims.parallel:
            given["resid_mid"] = ("'resid_pre' + 'attn_out'", resid + maps.post(heads))
        if mlp is not None and "mlp_in" in here:
            up = _linear(here["mlp_in"], mlp.W_in, mlp.b_in)
            given["mlp_up"] = ("what its weights make of 'mlp_in'", up)
            bias = getattr(model.bridge.blocks[layer].mlp, "b_gate", None)
            first = up if mlp.W_gate is None else _linear(here["mlp_in"], mlp.W_gate, bias)
            given["mlp_pre"] = ("what its weights make of 'mlp_in'", first)
        for kind in given.keys() & here.keys():
            yield Site(kind, layer), *given[kind], here[kind]
        post = getattr(model.bridge.blocks[layer], "ln2_post", None)
        if post is not None and "mlp_raw" in here:
            with torch.no_grad():
                normed = post(here["mlp_raw"])
            yield Site("mlp_raw", layer), "what the norm after the MLP is given", normed, here["mlp_out"]
        if "pattern" in here:
            v = here["v"].repeat_interleave(dims.n_heads // dims.n_kv_heads, 2).to(here["pattern"])
            mixed = einsum(here["pattern"], v, "batch head query key, batch key head d -> batch query head d")
            yield Site("pattern", layer), "what weighs the values 'v' in 'z'", mixed, here["z"]
    if Site("final_norm") in values:
        normed = layout.final_norm(values[Site("resid_final")])
        yield Site("final_norm"), "the norm of 'resid_final'", normed, values[Site("final_norm")]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.to(weight.dtype) @ weight
    return out if bias is None else out + bias


def _not_pointwise(model: Any, tokens: Tensor, values: Mapping[Site, Tensor], layer: int) -> str | None:
    """Why the neurons are no function of `mlp_pre` one by one, times `mlp_up` where there is one; None if they are."""
    pre, up, post = (Site(kind, layer) for kind in ("mlp_pre", "mlp_up", "mlp_post"))
    if any(values[site].shape != values[post].shape for site in (pre, up) if site in values):
        return "it has not one entry for each of the neurons 'mlp_post'"
    some = (torch.rand(values[post].shape, generator=torch.Generator().manual_seed(layer)) < 0.5).to(model.device)
    asked = [site for site in (pre, up) if site in values]
    run = model.run(
        tokens,
        start=(layer, values[Site("resid_pre", layer)]),
        grads=asked,
        loss=lambda value: (value * some).sum(),
        stop=post,
    )
    if bool((run.grads[pre].masked_fill(some, 0) != 0).any()):
        return "a neuron of 'mlp_post' depends on more of it than its own entry, so no activation function lies between"
    exact = model.dtype in (torch.float32, torch.float64)
    if up in values and not _gap(run.grads[up] * values[up], values[post] * some) < (1e-4 if exact else 5e-2):
        return "'mlp_post' is not a gate, a function of 'mlp_pre' times 'mlp_up'"
    return None
