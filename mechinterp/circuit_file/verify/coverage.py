"""What `verify` covers: which parts of a circuit file are recomputed, only hash-checked, or not checked at all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from mechinterp.base.errors import clip
from mechinterp.circuit_file.schema import CircuitFile, FeaturesRecord, TaskRecord
from mechinterp.circuit_file.setting_types import REFINEMENT, RULES, SELECTION
from mechinterp.circuit_file.verify.role_support import support_of_roles

RESCORED = "scores again"
"""The claim that needs `rescore=True`; what comes with it ends in "again", too."""
READOUT = "direction"
"""The claim that the direction which is read is the one of the file."""
OF_THE_TASK = "of the task"
"""Suffix of the claim that the task makes all the pairs that are given as token ids."""


@dataclass(frozen=True)
class Part:
    """A part of a circuit file: its field, and a description."""

    field: str
    words: str


@dataclass(frozen=True)
class Extent:
    """Every part of a circuit file in one of three lists.

    A part that is only hashed is unchanged since it was written, which does not show that it was ever true. Free text
    is the author's own.
    """

    recomputed: tuple[Part, ...]
    only_hashed: tuple[Part, ...]
    free_text: tuple[Part, ...]

    def lists(self) -> tuple[tuple[str, tuple[Part, ...]], ...]:
        """The three lists with their headings."""
        return (
            ("recomputed", self.recomputed),
            ("only hash-checked", self.only_hashed),
            ("free text, never checked", self.free_text),
        )

    def lines(self) -> tuple[tuple[str, str], ...]:
        """The three lists as text: a heading, and its parts separated by semicolons, shortened if they are many."""
        return tuple((heading, _listed(parts)) for heading, parts in self.lists())


NOTHING = Extent((), (), ())
_MOST_PARTS, _MOST_LETTERS = 40, 100


def _listed(parts: tuple[Part, ...]) -> str:
    words = [clip(part.words, _MOST_LETTERS) for part in parts[:_MOST_PARTS]]
    more = [f"{len(parts) - _MOST_PARTS} more"] if len(parts) > _MOST_PARTS else []
    return "; ".join([*words, *more]) or "nothing"


def extent_of(document: CircuitFile, compared: Collection[str] | None = None) -> Extent:
    """The three lists, given the names of the claims that were compared.

    `compared=None` stands for all claims that `verify` compares if the model is available, without `rescore`.
    """
    parts = list(_parts(document))
    if compared is None:
        compared = {
            claim for _, claims in parts for claim in claims if not claim.endswith("again") and OF_THE_TASK not in claim
        }
    done = [bool(claims) and set(claims) <= set(compared) for _, claims in parts]
    return Extent(
        tuple(part for (part, _), is_done in zip(parts, done, strict=True) if is_done),
        tuple(part for (part, _), is_done in zip(parts, done, strict=True) if not is_done),
        tuple(_free_text(document)),
    )


def evaluation_name(document: CircuitFile, number: int) -> str:
    """The first part of the names of all claims about an evaluation."""
    return "evaluation" if len(document.evaluation) == 1 else f"evaluation[{number}]"


def basis_claim(record: FeaturesRecord) -> str:
    """The name of the claim that a basis is the one of the file."""
    return f"basis {record.basis}"


def applies_again(document: CircuitFile) -> bool:
    """Whether the selection is a rule that can be applied to the scores again."""
    stated = set(document.selection.parameters)
    return document.discovery is not None and bool(stated) and stated <= set(SELECTION)


def refined(document: CircuitFile) -> bool:
    """Whether the circuit was refined after it was selected by a rule, which no scores can show."""
    stated = document.selection.parameters
    return "refined" in stated and stated.get("rule", "top") in RULES and set(stated) <= {*SELECTION, *REFINEMENT}


def _parts(document: CircuitFile) -> Iterable[tuple[Part, tuple[str, ...]]]:
    """Every part that is not free text, with the claims that recompute it (empty: none do)."""
    model, selection, discovery = document.model, document.selection, document.discovery
    yield Part("integrity", "hashes"), ("file hash", "circuit hash")
    yield Part("graph", "graph"), ("graph",)
    yield Part("edges", "that nodes and edges are of this graph"), ("nodes",)
    yield Part("selection", "choice of the edges"), ("selection",) if applies_again(document) else ()
    if selection.size is not None:
        yield Part("selection", "choice of the size"), ("selection.size", "curve.faithfulness")
    if document.performance is not None:
        yield Part("performance", "that the model does the task"), ("performance.difference",)
    if document.stability is not None:
        yield Part("stability", "stability over resampled examples"), ("stability.jaccard again", RESCORED)
    if discovery is not None:
        yield Part("discovery", f"scores and how they were made ({discovery.method})"), (RESCORED,)
        yield Part("discovery", "cost of the scores"), ()
    elif any(edge.score is not None for edge in document.edges):
        yield Part("edges", "scores of the edges"), ()
    weights = () if model.weights_sha256 is None else ("model.weights_sha256",)
    yield Part("model", "model and weights" if weights else "sizes of the model"), ("model.dims", *weights)
    if model.file is not None:
        yield Part("model", "the file that the model was opened from"), ("model.file",)
    yield Part("model", f"name of the model ({model.name})"), ("model.origin",) * (model.origin != "memory")
    for record in document.graph.features or ():
        yield Part("graph", f"dictionary of {record.basis} ({record.where})"), (basis_claim(record),)
    if document.readout is not None:
        yield Part("readout", f"direction that is read ({document.readout.where})"), (READOUT,)
    if document.tokenizer is not None:
        yield Part("tokenizer", "tokenizer"), ("tokenizer",)
    yield from _examples(document)
    for number, entry in enumerate(document.evaluation):
        name = evaluation_name(document, number)
        yield Part("evaluation", f"{name} on {entry.pairs!r}"), (f"{name}.metric", f"{name}.faithfulness")
    if document.curve is not None:
        yield Part("curve", "curve over sizes"), ("curve.n_edges", "curve.faithfulness")
    if document.predictions:
        claims = tuple(f"prediction {prediction.name}" for prediction in document.predictions)
        yield Part("predictions", f"{len(claims)} predictions"), claims
    yield from _roles(document)
    yield Part("provenance", "versions, device and command"), ()


def _roles(document: CircuitFile) -> Iterable[tuple[Part, tuple[str, ...]]]:
    """The roles, divided into those that predictions support and the others."""
    support = support_of_roles(document)
    n, without = sum(len(entry.role.nodes) for entry in support), sum(len(entry.without) for entry in support)
    if n > without:
        claims = {f"prediction {prediction.name}" for entry in support for prediction in entry.predictions}
        yield Part("roles", f"predictions about {n - without} of {n} nodes with roles"), tuple(sorted(claims))
    if without:
        yield Part("roles", f"roles of {without} of {n} nodes"), ()


def _examples(document: CircuitFile) -> Iterable[tuple[Part, tuple[str, ...]]]:
    """The task and the pairs. Content that is in the file itself cannot be compared with anything."""
    task = document.task
    if isinstance(task, TaskRecord):
        whose = "of the package" if task.bundled else "of the file's own"
        yield Part("task", f"task {task.name!r} {whose}"), ("task",) if task.bundled else ()
    elif task is not None:
        yield Part("task", f"name of the pairs ({task.name})"), ()
    for name, record in document.pairs.items():
        if record.made_from.kind == "task":
            yield Part("pairs", f"pairs {name!r}"), (f"pairs.{name}",)
        else:
            claims = (f"pairs.{name} {OF_THE_TASK}",) if isinstance(task, TaskRecord) else ()
            yield Part("pairs", f"pairs {name!r} as token ids"), claims


def _free_text(document: CircuitFile) -> Iterable[Part]:
    """Texts by the author, which are not compared with anything."""
    for name in ("id", "title", "description", "license", "citation"):
        if getattr(document, name):
            yield Part(name, name)
    if document.created_utc:
        yield Part("created_utc", "date")
    if document.derived_from:
        yield Part("derived_from", "sources")
    yield Part("status", f"status ({document.status})")
    if document.positions:
        yield Part("positions", "descriptions of positions")
    if document.roles:
        yield Part("roles", "names and descriptions of roles")
    if document.role_edges:
        yield Part("role_edges", "edges between roles")
    if isinstance(document.task, TaskRecord) and not document.task.bundled:
        yield Part("task", "title and source of the task")
    if document.predictions:
        yield Part("predictions", "names and statements of predictions")
    if document.extensions:
        yield Part("extensions", "extensions")
