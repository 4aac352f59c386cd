"""The checks that a HookManager makes on its model when it is built.

Some hook points of TransformerLens have no effect (they are on a side branch), fire twice, or never fire. One forward
with every site tapped and one backward detect them: a value that the logits do not depend on gets no gradient.

Others hold another value than their name says: in a mixture of experts `mlp.hook_pre` and `mlp.hook_post` are the
input and output of the whole block. So the value of each site is compared with its definition, and a site that holds
something else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from einops import einsum
from torch import Tensor

from mechinterp.base.errors import UnsupportedError
from mechinterp.models.activation import measure_activation
from mechinterp.models.hook_names import HOOK_NAMES
from mechinterp.models.layout import MlpMaps, build_layout
from mechinterp.models.placement import called
from mechinterp.models.refusal import refusing
from mechinterp.models.sites import Site

HEAD_SITES = ("q", "k", "v", "scores", "pattern", "z")
NEEDED = ("resid_pre", "q", "k", "v", "z")
"""The sites that every engine needs."""

Check = Callable[[str, Tensor, Tensor], None]
STREAM = ("embed", "resid_pre", "resid_mid", "resid_post", "resid_final")
"""Values of one residual stream: two of them are equal if nothing is written in between."""

Definition = tuple[Site, str, Tensor, Tensor]


def check_model(model: Any) -> None:
    """Sets the model's `layout`, `branches`, `refused`, `coupled_heads`, `keeps_past` and `bound_mlps`, by its runs.

    Raises UnsupportedError, naming the part, when no analysis would be exact, and for any error of TransformerLens or
    Hugging Face during the checks.
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
        model.coupled_heads = probe_coupled_heads(model)
        model.keeps_past, model.bound_mlps = probe_past(model), probe_mlps(model)


def _settle_final_stream(model: Any) -> None:
    """Reads `resid_final` after the last layer if the model uses its final norm more than once (NanoChat)."""
    site, last = Site("resid_final"), Site("resid_post", model.dims.n_layers - 1)
    if not model.has(site) or not model.has(last):
        return
    tokens = torch.zeros(1, 1, dtype=torch.long)
    _, seen = model.survey(tokens.to(model.device), [site], lambda logits: logits.sum())
    if seen[site][0] > 1:
        model._points[HOOK_NAMES[site.kind]] = model._points[model.resolve(last)]


