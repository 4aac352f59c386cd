"""Where pairs came from, and what was left out when they were made; recorded in circuit files."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class TaskSource:
    """Everything needed to make the same pairs again with the same tokenizer."""

    task: str
    version: int
    digest: str
    split: str
    n: int
    seed: int
    prepend_bos: bool
    skip: int = 0
    read_at: str | None = None
    """The position at which a direction is read on them instead of answers; None: they have the task's answers."""
    positive: int | None = None
    """The right answer of the prompts that were made the clean ones, for a direction; None: as the task has it."""


@dataclass(frozen=True)
class FileSource:
    """The file that the pairs were read from, by name and content."""

    file: str
    sha256: str
    prepend_bos: bool | None


@dataclass(frozen=True)
class Dropped:
    """One thing that was left out (`what`, a word of a list or a row of a file), and the reason."""

    what: str
    why: str


@dataclass(frozen=True)
class Report:
    """What was left out when pairs were made."""

    dropped: tuple[Dropped, ...] = ()

    def __len__(self) -> int:
        return len(self.dropped)

    def __str__(self) -> str:
        if not self.dropped:
            return "nothing was dropped"
        return "\n".join(f"dropped {entry.what}: {entry.why}" for entry in self.dropped)


def source_record(source: TaskSource | FileSource | None) -> dict[str, object]:
    """The source as plain values for a file; `kind` is `task`, `file` or `tensors` (made in Python)."""
    if source is None:
        return {"kind": "tensors"}
    stated = {name: value for name, value in asdict(source).items() if value is not None or name == "prepend_bos"}
    return {"kind": "task" if isinstance(source, TaskSource) else "file", **stated}
