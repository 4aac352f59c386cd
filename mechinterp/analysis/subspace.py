"""Interchange of a subspace: only some directions of a state get the other prompt's value.

TransformerLens's `interchange` does the arithmetic, draws the random subspaces and runs the search (DAS); this module
adds pairs, positions and the patching engine. Source: Geiger et al. 2021 (arXiv 2106.02997) and 2024 (DAS, arXiv
2303.02536); why controls are necessary: Makelov et al. 2024 (arXiv 2311.17030).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.batches import over_batches
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.engines.grid import Grid, numbered
from mechinterp.engines.patch_direction import patch_direction
from mechinterp.engines.patch_sweep import Patch, entry, run_base, sweep
from mechinterp.engines.readout import checked_metric, metric_readout
from mechinterp.models.components import BY_QUERY, Part, Position, parse_part, position_index, position_sets
from mechinterp.models.feature_basis import FeatureBasis, shift
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.interchange import das, interchange, placebo, random_basis
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs


def subspace_interchange(
    model: HookManager,
    pairs: Pairs,
    part: str,
    basis: Float[Tensor, "d rank"] | FeatureBasis,
    *,
    position: Position = -1,
    placebos: int = 5,
    seed: int = 0,
    direction: Literal["noise", "denoise"] = "noise",
    metric: MetricLike = "logit_diff",
    batch_size: int | None = None,
) -> Grid:
    """The effect of giving a subspace of one state the other prompt's value, together with its controls.

    Axes subspace, example, in units of the metric, sign and directions as in `activation_patching`. The axis
    `subspace` has `basis`; `complement` (all other directions); `whole` (the state: ordinary activation patching); and
    `placebo 0`, ... : a move of the same length in a random subspace of the same rank. An effect that placebos share
    comes from the size of the move, not from the subspace. A subspace that was learned (`learn_subspace`) also needs
    controls of its learning: arbitrary targets and an untrained model (TransformerLens's `arbitrary_targets`,
    `random_init_bridge`).

    Args:
        model: The model.
        pairs: Clean and corrupt prompts.
        part: A state of one vector per token (`resid_pre.5`, `a9.h9`, `m3`, `mlp_post.3`).
        basis: The orthonormal directions of the subspace, as columns; or a feature basis at this state, all of whose
            features get the other prompt's activations (`keep` takes some of a dictionary).
        position: Where the state is read and written.
        placebos: How many random subspaces to compare with.
        seed: Of the random subspaces.
        direction: `noise` or `denoise`.
        metric: What is measured.
        batch_size: Examples at a time; by default all.

    Cost: two forwards, and per subspace the rest of the model from the state on.

    Raises InputError for a basis that is not orthonormal or of another width, and parts that are not one vector per
    token.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=8)
    >>> toward = mi.mean_difference(model, pairs.clean, pairs.corrupt, "resid_pre.3", mask=pairs.mask)
    >>> grid = mi.subspace_interchange(model, pairs, "resid_pre.3", (toward / toward.norm())[:, None], placebos=1)
    >>> grid.labels["subspace"]
    ('basis', 'complement', 'whole', 'placebo 0')
    """
    metric = checked_metric(model, pairs, metric)
    chosen = patch_direction(direction)
    if placebos < 0:
        raise InputError(f"`placebos` must be at least 0; got {placebos}.")
    pairs, found = pairs.to(model.device), _state(model, part)
    names = ("basis", "complement", "whole", *(f"placebo {i}" for i in range(placebos)))

    def patched(batch: Pairs, _: slice) -> dict[str, Tensor]:
        readout = metric_readout(model, batch, metric)
        base_tokens, other_tokens = chosen.tokens(batch)
        layers = (max(0, entry(model, found)[0]),)
        base = run_base(model, readout, base_tokens, layers=layers, record=[found.site])
        other = run_base(model, readout, other_tokens, record=[found.site])
        moves = _moves(base.recorded[found.site].shape[-1], basis, found, placebos, seed)
        mask = position_sets(batch, [position]).masks[0]
        values = [_everywhere(move, base.recorded[found.site], other.recorded[found.site]) for move in moves]
        patches = [Patch((found,), (mask,), (value,)) for value in values]
        after, _cost = sweep(model, readout, base, patches, {})
        return {"effect": chosen.effect(base.values, after, metric)}

    effects = over_batches(pairs, batch_size, patched, {"effect": -1})["effect"]
    about = {
        "analysis": "subspace interchange",
        "part": part,
        "position": str(position),
        "rank": basis.shape[1] if isinstance(basis, Tensor) else basis.n_features,
        "direction": direction,
        "metric": metric.name,
        "sign": "positive = the subspace helps the task",
        "seed": seed,
    }
    labels = {"subspace": names, "example": numbered(len(pairs))}
    return Grid(effects, labels, "effect", metric.unit, about, {"forwards": 2.0 + len(names)})


def learn_subspace(
    model: HookManager,
    pairs: Pairs,
    part: str,
    rank: int,
    *,
    position: Position = -1,
    epochs: int = 20,
    batch_size: int = 128,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> Float[Tensor, "d rank"]:
    """An orthonormal basis of the subspace that carries the answer from corrupt to clean prompts, by DAS.

    TransformerLens's `fit_das` trains it so that a clean prompt with the corrupt prompt's value in the subspace
    predicts the first wrong answer rather than the first right one (so the corrupt prompt's answer must be the wrong
    one). Evaluate it on other pairs with `subspace_interchange`, and against its controls.

    Args:
        model: The model.
        pairs: The training pairs, with right and wrong answers.
        part: A residual stream, an attention or MLP output, or `mlp_post`.
        rank: The number of directions.
        position: Where the state is read and written.
        epochs: Passes over the pairs.
        batch_size: Examples per training step.
        learning_rate: Of Adam.
        seed: Of the first basis and the order of the examples.

    Cost: `epochs` forwards and backwards of the pairs.

    Raises InputError for parts that are not one vector per token, pairs without answers, and a rank that does not fit;
    UnsupportedError for `resid_mid` where TransformerLens's hook is on the MLP's input only.
    """
    found = _state(model, part)
    if model.resolve(found.site) in model.branches:
        after = f"resid_pre.{layer}" if (layer := (found.site.layer or 0) + 1) < model.dims.n_layers else "resid_final"
        raise UnsupportedError(
            f"TransformerLens's search would edit '{found.site}' for the MLP only, not for what comes after it; learn "
            f"the subspace at 'resid_pre.{found.site.layer}' or '{after}'."
        )
    if found.unit is not None:
        raise InputError(
            f"A subspace is learned at a whole site, such as 'resid_pre.5', not at one head; got {part!r}."
        )
    if pairs.right is None or pairs.wrong is None:
        raise InputError("A subspace is learned from right and wrong answers, but the pairs have none.")
    if model.edited:
        raise InputError("A subspace cannot be learned inside `intervene`: its edits would not take effect.")
    width = model.run(pairs.clean[:1], record=[found.site]).values[found.site].shape[-1]
    if not 1 <= rank <= width:
        raise InputError(f"`rank` must be from 1 to {width}, the width of the state; got {rank}.")
    pairs = pairs.to(model.device)
    assert pairs.right is not None and pairs.wrong is not None
    # The search passes on its inputs only, so the answers and their positions are appended to the tokens.
    extra = torch.cat([pairs.right[:, :1], pairs.wrong[:, :1], pairs.answer_pos[:, :1]], 1)
    n_pos = pairs.clean.shape[1]

    def two_logits(inputs: Tensor) -> Tensor:
        ids, answers, at = inputs[:, :n_pos], inputs[:, n_pos : n_pos + 2], inputs[:, n_pos + 2]
        logits = model.bridge(ids, return_type="logits")
        return logits[torch.arange(len(ids), device=ids.device), at].gather(-1, answers)

    where = position_index(pairs, position)
    result = das(
        model.bridge,
        model.info.name,
        model.first_name(found.site),
        torch.cat([pairs.clean, extra], 1),
        torch.cat([pairs.corrupt, extra], 1),
        torch.ones(len(pairs), dtype=torch.long),
        two_logits,
        rank=rank,
        base_positions=where,
        source_positions=where,
        epochs=epochs,
        batch_size=batch_size,
        lr=learning_rate,
        seed=seed,
    )
    return result.basis.to(model.device)


def _state(model: HookManager, part: str) -> Part:
    found = parse_part(model, part)
    if found.position is not None:
        raise InputError(f"Give the position as `position`, not after an '@'; got {part!r}.")
    if found.site.kind in BY_QUERY or (found.site.kind in ("q", "k", "v", "z") and found.unit is None):
        raise InputError(f"{part!r} is not one vector per token; name a residual stream, a head ('a9.h9') or 'm3'.")
    if found.site.kind.startswith("mlp_") and found.unit is not None:
        raise InputError(f"{part!r} is a single number; for a subspace of neurons give a basis at '{found.site}'.")
    return found


def _moves(
    d: int, basis: Tensor | FeatureBasis, part: Part, placebos: int, seed: int
) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """What each entry of the axis `subspace` does with (base, source) vectors `[n, d]`."""
    if not isinstance(basis, Tensor):
        return _feature_moves(d, basis, part, placebos, seed)
    if basis.ndim != 2 or basis.shape[0] != d or not 1 <= basis.shape[1] <= d:
        raise InputError(f"The basis must be [{d}, rank], one direction per column; got {list(basis.shape)}.")
    wide = basis.double()
    if not torch.allclose(
        wide.T @ wide, torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device), atol=1e-4
    ):
        raise InputError(
            "The basis is not orthonormal; torch.linalg.qr(basis).Q is an orthonormal basis of the same subspace."
        )
    moves: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda base, source: interchange(base, source, basis),
        lambda base, source: source - interchange(base, source, basis) + base,
        lambda base, source: source,
    ]
    for i in range(placebos):
        other = random_basis(d, basis.shape[1], seed + i)
        moves.append(lambda base, source, other=other: placebo(base, source, basis, other))
    return moves


def _feature_moves(
    d: int, basis: FeatureBasis, part: Part, placebos: int, seed: int
) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """The same for the features of a basis; a placebo has as many random directions, at most d, and the same length."""
    if basis.sites_in != (part.site,) or basis.sites_out != (part.site,) or part.unit is not None:
        raise InputError(f"The basis '{basis.name}' is not at '{part.site}', the state whose features are exchanged.")

    def move(base: Tensor, source: Tensor) -> Tensor:
        code = basis.encode(base)
        return shift(basis, code, basis.encode(source).values)[part.site].to(base)

    moves: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda base, source: base + move(base, source),
        lambda base, source: source - move(base, source),
        lambda base, source: source,
    ]
    for i in range(placebos):
        other = random_basis(d, min(d, basis.n_features), seed + i)

        def matched(base: Tensor, source: Tensor, other: Tensor = other) -> Tensor:
            random = interchange(base, source, other) - base
            length = move(base, source).norm(dim=-1, keepdim=True)
            return base + random * (length / random.norm(dim=-1, keepdim=True).clamp(min=1e-12))

        moves.append(matched)
    return moves


def _everywhere(move: Callable[[Tensor, Tensor], Tensor], base: Tensor, source: Tensor) -> Tensor:
    """The move applied to every vector of a site, whatever its other axes are."""
    wide = torch.promote_types(base.dtype, torch.float32)
    flat = move(base.to(wide).flatten(0, -2), source.to(wide).flatten(0, -2))
    return flat.reshape(base.shape)
