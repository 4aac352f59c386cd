"""The logit lens: what the model would predict if a residual stream were its last.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; a tuned lens (Belrose et al. 2023, arXiv 2303.08112)
can be given as `lens=`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.analysis.tuned_lens import TunedLens
from mechinterp.base.batches import batches
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.shown import Shown
from mechinterp.engines.grid import Grid, numbered
from mechinterp.engines.projected_logits import Reading, extremes, logits_of, read_vocabulary
from mechinterp.models.components import Position, as_pairs, parse_part, position_index
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "resid_final")
Lens = Callable[[Site, Tensor], Tensor]
"""Maps the residual stream at a site to one that the final norm can read; the identity is the plain lens."""


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Shown):
    """The distributions that the lens gives, by site, position and example."""

    top_tokens: Int[Tensor, "site pos example k"]
    """Token ids, the most probable first; -1 where an example has no such position."""
    probabilities: Grid
    """Their probabilities; axes site, pos, example, rank."""
    target_rank: Grid
    """How many tokens are more probable than the target (0 = it is the first); axes site, pos, example, target."""
    target_log_prob: Grid
    """In nats."""
    targets: Int[Tensor, "example target"]
    kl: Grid
    """KL(model's own distribution || lens), in nats; axes site, pos, example."""
    entropy: Grid
    """Of the lens's distribution, in nats."""

    def _facts(self) -> list[tuple[str, object]]:
        sites, kl = self.kl.labels["site"], self.kl.values.double()
        ends = f"{float(kl[0].nanmean()):.3g} at {sites[0]}, {float(kl[-1].nanmean()):.3g} at {sites[-1]}"
        sizes = [(axis, len(self.kl.labels[axis])) for axis in ("pos", "example")]
        return [
            ("sites", f"{len(sites)}, {sites[0]} to {sites[-1]}"),
            *sizes,
            ("mean KL to the output", f"{ends} nats"),
        ]

    def to_frame(self, tokenizer: Any = None) -> pd.DataFrame:
        """A row per site, position and example: KL, entropy and the most probable token with its probability.

        With a tokenizer the token is given as text, otherwise as its id.
        """
        frame = self.kl.to_frame()
        entropy, first = self.entropy.to_frame(), self.probabilities.at(rank=0).to_frame()
        frame["entropy"], frame["probability"] = entropy["entropy"], first["probability"]
        ids = self.top_tokens[..., 0].flatten()
        ids = ids[ids >= 0].tolist()
        frame["token"] = ids if tokenizer is None else [tokenizer.decode([token]) for token in ids]
        return frame


def logit_lens(
    model: HookManager,
    prompts: Pairs | str | Sequence[str] | Int[Tensor, "batch pos"],
    *,
    sites: Sequence[str | Site] | None = None,
    positions: Sequence[Position] | str | None = None,
    targets: Int[Tensor, "batch _target"] | None = None,
    lens: Lens | None = None,
    top_k: int = 5,
    vocabulary_chunk: int | None = None,
    batch_size: int | None = None,
) -> LogitLens:
    """The model's final norm, unembedding and soft cap applied to every residual stream on the way.

    Args:
        model: The model.
        prompts: Pairs (their clean prompts), texts, or token ids.
        sites: Residual streams; by default every `resid_pre` and `resid_mid`, and `resid_final`. A tuned lens has no
            map for `resid_mid`, so with one the default leaves it out.
        positions: Names (`end`), numbers (-1 is the last real token) or `each`; by default the first answer position.
        targets: Token ids `[batch, n]` whose rank and log-probability to follow; by default the first right and the
            first wrong answer.
        lens: A map of the residual stream before the final norm (a `TunedLens`); by default none.
        top_k: How many of the most probable tokens to keep.
        vocabulary_chunk: Tokens of the vocabulary at a time; by default as many as fit 128 MiB of logits.
        batch_size: Examples at a time; by default all.

    In every call the lens at `resid_final` is compared with the model's own logits; the largest difference as a share
    of the largest logit is in `about["error"]` of every grid.

    Cost: one forward, and `n_sites` unembeddings of the positions read. Memory: 128 MiB of logits at a time, and the
    model's own logits at the positions read.

    Raises InputError for a site that is not a residual stream, positions and tokens that do not exist,
    UnsupportedError where the lens at the end does not give the model's logits.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=8)
    >>> read = mi.logit_lens(model, pairs)
    >>> read.target_rank.at(site="resid_final", target=0).values.flatten().tolist()[:2], read.kl.axes
    ([0.0, 0.0], ('site', 'pos', 'example'))
    """
    pairs = as_pairs(prompts, model=model).to(model.device)
    pairs.check_vocabulary(model.dims.d_vocab, model.dims.d_vocab_out)
    if isinstance(lens, TunedLens):
        lens.check_model(model)
        sites = [site for site in _sites(model, None) if site.kind != "resid_mid"] if sites is None else sites
    if not 1 <= top_k <= model.dims.d_vocab_out:
        raise InputError(f"`top_k` must be from 1 to the vocabulary's {model.dims.d_vocab_out}; got {top_k}.")
    chosen = _sites(model, sites)
    labels, at = _positions(pairs, positions)
    aims = _targets(pairs, targets, model.dims.d_vocab_out)
    blocks: list[list[Reading]] = []
    error = 0.0
    for rows, batch in batches(pairs, batch_size):
        found, worst = _read(model, batch, chosen, at[:, rows], aims[rows], lens, top_k, vocabulary_chunk)
        blocks.append(found)
        error = max(error, worst)
    there = at >= 0
    names = {"site": tuple(map(str, chosen)), "pos": labels, "example": numbered(len(pairs))}
    about = {
        "analysis": "logit lens" if lens is None else "logit lens through " + type(lens).__name__,
        "reference": "the model's own distribution",
        "error": error,
        "soft_cap": model.layout.soft_cap,
    }

    def gathered(name: str) -> Tensor:
        parts = [
            torch.stack([getattr(reading, name) for reading in block]).unflatten(1, (len(labels), -1))
            for block in blocks
        ]
        value = torch.cat(parts, 2)
        mask = there[None].reshape(1, *there.shape, *[1] * (value.ndim - 3))
        if name == "top_tokens":
            return torch.where(mask, value, -1)
        if name == "target_ranks":
            value = torch.where(value < 0, torch.nan, value.to(torch.float32))
        return torch.where(mask, value, torch.nan)

    def grid(values: Tensor, name: str, unit: str, **more: tuple[str, ...]) -> Grid:
        return Grid(values, {**names, **more}, name, unit, about, {"forwards": 1.0})

    n_targets = numbered(aims.shape[1])
    return LogitLens(
        top_tokens=gathered("top_tokens"),
        probabilities=grid(gathered("top_log_probs").exp(), "probability", "", rank=numbered(top_k)),
        target_rank=grid(gathered("target_ranks"), "rank", "tokens", target=n_targets),
        target_log_prob=grid(gathered("target_log_probs"), "log_prob", "nats", target=n_targets),
        targets=aims,
        kl=grid(gathered("kl"), "kl", "nats"),
        entropy=grid(gathered("entropy"), "entropy", "nats"),
    )


def writes_lens(
    model: HookManager,
    prompts: Pairs | str | Sequence[str] | Int[Tensor, "batch pos"],
    nodes: Sequence[str],
    *,
    position: Position | None = None,
    top_k: int = 5,
    tokenizer: Any = None,
) -> pd.DataFrame:
    """The tokens that each node's write raises and lowers most: columns node, example, rank, raised, by, lowered, by.

    The write goes through the final norm with the scale of the run (as in direct logit attribution) and the
    unembedding, without bias and before any soft cap; under a post-norm it is the node's share. In logits.

    Args:
        model: The model.
        prompts: Pairs (their clean prompts), texts, or token ids.
        nodes: Heads (`a9.h9`), MLPs (`m3`), neurons (`m3.n17`) and `input`.
        position: Where the writes are read; by default the first answer position.
        top_k: How many tokens per direction.
        tokenizer: If given, tokens are shown as text instead of ids.

    Cost: one forward and, for all nodes together, one unembedding with a row per node. Raises InputError for nodes
    and positions that do not exist.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> table = mi.writes_lens(model, mi.load_task("ioi").pairs(model, n=2), ["a2.h1", "m3"], top_k=1)
    >>> table.columns.tolist()
    ['node', 'example', 'rank', 'raised', 'raised_by', 'lowered', 'lowered_by']
    """
    pairs = as_pairs(prompts, model=model).to(model.device)
    if not nodes or isinstance(nodes, str):
        raise InputError("`nodes` is a list of at least one node, such as ['a9.h9', 'm3'].")
    at = pairs.answer_pos[:, 0] if position is None else position_index(pairs, position)
    layout, dims = model.layout, model.dims
    parts = [parse_part(model, name) for name in nodes]
    sites = [Site("z", part.site.layer) if part.site.kind == "z" else part.site for part in parts]
    extra = [Site("mlp_post", p.site.layer) for p in parts if p.site.kind == "mlp_post" and p.site.layer is not None]
    final = Site("resid_final")
    run = model.run(pairs.clean, pairs.mask, record=list(dict.fromkeys([*sites, *extra, final])), stop=final)
    rows = torch.arange(len(pairs), device=pairs.device)
    wide = torch.promote_types(model.dtype, torch.float32)
    value = {site: v[rows, at].to(wide) for site, v in run.values.items() if isinstance(site, Site)}
    scale = layout.final_norm.scale(value[final])
    writes: list[Tensor] = []
    for name, part in zip(nodes, parts, strict=True):
        layer = part.site.layer or 0
        if part.site.kind == "z" and part.unit is not None:
            write = layout.head_writes(layer, value[part.site])[part.unit]
        elif part.site.kind == "mlp_post" and part.unit is not None:
            maps = layout.neurons(layer)
            write = value[part.site][:, part.unit, None] * maps.W_out[part.unit].to(wide)
            if not maps.post.identity:
                raw = value[part.site] @ maps.W_out.to(wide)
                raw = raw if maps.b_out is None else raw + maps.b_out.to(wide)
                write = maps.post.project(write) / maps.post.scale(raw)
        elif part.site.kind in ("mlp_out", "attn_out") or part.site == Site("resid_pre", 0):
            write = value[part.site]
        else:
            raise InputError(
                f"{name!r} does not write to the residual stream by itself; name heads, MLPs, neurons or 'input'."
            )
        writes.append(layout.final_norm.project(write) / scale)
    # All nodes in one product: the unembedding is what takes time to read.
    up, gain, down, loss = extremes(layout, torch.cat(writes), min(top_k, dims.d_vocab_out))
    decode = (lambda ids: ids) if tokenizer is None else (lambda ids: [tokenizer.decode([i]) for i in ids])
    n, k = len(pairs), up.shape[1]
    return pd.DataFrame(
        {
            "node": [name for name in nodes for _ in range(n * k)],
            "example": [i for i in range(n) for _ in range(k)] * len(nodes),
            "rank": list(range(k)) * (n * len(nodes)),
            "raised": decode(up.flatten().tolist()),
            "raised_by": gain.flatten().tolist(),
            "lowered": decode(down.flatten().tolist()),
            "lowered_by": loss.flatten().tolist(),
        }
    )


def _sites(model: HookManager, sites: Sequence[str | Site] | None) -> tuple[Site, ...]:
    if sites is None:
        every = [Site(kind, layer) for layer in range(model.dims.n_layers) for kind in ("resid_pre", "resid_mid")]
        return (*(site for site in every if model.has(site)), Site("resid_final"))
    if isinstance(sites, (str, Site)) or not len(sites):
        raise InputError(
            "`sites` must be a list of at least one residual stream, such as ['resid_pre.5', 'resid_final']."
        )
    found = tuple(Site.parse(site) if isinstance(site, str) else site for site in sites)
    for site in found:
        if site.kind not in RESIDUAL:
            raise InputError(
                f"'{site}' is not a residual stream; the lens reads {', '.join(RESIDUAL)}. See `writes_lens`."
            )
        model.resolve(site)
    return found


def _positions(
    pairs: Pairs, positions: Sequence[Position] | str | None
) -> tuple[tuple[str, ...], Int[Tensor, "pos batch"]]:
    """(labels, where each is in every example; -1 = the example does not have it)."""
    if positions is None:
        return ("answer",), pairs.answer_pos[:, 0][None]
    if positions == "each" and "each" not in pairs.positions:
        width = pairs.clean.shape[1]
        every = torch.arange(width, device=pairs.device)[:, None].expand(-1, len(pairs))
        return numbered(width), torch.where(every < pairs.lengths, every, -1)
    wanted = [positions] if isinstance(positions, (str, int)) else list(positions)
    if not wanted:
        raise InputError("No position is given; name some, or leave `positions` out for the answer position.")
    return tuple(map(str, wanted)), torch.stack([position_index(pairs, position) for position in wanted])


def _targets(pairs: Pairs, targets: Tensor | None, d_vocab: int) -> Int[Tensor, "example target"]:
    if targets is None:
        answers = [table[:, :1] for table in (pairs.right, pairs.wrong) if table is not None]
        if answers:
            return torch.cat(answers, 1)
        return torch.full((len(pairs), 1), -1, device=pairs.device)
    if targets.ndim != 2 or len(targets) != len(pairs) or targets.is_floating_point():
        raise InputError(
            f"`targets` must be token ids [batch, n] with batch = {len(pairs)}; got {list(targets.shape)}."
        )
    if not bool(((targets >= -1) & (targets < d_vocab)).all()):
        raise InputError(f"`targets` hold ids outside the vocabulary of {d_vocab} (-1 means no entry).")
    return targets.to(pairs.device)


def _read(
    model: HookManager,
    pairs: Pairs,
    sites: Sequence[Site],
    at: Int[Tensor, "pos batch"],
    targets: Int[Tensor, "batch target"],
    lens: Lens | None,
    top_k: int,
    chunk: int | None,
) -> tuple[list[Reading], float]:
    """(per site the reading of every position and example, how far the lens at the end is from the model's logits)."""
    final = Site("resid_final")
    order = at.T.contiguous()
    run = model.run(pairs.clean, pairs.mask, record=list(dict.fromkeys([*sites, final])), at=order)
    wide = torch.promote_types(model.dtype, torch.float32)
    index = at.clamp(min=0)
    rows = torch.arange(len(pairs), device=pairs.device)[None].expand_as(index)
    seen: list[Float[Tensor, "item d_model"]] = []
    for site in sites:
        resid = run.values[site][rows, index].to(wide)
        read = resid if lens is None else lens(site, resid)
        if read.shape != resid.shape:
            raise InputError(f"The lens must keep the shape {list(resid.shape)} at '{site}'; got {list(read.shape)}.")
        seen.append(model.layout.final_norm(read).flatten(0, 1))
    last = model.layout.final_norm(run.values[final][rows, index].to(wide)).flatten(0, 1)
    own = run.logits
    assert own is not None
    error = _error(model, last, own.movedim(1, 0).flatten(0, 1)[(at >= 0).flatten()], (at >= 0).flatten())
    aims = targets[rows.flatten()]
    return read_vocabulary(model.layout, torch.stack([*seen, last]), aims, top_k, chunk)[:-1], error


def _error(model: HookManager, normed: Tensor, own: Tensor, there: Tensor) -> float:
    """The largest difference of the lens from the model's logits, as a share of the largest of them."""
    worst, largest = 0.0, float(own.float().abs().max()) + 1e-6
    for columns in (slice(i, i + 4096) for i in range(0, own.shape[1], 4096)):
        logits = logits_of(model.layout, normed[there], columns)
        worst = max(worst, float((logits - own[:, columns]).abs().max()))
    limit = 1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2
    if not worst / largest < limit:
        raise UnsupportedError(
            f"The lens gives other logits at 'resid_final' than the model (off by {worst / largest:.2g} of their "
            "size); does an intervention edit the final norm or the logits?"
        )
    return worst / largest
