"""What a circuit file may say: the pydantic model that the published JSON Schema is generated from.

`extensions` is the one free place. Nothing here reads a file or needs torch.

The parts of a circuit file: small pydantic models whose field names are the file's.

Every part refuses unknown keys by name; numbers are finite and whole numbers are whole.

Sets of examples as a circuit file holds them: what makes them again, or their token ids.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mechinterp.base.canonical_json import canonical_sha256
from mechinterp.circuit_file.field_types import (
    Count,
    Flag,
    GgmlType,
    Index,
    Label,
    Named,
    Neurons,
    Number,
    Parameter,
    Seed,
    Sha256,
    Share,
    SidecarName,
    Small,
    Text,
    Version,
)
from mechinterp.circuit_file.limits import (
    MAX_EDGES,
    MAX_EVALUATIONS,
    MAX_EXAMPLES,
    MAX_GRAPH_CELLS,
    MAX_NAMED,
    MAX_NODES,
    MAX_PADDED,
    MAX_PAIRS,
    MAX_PREDICTIONS,
    MAX_ROLES,
    MAX_TOKEN_IDS,
    MAX_WORDS,
)
from mechinterp.circuit_file.result_schema import SCORE_SIGN as SCORE_SIGN
from mechinterp.circuit_file.result_schema import AblationRecord as AblationRecord
from mechinterp.circuit_file.result_schema import CurvePointRecord as CurvePointRecord
from mechinterp.circuit_file.result_schema import CurveRecord as CurveRecord
from mechinterp.circuit_file.result_schema import DiscoveryRecord as DiscoveryRecord
from mechinterp.circuit_file.result_schema import EvaluationRecord as EvaluationRecord
from mechinterp.circuit_file.result_schema import MetricRecord as MetricRecord
from mechinterp.circuit_file.result_schema import PerformanceRecord as PerformanceRecord
from mechinterp.circuit_file.result_schema import SelectionRecord as SelectionRecord
from mechinterp.circuit_file.result_schema import SizeRule as SizeRule
from mechinterp.circuit_file.result_schema import StabilityRecord as StabilityRecord
from mechinterp.circuit_file.result_schema import TemplateRecord as TemplateRecord
from mechinterp.circuit_file.result_schema import Tolerance as Tolerance
from mechinterp.evaluation.predictions import ON_PAIRS, Prediction
from mechinterp.tasks.schema import Strict


class Citation(Strict):
    """What to cite; every part is optional."""

    title: Label | None = None
    authors: Annotated[tuple[Label, ...], Named] = ()
    doi: Label | None = None
    arxiv: Label | None = None
    url: Label | None = None
    bibtex: Text | None = None


class Origin(Strict):
    """What the circuit was made from, when it was not discovered here."""

    source: Label
    path: Label | None = None
    commit: Label | None = None
    note: Text | None = None


class LayerDimsRecord(Strict):
    """What one layer of a hybrid model has: `mechinterp.models.layout.LayerDims`."""

    n_heads: Count
    """0: no heads."""
    n_kv_heads: Count
    mixer: Flag
    """Whether something else (a convolution, a state-space layer) takes the place of heads, as one node."""
    mlp: Flag

    @model_validator(mode="after")
    def _sensible(self) -> LayerDimsRecord:
        if self.mixer and self.n_heads:
            raise ValueError("a layer has heads, or a mixer in their place, not both")
        if bool(self.n_heads) != bool(self.n_kv_heads) or self.n_heads % max(1, self.n_kv_heads):
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        return self


class DimsRecord(Strict):
    """Sizes and shape of the model: `mechinterp.models.layout.Dims`, name by name."""

    n_layers: Small
    n_heads: Count
    """0 only if no layer has heads that can be told apart; `n_kv_heads` and `d_head` are then 0, too."""
    n_kv_heads: Count
    d_model: Small
    d_head: Count
    d_vocab: Small
    d_vocab_out: Small
    n_ctx: Small
    has_mlp: Flag
    parallel: Flag
    causal: Flag
    layers: Annotated[tuple[LayerDimsRecord, ...], Field(min_length=1, max_length=10_000)] | None = None
    """Layer by layer, if they differ (hybrid models); null: all are alike. A file with this has version 2."""

    @model_validator(mode="after")
    def _sensible(self) -> DimsRecord:
        if self.layers is not None:
            heads = max(own.n_heads for own in self.layers), max(own.n_kv_heads for own in self.layers)
            stated = len(self.layers), *heads, any(own.mlp for own in self.layers)
            if stated != (self.n_layers, self.n_heads, self.n_kv_heads, self.has_mlp):
                raise ValueError("`layers` does not agree with n_layers, n_heads, n_kv_heads and has_mlp")
        if not all((self.n_heads, self.n_kv_heads, self.d_head)) and (self.layers is None or self.n_heads):
            raise ValueError("n_heads, n_kv_heads and d_head are at least 1, or `layers` says that there are no heads")
        if self.n_heads % max(1, self.n_kv_heads):
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        self.check_graph()
        return self

    def check_graph(self, n_positions: int = 1, n_parts: int = 0, n_inputs: int = 0) -> None:
        """Return None when a file may describe the graph of so many named positions, parts of nodes and their inputs.

        Parts are neurons, experts and features; those of transcoders have inputs. Raises ValueError otherwise.
        """
        writers, in_layers = (
            self.n_layers * (self.n_heads + 1),
            self.n_layers * (self.n_heads + 2 * self.n_kv_heads + 1),
        )
        if self.layers is not None:
            writers = sum(max(own.n_heads, 1) + 1 for own in self.layers)
            in_layers = sum(max(own.n_heads + 2 * own.n_kv_heads, 1) + 1 for own in self.layers)
        writers, readers = 2 + writers + n_parts, 1 + (in_layers + n_inputs) * n_positions
        if writers * readers > MAX_GRAPH_CELLS:
            raise ValueError(f"a graph of {writers} writers and {readers} readers is larger than this version reads")


class ModelFileRecord(Strict):
    """The one file that a model was opened from: a GGUF file."""

    sha256: Sha256
    types: Annotated[tuple[GgmlType, ...], Field(min_length=1, max_length=50)]
    """How its weights are stored, the type of most of them first; they were dequantised to the model's dtype."""


