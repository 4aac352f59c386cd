"""What a circuit file may say: the pydantic model that the published JSON Schema is generated from.

`extensions` is the one free place. Nothing here reads a file or needs torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mechinterp.evaluation.predictions import ON_PAIRS, Prediction
from mechinterp.files.limits import (
    MAX_EVALUATIONS,
    MAX_GRAPH_CELLS,
    MAX_NODES,
    MAX_PAIRS,
    MAX_PREDICTIONS,
    MAX_ROLES,
)
from mechinterp.files.schema_pairs import PairsRecord, TaskPairs
from mechinterp.files.schema_parts import (
    Citation,
    CurveRecord,
    DiscoveryRecord,
    EdgeRecord,
    EvaluationRecord,
    FileTaskRecord,
    GraphRecord,
    Integrity,
    Label,
    ModelRecord,
    Named,
    Origin,
    Position,
    Provenance,
    Role,
    RoleEdge,
    SelectionRecord,
    TaskRecord,
    Text,
    TokenizerRecord,
    TokensTaskRecord,
)
from mechinterp.jsontext import canonical_sha256
from mechinterp.tasks.schema import Strict

SCHEMA_VERSION = 1
"""Sets of examples; each is made again."""


class CircuitFile(Strict):
    """A circuit file: which circuit of which model, how it was found, what it does, and how to check that."""

    schema_version: Literal[1]
    kind: Literal["circuit"]
    id: Label
    title: Label
    description: Text = ""
    license: Label | None = None
    created_utc: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")] | None = None
    citation: Citation | None = None
    derived_from: Annotated[tuple[Origin, ...], Named] = ()
    status: Literal["published", "discovered", "ground-truth", "imported"]
    model: ModelRecord
    tokenizer: TokenizerRecord | None = None
    graph: GraphRecord
    positions: Annotated[dict[Label, Position], Named] = Field(default_factory=dict)
    """The named positions that nodes are restricted to; empty: every node is at all positions."""
    roles: Annotated[dict[Label, Role], Field(max_length=MAX_ROLES)] = Field(default_factory=dict)
    role_edges: Annotated[tuple[RoleEdge, ...], Field(max_length=MAX_ROLES)] | None = None
    """The claim between roles that the edges were made from by a rule; null: there is none."""
    nodes: Annotated[tuple[Label, ...], Field(max_length=MAX_NODES)]
    edges: Annotated[tuple[EdgeRecord, ...], Field(min_length=1, max_length=MAX_GRAPH_CELLS)]
    task: Annotated[TaskRecord | FileTaskRecord | TokensTaskRecord, Field(discriminator="kind")] | None = None
    pairs: Annotated[dict[Label, PairsRecord], Field(max_length=MAX_PAIRS)] = Field(default_factory=dict)
    discovery: DiscoveryRecord | None = None
    selection: SelectionRecord
    evaluation: Annotated[tuple[EvaluationRecord, ...], Field(max_length=MAX_EVALUATIONS)] = ()
    curve: CurveRecord | None = None
    predictions: Annotated[tuple[Prediction, ...], Field(max_length=MAX_PREDICTIONS)] | None = None
    """What the file predicts, to be measured again; null: nothing."""
    provenance: Provenance
    integrity: Integrity
    extensions: dict[str, Any] = Field(default_factory=dict)
    """Free for other tools; this package keeps it and reads none of it."""

    @model_validator(mode="after")
    def _refers_to_what_is_there(self) -> CircuitFile:
        used = [entry.pairs for entry in self.evaluation] + [entry.reference for entry in self.evaluation]
        used += [self.discovery.pairs] if self.discovery else []
        used += [self.curve.pairs] if self.curve else []
        used += [self.selection.size.pairs] if self.selection.size else []
        predictions = self.predictions or ()
        used += [prediction.pairs for prediction in predictions]
        if len({prediction.name for prediction in predictions}) != len(predictions):
            raise ValueError("two predictions have the same name")
        for prediction in predictions:
            if isinstance(prediction.measure, ON_PAIRS) != (prediction.pairs is not None):
                raise ValueError(
                    f"prediction {prediction.name!r}: a measurement on examples names its pairs, others none"
                )
        for name in used:
            if name is not None and name not in self.pairs:
                raise ValueError(f"pairs {name!r} are used but not described under `pairs`")
        needs_task = any(isinstance(entry.made_from, TaskPairs) for entry in self.pairs.values())
        if needs_task and not isinstance(self.task, TaskRecord):
            raise ValueError("some pairs are made from a task, but no task is given")
        if self.selection.n_edges != len(self.edges):
            raise ValueError(f"selection.n_edges is {self.selection.n_edges}, but there are {len(self.edges)} edges")
        positions, neurons = self.graph.positions or (), self.graph.neurons or ()
        self.model.dims.check_graph(max(1, len(positions)), sum(map(len, neurons)))
        nodes = set(self.nodes)
        for role in self.roles.values():
            for node in role.nodes:
                if node not in nodes:
                    raise ValueError(f"role {role.label!r} names {node!r}, which is no node of the circuit")
        for edge in self.role_edges or ():
            for name, end in ((edge.source, "input"), (edge.target, "logits")):
                if name not in self.roles and name != end:
                    raise ValueError(f"a role edge names {name!r}, which is neither a role nor {end!r}")
        if self.model.weights_sha256 is None and (self.status != "published" or self.evaluation or self.discovery):
            raise ValueError("model.weights_sha256 is missing; only a published circuit without results can do so")
        return self


def circuit_sha256(document: CircuitFile) -> str:
    """The hash to cite: over model, graph, nodes, edges and positions; not over scores or results.

    The model counts by its weights, architecture, sizes and processing, not by where it was loaded from; by its name
    and revision where no weights are stated.
    """
    model = document.model
    unhashed = {"name": model.name, "revision": model.revision} if model.weights_sha256 is None else {}
    return canonical_sha256(
        {
            "model": {
                "weights_sha256": model.weights_sha256,
                "architecture": model.architecture,
                "dims": model.dims.model_dump(mode="json"),
                "processing": model.processing,
                **unhashed,
            },
            "graph": document.graph.model_dump(mode="json", exclude_none=True),
            "nodes": sorted(document.nodes),
            "edges": sorted(edge.name for edge in document.edges),
            "positions": {name: entry.description for name, entry in document.positions.items()},
        }
    )


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a circuit file, as it is published in the package."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **CircuitFile.model_json_schema(),
    }
