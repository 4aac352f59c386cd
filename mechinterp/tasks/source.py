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
    return {"kind": "task" if isinstance(source, TaskSource) else "file", **asdict(source)}