def probe(model: Any) -> dict[Site, str]:
    """The sites that cannot be used on a HookManager's model, each with the reason.

    Cost: five forwards and a backward on 2 x 4 tokens. Raises UnsupportedError, naming the part, when a needed
    site cannot be used or a map of the layout disagrees with the running model.
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
    sites: list[Site] = []
    for layer in range(model.dims.n_layers):
        own = model.dims.layer(layer)
        kinds = NEEDED if own.n_heads else (NEEDED[0], "attn_in", "attn_raw") * own.mixer
        sites += [Site(kind, layer) for kind in (*kinds, *("mlp_in", "mlp_out") * own.mlp)]
    for site in (*sites, Site("resid_final")):
        if site in refused or not model.has(site):
            raise UnsupportedError(
                f"{model.info.architecture}: site '{site}' cannot be used: "
                f"{refused.get(site, 'its hook point does not exist')}; no analysis would be exact on this model."
            )


def probe_causal(model: Any) -> bool:
    """Whether earlier logits stay the same when the last token changes. Two forwards on 2 x 4 tokens.

    This is measured, since configurations differ in how they say it (Gemma-3's `use_bidirectional_attention`). If it
    cannot be measured (one token or one position), the configuration is believed.
    """
    length = min(4, model.dims.n_ctx)
    if length < 2 or model.dims.d_vocab < 2:
        return model.dims.causal
    tokens = torch.randint(model.dims.d_vocab, (2, length), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, -1] = (tokens[:, -1] + 1) % model.dims.d_vocab
    before, after = (model.run(ids).logits[:, :-1].float() for ids in (tokens, other))
    worst = float((after - before).abs().max()) / (float(before.abs().max()) + 1e-6)
    # Rounding: experts process the tokens of a batch together, so their sums may be in another order.
    return worst < (1e-5 if model.dtype in (torch.float32, torch.float64) else 2e-2)


def probe_branches(model: Any) -> dict[str, str]:
    """Hook of `resid_mid` -> hook of the layer's output, for layers where `resid_mid` sees one branch only.

    An edit of `resid_mid` must reach the output of the layer: output = stream + MLP. One forward on 2 x 4 tokens.
    """
    layers = model.dims.mlp_layers
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


def probe_coupled_heads(model: Any) -> frozenset[int]:
    """The layers where what one head reads acts on the other heads: one norm over the queries of all (OLMoE, MiniMax),
    or over their outputs (BitNet).

    In every layer the first head, with the key/value head of its group, gets eight times the q, k and v of another
    prompt, all other heads their own; what heads outside that group give must not change by a bit. A false alarm would
    cost time only (see `whole_nodes`). Three forwards on 2 x 4 tokens.
    """
    dims = model.dims
    given: dict[int, tuple[str, ...]] = {}
    for layer in dims.head_layers:
        own = dims.layer(layer)
        if own.n_heads > 1:  # one key/value head feeds every head
            given[layer] = ("q", "k", "v") if own.n_kv_heads > 1 else ("q",)
    tokens = torch.arange(min(4, dims.n_ctx))[None].repeat(2, 1).to(model.device) % dims.d_vocab
    read = [Site(kind, layer) for layer in given for kind in "qkv"]
    outputs = [Site("z", layer) for layer in given]
    if not given:
        return frozenset()
    other = model.run((tokens + 1) % dims.d_vocab, record=read).values
    plain = model.run(tokens, record=[*read, *outputs]).values
    edits = {site: plain[site] for site in read}
    for site in (Site(kind, layer) for layer, kinds in given.items() for kind in kinds):
        edits[site] = torch.cat([8 * other[site][:, :, :1], plain[site][:, :, 1:]], 2)
    after = model.run(tokens, record=outputs, interventions=edits).values
    found: set[int] = set()
    for layer, kinds in given.items():
        own, site = dims.layer(layer), Site("z", layer)
        first = 1 if kinds == ("q",) else own.n_heads // own.n_kv_heads
        if not torch.equal(plain[site][:, :, first:], after[site][:, :, first:]):
            found.add(layer)
    return frozenset(found)


def probe_past(model: Any) -> bool:
    """Whether a run that continues from a past gives the same as a whole run. Two forwards on 2 x 4 tokens."""
    if model.dims.layers:  # the past of a layer without heads does not consist of keys and values
        return False
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

    Some models keep its two matrices in the layer (OPT), some add the residual stream inside the MLP (Bloom).
    """
    layers = model.dims.mlp_layers
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
                found[layer] = f"run by itself it has another output (off by {worst:.2g} of its size)"
    return found


def _check_maps(model: Any, tokens: Tensor, plain: Tensor, refused: dict[Site, str]) -> None:
    """Compares every read and write map of the layout with the values of a run."""
    kinds = ("resid_pre", "q", "k", "v", "z", "mlp_in", "mlp_post", "mlp_out", "resid_post", "resid_final")
    kinds += ("attn_in", "attn_raw", "attn_out") * bool(model.layout.mixers or model.layout.attention.packed)
    run = model.run(tokens, record=[s for s in model.sites() if s.kind in kinds and s not in refused])
    layout, dims = model.layout, model.dims

    def check(what: str, got: Tensor, expected: Tensor) -> None:
        if got.shape != expected.shape:
            raise UnsupportedError(
                f"{model.info.architecture}: {what} is {list(expected.shape[1:])}, and its weights give "
                f"{list(got.shape[1:])} (is there a gate or another projection?); edges cannot be exact on this model."
            )
        size = float(expected.float().abs().max()) + 1e-6
        worst = float((got.float() - expected.float()).abs().max()) / size
        if not worst < (1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2):
            raise UnsupportedError(
                f"{model.info.architecture}: {what} is not what its weights give (off by {worst:.2g} of its size); "
                "edges cannot be exact on this model."
            )

    for layer in range(dims.n_layers):
        resid, own, middle = run.values[Site("resid_pre", layer)], dims.layer(layer), None
        if layer in layout.attention.packed:
            _check_shapes(model, run, layer)
            middle = resid + run.values[Site("attn_out", layer)]
        elif own.n_heads:
            for channel, heads in (("q", own.n_heads), ("k", own.n_kv_heads), ("v", own.n_kv_heads)):
                read = layout.read_heads(layer, channel, resid.expand(heads, *resid.shape))
                check(f"{channel} of layer {layer}", read.movedim(0, 2), run.values[Site(channel, layer)])
            z = run.values[Site("z", layer)]
            attention = layout.head_writes(layer, z).sum(0)
            bias = layout.attention_bias(layer, z)
            middle = resid + (attention if bias is None else attention + bias)
        elif own.mixer:
            given = run.values[Site("attn_in", layer)]
            check(f"the input of what mixes tokens in layer {layer}", layout.read_mixer(layer, resid), given)
            middle = resid + layout.mixer(layer).post(run.values[Site("attn_raw", layer)])
        _check_layer(model, run, layer, resid, resid if middle is None else middle, check)
    final = run.values[Site("resid_final")]
    check("the unembedding", layout.unembed(final), plain)


def _check_shapes(model: Any, run: Any, layer: int) -> None:
    """Refuses heads of another number or size than the configuration says, where no weight can be compared with it."""
    own, size = model.dims.layer(layer), model.dims.d_head
    for kind, heads in (("q", own.n_heads), ("k", own.n_kv_heads), ("v", own.n_kv_heads), ("z", own.n_heads)):
        if (found := tuple(run.values[Site(kind, layer)].shape[2:])) != (heads, size):
            raise UnsupportedError(
                f"{model.info.architecture}: '{kind}' of layer {layer} is {list(found)}, not {heads} heads of {size} "
                "as its configuration says, and its weights are quantised; load it without quantisation."
            )


def _check_readers(model: Any, tokens: Tensor, refused: dict[Site, str]) -> None:
    """Checks that heads and MLPs read the residual stream only through q, k, v and the MLP's input.

    With these inputs from another prompt, they must write what they write on that prompt. A gate that also reads the
    stream, and that `block_parts.py` does not know, would not follow, and would be missing from every circuit.
    """
    given: list[Site] = []
    written: list[Site] = []
    for layer in range(model.dims.n_layers):
        own = model.dims.layer(layer)
        kinds = ("q", "k", "v") if own.n_heads else ("attn_in",) * own.mixer
        given += [Site(kind, layer) for kind in (*kinds, *("mlp_in",) * own.mlp)]
        kinds = ("z",) if own.n_heads else ("attn_raw",) * own.mixer
        written += [site for kind in (*kinds, "mlp_out") if model.has(site := Site(kind, layer))]
    given = [site for site in given if site not in refused]
    other = model.run((tokens + 1) % model.dims.d_vocab, record=[*given, *written]).values
    got = model.run(tokens, record=written, interventions={site: other[site] for site in given}).values
    for site in written:
        worst = float((got[site].float() - other[site].float()).abs().max())
        size = float(other[site].float().abs().max()) + 1e-6
        if not worst / size < (1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2):
            what, reads = {"z": ("heads", "queries, keys and values"), "mlp_out": ("MLP", "input")}.get(
                site.kind, ("part that mixes tokens", "input")
            )
            raise UnsupportedError(
                f"{model.info.architecture}: the {what} of layer {site.layer} also read the residual stream other than "
                f"through their {reads} (is there a gate?; off by {worst / size:.2g} of its size); edges cannot be "
                "exact on this model."
            )


def _check_layer(model: Any, run: Any, layer: int, resid: Tensor, middle: Tensor, check: Check) -> None:
    dims, layout = model.dims, model.layout
    after = Site("resid_post", layer) if model.has(Site("resid_post", layer)) else Site("resid_final")
    if not dims.layer(layer).mlp:
        check(f"the residual stream after layer {layer}", middle, run.values[after])
        return
    mlp_input = resid if dims.mlp_reads_input(layer) else middle
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
    """Drops the neuron weights of an MLP, without refusing the model, if they do not give the MLP's output."""
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
        found = maps.activated_by(_activation(model, maps, run.values[Site("mlp_in", layer)], neurons))
    kept = tuple(found if i == layer else m for i, m in enumerate(model.layout.mlp_maps))
    model.layout = replace(model.layout, mlp_maps=kept)


def _activation(model: Any, maps: MlpMaps, mlp_in: Tensor, neurons: Tensor) -> str | None:
    """The activation function between the MLP's input and its neurons, or None."""
    given, up = maps.before_activation(mlp_in)
    near = 1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2
    return measure_activation(str(model.bridge.cfg.act_fn), given, up, neurons, near)


def probe_sites(model: Any) -> dict[Site, str]:
    """The sites that do not hold the value that their name says, each with the reason.

    - A site with a closed form (`attn_in` is the norm of `resid_pre`, `mlp_pre` the weights times `mlp_in`, ...) must
      have the value of the closed form.
    - A site without one must not equal a site of another kind bit for bit. If the weights make two kinds equal (an
      identity, no norm), both have closed forms, which then agree.
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
    refused |= {
        site: "what mixes tokens in this layer is read as a whole: its heads cannot be told apart exactly"
        for site in values
        if site.kind in HEAD_SITES and not model.dims.layer(site.layer).n_heads
    }
    whole = {*model.layout.attention.packed, *(i for i in range(model.dims.n_layers) if model.dims.layer(i).mixer)}
    known |= {site for site in values if site.kind in ("attn_raw", "attn_out") and site.layer in whole}
    known |= {s for s in values if s.kind == "mlp_post" and model.layout.mlp_maps[s.layer] is not None}
    for site in values:
        if site not in known and site not in refused and (twin := _twin(site, values)) is not None:
            refused[site] = (
                f"its value is bit for bit that of '{twin}', so it is another name for the same value, not "
                f"{_MEANING.get(site.kind, site.kind)}"
            )
    for layer in model.dims.mlp_layers:
        pre, up, post = (Site(kind, layer) for kind in ("mlp_pre", "mlp_up", "mlp_post"))
        if pre in values and post in values and not refused.keys() & {pre, post}:
            why = _not_pointwise(model, tokens, values, layer)
            refused |= {site: why for site in (pre, up) if why is not None and site in values}
    return refused


_MEANING = {
    "mlp_pre": "the input of an activation function",
    "mlp_up": "the factor of a gate",
    "mlp_post": "the values of single neurons",
    "pattern": "an attention pattern",
    "scores": "an attention score",
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
    """(site, its definition in words, the value by that definition, the value to compare with), where there is one."""
    layout, dims = model.layout, model.dims
    for layer in range(dims.n_layers):
        here = {site.kind: value for site, value in values.items() if site.layer == layer}
        own, mlp, resid = dims.layer(layer), layout.mlp_maps[layer], here["resid_pre"]
        given: dict[str, tuple[str, Tensor]] = {}
        maps, total = None, None
        if layer in layout.attention.packed:
            if not dims.parallel:
                given["resid_mid"] = ("'resid_pre' + 'attn_out'", resid + here["attn_out"])
        elif own.n_heads:
            maps, total = layout.attention[layer], layout.attention_total(layer, here["z"])
            given["attn_raw"] = ("the sum of the heads", total)
            given["attn_out"] = ("what the heads add to the residual stream", maps.post(total))
        elif own.mixer:
            maps, total = layout.mixer(layer), here["attn_raw"]
        if maps is not None and total is not None:
            given["attn_in"] = ("the norm of 'resid_pre'", maps.norm(resid))
            if not dims.parallel:
                given["resid_mid"] = ("'resid_pre' + 'attn_out'", resid + maps.post(total))
        if mlp is not None and "mlp_in" in here:
            up = _linear(here["mlp_in"], mlp.W_in, mlp.b_in)
            given["mlp_up"] = ("the product of its weights and 'mlp_in'", up)
            first = up if mlp.W_gate is None else _linear(here["mlp_in"], mlp.W_gate, mlp.b_gate)
            given["mlp_pre"] = ("the product of its weights and 'mlp_in'", first)
        if "mlp_in" in here:
            given["router_in"] = ("the MLP's input", here["mlp_in"])
        for kind in given.keys() & here.keys():
            yield Site(kind, layer), *given[kind], here[kind]
        post = getattr(model.bridge.blocks[layer], "ln2_post", None)
        if post is not None and "mlp_raw" in here:
            with torch.no_grad():
                normed = called(post, here["mlp_raw"])
            yield Site("mlp_raw", layer), "the input of the norm after the MLP", normed, here["mlp_out"]
        if "pattern" in here and own.n_heads:
            v = here["v"].repeat_interleave(own.n_heads // own.n_kv_heads, 2).to(here["pattern"])
            mixed = einsum(here["pattern"], v, "batch head query key, batch key head d -> batch query head d")
            yield Site("pattern", layer), "the weights of the values 'v' in 'z'", mixed, here["z"]
    if Site("final_norm") in values:
        normed = layout.final_norm(values[Site("resid_final")])
        yield Site("final_norm"), "the norm of 'resid_final'", normed, values[Site("final_norm")]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.to(weight.dtype) @ weight
    return out if bias is None else out + bias


def _not_pointwise(model: Any, tokens: Tensor, values: Mapping[Site, Tensor], layer: int) -> str | None:
    """Why neurons are not an elementwise function of `mlp_pre` (times `mlp_up`, if it exists); None if they are."""
    pre, up, post = (Site(kind, layer) for kind in ("mlp_pre", "mlp_up", "mlp_post"))
    if any(values[site].shape != values[post].shape for site in (pre, up) if site in values):
        return "it does not have one entry per neuron of 'mlp_post'"
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
        return (
            "a neuron of 'mlp_post' also depends on its other entries, so it is not the input of an activation function"
        )
    exact = model.dtype in (torch.float32, torch.float64)
    if up in values and not _gap(run.grads[up] * values[up], values[post] * some) < (1e-4 if exact else 5e-2):
        return "'mlp_post' is not a function of 'mlp_pre' times 'mlp_up'"
    return None
