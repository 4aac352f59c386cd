"""Contextual decomposition: how much of a target is due to a source, propagated operation by operation.

Source: Hsu et al. 2024 (arXiv 2407.00886; CD-T, ICLR 2025) and its public code; see `rules` for the presets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.batches import batches
from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.registry import unknown
from mechinterp.base.shown import Shown
from mechinterp.engines.decomposition.encoder import Encoder
from mechinterp.engines.decomposition.one_backward import linear_scores, suits
from mechinterp.engines.decomposition.rules import Preset, get_preset
from mechinterp.engines.decomposition.subject import Decoder, Pass, Subject
from mechinterp.engines.decomposition.tape import Source, Window, narrow_values, walk
from mechinterp.engines.decomposition.targets import Target, TargetLike, read_columns, target_list
from mechinterp.engines.grid import Grid, numbered
from mechinterp.engines.means import MEANS, check_means, site_means
from mechinterp.engines.part_sets import Nodes, every_node, placed_parts, swept_parts
from mechinterp.engines.patch_sweep import memory_budget
from mechinterp.features.addresses import refuse_features
from mechinterp.models.components import Position, Positions, as_pairs, position_index
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.modes import Gradients
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

REPLACEMENTS = ("zero", "pair", *MEANS)
_INSTEAD = (
    "its rules know the model's own operations. The linear rules at features are attribution_patching(model, pairs, "
    "basis, method='relp'), along edges score_edges(..., method='cd-edges') on a graph with features"
)


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition(Shown):
    """The relevant and the irrelevant part of every target, for every source.

    Where nothing of a source reaches a target, the relevant part is 0; relevant + irrelevant = total, exactly.
    """

    labels: Mapping[str, tuple[str, ...]]
    """The axes of the sources, as in activation patching: (layer, head or neuron) or node, and pos."""
    relevant: Mapping[str, Tensor]
    """Per target `[*sources, example]` (a direction), `[*sources, example, n_answer, d_vocab]` (logits), or `[*sources,
    example, pos, ...]` (a site; NaN at padding; without `pos` where the target names a position)."""
    total: Mapping[str, Tensor]
    """Per target the same without the sources' axes."""
    completeness: float
    """The largest |operation(r + i) - the run's own value| of any operation, as a share of its largest entry."""
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    cost: Mapping[str, float] = field(default_factory=dict[str, float])
    """Of all examples, in forwards (a source counts from its layer and first position on) and backwards."""

    def _facts(self) -> list[tuple[str, object]]:
        sources = ", ".join(f"{axis} {len(labels)}" for axis, labels in self.labels.items())
        targets = ", ".join(f"{name} {list(value.shape)}" for name, value in self.total.items())
        return [("sources", sources), ("targets", targets), ("completeness", f"{self.completeness:.2g}")]

    def irrelevant(self, target: str | None = None) -> Tensor:
        """Total minus relevant, with the sources' axes."""
        name = self._name(target)
        return self.total[name] - self.relevant[name]

    def scores(self, target: str | None = None) -> Grid:
        """The relevant part of a target that is one number per example, as a Grid (..., example)."""
        name = self._name(target)
        value = self.relevant[name]
        if value.ndim != len(self.labels) + 1:
            raise InputError(
                f"The target {name!r} has a tensor per example, {list(value.shape[len(self.labels) + 1 :])}; read "
                "`relevant`, or decompose a direction for scores."
            )
        axes = {**self.labels, "example": numbered(value.shape[-1])}
        return Grid(value, axes, "relevance", "logits", {**self.about, "target": name}, self.cost)

    def to_frame(self, target: str | None = None) -> pd.DataFrame:
        """The tidy table of `scores`."""
        return self.scores(target).to_frame()

    def _name(self, target: str | None) -> str:
        if target is None and len(self.relevant) == 1:
            return next(iter(self.relevant))
        if target is None:
            raise InputError(f"Name a target: {', '.join(self.relevant)}.")
        if target not in self.relevant:
            raise unknown("target", target, self.relevant)
        return target


