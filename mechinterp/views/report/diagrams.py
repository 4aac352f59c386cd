"""Data for the diagrams of a circuit: boxes of nodes by role or by layer, and the arrows between them.

A diagram of roles is drawn like figure 2 of Wang et al. 2022 (arXiv 2211.00593): token positions are columns, the input
is at the bottom, and a role stands at the position at which its heads write. What a file states of positions decides:
positions of nodes or of edges between roles, else those of the predictions that support the role.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from statistics import fmean
from typing import Any

from mechinterp.base.canonical_json import six_digits
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.circuit_file.summary import NO_ROLE, coloured
from mechinterp.circuit_file.verify.role_support import support_of_roles
from mechinterp.evaluation.predictions import Attention, DirectEffect, DirectEffectChange, PathPatched, Prediction
from mechinterp.evaluation.role_names import plain_role
from mechinterp.graphs.colours import NODE_LOOKS
from mechinterp.graphs.graph import REST
from mechinterp.graphs.layered_layout import Net
from mechinterp.models.sites import node_of, split_position
from mechinterp.views.plots.circuit import kind_of
from mechinterp.views.report.prompt_example import PromptExample

MAIN_SHARE, MAIN_ARROWS = 0.03, 40
"""The arrows of the first view: at least this share of the largest, and at most so many."""
CROWDED = 500
"""With more lines than this, and no roles, the first view is by layer."""
FEW_ROLES = 3
"""With fewer roles than this, the first view also has the nodes without a role."""
MAX_BESIDE = 3
"""At most so many roles stand side by side in one column."""
MAX_ROLES = 60
"""With more roles than this, there is no diagram of them."""
MAX_BLOCKS = 12
"""Layers are drawn in at most so many blocks."""
INPUT, LOGITS = "input", "logits"
ANYWHERE = ""
"""The column of boxes for which no position is stated."""


@dataclass(frozen=True)
class Box:
    """One box of a diagram: its kind is `role`, `plain` (nodes without a role), `layers`, `input` or `logits`."""

    key: str
    kind: str
    label: str
    colour: str
    nodes: tuple[str, ...] = ()
    description: str = ""
    column: str = ANYWHERE


@dataclass
class Arrow:
    """All lines from one box to another through one input, at one position of the input where that is stated.

    `weight` is the sum of their scores, None where edges have no scores of their own.
    """

    source: int
    target: int
    inputs: tuple[str, ...]
    at: str = ANYWHERE
    weight: float | None = None
    names: set[str] = field(default_factory=set[str])
    note: str = ""


def diagrams(net: Net, document: CircuitFile, example: PromptExample | None) -> list[dict[str, Any]]:
    """The diagram of roles if the file has some (and not too many to be read); else by layer above `CROWDED` lines.

    Args:
        net: all lines of the circuit, as they are drawn, with `score` where they have one.
        document: the circuit file.
        example: a pair of prompts, whose tokens and positions name the columns.
    """
    scored = document.graph.granularity == "edge" and all("score" in data for *_, data in net.edges(data=True))
    if 0 < len(document.roles) <= MAX_ROLES:
        return [_of_roles(net, document, example, scored)]
    return [_of_layers(net, document, scored)] if net.number_of_edges() > CROWDED else []


def _of_roles(net: Net, document: CircuitFile, example: PromptExample | None, scored: bool) -> dict[str, Any]:
    answers = _answers_at(document, example)
    boxes = list(_role_boxes(net, document, answers))
    found = _arrows(net, boxes, scored)
    claimed = document.role_edges is not None
    if document.role_edges:
        index = {box.key: i for i, box in enumerate(boxes)}
        arrows = list(_claims(document, index, found))
    else:
        arrows = _with_read_positions(found, boxes, document)
    main = set(range(len(arrows))) if claimed else _main(arrows, boxes)
    named = {i for i, box in enumerate(boxes) if box.kind != "plain"}
    few = not claimed and len(document.roles) < FEW_ROLES
    shown = set(range(len(boxes))) if few else named
    levels = _levels(boxes, [arrow for i, arrow in enumerate(arrows) if i in main], shown)
    names = {box.column for box in boxes if box.kind != "input"} | {arrow.at for arrow in arrows}
    inside, total = _share(found, named)
    return {
        "by": "roles",
        "claimed": claimed,
        "stated": len(document.role_edges or ()),
        "plain": few,
        "weights": "scores" if scored and not claimed else "none" if claimed else "edges",
        "columns": _columns(names, [arrow for i, arrow in enumerate(arrows) if i in main], boxes, document, example),
        "boxes": [_box(box, levels[i]) for i, box in enumerate(boxes)],
        "arrows": [_arrow(arrow, i in main) for i, arrow in enumerate(arrows)],
        "inside": inside,
        "total": total,
    }


def _of_layers(net: Net, document: CircuitFile, scored: bool) -> dict[str, Any]:
    n_layers = document.model.dims.n_layers
    per = -(-n_layers // MAX_BLOCKS)
    members: dict[tuple[int, bool], list[str]] = defaultdict(list)
    inputs, logits = list[str](), list[str]()
    for name in map(str, net.nodes):
        node = node_of(name)
        if node.kind == "logits":
            logits.append(name)
        elif node.layer < 0:
            inputs.append(name)
        else:
            members[node.layer // per, node.in_mlp].append(name)
    boxes = [Box(INPUT, "input", "input", NODE_LOOKS["input"].colour, tuple(inputs))]
    levels = [0]
    for (block, in_mlp), names in sorted(members.items()):
        first, last = block * per, min(n_layers, (block + 1) * per) - 1
        which = f"{first}" if first == last else f"{first} to {last}"
        label = f"{'MLPs' if in_mlp else 'heads'}, layer{'' if first == last else 's'} {which}"
        colour = NODE_LOOKS["mlp" if in_mlp else "head"].colour
        column = "MLPs" if in_mlp else "heads"
        boxes.append(Box(f"{block}{column}", "layers", label, colour, tuple(sorted(names, key=node_of)), "", column))
        levels.append(1 + 2 * block + in_mlp if per == 1 else 1 + block)
    boxes.append(Box(LOGITS, "logits", "logits", NODE_LOOKS["logits"].colour, tuple(logits)))
    levels.append(max(levels) + 1)
    arrows = _arrows(net, boxes, scored)
    main = _main(arrows, boxes)
    inside, total = _share(arrows, set(range(len(boxes))))
    return {
        "by": "layers",
        "claimed": False,
        "stated": 0,
        "plain": False,
        "weights": "scores" if scored else "edges",
        "columns": [{"name": name, "token": ""} for name in ("heads", "MLPs")],
        "boxes": [_box(box, level) for box, level in zip(boxes, levels, strict=True)],
        "arrows": [_arrow(arrow, i in main) for i, arrow in enumerate(arrows)],
        "inside": inside,
        "total": total,
    }


# -- boxes -------------------------------------------------------------------------------------------------------------


def _role_boxes(net: Net, document: CircuitFile, answers: str) -> Iterable[Box]:
    of_node = {name: key for key, role in document.roles.items() for name in role.nodes}
    names = [str(name) for name in net.nodes]
    inputs = tuple(name for name in names if kind_of(name) == "input")
    yield Box(INPUT, "input", "input", NODE_LOOKS["input"].colour, inputs)
    support = support_of_roles(document)
    colours = coloured(document.roles)
    for (key, role), (_, colour), supported in zip(document.roles.items(), colours, support, strict=True):
        column = _column_of_role(key, role.nodes, document, supported.predictions, answers)
        yield Box(key, "role", plain_role(role.label), colour, role.nodes, role.description, column)
    plain: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if name not in of_node and kind_of(name) not in ("input", "logits"):
            plain[kind_of(name)].append(name)
    for kind, without in plain.items():
        label = f"{NODE_LOOKS[kind].label.removeprefix('attention ')}s without a role"
        yield Box(f" {kind}", "plain", label, NO_ROLE, tuple(sorted(without, key=node_of)))
    yield Box(LOGITS, "logits", "logits", NODE_LOOKS["logits"].colour, (LOGITS,), "", answers)


def _column_of_role(
    key: str, nodes: Sequence[str], document: CircuitFile, predictions: Sequence[Prediction], answers: str
) -> str:
    """The position at which the nodes of a role write, as far as the file states it."""
    stated = Counter(position for name in nodes if (position := split_position(name)[1]))
    if stated:
        return stated.most_common(1)[0][0]
    for edge in document.role_edges or ():
        if edge.target == key and "q" in (edge.positions or {}):
            return (edge.positions or {})["q"]
    for edge in document.role_edges or ():
        if edge.source == key and edge.positions:
            return next(iter(edge.positions.values()))  # what a role sends is read where it writes
    queries = {str(p.measure.query) for p in predictions if isinstance(p.measure, Attention)}
    if len(queries) == 1:
        return queries.pop()
    by_answers = (DirectEffect, DirectEffectChange, PathPatched)
    return answers if any(isinstance(p.measure, by_answers) for p in predictions) else ANYWHERE


def _answers_at(document: CircuitFile, example: PromptExample | None) -> str:
    """The name of the position at which the answer is read; ANYWHERE if the file names none."""
    if document.graph.answers:
        return document.graph.answers
    for edge in document.role_edges or ():
        if edge.target == LOGITS and edge.positions:
            return next(iter(edge.positions.values()))
    if example is not None:
        return next((name for name, at in example.positions.items() if at == example.answer_pos), ANYWHERE)
    names = {str(p.measure.query) for p in document.predictions or () if isinstance(p.measure, Attention)}
    return "end" if "end" in names else ANYWHERE


# -- arrows ------------------------------------------------------------------------------------------------------------


def _arrows(net: Net, boxes: Sequence[Box], scored: bool) -> list[Arrow]:
    """One arrow for every two boxes, input and (of the model's input) position; an edge counts once for each."""
    box_of = {name: i for i, box in enumerate(boxes) for name in box.nodes}
    found: dict[tuple[int, int, str, str], Arrow] = {}
    for a, b, data in net.edges(data=True):
        source, target = box_of[str(a)], box_of[str(b)]
        channel = data["channel"] or ("logits" if b == LOGITS else "mlp")
        at = split_position(str(a))[1] if boxes[source].kind == "input" else ANYWHERE
        arrow = found.setdefault((source, target, channel, at), Arrow(source, target, (channel,), at))
        if data["name"] not in arrow.names:
            arrow.names.add(data["name"])
            arrow.weight = (arrow.weight or 0.0) + data["score"] if scored else None
    return list(found.values())


def _claims(document: CircuitFile, index: Mapping[str, int], found: Sequence[Arrow]) -> Iterable[Arrow]:
    """The edges between roles that the file states, with the edges of the circuit that spell them out."""
    between: dict[tuple[int, int], set[str]] = defaultdict(set)
    for arrow in found:
        between[arrow.source, arrow.target] |= arrow.names
    for edge in document.role_edges or ():
        source, target = index[edge.source], index[edge.target]
        groups: dict[str, list[str]] = defaultdict(list)
        for name in edge.inputs or ((LOGITS,) if edge.target == LOGITS else ("mlp",)):
            groups[(edge.positions or {}).get(name, ANYWHERE) if edge.source == INPUT else ANYWHERE].append(name)
        for at, names in groups.items():
            yield Arrow(source, target, tuple(names), at, None, between[source, target], edge.note or "")


def _with_read_positions(arrows: Sequence[Arrow], boxes: Sequence[Box], document: CircuitFile) -> list[Arrow]:
    """Arrows from the input with the position that the target attends to, where all its predictions agree on one."""
    reads: dict[str, dict[str, str]] = {}
    for key, supported in zip(document.roles, support_of_roles(document), strict=True):
        measures = [p.measure for p in supported.predictions if isinstance(p.measure, Attention)]
        if len({(m.query, m.key) for m in measures}) == 1:
            reads[key] = {"q": str(measures[0].query)} | dict.fromkeys("kv", str(measures[0].key))
    for arrow in arrows:
        if boxes[arrow.source].kind == "input" and not arrow.at:
            arrow.at = reads.get(boxes[arrow.target].key, {}).get(arrow.inputs[0], ANYWHERE)
    return list(arrows)


def _size(arrow: Arrow) -> float:
    return float(len(arrow.names)) if arrow.weight is None else abs(arrow.weight)


def _main(arrows: Sequence[Arrow], boxes: Sequence[Box]) -> set[int]:
    """The arrows of the first view; those of nodes without a role are chosen by themselves."""
    found: set[int] = set()
    for plain in (False, True):
        mine = [
            i
            for i, arrow in enumerate(arrows)
            if (("plain" in (boxes[arrow.source].kind, boxes[arrow.target].kind)) == plain)
            and arrow.source != arrow.target
        ]
        largest = max((_size(arrows[i]) for i in mine), default=0.0)
        strong = sorted((i for i in mine if _size(arrows[i]) >= MAIN_SHARE * largest), key=lambda i: -_size(arrows[i]))
        found |= set(strong[:MAIN_ARROWS])
    return found


def _share(arrows: Iterable[Arrow], named: set[int]) -> tuple[int, int]:
    """(edges between the named boxes, all edges), counted by name."""
    inside, every = set[str](), set[str]()
    for arrow in arrows:
        every |= arrow.names
        if {arrow.source, arrow.target} <= named:
            inside |= arrow.names
    return len(inside), len(every)


# -- places ------------------------------------------------------------------------------------------------------------


def _depth(box: Box) -> float:
    """The mean layer of its nodes; an MLP counts half a layer more than the heads before it."""
    nodes = [node_of(name) for name in box.nodes]
    return fmean(node.layer + 0.5 * node.in_mlp for node in nodes) if nodes else -1.0


def _levels(boxes: Sequence[Box], arrows: Sequence[Arrow], named: set[int]) -> list[int]:
    """The row of every box: above all boxes that it reads from, as far as the mean layers have that order."""
    depth = [_depth(box) for box in boxes]
    below: dict[int, set[int]] = {i: set() for i in named}
    for arrow in arrows:
        a, b = arrow.source, arrow.target
        forward = boxes[b].kind == "logits" or boxes[a].kind == "input" or depth[a] < depth[b]
        if a != b and {a, b} <= named and forward:
            below[b].add(a)
    levels = [1] * len(boxes)
    order = list(TopologicalSorter(below).static_order())
    for i in order:
        levels[i] = max((levels[j] + 1 for j in below[i]), default=0 if boxes[i].kind == "input" else 1)
    roles = [i for i in order if boxes[i].kind not in ("input", "logits")]
    joined = [i for i in roles if below[i] or any(i in below[j] for j in roles)]
    for i in reversed(roles):  # what nothing shown feeds stands just below what it feeds, else beside what is as deep
        above = [levels[j] for j in roles if i in below[j]]
        if not below[i] and above:
            levels[i] = max(1, min(above) - 1)
        elif not below[i] and joined:
            levels[i] = levels[min(joined, key=lambda j: abs(depth[j] - depth[i]))]
    for i in range(len(boxes)):
        if i not in named and roles:
            levels[i] = levels[min(roles, key=lambda j: abs(depth[j] - depth[i]))]
    return _not_too_wide(boxes, levels, depth)


def _not_too_wide(boxes: Sequence[Box], levels: Sequence[int], depth: Sequence[float]) -> list[int]:
    """The levels, with another one wherever more than `MAX_BESIDE` roles would stand side by side in one column."""
    cells: dict[tuple[int, str], list[int]] = defaultdict(list)
    for i, box in enumerate(boxes):
        if box.kind in ("role", "layers"):
            cells[levels[i], box.column].append(i)
    key = [(level, 0) for level in levels]
    for some in cells.values():
        for rank, i in enumerate(sorted(some, key=lambda i: depth[i])):
            key[i] = (levels[i], rank // MAX_BESIDE)
    middle = [key[i] for i, box in enumerate(boxes) if box.kind not in ("input", "logits")]
    row = {place: 1 + k for k, place in enumerate(sorted(set(middle)))}
    ends = {"input": 0, "logits": len(row) + 1}
    return [ends[box.kind] if box.kind in ends else row[key[i]] for i, box in enumerate(boxes)]


def _columns(
    names: set[str],
    arrows: Sequence[Arrow],
    boxes: Sequence[Box],
    document: CircuitFile,
    example: PromptExample | None,
) -> list[dict[str, str]]:
    """The columns from left to right, in the order of the prompt: boxes without a position, then the positions."""
    named = {name for name in names if name}
    places = dict(example.positions) if example is not None else {}
    if named <= set(places) | {REST}:
        named |= set(places)
        order = sorted(named, key=lambda name: (name == REST, places.get(name, 0), name))
    else:
        order = _causal_order(named, arrows, boxes, document)
    tokens = {name: example.clean[at] for name, at in places.items()} if example is not None else {}
    roles = {i for i, box in enumerate(boxes) if box.kind in ("role", "logits")}
    free = any(boxes[i].column == ANYWHERE for i in roles)
    free |= any(boxes[arrow.source].kind == "input" and not arrow.at for arrow in arrows if arrow.target in roles)
    first = [{"name": ANYWHERE, "token": ""}] if free or not order else []
    return first + [{"name": name, "token": tokens.get(name, "")} for name in order]


def _causal_order(names: set[str], arrows: Sequence[Arrow], boxes: Sequence[Box], document: CircuitFile) -> list[str]:
    """An order in which every position comes after those that heads at it attend to; by name where that is open."""
    before: dict[str, set[str]] = {name: set() for name in names}
    pairs = [(arrow.at, boxes[arrow.target].column) for arrow in arrows if set(arrow.inputs) & {"k", "v"}]
    pairs += [
        (boxes[arrow.source].column, boxes[arrow.target].column)
        for arrow in arrows
        if document.role_edges and set(arrow.inputs) & {"k", "v"}
    ]
    measured = [p.measure for p in document.predictions or () if isinstance(p.measure, Attention)]
    pairs += [(str(measure.key), str(measure.query)) for measure in measured]
    for first, later in pairs:
        if first in names and later in names and first != later:
            before[later].add(first)
    for name in names - {REST}:
        before.setdefault(REST, set()).add(name)
    order: list[str] = []
    sorter = TopologicalSorter(before)
    try:
        sorter.prepare()
    except CycleError:
        return sorted(names)
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        order += ready
        sorter.done(*ready)
    return [name for name in order if name in names]


# -- JSON --------------------------------------------------------------------------------------------------------------


def _box(box: Box, level: int) -> dict[str, Any]:
    return {
        "kind": box.kind,
        "label": box.label,
        "colour": box.colour,
        "description": box.description,
        "nodes": box.nodes,
        "column": box.column,
        "level": level,
    }


def _arrow(arrow: Arrow, main: bool) -> dict[str, Any]:
    return {
        "from": arrow.source,
        "to": arrow.target,
        "inputs": arrow.inputs,
        "at": arrow.at,
        "weight": None if arrow.weight is None else six_digits(arrow.weight),
        "n": len(arrow.names),
        "main": main,
        "note": arrow.note,
    }