class ModelRecord(Strict):
    """The model that the circuit is of. `name` is what `load_model` takes (a label when origin is memory)."""

    name: Label
    origin: Literal["bundled", "directory", "file", "hub", "memory"]
    file: ModelFileRecord | None = None
    """Which file, if origin is file; the name is its path, or the last part of an absolute one."""
    revision: Label | None = None
    weights_sha256: Sha256 | None = None
    """Of the weights as they were loaded; null only in a published circuit that was never run here."""
    architecture: Label
    dims: DimsRecord
    processing: Literal["raw", "compatibility"]
    dtype: Literal["float64", "float32", "bfloat16", "float16"]
    attention: Label = "eager"
    loader: Label

    @model_validator(mode="after")
    def _file_is_stated(self) -> ModelRecord:
        if (self.origin == "file") != (self.file is not None):
            raise ValueError("`file` is stated if, and only if, the origin is file")
        return self


class TokenizerRecord(Strict):
    """`vocabulary_sha256` is over the words with their ids and the special tokens."""

    kind: Label
    n_tokens: Count
    vocabulary_sha256: Sha256
    prepend_bos: Flag | None = None
    """Whether the pairs begin with BOS; null when they were made from token ids."""
    padding_side: Literal["right"] = "right"


class FeaturesRecord(Strict):
    """Features of one basis that are nodes by themselves, and where the basis is."""

    basis: Label
    """The name of the basis in the names of nodes: `m3` of `m3.f17`."""
    where: Label
    """What `load_basis` takes: a folder, `org/name/folder@commit`, or `bundled:NAME`."""
    options: Annotated[dict[LoadOption, Parameter], Field(max_length=10)] | None = None
    """What else it is told; null: nothing."""
    format: Label
    sha256: Sha256
    """Over sites, settings and tensors of the basis; another basis is refused."""
    site_in: Label
    site_out: Label
    later_sites: Annotated[tuple[Label, ...], Field(min_length=1, max_length=10_000)] | None = None
    """Of a cross-layer transcoder: the sites of later layers to which the features write, too, in order."""
    numbers: Annotated[Neurons, Field(min_length=1)]
    """The features, in order."""


LoadOption = Literal["format", "site", "site_out", "k", "input_scale", "layer"]


class ReadoutRecord(Strict):
    """The direction that is read in place of the logits, and the file that it is in."""

    where: Label
    """`NAME.direction.json`: beside the circuit file, below the working folder, or a stored one."""
    direction_sha256: Sha256
    """Over its site and numbers; another direction is refused."""
    site: Label
    """The residual stream at which it is read; the graph ends there."""


class GraphRecord(Strict):
    """Which edges could have been chosen."""

    granularity: Literal["edge", "node"] = "edge"
    """What was chosen as one: edges, or nodes with all edges out of them."""
    split_input: Flag
    positions: Annotated[tuple[Label, ...], Named] | None = None
    """The positions that edges are told apart by, the last one `rest`; null: edges are at all positions."""
    answers: Label | None = None
    """Which of them the answers are at."""
    neurons: Annotated[tuple[Neurons, ...], Field(max_length=10_000)] | None = None
    """Per layer the neurons that are nodes by themselves; null: MLPs are whole."""
    experts: Annotated[tuple[Count, ...], Field(max_length=10_000)] | None = None
    """Per layer how many experts are nodes by themselves; null: none."""
    features: Annotated[tuple[FeaturesRecord, ...], Field(min_length=1, max_length=MAX_NAMED)] | None = None
    """Per basis the features that are nodes by themselves; null: none. A file with features has version 2."""
    key_value: Literal["per kv head"] = "per kv head"
    n_writers: Count
    n_readers: Count
    n_edges: Count
    sha256: Sha256


