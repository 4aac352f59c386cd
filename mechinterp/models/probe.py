"""The checks that a HookManager makes on its model when it is built.

TransformerLens has hook points that fire and do nothing (a side branch), fire twice, or never. One forward with
every site tapped and one backward tell them apart: a value that the logits do not depend on gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mechinterp.base.errors import UnsupportedError
from mechinterp.models.activation import measure_activation
from mechinterp.models.layout import MlpMaps
from mechinterp.models.sites import Site

NEEDED = ("resid_pre", "q", "k", "v", "z")
"""Sites without which no engine can work."""

Check = Callable[[str, Tensor, Tensor], None]


def probe(model: Any) -> dict[Site, str]:
    """The sites that do not work on a HookManager's model, each with the reason.

    Cost: five forwards and a backward on 2 x 4 tokens. Raises UnsupportedError, naming the part, when a needed
    site or a map of the layout does not agree with the running model.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(4, model.dims.n_ctx)
    tokens = torch.randint(model.dims.d_vocab, (2, length), generator=generator).to(model.device)
    plain = model.run(tokens).logits
    direction = torch.randn(plain.shape, generator=generator).to(plain)
    tapped, seen = model.survey(tokens, model.sites(), lambda logits: (logits * direction).sum())
    if not torch.equal(tapped, plain):
        worst = float((tapped - plain).abs().max())
        raise UnsupportedError(
            f"{model.info.architecture}: tapping the sites changes the logits by {worst:.2g}; "
            "reading activations would not be exact on this model."
        )
    refused: dict[Site, str] = {}
    for site, (fired, gradient) in seen.items():
        if fired != 1:
            refused[site] = f"its hook fires {fired} times in a forward"
        elif gradient is None:
            refused[site] = "its hook fires, but the logits do not depend on its value, so an edit would do nothing"
    _check_needed(model, refused)
    _check_maps(model, tokens, plain, refused)
    _check_readers(model, tokens, refused)
    return refused


def _check_needed(model: Any, refused: Mapping[Site, str]) -> None:
    kinds = (*NEEDED, "mlp_in", "mlp_out") if model.dims.has_mlp else NEEDED
    sites = [Site(kind, layer) for layer in range(model.dims.n_layers) for kind in kinds]
    for site in (*sites, Site("resid_final")):
        if site in refused or not model.has(site):
            raise UnsupportedError(
                f"{model.info.architecture}: site '{site}' cannot be used: "
                f"{refused.get(site, 'its hook point is not there')}; no analysis would be exact on this model."
            )


def probe_causal(model: Any) -> bool:
    """Whether earlier logits stay as they are when the last token is another one. Two forwards on 2 x 4 tokens.

    Measured, since configurations do not say it in one way (Gemma-3's `use_bidirectional_attention`). Where nothing
    can be measured (one token or one position) it is what the configuration says.
    """
    length = min(4, model.dims.n_ctx)
    if length < 2 or model.dims.d_vocab < 2:
        return model.dims.causal
    tokens = torch.randint(model.dims.d_vocab, (2, length), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, -1] = (tokens[:, -1] + 1) % model.dims.d_vocab
    before, after = (model.run(ids).logits[:, :-1].float() for ids in (tokens, other))
    worst = float((after - before).abs().max()) / (float(before.abs().max()) + 1e-6)
    # Rounding: where experts take the tokens of a batch together, the sums are in another order.
    return worst < (1e-5 if model.dtype in (torch.float32, torch.float64) else 2e-2)


def probe_branches(model: Any) -> dict[str, str]:
    """Hook of `resid_mid` -> hook of the layer's output, where the former sees one branch of the stream only.

    An edit there must come out of the layer: output = stream + MLP. One forward on 2 x 4 tokens.
    """
    layers = range(model.dims.n_layers if model.dims.has_mlp else 0)
    kinds = ("resid_mid", "mlp_out", "resid_post")
    layers = [layer for layer in layers if all(model.has(Site(kind, layer)) for kind in kinds)]
    tokens = torch.arange(min(4, model.dims.n_ctx, model.dims.d_vocab))[None].repeat(2, 1).to(model.device)
    sites = [Site(kind, layer) for layer in layers for kind in kinds]
    edits = {Site("resid_mid", layer): lambda value: value * 2 + 1 for layer in layers}
    values = model.run(tokens, record=sites, interventions=edits).values if layers else {}
    found: dict[str, str] = {}
    for layer in layers:
        middle, written, after = (values[Site(kind, layer)].float() for kind in kinds)
        if float((after - middle - written).abs().max()) > 5e-2 * float(middle.abs().max()):
            found[model.resolve(Site("resid_mid", layer))] = model.resolve(Site("resid_post", layer))
    return found


