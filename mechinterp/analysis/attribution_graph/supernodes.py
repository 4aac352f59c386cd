"""`find_supernodes`: features of an attribution graph that write the same and fire together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from mechinterp.analysis.attribution_graph.graph import AttributionGraph, GraphNode, Supernode
from mechinterp.analysis.describe_subject import subject_of
from mechinterp.analysis.texts import Texts, batches_of_texts
from mechinterp.analysis.weights import top_tokens
from mechinterp.base.errors import InputError
from mechinterp.features.basis import Basis
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.modes import Gradients

Key = tuple[str, int]


def find_supernodes(
    model: HookManager,
    graph: AttributionGraph,
    transcoders: Sequence[Basis],
    *,
    texts: Texts | None = None,
    similarity: float = 0.5,
    across_positions: bool = False,
    skip: int = 1,
    batch_size: int = 32,
) -> tuple[Supernode, ...]:
    """Groups of features that write the same and, if a corpus is given, fire together; the largest influence first.

    Two features are as similar as the cosine of what they add to the residual stream; with a corpus, as the mean of
    this and of the cosine of their activations on its tokens. Features are joined as long as the mean similarity
    between two groups (average linkage) is at least `similarity`. A group has at least two nodes.

    Args:
        model: The model.
        graph: The graph, best a pruned one: `graph.with_supernodes(find_supernodes(...))`.
        transcoders: Those that it was made with.
        texts: The corpus, read once; None: what they write alone decides.
        similarity: Where groups end, above 0 to 1.
        across_positions: Whether nodes at different positions may be in one group.
        skip: So many tokens at the beginning of every text do not count for firing together. The first one is the
            same everywhere (BOS) or takes a state that no other has, so features that fire on it would look alike.
        batch_size: Texts per run.

    A group is named after the two tokens that its features raise most, and its layers: a label to replace with a
    better one. Cost: with a corpus one forward per text; `[features, features]` floats.

    Raises InputError for other transcoders than the graph's, and a corpus without a text of more than `skip` tokens.
    """
    if skip < 0:
        raise InputError(f"`skip` is a number of tokens, at least 0; got {skip}.")
    if not 0 < similarity <= 1:
        raise InputError(f"`similarity` is a cosine above 0 and at most 1; got {similarity}.")
    by_name = {basis.name: basis for basis in transcoders}
    if any(node.basis not in by_name for node in graph.features):
        raise InputError(f"The graph was made with {', '.join(graph.bases)}; give the same transcoders.")
    if len(graph.features) < 2:
        return ()
    with Gradients(False) as off, off:
        keys = list(dict.fromkeys((node.basis, node.feature) for node in graph.features))
        writes = torch.stack([_written(model, by_name[name], i) for name, i in keys])
        alike = _cosines(writes)
        if texts is not None:
            alike = (alike + _together(model, by_name, keys, texts, batch_size, skip)) / 2
    place, influence = {key: i for i, key in enumerate(keys)}, dict(
        zip((node.name for node in graph.writers), graph.influence().tolist(), strict=True)
    )  # fmt: skip
    positions = [None] if across_positions else sorted({node.position for node in graph.features})
    found: list[list[GraphNode]] = []
    for position in positions:
        nodes = [node for node in graph.features if position is None or node.position == position]
        if len(nodes) > 1:
            own = [place[node.basis, node.feature] for node in nodes]
            found += _groups(nodes, alike[own][:, own], 1 - similarity)
    found.sort(key=lambda group: -sum(influence[node.name] for node in group))
    labels: dict[str, int] = {}
    made: list[Supernode] = []
    for group in found:
        label = _label(model, group, writes[[place[node.basis, node.feature] for node in group]])
        labels[label] = labels.get(label, 0) + 1
        label = label if labels[label] == 1 else f"{label} ({labels[label]})"
        made.append(Supernode(label, tuple(node.name for node in group)))
    return tuple(made)


def _written(model: HookManager, basis: Basis, feature: int) -> Float[Tensor, " d_model"]:
    direction = subject_of(model, basis, feature).direction
    assert direction is not None  # a transcoder writes to the residual stream
    return direction


def _cosines(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    return (unit @ unit.T).cpu()


def _together(
    model: HookManager, bases: Mapping[str, Basis], keys: Sequence[Key], texts: Texts, batch_size: int, skip: int
) -> Float[Tensor, "n n"]:
    """The cosine of the activations of any two features on the tokens of a corpus, but for the first ones."""
    products = torch.zeros(len(keys), len(keys), dtype=torch.float64)
    used = list(dict.fromkeys(name for name, _ in keys))
    n_read = 0
    for tokens, mask in batches_of_texts(model, texts, batch_size):
        run = model.run(tokens, mask, record=[bases[name] for name in used])
        counted = mask & (torch.arange(mask.shape[1], device=mask.device) >= skip)
        columns = [run.values[bases[name]][..., i][counted] for name, i in keys]
        active = torch.stack(columns, 1).double().cpu()
        products, n_read = products + active.T @ active, n_read + len(active)
    if not n_read:
        raise InputError(f"The corpus has no text of more than {skip} {'token' if skip == 1 else 'tokens'}.")
    size = products.diagonal().sqrt().clamp(min=1e-12)
    return products / size / size[:, None]


def _groups(nodes: Sequence[GraphNode], alike: Tensor, distance: float) -> list[list[GraphNode]]:
    """The nodes by average linkage, cut at a distance; groups of one are left out."""
    apart = (1 - alike).clamp(min=0).fill_diagonal_(0).numpy()
    tree = linkage(squareform(apart, checks=False), "average")
    numbers = fcluster(tree, distance + 1e-9, "distance")
    groups = ([node for node, own in zip(nodes, numbers, strict=True) if own == i] for i in sorted(set(numbers)))
    return [group for group in groups if len(group) > 1]


def _label(model: HookManager, group: Sequence[GraphNode], writes: Float[Tensor, "n d_model"]) -> str:
    """The tokens that the features raise most together, and where they are."""
    sizes = torch.tensor([node.value for node in group], dtype=writes.dtype, device=writes.device)
    words = [str(word).strip() for word in top_tokens(model, (sizes @ writes)[None], 2)["text"]]
    layers = sorted({node.layer for node in group})
    where = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
    positions = {node.position for node in group}
    at = f"@{positions.pop()}" if len(positions) == 1 else ""
    return f"{'/'.join(dict.fromkeys(words))} m{where}{at}"
