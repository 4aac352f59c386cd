"""Head detectors: which heads attend to the previous token, to duplicates, by induction; which heads copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.analysis.weights import FOLDED, embedded, reading, unembedding, writing
from mechinterp.base.batches import batches, over_batches
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.registry import unknown
from mechinterp.engines.grid import Grid, numbered
from mechinterp.models.components import Position, position_index, position_sets
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs


def head_scores(
    model: HookManager,
    kind: str,
    *,
    n: int = 10,
    length: int = 25,
    seed: int = 0,
    batch_size: int | None = None,
) -> Grid:
    """A Grid (layer, head, example) of the mean attention, 0 to 1, that each head pays to what `kind` looks for.

    Measured on sequences of different random tokens that are repeated once (see `repeated_tokens`).

    Args:
        model: The model.
        kind: `previous_token`: from every token to the one before it. `duplicate_token`: from the second copy of a
            token to the first. `induction`: from the second copy of a token to the one after the first copy.
        n: The number of sequences.
        length: The number of tokens that are repeated.
        seed: Of the tokens.
        batch_size: Sequences at a time; by default all.

    Cost: one forward up to the last pattern.

    Raises InputError for an unknown kind and for a length that does not fit the context or the vocabulary.

    Source: the detection patterns are those of TransformerLens's `head_detector`, whose score `mul` also divides by
    the queries that have nothing to look for; here those are left out. Olsson et al. 2022's prefix matching score is
    `induction` on random tokens repeated four times. For heads that copy what they attend to, see `copying_scores`.

    >>> import mechinterp as mi
    >>> head_scores(mi.load_model("bundled"), "previous_token", n=4).mean().top(1)[["layer", "head"]].values.tolist()
    [[0, 0]]
    """
    return detector_scores(model, [kind], n=n, length=length, seed=seed, batch_size=batch_size)[kind]


def detector_scores(
    model: HookManager,
    kinds: Sequence[str] | None = None,
    *,
    n: int = 10,
    length: int = 25,
    seed: int = 0,
    batch_size: int | None = None,
) -> dict[str, Grid]:
    """The Grid of `head_scores` for each kind, all from the same run.

    Args:
        model: The model.
        kinds: As in `head_scores`; by default all of them.
        n: The number of sequences.
        length: The number of tokens that are repeated.
        seed: Of the tokens.
        batch_size: Sequences at a time; by default all.

    Cost: one forward up to the last pattern for all kinds. Raises as `head_scores`.
    """
    kinds = list(TARGETS if kinds is None else kinds)
    for kind in kinds:
        if kind not in TARGETS:
            raise unknown("detector", kind, TARGETS)
    tokens = repeated_tokens(model, n, length, seed)

    def scored(batch: Tensor, _: slice) -> dict[str, Tensor]:
        targets = torch.stack([TARGETS[kind](batch) for kind in kinds])
        return {"scores": _scores_of_targets(model, batch, targets, None)}

    found = over_batches(tokens, batch_size, scored, {"scores": -1})["scores"]
    dims = model.dims
    labels = {"layer": numbered(dims.n_layers), "head": numbered(dims.n_heads), "example": numbered(n)}
    return {
        kind: Grid(values, labels, kind, "attention", {"kind": kind, "length": length, "seed": seed}, {"forwards": 1.0})
        for kind, values in zip(kinds, found, strict=True)
    }


def repeated_tokens(model: HookManager, n: int = 10, length: int = 25, seed: int = 0) -> Int[Tensor, "example pos"]:
    """`n` sequences of `length` different random tokens, each repeated once; BOS first where the tokenizer has one.

    Special tokens are left out. Raises InputError when twice the length does not fit, or there are too few tokens.
    """
    bos = getattr(model.tokenizer, "bos_token_id", None)
    special = set[int](getattr(model.tokenizer, "all_special_ids", None) or [])
    usable = torch.tensor([token for token in range(model.dims.d_vocab) if token not in special])
    first = 0 if bos is None else 1
    most = min((model.dims.n_ctx - first) // 2, len(usable))
    if n < 1 or not 2 <= length <= most:
        raise InputError(
            f"{n} sequences of {length} repeated tokens are not possible: the model's context and vocabulary allow "
            f"lengths 2 to {most}, and at least one sequence is needed."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([usable[torch.randperm(len(usable), generator=generator)[:length]] for _ in range(n)])
    parts = [torch.full((n, 1), bos)] if bos is not None else []
    return torch.cat([*parts, chosen, chosen], 1).to(model.device)


def attention_to(
    model: HookManager,
    pairs: Pairs,
    query: Position | Sequence[Position],
    key: Position | Sequence[Position],
    *,
    prompt: str = "clean",
    batch_size: int | None = None,
) -> Grid:
    """A Grid (layer, head, example) of the attention, 0 to 1, that each head pays from `query` to `key`.

    Args:
        model: The model.
        pairs: The prompts.
        query: A position: a name of the task, a number (-1 is the last token), or a list of these, over which the
            attention is averaged.
        key: A position or a list of positions, over which the attention is summed.
        prompt: `clean` or `corrupt`.
        batch_size: Examples at a time; by default all.

    Cost: one forward up to the last pattern.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=8, split="train", seed=0)
    >>> attention_to(model, pairs, "end", "IO")
    Grid(attention [attention]: layer 4, head 4, example 8)
    """
    if prompt not in ("clean", "corrupt"):
        raise InputError(f"`prompt` is 'clean' or 'corrupt'; got {prompt!r}.")
    pairs = pairs.to(model.device)
    queries, keys = (position_sets(pairs, [part]).masks[0] for part in (query, key))
    tokens = pairs.clean if prompt == "clean" else pairs.corrupt
    grid = pattern_scores(model, tokens, queries[:, :, None] & keys[:, None, :], mask=pairs.mask, batch_size=batch_size)
    about = {"query": str(query), "key": str(key), "prompt": prompt}
    return Grid(grid.values, grid.labels, "attention", "attention", about, grid.cost)


def attention_between(
    model: HookManager,
    pairs: Pairs,
    positions: Sequence[Position] | None = None,
    *,
    prompt: str = "clean",
    batch_size: int | None = None,
) -> Grid:
    """A Grid (layer, head, query, key, example) of the attention, 0 to 1, between single positions.

    Args:
        model: The model.
        pairs: The prompts.
        positions: Names of the task, or numbers; by default all that the pairs name. Two of them may be one token.
        prompt: `clean` or `corrupt`.
        batch_size: Examples at a time; by default all.

    Cost: one forward up to the last pattern for all positions; `attention_to` takes sets of tokens.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=8, split="train", seed=0)
    >>> both = attention_between(model, pairs, ["end", "IO"])
    >>> both.axes, float(both.mean().at(layer=3, head=2, query="IO", key="end"))  # a causal model looks back only
    (('layer', 'head', 'query', 'key', 'example'), 0.0)
    """
    if prompt not in ("clean", "corrupt"):
        raise InputError(f"`prompt` is 'clean' or 'corrupt'; got {prompt!r}.")
    named = list(pairs.positions) if positions is None else list(positions)
    if not named or len({str(name) for name in named}) != len(named):  # the name "1" and the number 1 are the same
        raise InputError(f"Give each position once, and at least one; got {named or 'none'}.")
    pairs = pairs.to(model.device)
    dims = model.dims

    def read(chunk: Pairs, _: slice) -> dict[str, Tensor]:
        at = torch.stack([position_index(chunk, name) for name in named], 1)  # batch position
        rows = torch.arange(len(chunk), device=model.device)[:, None, None]
        found: list[Tensor] = []

        def note(pattern: Tensor) -> Tensor:
            found.append(pattern[rows, :, at[:, :, None], at[:, None, :]])  # batch query key head
            return pattern

        tokens = chunk.clean if prompt == "clean" else chunk.corrupt
        edits = [Intervention(Site("pattern", layer), note) for layer in range(dims.n_layers)]
        model.run(tokens, chunk.mask, interventions=edits, stop=Site("pattern", dims.n_layers - 1))
        return {"values": rearrange(torch.stack(found), "layer batch query key head -> layer head query key batch")}

    found = over_batches(pairs, batch_size, read, {"values": -1})["values"]
    names = tuple(str(name) for name in named)
    labels = {
        "layer": numbered(dims.n_layers),
        "head": numbered(dims.n_heads),
        "query": names,
        "key": names,
        "example": numbered(len(pairs)),
    }
    values = found.to(torch.promote_types(model.dtype, torch.float32))
    return Grid(values, labels, "attention", "attention", {"prompt": prompt}, {"forwards": 1.0})


def pattern_scores(
    model: HookManager,
    tokens: Int[Tensor, "batch pos"],
    targets: Bool[Tensor, "batch query key"],
    *,
    mask: Bool[Tensor, "batch pos"] | None = None,
    batch_size: int | None = None,
) -> Grid:
    """A Grid (layer, head, example) of the attention to the targets: their sum per query, its mean over the queries.

    Queries without a target are not counted. Cost: one forward up to the last pattern; memory: one layer's patterns.

    Raises InputError for targets of another shape and for an example without any.
    """
    expected = (*tokens.shape, tokens.shape[1])
    if tuple(targets.shape) != expected:
        raise InputError(f"Targets are [batch, query, key] = {list(expected)}; got {list(targets.shape)}.")
    counted = targets.any(2).sum(1)
    if not bool(counted.all()):
        raise InputError(f"Example {int((counted == 0).nonzero()[0])} has no target, so it has no score.")
    n_layers = model.dims.n_layers
    columns = [
        _scores_of_targets(model, batch, targets[None, rows], None if mask is None else mask[rows])[0]
        for rows, batch in batches(tokens, batch_size)
    ]
    labels = {
        "layer": numbered(n_layers),
        "head": numbered(model.dims.n_heads),
        "example": numbered(len(tokens)),
    }
    return Grid(torch.cat(columns, 2), labels, "attention", "attention", {}, {"forwards": 1.0})


def _scores_of_targets(
    model: HookManager,
    tokens: Int[Tensor, "batch pos"],
    targets: Bool[Tensor, "n_targets batch query key"],
    mask: Bool[Tensor, "batch pos"] | None,
) -> Float[Tensor, "n_targets layer head batch"]:
    """The scores of `pattern_scores` for several sets of targets, from one run."""
    counted = targets.any(3).sum(2)
    found: dict[int, Tensor] = {}
    targets = targets.to(model.device)

    def note(layer: int) -> Callable[[Tensor], Tensor]:
        def sum_targets(pattern: Tensor) -> Tensor:
            wide = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
            found[layer] = torch.stack([(wide * wanted[:, None]).sum((2, 3)) for wanted in targets])
            return pattern

        return sum_targets

    n_layers = model.dims.n_layers
    edits = [Intervention(Site("pattern", layer), note(layer)) for layer in range(n_layers)]
    model.run(tokens, mask, interventions=edits, stop=Site("pattern", n_layers - 1))
    sums = torch.stack([found[layer] for layer in range(n_layers)], 1)  # n_targets layer batch head
    return sums.transpose(2, 3) / counted.to(sums)[:, None, None]


def previous_token_targets(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos pos"]:
    """True from every token to the one before it."""
    n = tokens.shape[1]
    return torch.eye(n, dtype=torch.bool, device=tokens.device).roll(-1, 1).tril(-1).expand(len(tokens), n, n)


def duplicate_token_targets(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos pos"]:
    """True from every token to the earlier copies of it."""
    return (tokens[:, :, None] == tokens[:, None, :]).tril(-1)


def induction_targets(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos pos"]:
    """True from every token to the tokens that came right after earlier copies of it."""
    return duplicate_token_targets(tokens).roll(1, 2)  # the last column is empty before, so nothing wraps around


TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "previous_token": previous_token_targets,
    "duplicate_token": duplicate_token_targets,
    "induction": induction_targets,
}
"""What each kind of head attends to: the same patterns as TransformerLens's."""


