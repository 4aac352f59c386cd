"""What the nodes of a circuit do on a few prompts: attention patterns, and the tokens that each node writes.

This is the only part of the page that needs the model. All results state the prompts that they were measured on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.analysis.direct_logit_attribution import direct_logit_attribution
from mechinterp.analysis.logit_lens import writes_lens
from mechinterp.analysis.weights import top_tokens
from mechinterp.base.errors import MechInterpError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.evaluation.direct_effects import direct_effects
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.components import NODES_WITH_SITES
from mechinterp.models.direction_readout import READING, explained
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Node, Site, node_of, split_position
from mechinterp.tasks.pairs import Pairs
from mechinterp.views.report.prompt_example import PromptExample, answer_texts, prompt_example, token_text

MAX_NODES = 200
"""The most heads, MLPs and neurons with details; GPT-2 small has 156 heads and MLPs."""
MAX_TOKENS = 48
"""Longer prompts are not shown: their patterns would be unreadable and the page large."""
EXAMPLES, SEARCHED = 3, 32
"""The number of prompts shown, and among how many the first short enough ones are looked for."""
MEAN_OVER = 50
"""The number of examples for the mean direct effect."""
TOP_TOKENS = 6

TokenLogits = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Written:
    """The tokens whose logits a node raises and lowers most at the answer position, in logits."""

    raised: TokenLogits
    lowered: TokenLogits


@dataclass(frozen=True)
class PromptDetails:
    """One clean prompt: its tokens, the attention patterns of heads (0 to 1), and the tokens that nodes write."""

    row: int
    """The index of the example."""
    tokens: tuple[str, ...]
    answer_pos: int
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    patterns: Mapping[str, Float[Tensor, "query key"]]
    written: Mapping[str, Written]


@dataclass(frozen=True)
class NodeDetails:
    """Measurements with the model, by the names of nodes without positions; `notes` say what was left out and why.

    `direct` is the mean direct effect of each node on `direction`, in `unit`, over the first `n_direct` of the
    `n_examples` examples of `pairs`.
    """

    pairs: str = ""
    n_examples: int = 0
    prompts: tuple[PromptDetails, ...] = ()
    direct: Mapping[str, float] = field(default_factory=dict[str, float])
    n_direct: int = 0
    direction: str = ""
    notes: tuple[str, ...] = ()
    tokens: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of every feature, the tokens that its direction raises most."""
    fires: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of every feature, where it is most active in the prompts."""
    example: PromptExample | None = None
    """The first of the prompts beside its corrupt one."""
    unit: str = "logits"
    """Of `direct`."""


def node_details(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    pairs_name: str,
    *,
    max_nodes: int = MAX_NODES,
    progress: Progress = no_progress,
) -> NodeDetails:
    """Patterns, written tokens and direct effects of the circuit's nodes on the clean prompts of `pairs`.

    Whatever cannot be measured is left out and listed in `notes`; it does not raise. Cost: two forwards per prompt
    shown, one per example of the mean, one unembedding per prompt with a row for every node.

    Args:
        model: the model of the circuit.
        circuit: the circuit whose nodes are measured.
        pairs: the examples.
        pairs_name: their name in the circuit file.
        max_nodes: of more heads, MLPs and neurons, those with the largest summed scores are taken; without scores, the
            first of the model.
        progress: called with the number of parts done: each prompt shown, and the direct effects.
    """
    names, notes = _chosen(circuit, max_nodes)
    rows = [row for row in range(min(SEARCHED, len(pairs))) if int(pairs.lengths[row]) <= MAX_TOKENS][:EXAMPLES]
    if not rows:
        notes.append(
            f"Patterns and written tokens are left out: the first {min(SEARCHED, len(pairs))} prompts have more than "
            f"{MAX_TOKENS} tokens."
        )
    of_reading = explained(model) is READING
    if of_reading:
        notes.append("Written tokens are left out: the circuit explains the reading of a direction, not logits.")
    prompts: list[PromptDetails] = []
    direct, n_direct, direction = dict[str, float](), 0, ""
    try:
        heads = [name for name in names if Node.parse(name).kind == "head"]
        for row in rows:
            progress(len(prompts), len(rows) + 1)
            prompts.append(_prompt(model, pairs, row, names, heads))
        progress(len(rows), len(rows) + 1)
        direct, n_direct, direction = _direct(model, pairs, names)
        progress(len(rows) + 1, len(rows) + 1)
    except MechInterpError as error:
        notes.append(f"Some details of nodes are left out: {error}")
    tokens = {} if of_reading else _feature_tokens(model, circuit)
    fires = _fires(model, circuit, pairs, rows)
    example = prompt_example(model, pairs, rows[0], pairs_name) if rows else None
    return NodeDetails(
        pairs_name,
        len(pairs),
        tuple(prompts),
        direct,
        n_direct,
        direction,
        tuple(notes),
        tokens,
        fires,
        example,
        "of the reading" if of_reading else "logits",
    )


def _fires(model: HookManager, circuit: Circuit, pairs: Pairs, rows: Sequence[int]) -> dict[str, str]:
    """Of the circuit's features, the tokens of each prompt at which they are most active, with their activations."""
    used = {split_position(name)[0] for name in circuit.nodes}
    families = [family for family in circuit.graph.features if family.chosen is not None]
    found: dict[str, list[str]] = {}
    for row in rows if families else ():
        one = pairs[[row]].to(model.device)
        ids = one.clean[:, : int(one.lengths[0])]
        values = model.run(ids, record=[family.loaded() for family in families]).values
        for family in families:
            for name, active in zip(family.writers, values[family.loaded()][0].T, strict=True):
                best = [i for i in active.abs().argsort(descending=True).tolist()[:3] if float(active[i])]
                if name in used and best:
                    where = ", ".join(f"{token_text(model, int(ids[0, i]))} {float(active[i]):.3g}" for i in best)
                    found.setdefault(name, []).append(f"prompt {row + 1}: {where}")
    return {name: "; ".join(several) for name, several in found.items()}