def contextual_decomposition(
    model: HookManager | Encoder,
    prompts: Pairs | Int[Tensor, "batch pos"],
    source: str | Nodes = "z",
    *,
    positions: Positions = None,
    targets: TargetLike | list[TargetLike] = "answers",
    preset: str | Preset = "linear",
    replacement: str = "zero",
    reference: Pairs | None = None,
    position: Position | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    forward: bool | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    progress: Progress = no_progress,
) -> Decomposition:
    """Every target split into what is due to each source and the rest: positive = the source raises the target.

    At its source the relevant part is the activation minus a replacement. From there it goes through every operation
    by the rules of the preset.

    Args:
        model: The model, or an encoder.
        prompts: Pairs (their clean prompts) or token ids.
        source: A kind of site, swept over its layers and heads (`z`), neurons (`mlp_post`) or layers (`mlp_out`);
            `nodes`, which is the input, every head and every MLP; or a list of parts (`input`, `a9.h9`, `m3`,
            `m3.n17`, each with an optional `@S2` or `@4`) and of sets of parts that are one source.
        positions: Where, as in activation patching (`each`, `["S2", ("IO", "S1")]`); words and phrases are
            `["input"]` with `positions="each"` or with `positions=[(3, 4, 5)]`.
        targets: Directions of logits (`answers`, `right`, `wrong`, a token id, a pair of them, weights; read at the
            answer positions, or at `position`; after a soft cap), `logits` (the whole vocabulary there), and parts or
            sites (`resid_post.3`, `a9.h9<q>`, `z.5@end`). For an encoder classifier, token ids are classes.
        preset: `linear`, `frozen-remove`, `authors-gpt`, `authors-bert`, `patch` (see `rules.PRESETS`), or your own
            `Preset`.
        replacement: `zero` (the whole activation is relevant), `mean` or `mean-positional` (over the corrupt prompts
            of `reference`), or `pair` (the corrupt run's value).
        reference: The pairs whose corrupt prompts give the means; by default `prompts`.
        position: Where directions and logits are read; by default the answer positions.
        mask: True at the real tokens, where `prompts` are token ids.
        forward: True: walk forward. False: insist on one backward. By default `linear` with one direction and sources
            at one site each is done in one backward (RelP's rules give the same coefficients).
        batch_size: Examples at a time; by default all.
        memory: Bytes of relevant parts at a time.
        progress: Called with the number of (source, example) pairs that are done.

    Checked in every call: the operation of each rule, at r + i, gives the run's own value (`completeness`). That holds
    for any split, good or bad; to see whether a preset ranks sources well, compare it with `patch`, which is ablation
    itself. Rules with a frozen norm may over- or underestimate magnitudes.

    Cost: a forward, and per source the share of a forward from its layer and first position on, without unembedding;
    twice that for `patch` and `authors-gpt`, which need patterns of parts. `linear` by backward: a forward and a
    backward in all. Memory: also all values of a run of `batch_size` examples.

    Raises InputError for sources, targets and positions that do not exist, UnsupportedError, naming the operation,
    where one has no rule.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=8)
    >>> found = mi.contextual_decomposition(model, pairs, "z", positions="end", replacement="mean")
    >>> found.scores().mean().axes, found.completeness < 1e-5
    (('layer', 'head', 'pos'), True)
    """
    means = None if replacement not in MEANS else (reference or as_pairs(prompts, mask))
    return decompose(
        model,
        prompts,
        source,
        means,
        positions=positions,
        targets=targets,
        preset=preset,
        replacement=replacement,
        position=position,
        mask=mask,
        forward=forward,
        batch_size=batch_size,
        memory=memory,
        progress=progress,
    )


def decompose(
    model: HookManager | Encoder,
    prompts: Pairs | Int[Tensor, "batch pos"],
    source: str | Nodes,
    reference: Pairs | Mapping[Site, Tensor] | None,
    *,
    positions: Positions = None,
    targets: TargetLike | list[TargetLike] = "answers",
    preset: str | Preset = "linear",
    replacement: str = "zero",
    position: Position | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    forward: bool | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    progress: Progress = no_progress,
) -> Decomposition:
    """`contextual_decomposition` with the pairs to average over, or with the means themselves by site."""
    subject: Subject = model if isinstance(model, Encoder) else Decoder(model)
    rules = get_preset(preset)
    refuse_features("Contextual decomposition", source, _INSTEAD)
    pairs = as_pairs(prompts, mask).to(model.device)
    pairs.check_vocabulary(model.dims.d_vocab, max(model.dims.d_vocab, model.dims.d_vocab_out))
    if replacement not in REPLACEMENTS:
        raise unknown("replacement", replacement, REPLACEMENTS)
    labels, parts = swept_parts(model, every_node(model.dims) if source == "nodes" else source, None, None)
    placed, pos_labels = placed_parts(pairs, parts, positions)
    wanted = target_list(model, pairs, targets)
    if position is not None and isinstance(model, Encoder) and model.classifies:
        raise InputError("A classifier is read at its first token; leave `position` out.")
    at = subject.read_at(pairs) if position is None else position_index(pairs, position)[:, None]
    sites = tuple(dict.fromkeys(part.site for several in parts for part in several))
    names = {site: subject.name(site) for site in sites}
    _check_sources(sites, rules)
    means = {} if reference is None or isinstance(reference, Pairs) else reference
    if isinstance(reference, Pairs):
        means = site_means(model, reference, sites, replacement, batch_size)
    backward = suits(model, rules, wanted, parts) if forward is None else not forward
    if backward and not suits(model, rules, wanted, parts):
        raise InputError(
            "One backward (`forward=False`) needs preset 'linear', one direction, and sources at one site each."
        )
    results: dict[str, list[Tensor]] = defaultdict(list)
    totals: dict[str, list[Tensor]] = defaultdict(list)
    cost = {"forwards": float(isinstance(reference, Pairs)), "backwards": 0.0}
    completeness, whole_work = 0.0, len(pairs) * len(placed)
    for rows, chunk in batches(pairs, batch_size):
        check_means(means, chunk)
        base = means
        if replacement == "pair":
            base = dict(model.run(chunk.corrupt, chunk.mask, record=sites).values)
        entries = [
            tuple((names[p.site], p.unit, m[rows], base.get(p.site)) for p, m in zip(several, where, strict=True))
            for several, where in placed
        ]
        sources = [Source(str(i), entry) for i, entry in enumerate(entries)]
        here = [target.rows(rows) for target in wanted]
        if backward:
            assert isinstance(model, HookManager)
            found, whole, worst = linear_scores(model, subject, chunk, sites, sources, here[0], at[rows])
            forwards, done = 1.0, {here[0].name: found}
            cost["backwards"] += len(chunk) / len(pairs)
        else:
            pass_ = subject.run_pass(chunk, at[rows], read_columns(here), scores=rules.attention != "frozen")

            def report(done: int, before: int = rows.start * len(sources)) -> None:
                progress(before + done, whole_work)

            done, forwards = _forward(subject, pass_, rules, chunk, sources, here, at[rows], memory, report)
            whole, worst = {t.name: t.read_total(pass_.totals, at[rows], chunk.mask) for t in here}, pass_.completeness
        completeness = max(completeness, worst)
        cost["forwards"] += (forwards + (replacement == "pair")) * len(chunk) / len(pairs)
        present = torch.stack([torch.stack([m.any(1) for _, _, m, _ in s.entries]).any(0) for s in sources])
        for name, value in done.items():
            shape = [*present.shape, *[1] * (value.ndim - 2)]
            results[name].append(torch.where(present.reshape(shape), value, torch.nan))
            totals[name].append(whole[name])
    axes = {**labels, "pos": pos_labels}
    sizes = [len(entry) for entry in axes.values()]
    about = {
        "analysis": "contextual decomposition",
        "preset": preset if isinstance(preset, str) else str(preset),
        "replacement": replacement,
        "by": "one backward" if backward else "forward walk",
        "sign": "positive = the source raises the target",
        "completeness": completeness,
        "examples": len(pairs),
    }
    relevant = {name: torch.cat(value, 1).unflatten(0, sizes) for name, value in results.items()}
    total = {name: torch.cat(value) for name, value in totals.items()}
    return Decomposition(axes, relevant, total, completeness, about, cost)