class Position(Strict):
    """A named position of the circuit's nodes."""

    description: Text


class Role(Strict):
    """Nodes that do the same job."""

    label: Label
    description: Text = ""
    color: Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")] | None = None
    nodes: Annotated[tuple[Label, ...], Field(max_length=MAX_NODES)]


class RoleEdge(Strict):
    """What the nodes of one role send to those of another, as a publication states it; `edges` spell it out."""

    source: Label
    """A role, or `input`."""
    target: Label
    """A role, or `logits`."""
    inputs: Annotated[tuple[Literal["q", "k", "v"], ...], Field(max_length=3)] = ()
    """Which inputs of the target's heads; empty for MLPs and `logits`."""
    positions: Annotated[dict[Label, Label], Named] | None = None
    """Per input (or `logits`) the token position at which it is read, where the source states one."""
    note: Text | None = None


class EdgeRecord(Strict):
    """One edge of the circuit; its score has 6 significant digits, the sidecar has all of them."""

    name: Annotated[str, Field(max_length=300)]
    score: Number | None = None
    frequency: Share | None = None
    """The share of resamples whose circuit has the edge (of nodes: the node that it leaves); null: not measured."""


class TaskContent(Strict):
    """A task that is not one of the package's: all that is needed to make its pairs again."""

    spec: dict[str, Any]
    lists: Annotated[dict[Label, Annotated[tuple[Text, ...], Field(max_length=MAX_WORDS)]], Named]


class TaskRecord(Strict):
    """A task of the package (`bundled`) or of a YAML file (`content` then holds it)."""

    kind: Literal["task"] = "task"
    name: Label
    version: Version
    sha256: Sha256
    title: Text
    source: Text
    bundled: Flag
    path: Label | None = None
    content: TaskContent | None = None

    @model_validator(mode="after")
    def _whole(self) -> TaskRecord:
        if self.bundled == (self.content is not None):
            raise ValueError("a task is bundled, or its content is given; exactly one of them")
        return self


class FileTaskRecord(Strict):
    """A file of the user's own pairs; the token ids that were used are under `pairs`."""

    kind: Literal["file"] = "file"
    name: Label
    path: Label | None = None
    sha256: Sha256


class TokensTaskRecord(Strict):
    """Pairs that were made in Python; the token ids are under `pairs`."""

    kind: Literal["tokens"] = "tokens"
    name: Label


class Provenance(Strict):
    """With what the file was made."""

    versions: Annotated[dict[Label, Label], Named]
    device: Label
    command: Text | None = None


class Sidecar(Strict):
    """The file of all scores, beside this one."""

    file: SidecarName
    sha256: Sha256


class Integrity(Strict):
    """`circuit_sha256` is for citing; `file_sha256` is over everything here but itself."""

    circuit_sha256: Sha256
    file_sha256: Sha256
    sidecar: Sidecar | None = None


Row = Annotated[tuple[Index, ...], Field(max_length=MAX_TOKEN_IDS)]
Rows = Annotated[tuple[Row, ...], Field(max_length=10**6)]


class TaskPairs(Strict):
    """Pairs that the task makes again from these."""

    kind: Literal["task"] = "task"
    split: Label
    seed: Seed
    prepend_bos: Flag
    skip: Annotated[int, Field(strict=True, ge=1, le=MAX_EXAMPLES)] | None = None
    """Examples of the split and seed that come before the first; null: none."""
    read_at: Label | None = None
    """The position at which a direction is read on them instead of answers; null: they have the task's answers."""
    positive: Count | None = None
    """The right answer of the prompts that are made the clean ones, for a direction; null: as the task has it."""


class TokenPairs(Strict):
    """Pairs as token ids, without padding; -1 means no entry in answers and answer positions."""

    kind: Literal["tokens"] = "tokens"
    clean: Rows
    corrupt: Rows
    right: Rows | None = None
    wrong: Rows | None = None
    answer_pos: Rows
    positions: Annotated[dict[Label, Annotated[tuple[Index, ...], Field(max_length=10**6)]], Named] = Field(
        default_factory=dict
    )

    @model_validator(mode="after")
    def _can_be_padded(self) -> TokenPairs:
        for name in ("clean", "corrupt", "right", "wrong", "answer_pos"):
            rows: tuple[tuple[int, ...], ...] = getattr(self, name) or ()
            longest = max(map(len, rows), default=0)
            if longest * len(rows) > MAX_PADDED:
                raise ValueError(f"{name} has {len(rows)} rows, padded to {longest} ids more than {MAX_PADDED}")
        if len(self.positions) * len(self.clean) > MAX_PADDED:
            raise ValueError(f"{len(self.positions)} positions of {len(self.clean)} rows are too many")
        return self


