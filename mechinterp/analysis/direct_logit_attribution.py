"""Direct logit attribution: a logit, or a sum of logits, split exactly into what every part of the model wrote.

The final norm divides by its scale; with that scale held at the run's value the logits are linear in the residual
stream, and the residual stream is the sum of what was written to it. So every writer has its own term, and each bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.batches import batches
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.engines.grid import Grid, numbered
from mechinterp.engines.logit_directions import DirectionLike, logit_direction
from mechinterp.engines.logit_parts import Block, LogitMap, Refined, logit_map, logit_parts, read_values
from mechinterp.features.addresses import by_name
from mechinterp.features.sweep import coded
from mechinterp.graphs.input_split import check_input_split
from mechinterp.graphs.token_positions import take_positions
from mechinterp.models.components import Position, Positions, PositionSets, as_pairs, position_index, position_sets
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Node
from mechinterp.tasks.pairs import Pairs


def direct_logit_attribution(
    model: HookManager,
    prompts: Pairs | str | Sequence[str] | Int[Tensor, "batch pos"],
    direction: DirectionLike = "answers",
    *,
    position: Position | None = None,
    prompt: str = "clean",
    refine: Sequence[str] = (),
    features: Sequence[FeatureBasis] = (),
    source_positions: Positions = "each",
    batch_size: int | None = None,
) -> Grid:
    """A Grid (node, example) in logits: how much every part of the model adds to the logit of a direction.

    The parts have the names of the graph's nodes: `input` (what enters the first layer), every head
    (`a0.h0`), every MLP (`m0`), and every bias that is not 0 (`a0.bias`: the output bias of an attention layer,
    `final_norm.bias`, `unembed.bias`). Their sum over `node` is the logit. The sign is that of the direction: for
    `answers`, positive = toward the right answers.

    Args:
        model: The model.
        prompts: Pairs, texts, or token ids without padding.
        direction: `answers` (mean right logit minus mean wrong logit), `right`, `wrong`, token ids (one, or one per
            example), a pair of these (difference), or float weights `[d_vocab]` or `[batch, d_vocab]`.
        position: Where it is read; by default the answer positions (their mean where an example has several).
        prompt: Which prompts of the pairs are read: `clean` or `corrupt`.
        refine: Nodes to split further: `input` into `embed` and `pos_embed`, as `build_graph(split_input=True)` does;
            an MLP (`m3`) into its neurons (`m3.n17`) and `m3.bias`; a head (`a9.h9`) into
            the positions it attends to (`a9.h9@4`), through the pattern and OV: pattern * v W_O, with the v of the
            shared KV head where there is one. `group_parts` sums parts.
        features: Bases that write to the output of an MLP or attention layer. Its node (`m3`; of attention all heads)
            is replaced by the features (`m3.f17`), the error (`m3.err`) and what no features decode to (`m3.bias`, with
            a skip connection).
        source_positions: Those positions: `each` (NaN where an example has no such position) or named positions and
            sets of them; the rest is `a9.h9@rest`.
        batch_size: Examples at a time; by default all.

    Frozen at the run's value: the scale of the final norm, and of post-norms (a head's or neuron's part is its share
    of the normed sum). Centring is linear, and included. Under a soft cap (Gemma-2) the parts sum to the logit before
    the cap. Values depend on the weights as they are: folding norms or biases (compatibility mode) moves value
    between parts, not their sum. Edits of an `intervene` block count where they are at z, v, patterns or MLPs.

    The sum is compared with the logit in every call; `about["error"]` is the largest difference as a share of the
    largest part (or of the size of what the norm's product with the direction sums, when that is larger).

    Cost: one forward without final norm and unembedding. Memory: the writes at the read positions only, `n_layers *
    batch * d_model`; a refined head also its layer's v and pattern rows.

    Raises InputError for an unknown direction, position or node, UnsupportedError where the parts do not sum to the
    logit (an intervention edits the residual stream itself) and for neurons of an MLP without neurons (experts).

    Source: Elhage et al. 2021 (the logits as a sum over paths). The same numbers as TransformerLens's `logit_attrs` of
    `get_full_resid_decomposition`, which needs folded weights, has all biases in one part and no source positions.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=8, split="train", seed=0)
    >>> parts = direct_logit_attribution(model, pairs, refine=["a3.h1"], source_positions=["IO", "S1", "S2"])
    >>> parts.axes, parts.about["error"] < 1e-5
    (('node', 'example'), True)
    >>> [name for name in parts.labels["node"] if name.startswith("a3.h1")]
    ['a3.h1@IO', 'a3.h1@S1', 'a3.h1@S2', 'a3.h1@rest']
    """
    pairs = as_pairs(prompts, model=model).to(model.device)
    if prompt not in ("clean", "corrupt"):
        raise InputError(f"`prompt` is 'clean' or 'corrupt'; got {prompt!r}.")
    pairs.check_vocabulary(model.dims.d_vocab, model.dims.d_vocab_out)
    chosen = logit_direction(pairs, direction, model.layout)
    at = pairs.answer_pos if position is None else position_index(pairs, position)[:, None]
    refined = _refined(model, refine)
    sources = _sources(pairs, source_positions) if refined.heads else None
    owned = _owned(model, features, refine)
    labels: list[str] = []
    columns: list[Tensor] = []
    error = 0.0
    for rows, chunk in batches(pairs, batch_size):
        read = read_values(model, chunk, chunk.clean if prompt == "clean" else chunk.corrupt, at[rows], refined)
        to_logit = logit_map(model, read, chosen.rows(rows), at[rows])
        attended = sources and PositionSets(sources.labels, sources.masks[:, rows])
        blocks = list(logit_parts(model, read, to_logit, refined, attended))
        if owned:
            tokens = chunk.clean if prompt == "clean" else chunk.corrupt
            blocks = _with_features(model, chunk, tokens, at[rows], owned, to_logit, blocks)
        labels = [label for names, _ in blocks for label in names]
        values = torch.cat([block for _, block in blocks])
        error = max(error, _check_sum(model, values, to_logit, read))
        columns.append(values)
    about = {
        "direction": chosen.text,
        "position": "answer positions" if position is None else str(position),
        "prompt": prompt,
        "sign": "positive = raises the direction's logit",
        "frozen": "the scale of the final norm and of post-norms",
        "sums_to": "the logit"
        + (f" before the soft cap of {model.layout.soft_cap:g}" if model.layout.soft_cap else ""),
        "weights": model.info.processing,
        "error": error,
    }
    axes = {"node": tuple(labels), "example": numbered(len(pairs))}
    cost = {"forwards": 1.0 + bool(owned)}
    return Grid(torch.cat(columns, 1), axes, "attribution", "logits", about, cost)


def group_parts(parts: Grid, groups: Mapping[str, Sequence[str]]) -> Grid:
    """The same Grid with the parts of each group summed; the other parts stay, so the sum over `node` is the same.

    Args:
        parts: A Grid of `direct_logit_attribution`.
        groups: By name a list of node names or patterns (`a0.h*`, `m3.n*`). NaN (no such position) counts as 0.

    Raises InputError for a name that matches nothing, a part in two groups, and a group named like a part that stays.

    >>> grid = Grid(torch.tensor([1.0, 2.0, 4.0]), {"node": ("embed", "a0.h0", "a0.h1")}, "attribution")
    >>> group_parts(grid, {"layer 0": ["a0.*"]}).to_frame().to_dict("list")
    {'node': ['layer 0', 'embed'], 'attribution': [6.0, 1.0]}
    """
    if "node" not in parts.labels:
        raise InputError(f"Groups need the axis 'node'; this grid has the axes {', '.join(parts.axes)}.")
    names = parts.labels["node"]
    owner: dict[str, str] = {}
    for group, patterns in groups.items():
        if isinstance(patterns, str) or not patterns:
            raise InputError(f"The group {group!r} must be a list of node names or patterns; got {patterns!r}.")
        for pattern in patterns:
            matched = [name for name in names if fnmatchcase(name, pattern)]
            if not matched:
                raise InputError(f"{pattern!r} of the group {group!r} matches no part. Parts: {', '.join(names)}.")
            for name in matched:
                if owner.setdefault(name, group) != group:
                    raise InputError(f"{name!r} is in two groups, {owner[name]!r} and {group!r}; it would count twice.")
    kept = [name for name in names if name not in owner]
    if taken := sorted(set(kept) & set(groups)):
        raise InputError(f"The group {taken[0]!r} has the name of a part outside all groups; choose another name.")
    dim = parts.axes.index("node")
    values = parts.values.movedim(dim, 0)
    sums = [values[[i for i, name in enumerate(names) if owner.get(name) == group]].nansum(0) for group in groups]
    rest = values[[i for i, name in enumerate(names) if name not in owner]]
    merged = torch.cat([torch.stack(sums), rest]) if sums else rest
    labels = {axis: (*groups, *kept) if axis == "node" else old for axis, old in parts.labels.items()}
    return replace(parts, values=merged.movedim(0, dim), labels=labels)


def _refined(model: HookManager, names: Sequence[str]) -> Refined:
    if isinstance(names, str):
        raise InputError(f"`refine` takes several nodes; write a list, as in refine=[{names!r}].")
    dims, mlps, heads = model.dims, set[int](), dict[int, list[int]]()
    if "input" in names:
        check_input_split(model)
    for name in names:
        if name == "input":
            continue
        node = Node.parse(name)
        if node.kind not in ("head", "mlp"):
            raise InputError(
                f"Only heads, MLPs and the input can be refined, as in refine=['a9.h9', 'm3', 'input']; got {name!r}."
            )
        if node.layer >= dims.n_layers or node.head >= dims.n_heads or (node.kind == "mlp" and not dims.has_mlp):
            shape = f"{dims.n_layers} layers of {dims.n_heads} heads" + ("" if dims.has_mlp else " and no MLPs")
            raise InputError(f"Node {name!r} does not exist: the model has {shape}.")
        if node.kind == "mlp":
            model.layout.neurons(node.layer)  # raises where it has no neurons
            mlps.add(node.layer)
        elif node.head not in heads.setdefault(node.layer, []):
            heads[node.layer].append(node.head)
    return Refined(frozenset(mlps), {layer: tuple(found) for layer, found in heads.items()}, "input" in names)


def _owned(model: HookManager, features: Sequence[FeatureBasis], refine: Sequence[str]) -> dict[str, FeatureBasis]:
    """The bases by the node (`m3`, `a3`) whose write they split."""
    by_name(features)
    owned: dict[str, FeatureBasis] = {}
    for basis in features:
        model.resolve(basis)
        site = basis.sites_out[0]
        if len(basis.sites_out) > 1 or site.kind not in ("mlp_out", "attn_out"):
            raise InputError(
                f"The basis '{basis.name}' writes to {', '.join(map(str, basis.sites_out))}; only what is written to "
                "one 'mlp_out' or 'attn_out' is a part of a logit."
            )
        if getattr(basis, "normalize", "none") != "none":
            raise UnsupportedError(f"The features of '{basis.name}' have no fixed directions: it normalises its input.")
        node = f"{'m' if site.kind == 'mlp_out' else 'a'}{site.layer}"
        if node in owned or any(name == node or name.startswith(f"{node}.") for name in refine):
            raise InputError(f"{node!r} is split twice; give one basis for it, and leave it out of `refine`.")
        owned[node] = basis
    return owned


def _with_features(
    model: HookManager,
    pairs: Pairs,
    tokens: Int[Tensor, "batch pos"],
    at: Int[Tensor, "batch n"],
    owned: Mapping[str, FeatureBasis],
    to_logit: LogitMap,
    blocks: Sequence[Block],
) -> list[Block]:
    """The parts, with the nodes of the bases replaced by features, error and bias, where the node was."""
    found = coded(model, pairs, tokens, list(owned.values()))
    made: dict[str, Block] = {}
    for node, basis in owned.items():
        code, (site,) = found[basis], basis.sites_out
        nothing = basis.decode(code.features.with_values(torch.zeros_like(code.features.values)))[site]
        values, error, bias = (
            take_positions(value, at) for value in (code.features.values, code.errors[site], nothing)
        )
        wide = to_logit.vector.dtype
        along = to_logit.vector @ basis.writes().to(to_logit.vector).T
        shares = einsum(values.to(wide), to_logit.weight, "batch n feature, batch n -> batch feature") * along
        names = [f"{basis.name}.f{i}" for i in range(basis.n_features)] + [f"{basis.name}.err", f"{basis.name}.bias"]
        rest = torch.stack([to_logit.of(error.to(wide)), to_logit.of(bias.to(wide))])
        made[node] = (names, torch.cat([shares.T, rest]))
    result: list[Block] = []
    for names, values in blocks:
        node = names[0].partition(".")[0].partition("@")[0]
        if node not in owned:
            result.append((names, values))
        elif node in made:
            result.append(made.pop(node))
    return result


def _sources(pairs: Pairs, positions: Positions) -> PositionSets:
    """The sets of source positions and, last, the rest; InputError when a position would count twice."""
    sources = position_sets(pairs, positions)
    twice = sources.masks.sum(0) > 1
    if bool(twice.any()):
        row, column = (int(i) for i in twice.nonzero()[0])
        sets = [label for label, mask in zip(sources.labels, sources.masks, strict=True) if bool(mask[row, column])]
        raise InputError(
            f"Position {column} of row {row} is in the source positions {' and '.join(map(repr, sets))}; it would "
            "count twice."
        )
    rest = pairs.mask & ~sources.masks.any(0)
    if not bool(rest.any()):
        return sources
    if "rest" in sources.labels:
        raise InputError(
            "A source position is named 'rest', which is the name of the remaining positions here; rename it."
        )
    return PositionSets((*sources.labels, "rest"), torch.cat([sources.masks, rest[None]]))


def _check_sum(
    model: HookManager, values: Float[Tensor, "node batch"], to_logit: LogitMap, read: Mapping[str, Tensor]
) -> float:
    """The largest difference of the sum from the logit, relative; raises UnsupportedError when it is not rounding."""
    difference = (values.nansum(0) - to_logit.logit).abs()
    # The product with the direction rounds in proportion to this, whatever the parts are.
    rounding = einsum(
        read["resid_final"].abs(), to_logit.vector.abs(), to_logit.weight, "batch n d, batch d, batch n -> batch"
    )
    size = torch.maximum(values.nan_to_num().abs().amax(0), rounding).clamp(min=torch.finfo(values.dtype).tiny)
    error = float((difference / size).max())
    # In a lower precision every addition to the residual stream is rounded, and that loss is in none of the parts.
    low = model.dtype not in (torch.float32, torch.float64)
    tolerance = 8 * torch.finfo(model.dtype).eps if low else 1e-5
    if not error <= tolerance:
        worst = int((difference / size).argmax())
        raise UnsupportedError(
            f"The parts sum to {float(values[:, worst].nansum()):.6g} in an example whose logit is "
            f"{float(to_logit.logit[worst]):.6g} (off by {error:.2g} of the largest part, {tolerance:.2g} allowed): "
            "something else writes to the residual stream. Is an intervention editing it?"
        )
    return error