def _check_sources(sites: Sequence[Site], rules: Preset) -> None:
    for site in sites:
        if site.kind in ("q", "k") and rules.attention == "frozen":
            raise InputError(
                f"This preset holds attention patterns constant, so nothing of '{site}' reaches anything; use "
                "'authors-gpt' or 'patch'."
            )


def _forward(
    subject: Subject,
    pass_: Pass,
    rules: Preset,
    chunk: Pairs,
    sources: Sequence[Source],
    targets: Sequence[Target],
    at: Int[Tensor, "batch n_at"],
    memory: int | None,
    report: Callable[[int], None],
) -> tuple[dict[str, Float[Tensor, "source batch ..."]], float]:
    """(the relevant part of every target, the cost in forwards)."""
    tape, width = pass_.tape, chunk.clean.shape[1]
    dims = subject.dims
    n_ops = len(tape.operations)
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, source in enumerate(sources):
        first = _first(source) if dims.causal else 0
        groups[min(tape.order(name) for name, *_ in source.entries), min(first, _earliest(at, width))].append(i)
    names = [target.value for target in targets]
    wide = [name for source in sources for name, *_ in source.entries]
    wide += [target.value for target in targets if not target.at_answers]
    narrow = narrow_values(tape, rules, names, tuple(dict.fromkeys(wide)))
    out: dict[str, list[Tensor | None]] = {target.name: [None] * len(sources) for target in targets}
    forwards, finished = 1.0, 0
    for (start, first), members in sorted(groups.items()):
        each = chunk.clean.numel() * (width - first) // width * 16 * dims.d_model * 4
        size = max(1, memory_budget(at.device, memory) // max(1, each))
        for low in range(0, len(members), size):
            some = members[low : low + size]
            window = Window(first, at, narrow)
            with Gradients(False) as off, off:
                parts = walk(tape, rules, pass_.totals, [sources[i] for i in some], names, window, pass_.visible)
            for target in targets:
                value = target.read(parts.get(target.value), len(some), pass_.totals, at, chunk.mask, first)
                for i, own in zip(some, value, strict=True):
                    out[target.name][i] = own
            forwards += len(some) * (n_ops - max(0, start)) / n_ops * (width - first) / width
            finished += len(some)
            report(finished * len(chunk))
    return {name: torch.stack([v for v in values if v is not None]) for name, values in out.items()}, forwards


def _first(source: Source) -> int:
    """The first position of a source in any example."""
    found = torch.stack([mask.any(0) for _, _, mask, _ in source.entries]).any(0).nonzero()
    return int(found[0]) if len(found) else 0


def _earliest(at: Int[Tensor, "batch n_at"], width: int) -> int:
    """The first answer position: it is read even where nothing reaches it."""
    return int(torch.where(at < 0, width, at).min())