class PairsRecord(Strict):
    """One set of examples. `sha256` is over the token ids, answers and positions themselves."""

    n: Count
    sha256: Sha256
    made_from: Annotated[TaskPairs | TokenPairs, Field(discriminator="kind")]

    @model_validator(mode="after")
    def _not_too_many(self) -> PairsRecord:
        if isinstance(self.made_from, TaskPairs) and self.n > MAX_EXAMPLES:
            raise ValueError(f"n is {self.n}; a file states at most {MAX_EXAMPLES} examples of a task")
        return self


SCHEMA_VERSION, WITH_FEATURES = 1, 2
"""The version of a file, and of one whose graph has features of dictionaries or layers that differ, or that
explains a direction."""


class CircuitFile(Strict):
    """A circuit file: which circuit of which model, how it was found, what it does, and how to check that."""

    schema_version: Literal[1, 2]
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
    readout: ReadoutRecord | None = None
    """The direction that the circuit explains; null: the logits. A file with one has version 2."""
    graph: GraphRecord
    positions: Annotated[dict[Label, Position], Named] = Field(default_factory=dict)
    """The named positions that nodes are restricted to; empty: every node is at all positions."""
    roles: Annotated[dict[Label, Role], Field(max_length=MAX_ROLES)] = Field(default_factory=dict)
    role_edges: Annotated[tuple[RoleEdge, ...], Field(max_length=MAX_ROLES)] | None = None
    """The claim between roles that the edges were made from by a rule; null: there is none."""
    nodes: Annotated[tuple[Label, ...], Field(max_length=MAX_NODES)]
    edges: Annotated[tuple[EdgeRecord, ...], Field(min_length=1, max_length=MAX_EDGES)]
    task: Annotated[TaskRecord | FileTaskRecord | TokensTaskRecord, Field(discriminator="kind")] | None = None
    pairs: Annotated[dict[Label, PairsRecord], Field(max_length=MAX_PAIRS)] = Field(default_factory=dict)
    discovery: DiscoveryRecord | None = None
    selection: SelectionRecord
    evaluation: Annotated[tuple[EvaluationRecord, ...], Field(max_length=MAX_EVALUATIONS)] = ()
    curve: CurveRecord | None = None
    performance: PerformanceRecord | None = None
    stability: StabilityRecord | None = None
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
        used += [self.performance.pairs] if self.performance else []
        used += [self.stability.pairs] if self.stability else []
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
        if self.stability is not None and any(edge.frequency is None for edge in self.edges):
            raise ValueError("a stability is stated, but some edges have no frequency")
        if self.selection.n_edges != len(self.edges):
            raise ValueError(f"selection.n_edges is {self.selection.n_edges}, but there are {len(self.edges)} edges")
        features = self.graph.features or ()
        if self.schema_version != (
            WITH_FEATURES if features or self.model.dims.layers or self.readout else SCHEMA_VERSION
        ):
            raise ValueError(
                "schema_version is 2 if, and only if, the graph has features or layers that differ, or the circuit "
                "explains a direction"
            )
        n_parts = sum(map(len, self.graph.neurons or ())) + sum(self.graph.experts or ())
        n_parts += sum(len(entry.numbers) for entry in features)
        n_inputs = sum(len(entry.numbers) for entry in features if entry.site_in != entry.site_out)
        self.model.dims.check_graph(max(1, len(self.graph.positions or ())), n_parts, n_inputs)
        nodes = set(self.nodes)
        for role in self.roles.values():
            for node in role.nodes:
                if node not in nodes:
                    raise ValueError(f"role {role.label!r} names {node!r}, which is not a node of the circuit")
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
    and revision where no weights are stated. Feature bases and the direction that is read count by their sha256, too.
    """
    model = document.model
    graph = document.graph.model_dump(mode="json", exclude_none=True)
    for entry in graph.get("features", ()):
        for name in ("where", "options", "format"):
            entry.pop(name, None)
    readout = document.readout
    read = {} if readout is None else {"readout": readout.model_dump(mode="json", exclude={"where"})}
    unhashed = {"name": model.name, "revision": model.revision} if model.weights_sha256 is None else {}
    return canonical_sha256(
        {
            "model": {
                "weights_sha256": model.weights_sha256,
                "architecture": model.architecture,
                "dims": model.dims.model_dump(mode="json", exclude_none=True),
                "processing": model.processing,
                **unhashed,
            },
            **read,
            "graph": graph,
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