def probe_past(model: Any) -> bool:
    """Whether a run that begins after a past gives what a whole run gives. Two forwards on 2 x 4 tokens."""
    length = min(4, model.dims.n_ctx)
    tokens = torch.randint(model.dims.d_vocab, (2, length), generator=torch.Generator().manual_seed(0))
    past = model.run(tokens, keep_past=True).past if length > 1 else None
    if past is None or past.n_pos != length:
        return False
    whole = model.run(tokens, record=[Site("resid_final")]).values[Site("resid_final")][:, length // 2 :]
    later = model.run(tokens[:, length // 2 :], past=past.upto(length // 2), record=[Site("resid_final")])
    worst = float((later.values[Site("resid_final")] - whole).abs().max()) / (float(whole.abs().max()) + 1e-6)
    return worst < (1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2)


def probe_mlps(model: Any) -> dict[int, str]:
    """The layers whose MLP cannot be run by itself, each with the reason. One forward on 2 x 4 tokens.

    Some keep its two matrices in the layer (OPT), some add the residual stream inside it (Bloom).
    """
    layers = range(model.dims.n_layers if model.dims.has_mlp else 0)
    sites = [Site(kind, layer) for layer in layers for kind in ("mlp_in", "mlp_out")]
    if not all(model.has(site) for site in sites):
        return dict.fromkeys(layers, "its input or output cannot be read")
    tokens = torch.arange(min(4, model.dims.n_ctx, model.dims.d_vocab))[None].repeat(2, 1).to(model.device)
    values = model.run(tokens, record=sites).values
    found: dict[int, str] = {}
    for layer in layers:
        given, expected = values[Site("mlp_in", layer)], values[Site("mlp_out", layer)]
        try:
            with torch.no_grad():
                worst = float((model.mlp(layer, given) - expected).abs().max()) / (float(expected.abs().max()) + 1e-6)
        except (UnsupportedError, RuntimeError, TypeError, AttributeError) as error:
            found[layer] = str(error).partition("\n")[0]
        else:
            if not worst < (1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2):
                found[layer] = f"run by itself it writes something else (off by {worst:.2g} of its size)"
    return found


def _check_maps(model: Any, tokens: Tensor, plain: Tensor, refused: dict[Site, str]) -> None:
    """Compares every read and write map of the layout with the values of a real run."""
    kinds = ("resid_pre", "q", "k", "v", "z", "mlp_in", "mlp_post", "mlp_out", "resid_post", "resid_final")
    run = model.run(tokens, record=[s for s in model.sites() if s.kind in kinds and s not in refused])
    layout, dims = model.layout, model.dims

    def check(what: str, got: Tensor, expected: Tensor) -> None:
        if got.shape != expected.shape:
            raise UnsupportedError(
                f"{model.info.architecture}: {what} is {list(expected.shape[1:])}, and its weights give "
                f"{list(got.shape[1:])} (a gate or a projection beside it?); edges cannot be exact on this model."
            )
        size = float(expected.float().abs().max()) + 1e-6
        worst = float((got.float() - expected.float()).abs().max()) / size
        if not worst < (1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2):
            raise UnsupportedError(
                f"{model.info.architecture}: {what} is not what its weights say (off by {worst:.2g} of its size); "
                "edges cannot be exact on this model."
            )

    for layer in range(dims.n_layers):
        resid = run.values[Site("resid_pre", layer)]
        for channel, heads in (("q", dims.n_heads), ("k", dims.n_kv_heads), ("v", dims.n_kv_heads)):
            read = layout.read_heads(layer, channel, resid.expand(heads, *resid.shape))
            check(f"{channel} of layer {layer}", read.movedim(0, 2), run.values[Site(channel, layer)])
        z = run.values[Site("z", layer)]
        attention = layout.head_writes(layer, z).sum(0)
        bias = layout.attention_bias(layer, z)
        middle = resid + (attention if bias is None else attention + bias)
        _check_layer(model, run, layer, resid, middle, check)
    final = run.values[Site("resid_final")]
    check("the unembedding", layout.unembed(final), plain)


def _check_readers(model: Any, tokens: Tensor, refused: dict[Site, str]) -> None:
    """Heads and MLPs must depend on the residual stream through q, k, v and the MLP's input, and on nothing else of it.

    With those of another prompt they write what they write there; a gate that reads the stream besides them (AFMoE)
    does not follow, and would be left out of every circuit.
    """
    kinds = ["q", "k", "v"] + ["mlp_in"] * model.dims.has_mlp
    layers = range(model.dims.n_layers)
    given = [site for kind in kinds for layer in layers if (site := Site(kind, layer)) not in refused]
    written = [Site(kind, layer) for layer in layers for kind in ("z", "mlp_out") if model.has(Site(kind, layer))]
    other = model.run((tokens + 1) % model.dims.d_vocab, record=[*given, *written]).values
    got = model.run(tokens, record=written, interventions={site: other[site] for site in given}).values
    for site in written:
        worst = float((got[site].float() - other[site].float()).abs().max())
        size = float(other[site].float().abs().max()) + 1e-6
        if not worst / size < (1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2):
            what, reads = ("heads", "queries, keys and values") if site.kind == "z" else ("MLP", "input")
            raise UnsupportedError(
                f"{model.info.architecture}: the {what} of layer {site.layer} read the residual stream not only "
                f"through their {reads} (a gate beside them?; off by {worst / size:.2g} of its size); edges cannot be "
                "exact on this model."
            )


def _check_layer(model: Any, run: Any, layer: int, resid: Tensor, middle: Tensor, check: Check) -> None:
    dims, layout = model.dims, model.layout
    after = Site("resid_post", layer) if model.has(Site("resid_post", layer)) else Site("resid_final")
    if not dims.has_mlp:
        check(f"the residual stream after layer {layer}", middle, run.values[after])
        return
    mlp_input = resid if dims.parallel else middle
    check(
        f"the MLP input of layer {layer}",
        layout.read_mlp(layer, mlp_input),
        run.values[Site("mlp_in", layer)],
    )
    written = run.values[Site("mlp_out", layer)]
    if Site("mlp_post", layer) in run.values:
        _check_neurons(model, run, layer, check)
    total = middle + written
    check(f"the residual stream after layer {layer}", total, run.values[after])


def _check_neurons(model: Any, run: Any, layer: int, check: Check) -> None:
    """Gives up the weights of an MLP's neurons, not the model, where they are not what the MLP computes."""
    maps, neurons = model.layout.mlp_maps[layer], run.values[Site("mlp_post", layer)]
    if maps is None:
        return
    try:
        if neurons.shape[-1] != len(maps.W_out):
            raise UnsupportedError("")
        raw = neurons @ maps.W_out if maps.b_out is None else neurons @ maps.W_out + maps.b_out
        check(f"what the neurons of layer {layer} write", maps.post(raw), run.values[Site("mlp_out", layer)])
    except UnsupportedError:
        found = None
    else:
        found = replace(maps, activation=_activation(model, maps, run.values[Site("mlp_in", layer)], neurons))
    kept = tuple(found if i == layer else m for i, m in enumerate(model.layout.mlp_maps))
    model.layout = replace(model.layout, mlp_maps=kept)


def _activation(model: Any, maps: MlpMaps, mlp_in: Tensor, neurons: Tensor) -> str | None:
    """The activation function between the MLP's input and its neurons, or None."""
    given, up = maps.before_activation(mlp_in)
    near = 1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2
    return measure_activation(str(model.bridge.cfg.act_fn), given, up, neurons, near)
