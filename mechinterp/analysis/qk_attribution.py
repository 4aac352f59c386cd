"""`qk_attribution`: an attention score as an exact sum over pairs of what is in the residual stream at query and key.

With the scales of the norm before the head as they are in the run, queries and keys are linear in the residual stream,
so the score of a query for a key is a sum over pairs: one part of the stream at the query, one at the key. Parts are
tokens, heads, MLPs (or their features and errors) and constants.

Source: Kamath et al. 2025 (transformer-circuits.pub/2025/attention-qk). Deviation: the parts are what was written at
these two positions, with each head a part of its own, not features of earlier positions seen through heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.analysis.attribution_graph.frozen_run import FrozenRun, check_transcoders, freeze
from mechinterp.analysis.phrases import read_prompt
from mechinterp.analysis.weights import head_of
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.engines.grid import Grid
from mechinterp.features.basis import Basis
from mechinterp.models.attention import attention_scores
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.modes import Gradients
from mechinterp.models.sites import Site


def qk_attribution(
    model: HookManager,
    prompt: str | Int[Tensor, " pos"],
    head: str,
    query: int,
    key: int,
    transcoders: Sequence[Basis] = (),
) -> Grid:
    """The score of a head for one query and key, split over pairs of parts of the residual stream.

    Args:
        model: The model.
        prompt: A text or token ids.
        head: Such as `a9.h9`.
        query: The position that attends; negative: from the end.
        key: The position that is attended to, not after the query.
        transcoders: Their features stand for the MLPs of their layers, with the error as a part of its own.

    Returns a Grid `query_part, key_part`, which sums to the score before the mask and before a soft cap, with the
    attention's own scale. Parts: `token`, `positions`, `a0.h1`, `a0.bias`, `m0` (or `m0.f17`, `m0.err`, `m0.skip`,
    `m0.bias`), and `bias`: what the head reads whatever is in the stream. Positive = it attends more.

    The score is compared with the model's own in every call. Cost: two forwards of the prompt.

    Raises InputError for positions that are not in the prompt or not in this order, UnsupportedError where queries and
    keys are not linear in the residual stream (norms on q and k) or positions act in another way (ALiBi).

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> grid = mi.qk_attribution(model, torch.tensor([2, 5, 6, 5]), "a1.h0", -1, 1)
    >>> abs(float(grid.values.sum()) - grid.about["score"]) < 1e-4
    True
    """
    node = head_of(model, head)
    tokens, _, _ = read_prompt(model, prompt)
    n = len(tokens)
    q_at, k_at = (at + n if at < 0 else at for at in (query, key))
    if not 0 <= k_at <= q_at < n:
        raise InputError(
            f"The prompt has positions 0 to {n - 1}, and a query attends to none after it; got {query}, {key}."
        )
    layer, h = node.layer, node.head
    with Gradients(False) as off, off:
        by_layer = check_transcoders(model, transcoders) if transcoders else {}
        run = freeze(model, tokens, {at: basis for at, basis in by_layer.items() if at < layer})
        names, parts = _parts(run, layer, (q_at, k_at))
        maps = model.layout.attention[layer]
        group = model.dims.n_heads // model.dims.n_kv_heads
        sides: list[Tensor] = []
        for channel, number, position, own in (("q", h, q_at, parts[0]), ("k", h // group, k_at, parts[1])):
            weight, constant = (part[number] for part in model.layout.folded(layer, channel, run.dtype))
            stream = run.at("resid_pre", layer)[position]
            centred = own - own.mean(-1, keepdim=True) if maps.norm.kind == "layer" else own
            read = centred / maps.norm.scale(stream) @ weight
            sides.append(torch.cat([read, constant[None]]))
        form = attention_scores(model.bridge, layer, n)
        at = torch.tensor([[q_at], [k_at]], device=model.device)
        turned = [form.rotated(side[:, None, None], at[i : i + 1].expand(len(side), 1)) for i, side in enumerate(sides)]
        values = turned[0][:, 0, 0] @ turned[1][:, 0, 0].T * form.scale
        score = _own_score(run, layer, h, q_at, k_at)
    total = float(values.sum())
    shown = total if form.cap is None else form.cap * float(torch.tanh(values.sum() / form.cap))
    size = float(values.abs().sum()) + 1e-6
    coarse = model.dtype not in (torch.float32, torch.float64)
    if not abs(shown - score) < (5e-2 if coarse else 1e-4) * size:
        raise UnsupportedError(
            f"{model.info.architecture}: the score of {head} is {score:.4g}, and its parts add up to {shown:.4g}: "
            "queries "
            "and keys are not linear in the residual stream here, or positions act in another way."
        )
    labels = {"query_part": (*names[0], "bias"), "key_part": (*names[1], "bias")}
    about = {"score": total, "head": head, "query": q_at, "key": k_at, "gap": abs(shown - score) / size}
    return Grid(values, labels, "score", "score before the softmax", about)


def _own_score(run: FrozenRun, layer: int, head: int, query: int, key: int) -> float:
    """The model's own score, from its hook; its pattern's logarithm up to a constant would not do."""
    site = Site("scores", layer)
    if not run.model.has(site):
        raise UnsupportedError(f"{run.model.info.architecture} does not show its attention scores.")
    return float(run.model.run(run.tokens[None], record=[site], stop=site).values[site][0, head, query, key])


def _parts(
    run: FrozenRun, layer: int, positions: tuple[int, int]
) -> tuple[list[tuple[str, ...]], list[Float[Tensor, "part d_model"]]]:
    """(names, vectors) of all that is in the residual stream before a layer, at two positions."""
    model = run.model
    sites = [Site("z", before) for before in range(layer)]
    z = model.run(run.tokens[None], record=sites).values if sites else {}
    names: list[list[str]] = [[], []]
    vectors: list[list[Tensor]] = [[], []]

    def add(name: str, value: Float[Tensor, "pos d_model"]) -> None:
        for side, position in enumerate(positions):
            names[side].append(name)
            vectors[side].append(value[position])

    constants = run.constants()
    add("token", run.token_writes())
    if bool(constants["input", -1].any()):
        add("positions", constants["input", -1])
    for before in range(layer):
        of_heads = z[Site("z", before)][0].to(run.dtype)
        for head, write in enumerate(model.layout.head_writes(before, of_heads)):
            add(f"a{before}.h{head}", write)
        if (bias := model.layout.attention_bias(before, of_heads)) is not None:
            add(f"a{before}.bias", bias)
        if not run.has_mlp(before):
            continue
        replaced = any(site.layer == before for basis in run.transcoders.values() for site in basis.sites_out)
        add(f"m{before}.err" if replaced else f"m{before}", run.errors(before))
        if replaced:
            add(f"m{before}.bias", constants["mlp", before])
            _add_features(run, before, positions, names, vectors)
    found = [torch.stack(side) for side in vectors]
    for side, position in enumerate(positions):
        stream = run.at("resid_pre", layer)[position]
        gap = float((found[side].sum(0) - stream).abs().max()) / (float(stream.abs().max()) + 1e-6)
        if not gap < (1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2):
            raise UnsupportedError(f"{model.info.architecture}: the parts of the residual stream do not add up to it.")
    return [tuple(side) for side in names], found


def _add_features(
    run: FrozenRun, layer: int, positions: tuple[int, int], names: list[list[str]], vectors: list[list[Tensor]]
) -> None:
    """Adds the active features that write at a layer's MLP, and its skip connection."""
    for basis in run.transcoders.values():
        x = run.values[basis.sites_in[0]]
        values = basis.encode(x).values.to(run.dtype)
        for i, site in enumerate(basis.sites_out):
            if site.layer != layer:
                continue
            for side, position in enumerate(positions):
                where = torch.tensor([position], device=x.device)
                for feature in values[position].nonzero()[:, 0].tolist():
                    write = values[position, feature] * basis.W_dec[feature, i].to(run.dtype)
                    names[side].append(f"{basis.name}.f{feature}" + f"[{site}]" * (len(basis.sites_out) > 1))
                    vectors[side].append(run.written(site.kind, layer, write[None], where)[0])
                if basis.W_skip is not None and i == 0:
                    bias = run.mlp_norm(layer).bias if basis.sites_in[0].kind == "mlp_in" else None
                    seen = x[position] if bias is None else x[position] - bias.to(x)
                    names[side].append(f"m{layer}.skip")
                    moved = (seen @ basis.W_skip.to(x))[None]
                    vectors[side].append(run.written(site.kind, layer, moved, where)[0])
