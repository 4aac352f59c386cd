"""Weights in the vocabulary basis: which tokens a head or a neuron reads and writes. No prompt is needed.

Everywhere in this module the weights and the centring of norms are folded in, scales are taken as 1 and biases are left
out: these are the linear maps of the model, exact up to a positive factor per input. `about` says so, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.registry import unknown
from mechinterp.engines.grid import Grid, numbered
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Node, Site

LARGEST_TABLE = 2**26
"""A table of more tokens times tokens than this is refused; `top_tokens` reads any number of tokens in chunks."""
FOLDED = "norm weights folded in, scales taken as 1, biases left out"


def embedded(model: HookManager, tokens: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n d_model"]:
    """What each token (by default all) adds to the residual stream before the first layer, without its position.

    Taken from a run of the model, so that the scale of Gemma's embedding or a norm after it is included. Cost: one
    forward of n tokens that stops before the first layer. Raises UnsupportedError when token and position are not
    simply added, InputError for ids outside the vocabulary and inside an `intervene` block.

    >>> import mechinterp as mi
    >>> embedded(mi.load_model("bundled"), torch.tensor([5, 6])).shape
    torch.Size([2, 64])
    """
    dims, device = model.dims, model.device
    if model.edited:
        raise InputError("Weights are read outside `intervene`: its edits could change the embedding.")
    ids = torch.arange(dims.d_vocab, device=device) if tokens is None else _checked(tokens, dims.d_vocab).to(device)
    site = Site("embed") if model.has(Site("pos_embed")) else Site("resid_pre", 0)
    width, rows = min(dims.n_ctx, 32, len(ids)), []
    for part in ids.split(width * 128):
        padded = torch.zeros(-(-len(part) // width) * width, dtype=torch.long, device=device)
        padded[: len(part)] = part
        batch = padded.view(-1, width)
        record = [site, Site("resid_pre", 0)] + [Site("pos_embed")] * (site.kind == "embed")
        values = model.run(batch, record=record, stop=Site("resid_pre", 0)).values
        if site.kind == "embed":
            total = values[site] + values[Site("pos_embed")]
            if not torch.allclose(total, values[Site("resid_pre", 0)], rtol=1e-2, atol=1e-5):
                raise UnsupportedError(
                    f"In {model.info.architecture} embed + pos_embed is not what enters the first layer, so a token "
                    "has no embedding of its own there."
                )
        rows.append(values[site].flatten(0, 1)[: len(part)])
    return torch.cat(rows).to(torch.promote_types(model.dtype, torch.float32))


def reading(model: HookManager, layer: int, channel: str) -> Float[Tensor, "head d_model d_head"]:
    """W_Q, W_K or W_V (`q`, `k`, `v`) of every head, the weight and the centring of the norm before it folded in.

    Under grouped-query attention the heads of a group have the same key and value weights.
    """
    weight, _ = model.layout.folded(layer, channel, torch.promote_types(model.dtype, torch.float32))
    if model.layout.attention[layer].norm.kind == "layer":
        weight = weight - weight.mean(1, keepdim=True)
    return weight if channel == "q" else weight.repeat_interleave(model.dims.n_heads // len(weight), 0)


def writing(model: HookManager, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """W_O of every head, the weight and the centring of a post-norm folded in."""
    maps = model.layout.attention[layer]
    return maps.post.project(maps.W_O.to(torch.promote_types(model.dtype, torch.float32)))


def unembedding(model: HookManager, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
    """The column of W_U of each token as a row, the weight and the centring of the final norm folded in."""
    columns = model.layout.W_U[:, tokens].T.to(torch.promote_types(model.dtype, torch.float32))
    return model.layout.final_norm.project_transposed(columns)


def head_writes_of(
    model: HookManager, head: str, sources: Int[Tensor, " source"] | Float[Tensor, "source d_model"]
) -> Float[Tensor, "source d_model"]:
    """What a head (`a9.h9`) writes for each source that it attends to with weight 1: source W_V W_O.

    `sources` are token ids (their embedding is the input) or your own residual vectors: Wang et al. 2022 take the
    embedding after the first MLP, for instance.
    """
    node = head_of(model, head)
    values = inputs_of(model, sources) @ reading(model, node.layer, "v")[node.head]
    return values @ writing(model, node.layer)[node.head]


def ov_circuit(
    model: HookManager,
    head: str,
    sources: Int[Tensor, " source"] | Float[Tensor, "source d_model"],
    tokens: Int[Tensor, " token"],
) -> Grid:
    """A Grid (source, token): the logit that a head gives each token when it attends to each source.

    The entries of W_E W_V W_O W_U (Elhage et al. 2021) at the given rows and columns only. Positive = raises the
    logit. Unit: logits, up to the factor 1 / (scale of the norm before the head * scale of the final norm). Labels are
    token ids.

    Args:
        model: The model.
        head: Such as `a9.h9`.
        sources: Token ids, or residual vectors in place of their embeddings.
        tokens: The token ids whose logits are wanted.

    Raises InputError for a head or an id that does not exist, and for tables beyond 2**26 entries (see `top_tokens`).

    >>> import mechinterp as mi
    >>> ids = torch.arange(20, 30)
    >>> ov_circuit(mi.load_model("bundled"), "a3.h1", ids, ids)
    Grid(logit [logits / norm scales]: source 10, token 10)
    """
    chosen = _checked(tokens, model.layout.W_U.shape[1]).to(model.device)
    _check_size(len(sources), len(chosen))
    values = head_writes_of(model, head, sources) @ unembedding(model, chosen).T
    labels = {"source": _labels(sources), "token": _labels(chosen)}
    about = {"circuit": "W_E W_V W_O W_U", "head": head, "weights": model.info.processing, "folded": FOLDED}
    return Grid(values, labels, "logit", "logits / norm scales", about)


def qk_circuit(
    model: HookManager,
    head: str,
    queries: Int[Tensor, " query"] | Float[Tensor, "query d_model"],
    keys: Int[Tensor, " key"] | Float[Tensor, "key d_model"],
) -> Grid:
    """A Grid (query, key): q . k of a head for each pair of tokens, W_E W_Q W_K' W_E' (Elhage et al. 2021).

    Before the attention's own scale (1 / sqrt(d_head) in most models) and any cap. Position embeddings are left out.
    With rotary (or other relative) positions this is the score at relative position 0 only, since rotations change it
    with the distance; `about["positions"]` says which.

    Args:
        model: The model.
        head: Such as `a9.h9`.
        queries: Token ids, or residual vectors in place of their embeddings.
        keys: The same for the keys.

    Raises UnsupportedError for attention whose scores are not linear in q (norms on q and k, as in Qwen3 or Gemma-3),
    InputError as `ov_circuit` does.
    """
    node = head_of(model, head)
    _check_size(len(queries), len(keys))
    _check_linear(model, node.layer)
    query_vectors = inputs_of(model, queries) @ reading(model, node.layer, "q")[node.head]
    key_vectors = inputs_of(model, keys) @ reading(model, node.layer, "k")[node.head]
    absolute = model.has(Site("pos_embed"))
    about = {
        "circuit": "W_E W_Q W_K' W_E'",
        "head": head,
        "weights": model.info.processing,
        "folded": FOLDED,
        "positions": "left out (absolute position embedding)" if absolute else "relative position 0 only",
    }
    labels = {"query": _labels(queries), "key": _labels(keys)}
    return Grid(query_vectors @ key_vectors.T, labels, "score", "q . k / norm scales", about)


def top_tokens(
    model: HookManager, vectors: Float[Tensor, "row d_model"], n: int = 10, *, through: str = "unembedding"
) -> pd.DataFrame:
    """The table of the n tokens with the highest values for each vector: row, rank, token, text, value.

    Args:
        model: The model.
        vectors: Writes or read directions; for the lowest tokens give `-vectors`.
        n: Tokens per vector.
        through: `unembedding`: vectors are writes, values the logits they add (final norm folded in, scale 1).
            `embedding`: vectors are read directions, values their product with each token's embedding.

    Memory: 4096 tokens times the rows at a time, never the whole vocabulary.
    """
    if through not in ("unembedding", "embedding"):
        raise unknown("vocabulary basis", through, ("unembedding", "embedding"))
    size = model.dims.d_vocab if through == "embedding" else model.layout.W_U.shape[1]
    if vectors.ndim != 2 or vectors.shape[1] != model.dims.d_model:
        raise InputError(f"`vectors` must be [row, d_model] = [rows, {model.dims.d_model}]; got {list(vectors.shape)}.")
    if not 1 <= n <= size:
        raise InputError(f"`n`, the number of tokens per row, must be from 1 to {size}; got {n}.")
    wide = vectors.to(model.device, torch.promote_types(model.dtype, torch.float32))
    values = wide.new_empty(len(wide), 0)
    ids = torch.empty(len(wide), 0, dtype=torch.long, device=wide.device)
    for some in _vocabulary(size, wide.device):
        basis = unembedding(model, some) if through == "unembedding" else embedded(model, some)
        values, ids = torch.cat([values, wide @ basis.T], 1), torch.cat([ids, some.expand(len(wide), -1)], 1)
        values, order = values.topk(min(n, values.shape[1]), 1)
        ids = ids.gather(1, order)
    rows: list[dict[str, Any]] = []
    for row, (found, scores) in enumerate(zip(ids.tolist(), values.tolist(), strict=True)):
        for rank, (token, value) in enumerate(zip(found, scores, strict=True)):
            rows.append({"row": row, "rank": rank, "token": token, "text": _text(model, token), "value": value})
    return pd.DataFrame(rows)


def neuron_tokens(
    model: HookManager, layer: int, neurons: Sequence[int], n: int = 10, *, side: str = "out"
) -> pd.DataFrame:
    """The table of the tokens that each neuron writes (`side="out"`) or reads (`"in"`, `"gate"`): neuron, rank, ...

    Args:
        model: The model.
        layer: The layer of the MLP.
        neurons: Their numbers.
        n: Tokens per neuron.
        side: `out`: W_out W_U, the logits that one unit of activation adds. `in`: W_E W_in, what each token's
            embedding adds to the pre-activation. `gate`: in a gated MLP the same for the input of the activation
            function; then `in` is what its output multiplies.

    Raises UnsupportedError for an MLP that is not a plain pair of matrices. Source: Dar et al. 2022 (arXiv 2209.02535),
    who leave the norms out; here their weights are folded in.

    >>> import mechinterp as mi
    >>> neuron_tokens(mi.load_model("bundled"), 1, [0, 7], 3).columns.tolist()
    ['neuron', 'rank', 'token', 'text', 'value']
    """
    if not 0 <= layer < model.dims.n_layers:
        raise InputError(f"Layer {layer} does not exist: the model has layers 0 to {model.dims.n_layers - 1}.")
    maps, before = model.layout.neurons(layer), model.layout.mlp_norm[layer] or Norm("none")
    n_neurons = len(maps.W_out)
    if not len(neurons) or min(neurons) < 0 or max(neurons) >= n_neurons:
        raise InputError(f"Neurons of layer {layer} are numbered 0 to {n_neurons - 1}; got {list(neurons)}.")
    wide, index = torch.promote_types(model.dtype, torch.float32), torch.tensor(list(neurons), device=model.device)
    if side == "out":
        table = top_tokens(model, maps.post.project(maps.W_out[index].to(wide)), n)
    elif side in ("in", "gate"):
        weight = maps.W_in if side == "in" else maps.W_gate
        if weight is None:
            raise UnsupportedError(f"The MLP of layer {layer} is not gated; use side='in' or 'out'.")
        table = top_tokens(model, before.project_transposed(weight[:, index].T.to(wide)), n, through="embedding")
    else:
        raise unknown("side of a neuron", side, ("out", "in", "gate"))
    table["row"] = [list(neurons)[row] for row in table["row"]]
    return table.rename(columns={"row": "neuron"})


def feature_tokens(
    model: HookManager, basis: FeatureBasis, features: Sequence[int], n: int = 10, *, side: str = "out"
) -> pd.DataFrame:
    """The table of the tokens that each feature writes (`side="out"`) or reads (`"in"`): feature, rank, token, ...

    Args:
        model: The model.
        basis: A basis that writes to the residual stream, of one input and one output site.
        features: Their numbers.
        n: Tokens per feature.
        side: `out`: the decoder's row through the final norm's weight and the unembedding, the logits that one unit of
            activation adds (the logit lens of a direction). `in`: what each token's embedding adds to the
            pre-activation of a basis that reads the residual stream or an MLP's input.

    Raises InputError for a basis that does not write to (read) the residual stream in d_model numbers.

    >>> import mechinterp as mi
    >>> feature_tokens(mi.load_model("bundled"), mi.load_basis("bundled:m1"), [0, 7], 3).columns.tolist()
    ['feature', 'rank', 'token', 'text', 'value']
    """
    model.resolve(basis)
    wide = torch.promote_types(model.dtype, torch.float32)
    if side == "out":
        site, rows = basis.sites_out[0], basis.writes(list(features))
        if len(basis.sites_out) > 1 or site.kind not in _STREAM_WRITES:
            raise InputError(f"The features of '{basis.name}' do not write to the residual stream at one place.")
        table = top_tokens(model, rows.to(model.device, wide), n)
    elif side == "in":
        site, rows = basis.sites_in[0], basis.reads(list(features))
        if rows is None or len(basis.sites_in) > 1 or site.kind not in (*_STREAM, "mlp_in"):
            raise InputError(f"The features of '{basis.name}' do not read the residual stream along one direction.")
        rows = rows.to(model.device, wide)
        if site.kind == "mlp_in":
            rows = (model.layout.mlp_norm[site.layer or 0] or Norm("none")).project_transposed(rows)
        table = top_tokens(model, rows, n, through="embedding")
    else:
        raise unknown("side of a feature", side, ("out", "in"))
    table["row"] = [list(features)[row] for row in table["row"]]
    return table.rename(columns={"row": "feature"})


_STREAM = ("embed", "resid_pre", "resid_mid", "resid_post", "resid_final")
_STREAM_WRITES = (*_STREAM, "attn_out", "mlp_out")


def head_of(model: HookManager, head: str) -> Node:
    """The head of that name. Raises InputError for a name that is not a head of the model."""
    node = Node.parse(head)
    if node.kind != "head" or node.layer >= model.dims.n_layers or node.head >= model.dims.n_heads:
        raise InputError(
            f"{head!r} is not a head of the model, which has {model.dims.n_layers} layers of {model.dims.n_heads} "
            "heads; heads are written 'a1.h0'."
        )
    return node


def inputs_of(model: HookManager, given: Tensor) -> Float[Tensor, "n d_model"]:
    """The embeddings of token ids, or the given residual vectors themselves."""
    if not given.is_floating_point():
        return embedded(model, given)
    if given.ndim != 2 or given.shape[1] != model.dims.d_model or not len(given):
        raise InputError(f"Residual vectors must be [n, d_model] = [n, {model.dims.d_model}]; got {list(given.shape)}.")
    return given.to(model.device, torch.promote_types(model.dtype, torch.float32))


def _checked(tokens: Tensor, size: int) -> Int[Tensor, " n"]:
    if tokens.ndim != 1 or not len(tokens) or tokens.dtype == torch.bool or tokens.is_floating_point():
        raise InputError(f"Token ids must be whole numbers [n], at least one; got {tokens.dtype} {list(tokens.shape)}.")
    if int(tokens.min()) < 0 or int(tokens.max()) >= size:
        wrong = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
        raise InputError(f"Token id {wrong} is outside the vocabulary of {size} ids (0..{size - 1}).")
    return tokens.long()


def _check_size(n_rows: int, n_columns: int) -> None:
    if n_rows * n_columns > LARGEST_TABLE:
        raise InputError(
            f"A table of {n_rows} x {n_columns} tokens is too large; choose rows and columns, or read "
            "top_tokens(model, head_writes_of(model, head, sources))."
        )


def _check_linear(model: HookManager, layer: int) -> None:
    """Raises UnsupportedError when scores are not linear in q (when a norm is applied to it)."""
    tokens = torch.arange(min(3, model.dims.d_vocab), device=model.device)[None]
    found: list[Tensor] = []
    for factor in (0.0, 0.25, 0.5):
        edit = Intervention(Site("q", layer), partial(torch.mul, factor))
        site = Site("pattern", layer)
        pattern = model.run(tokens, record=[site], interventions=[edit], stop=site).values[site].double()
        found.append(pattern[..., -1, :].log() - pattern[..., -1, :1].log())
    first, second = (torch.linalg.vector_norm(b - a) for a, b in pairwise(found))
    if float(first) > 0 and not float(second) > 0.5 * float(first):  # 1 where it is linear, 0 after a norm
        raise UnsupportedError(
            f"The attention scores of layer {layer} are not linear in q (q and k are normalised), so the "
            "head has no QK circuit from weights alone."
        )


def _labels(given: Tensor) -> tuple[str, ...]:
    return numbered(len(given)) if given.is_floating_point() else tuple(str(token) for token in given.tolist())


def _vocabulary(size: int, device: torch.device) -> Iterator[Int[Tensor, " n"]]:
    return iter(torch.arange(size, device=device).split(4096))


def _text(model: HookManager, token: int) -> str:
    return "" if model.tokenizer is None else str(model.tokenizer.decode([token]))