def _feature_tokens(model: HookManager, circuit: Circuit) -> dict[str, str]:
    """The tokens that the directions of the circuit's features raise most, through final norm and unembedding."""
    used = {split_position(name)[0] for name in circuit.nodes}
    found: dict[str, str] = {}
    for family in circuit.graph.features:
        if family.chosen is None:
            continue
        table = top_tokens(model, family.directions(model), TOP_TOKENS)
        for row, part in table.groupby("row"):
            if (name := family.writers[int(row)]) in used:  # pyright: ignore[reportArgumentType]
                found[name] = ", ".join(token_text(model, int(token)) for token in part["token"])
    return found


def _chosen(circuit: Circuit, most: int) -> tuple[list[str], list[str]]:
    """The nodes to measure, in the order of the model, and notes on the others."""
    own = list(dict.fromkeys(split_position(name)[0] for name in circuit.nodes))
    split = set(circuit.graph.split_writers)  # the remainder of a split MLP has no single output
    found = [name for name in own if node_of(name).kind in NODES_WITH_SITES and name not in split]
    notes = [f"No details for {', '.join(sorted(split & set(own)))}: parts of them are separate nodes."]
    notes = notes if split & set(own) else []
    if len(found) <= most:
        return found, notes
    order = found
    how = "the first of the model"
    if circuit.scores is not None:
        table = torch.where(circuit.kept, circuit.scores.values.cpu(), 0).sum(0).abs().tolist()
        strength = dict(zip(circuit.graph.writers, table, strict=True))
        order, how = sorted(found, key=lambda name: -strength[name]), "those with the largest scores"
    kept = set(order[:most])
    left = len(found) - most
    notes.append(f"Patterns and written tokens are of {most} nodes ({how}); {left} others were left out.")
    return [name for name in found if name in kept], notes


def _prompt(model: HookManager, pairs: Pairs, row: int, names: Sequence[str], heads: Sequence[str]) -> PromptDetails:
    one = pairs[[row]].to(model.device)
    length = int(one.lengths[0])
    ids = one.clean[:, :length]
    written: dict[str, Written] = {}
    if names and explained(model) is not READING:
        for name, part in writes_lens(model, one, names, top_k=TOP_TOKENS).groupby("node", sort=False):
            written[str(name)] = Written(_top(model, part, "raised"), _top(model, part, "lowered"))
    return PromptDetails(
        row,
        tuple(token_text(model, token) for token in ids[0].tolist()),
        int(one.answer_pos[0, 0]),
        answer_texts(model, one.right, 0),
        answer_texts(model, one.wrong, 0),
        _patterns(model, ids, heads),
        written,
    )


def _top(model: HookManager, table: pd.DataFrame, which: str) -> TokenLogits:
    ids, by = table[which].tolist(), table[f"{which}_by"].tolist()
    return tuple((token_text(model, int(token)), float(value)) for token, value in zip(ids, by, strict=True))


def _patterns(model: HookManager, ids: Tensor, heads: Sequence[str]) -> dict[str, Float[Tensor, "query key"]]:
    nodes = [Node.parse(name) for name in heads]
    sites = [Site("pattern", layer) for layer in sorted({node.layer for node in nodes})]
    if not sites:
        return {}
    values = model.run(ids, record=sites, stop=sites[-1]).values
    return {str(node): values[Site("pattern", node.layer)][0, node.head].float().cpu() for node in nodes}


def _direct(model: HookManager, pairs: Pairs, names: Sequence[str]) -> tuple[dict[str, float], int, str]:
    some = pairs[:MEAN_OVER]
    if names and explained(model) is READING:
        parts, text = direct_effects(model, some, 16), "reading of the direction, clean less corrupt prompt"
    elif names and pairs.right is not None:
        direction = "right" if pairs.wrong is None else "answers"
        refine = ["input"] if "pos_embed" in names else []
        parts = direct_logit_attribution(model, some, direction, refine=refine, batch_size=16)
        text = str(parts.about["direction"])
    else:
        return {}, 0, ""
    means = dict(zip(parts.labels["node"], parts.mean("example").values.tolist(), strict=True))
    return {name: means[name] for name in names if math.isfinite(means.get(name, math.nan))}, len(some), text