def copying_scores(model: HookManager) -> Grid:
    """A Grid (layer, head) of sum(eigenvalues) / sum(|eigenvalues|) of the full OV circuit, from -1 to 1.

    The circuit is W_E W_V W_O W_U, d_vocab x d_vocab: a positive score means that attending to a token raises that
    token's own logit (copying), a negative one that it lowers it. Norm weights and centring are folded in. Its
    eigenvalues that are not 0 are those of W_O W_U W_E W_V, d_head x d_head.

    Cost: no forward; `d_vocab * d_model^2` multiplications once. Raises UnsupportedError where token ids in and out
    are not the same vocabulary. Source: Elhage et al. 2021, "Detecting copying behavior".

    >>> import mechinterp as mi
    >>> copying_scores(mi.load_model("bundled"))
    Grid(copying: layer 4, head 4)
    """
    dims = model.dims
    if dims.d_vocab != dims.d_vocab_out:
        raise UnsupportedError(
            f"Copying compares a token's embedding with its logit, but the model reads {dims.d_vocab} ids and writes "
            f"{dims.d_vocab_out}."
        )
    wide = torch.promote_types(model.dtype, torch.float32)
    between = torch.zeros(dims.d_model, dims.d_model, dtype=wide, device=model.device)
    for ids in torch.arange(dims.d_vocab, device=model.device).split(4096):
        between += unembedding(model, ids).T @ embedded(model, ids)
    rows: list[Float[Tensor, " head"]] = []
    for layer in range(dims.n_layers):
        small = writing(model, layer) @ between @ reading(model, layer, "v")
        values = torch.linalg.eigvals(small)
        rows.append(values.sum(-1).real / values.abs().sum(-1))
    labels = {"layer": numbered(dims.n_layers), "head": numbered(dims.n_heads)}
    return Grid(torch.stack(rows), labels, "copying", "", {"weights": model.info.processing, "folded": FOLDED})
