"""What a direction file may say: which direction of which model, how it was found, what was measured. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mechinterp.base.canonical_json import canonical_sha256
from mechinterp.base.plain_files import read_bounded
from mechinterp.circuit_file.field_types import Count, Label, Named, Number, Parameter, Seed, Sha256, Share, Text
from mechinterp.circuit_file.limits import MAX_POINTS
from mechinterp.circuit_file.read_document import MAX_JSON_BYTES, read_document
from mechinterp.circuit_file.schema import (
    FileTaskRecord,
    ModelRecord,
    PairsRecord,
    Provenance,
    TaskPairs,
    TaskRecord,
    TokenizerRecord,
    Tolerance,
)
from mechinterp.tasks.schema import Strict

DIRECTION_VERSION = 1
SUFFIX = ".direction.json"
SETS = ("train", "validation", "test")
TensorsName = Annotated[
    str, Field(pattern=r"^[^-./\\:\x00-\x1f][^/\\:\x00-\x1f]*\.direction\.safetensors$", max_length=200)
]
"""A plain file name beside the direction file."""


class ProbeRecord(Strict):
    """How well a direction separates prompts that it was not fitted on, and its controls; see `probe_directions`."""

    site: Label
    n: Count
    """Pairs neither prompt of which was in the fit."""
    accuracy: Share
    train: Share
    shuffled: Share
    control: Share | None = None
    selectivity: Number | None = None
    embeddings: Share
    auroc: Share
    gap: Number


class FitRecord(Strict):
    """How the direction was fitted, and the seeds and numbers of its controls."""

    method: Label
    parameters: Annotated[dict[Label, Parameter], Named]
    position: Label
    """A named position, or a number (-1: the last token)."""
    control_position: Label | None = None
    classes: Literal["clean", "answer"]
    """The positive class: the clean prompts, or the prompts whose right answer is `positive` (see `orient_pairs`)."""
    positive: Count | None = None
    positive_text: Label | None = None
    shuffles: Annotated[int, Field(strict=True, ge=1, le=1000)]
    seed: Seed


class SteeringRecord(Strict):
    """What adding 1 to the reading of the corrupt test prompts changes in the metric, beside random directions."""

    metric: Label
    strength: Number
    without: Number
    change: Number
    random: Annotated[tuple[Number, ...], Field(min_length=1, max_length=100)]


class DirectionFile(Strict):
    """A direction file: `NAME.direction.json`, with its numbers in `NAME.direction.safetensors`."""

    schema_version: Literal[1]
    kind: Literal["direction"]
    id: Label
    title: Label
    description: Text = ""
    model: ModelRecord
    tokenizer: TokenizerRecord | None = None
    task: Annotated[TaskRecord | FileTaskRecord, Field(discriminator="kind")]
    pairs: dict[Literal["train", "validation", "test"], PairsRecord]
    site: Label
    fit: FitRecord
    scan: Annotated[tuple[ProbeRecord, ...], Field(min_length=1, max_length=MAX_POINTS)]
    """Every site that was tried, judged on the validation pairs; the most accurate one was chosen."""
    without_direction: Annotated[tuple[Label, ...], Named] = ()
    """Sites that were tried where the classes have the same mean."""
    test: ProbeRecord
    """The chosen one on the test pairs, which had no part in fitting or choosing."""
    steering: SteeringRecord | None = None
    tolerance: Tolerance
    n_numbers: Count
    direction_sha256: Sha256
    """Over the site and the numbers: for citing."""
    tensors: TensorsName
    tensors_sha256: Sha256
    provenance: Provenance
    file_sha256: Sha256
    """Over everything here but itself."""

    @model_validator(mode="after")
    def _whole(self) -> DirectionFile:
        if set(self.pairs) != set(SETS):
            raise ValueError(f"a direction needs the pairs {', '.join(SETS)}; got {', '.join(sorted(self.pairs))}")
        if (self.fit.classes == "answer") != (self.fit.positive is not None):
            raise ValueError("`positive` is stated if, and only if, the classes are those of the answers")
        if self.test.site != self.site:
            raise ValueError(f"the test is at {self.test.site!r}, the direction at {self.site!r}")
        if any(isinstance(entry.made_from, TaskPairs) for entry in self.pairs.values()) and not isinstance(
            self.task, TaskRecord
        ):
            raise ValueError("some pairs are made from a task, but no task is given")
        return self


@dataclass(frozen=True)
class OpenedDirection:
    """A direction file that follows the schema, and its JSON as read."""

    path: Path
    document: DirectionFile
    content: Mapping[str, Any]

    @property
    def file_sha256(self) -> str:
        """The hash of the file as it is now."""
        return content_sha256(self.content)


def content_sha256(content: Mapping[str, Any]) -> str:
    """sha256 over the content of a direction file except this hash itself."""
    return canonical_sha256({key: value for key, value in content.items() if key != "file_sha256"})


def is_direction_name(path: str | Path) -> bool:
    """Whether the file name is that of a direction file."""
    return Path(path).name.endswith(SUFFIX)


def open_direction_file(path: str | Path) -> OpenedDirection:
    """The direction file, checked against the schema but not against its hashes.

    Raises FormatError, in one line, for anything that is not a direction file of a known version.
    """
    path = Path(path)
    text = read_bounded(path, MAX_JSON_BYTES)
    document, content = read_document(DirectionFile, text, path, "direction", (DIRECTION_VERSION,))
    return OpenedDirection(path, document, content)


def direction_finding(document: DirectionFile) -> str:
    """What was found, in one line."""
    where, test = document.fit.position, document.test
    controls = [f"shuffled {test.shuffled:.0%}", f"embeddings {test.embeddings:.0%}"]
    controls += [] if test.control is None else [f"control task {test.control:.0%}"]
    classes = "clean" if document.fit.positive_text is None else document.fit.positive_text
    text = f"{document.task.name} ({classes!r} against the others) at {document.site}, position {where}: "
    text += f"separates {test.accuracy:.1%} of {2 * test.n} held-out prompts ({', '.join(controls)})"
    if document.steering is not None:
        steering = document.steering
        most = max(map(abs, steering.random))
        text += f"; adding it changes {steering.metric} by {steering.change:.3g}, random directions by up to {most:.2g}"
        if abs(steering.change) <= most:
            text += ": no more than one of these does"
    return text
