"""Observables: a linear functional of the logits pulled back through named heads and MLPs, as a direction.

What a path reads is one vector: for the last step columns of the unembedding, through every head the transpose of its
OV matrix, through an MLP its gradient at a typical input (Dunefsky and Cohan 2024, arXiv 2312.16291). Norm weights and
centring are folded in and scales are taken as 1: a norm changes the length of what is read, hardly its direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.analysis.directions import Direction
from mechinterp.analysis.weights import FOLDED, head_of, reading, writing
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.features.subspaces import direction_basis
from mechinterp.models.feature_basis import BasisSource
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.modes import Gradients
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Node, Site
from mechinterp.tasks.pairs import Pairs

FINAL = Site("resid_final")


def observable(
    model: HookManager,
    weights: Mapping[Any, float | int],
    path: Sequence[str] = (),
    *,
    pairs: Pairs | None = None,
) -> Direction:
    """The direction of the residual stream whose reading is a sum of logits, through a path of heads and MLPs.

    The reading of the stream x that the path's first node reads is what x contributes to `sum of weight * logit` along
    this path, for an attention weight of 1 through each head and norm scales of 1, biases left out. So where the model
    has no norm, the readings of all paths, times their attention weights, add up to the observable exactly.

    Args:
        model: The model.
        weights: Weights of tokens, by text or id: `{" he": 1, " she": -1}`.
        path: Heads and MLPs in the order in which they run: `["m0", "a6.h6"]`; by default none: the final stream.
        pairs: Prompts whose mean MLP input (over tokens, clean and corrupt) is where MLPs are linearised; needed for a
            path with an MLP, and not otherwise.

    Returns a Direction at `resid_final`, at `resid_pre` of the first node's layer, or at `resid_mid` for an MLP after
    an attention layer. Its `read` is the paper's feature vector; its length says how strongly the path can act.

    Cost: products of a vector with weights; with MLPs two forwards.

    Raises InputError for a path out of order, texts that are not one token, a path with an MLP without `pairs`, and one
    whose reading is 0; UnsupportedError for an MLP that is not two matrices.

    Source: Dunefsky and Cohan 2024 (arXiv 2312.16291), section 2 (the theorem that a LayerNorm leaves the direction).

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> mi.observable(model, {" he": 1, " she": -1}, ["a1.h3"]).site
    Site(kind='resid_pre', layer=1)
    """
    nodes = _path(model, path)
    with Gradients(False) as off, off:
        vector = _unembedded(model, weights)
        means = _mlp_inputs(model, [node.layer for node in nodes if node.kind == "mlp"], pairs)
        for node in reversed(nodes):
            vector = _through(model, node, vector, means)
    length = float(vector.double().square().sum())
    if not length > 0:
        raise InputError(f"Nothing is read through {' -> '.join(path) or 'the unembedding'}: the weights cancel.")
    site = FINAL if not nodes else _reads_at(model, nodes[0])
    about = {"observable": dict(weights), "path": list(path), "scales": FOLDED}
    source = BasisSource(format="observable", about={"path": " -> ".join(path), "weights": str(dict(weights))[:400]})
    basis = direction_basis(site, vector, (vector.double() / length).to(vector.dtype), source=source)
    return Direction(basis, -1, "observable", about)


def coupling(a: Direction, b: Direction) -> float:
    """The coupling coefficient of b on a: by how much the reading of b changes where that of a changes by 1.

    It is `a . b / |a|^2` of what is read: the slope of the regression of b's reading on a's over inputs that are alike
    in all directions. 1 of a direction with itself, 0 of orthogonal ones; not symmetric.

    Args:
        a: A direction.
        b: Another one, at the same site.

    Raises InputError for directions at two sites.

    Source: Dunefsky and Cohan 2024 (arXiv 2312.16291), section 2.4.
    """
    if a.site != b.site or a.read.shape != b.read.shape:
        raise InputError(f"Directions are coupled at one site; got {a.site} and {b.site}.")
    x, y = a.read.double(), b.read.to(a.read.device).double()
    return float(x @ y / (x @ x))


def _path(model: HookManager, path: Sequence[str]) -> list[Node]:
    """The nodes of a path. Raises InputError for other names, or if one runs before the one that it reads."""
    nodes: list[Node] = []
    for name in path:
        node = Node.parse(name)
        if node.kind == "head":
            node = head_of(model, name)
        elif node.kind != "mlp" or node.layer >= model.dims.n_layers or not model.dims.has_mlp:
            raise InputError(f"A path goes through heads ('a1.h0') and MLPs ('m2') of the model; got {name!r}.")
        if nodes and not _order(model, nodes[-1], written=True) <= _order(model, node, written=False):
            raise InputError(f"{name!r} does not read what {path[len(nodes) - 1]!r} writes; name the path as it runs.")
        nodes.append(node)
    return nodes


def _order(model: HookManager, node: Node, *, written: bool) -> tuple[int, int]:
    """The state of the stream that a node reads, or the first one with what it writes."""
    if node.kind == "head":
        return (node.layer + 1, 0) if written and model.dims.parallel else (node.layer, int(written))
    return (node.layer + 1, 0) if written else (node.layer, 0 if model.dims.parallel else 1)


def _reads_at(model: HookManager, node: Node) -> Site:
    layer, stage = _order(model, node, written=False)
    return Site("resid_mid" if stage else "resid_pre", layer)


def _unembedded(model: HookManager, weights: Mapping[Any, float | int]) -> Float[Tensor, " d_model"]:
    if not weights:
        raise InputError('Give weights of tokens, such as {" he": 1, " she": -1}.')
    columns, total = model.layout.W_U.detach(), torch.promote_types(model.dtype, torch.float32)
    found = columns.new_zeros(columns.shape[0], dtype=total)
    for token, weight in weights.items():
        index = _token(model, token)
        if not 0 <= index < columns.shape[1]:
            raise InputError(f"The model has tokens 0 to {columns.shape[1] - 1}; got {index}.")
        if weight != weight or abs(weight) == float("inf"):
            raise InputError(f"The weight of {token!r} is not a number: {weight}.")
        found += weight * columns[:, index].to(total)
    return model.layout.final_norm.project_transposed(found)


def _token(model: HookManager, token: str | int) -> int:
    if isinstance(token, int):
        return token
    ids = model.to_tokens(token, prepend_bos=False)[0].tolist()
    if len(ids) != 1:
        raise InputError(f"{token!r} is {len(ids)} tokens of this tokenizer; give a text of one token, or an id.")
    return ids[0]


def _mlp_inputs(model: HookManager, layers: Sequence[int], pairs: Pairs | None) -> dict[int, Float[Tensor, " d_model"]]:
    """The mean input of each of these MLPs over all tokens of the prompts."""
    if not layers:
        if pairs is not None:
            raise InputError("`pairs` say where MLPs are linearised; this path has no MLP, so leave them out.")
        return {}
    if pairs is None:
        raise InputError("An MLP is linearised at its mean input over prompts; give `pairs`.")
    sites = [Site("mlp_in", layer) for layer in layers]
    pairs = pairs.to(model.device)
    runs = [model.run(ids, pairs.mask, record=sites).values for ids in (pairs.clean, pairs.corrupt)]
    wide = torch.promote_types(model.dtype, torch.float32)
    return {
        layer: torch.cat([run[site][pairs.mask].to(wide) for run in runs]).mean(0)
        for layer, site in zip(layers, sites, strict=True)
    }


def _through(
    model: HookManager, node: Node, vector: Float[Tensor, " d_model"], means: Mapping[int, Tensor]
) -> Float[Tensor, " d_model"]:
    """What a node reads of the stream for each unit of what `vector` reads of what it writes."""
    layout, layer = model.layout, node.layer
    if node.kind == "head":
        back = writing(model, layer)[node.head] @ vector
        return reading(model, layer, "v")[node.head] @ back
    maps = layout.mlp_maps[layer]
    if maps is None or maps.activation is None:
        raise UnsupportedError(f"The MLP of layer {layer} is not matrices and a known function; leave m{layer} out.")
    with Gradients(True) as on, on:
        at = means[layer].detach().requires_grad_(True)
        out = maps(at) @ layout.mlp_post[layer].project_transposed(vector)
        (gradient,) = torch.autograd.grad(out, at)
    return (layout.mlp_norm[layer] or Norm("none")).project_transposed(gradient)
