"""The result of `verify`: claims that hold or fail, notes and warnings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mechinterp.base.errors import MechInterpError, ModelNotAvailable
from mechinterp.base.shown import Shown
from mechinterp.circuit_file.schema import Tolerance
from mechinterp.circuit_file.verify.coverage import NOTHING, Extent

T = TypeVar("T")


@dataclass(frozen=True)
class Claim:
    """One statement of a circuit file; if it does not hold, what was found instead and why."""

    name: str
    ok: bool
    expected: str = ""
    got: str = ""
    detail: str = ""

    def __str__(self) -> str:
        if self.ok:
            return f"ok      {self.name}" + (f": {self.got}" if self.got else "")
        compared = f"expected {self.expected}, got {self.got}" if self.expected or self.got else ""
        return f"FAILED  {self.name}: " + "; ".join(filter(None, [compared, self.detail]))


@dataclass(frozen=True)
class FileWarning:
    """Something that could mislead a reader although all claims hold: a short name and a sentence."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"warning {self.name}: {self.text}"


MOST_SHOWN = 5
"""Failed claims, and warnings, that are named when a verification is printed."""


@dataclass(frozen=True, repr=False)
class Verification(Shown):
    """All claims of one circuit file, warnings, and how much of the file was checked (`extent`).

    `notes` are differences that are not failures, such as other versions. `verify --strict` passes a file only if it
    has no failed claim and no warning.
    """

    path: Path
    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[FileWarning, ...] = ()
    extent: Extent = NOTHING

    def _facts(self) -> list[tuple[str, object]]:
        failed = ", ".join(claim.name for claim in self.failed[:MOST_SHOWN])
        more = f" and {len(self.failed) - MOST_SHOWN} more" if len(self.failed) > MOST_SHOWN else ""
        found = f"failed: {failed}{more}" if self.failed else "all hold" if self.ok else "nothing was checked"
        warnings = ", ".join(warning.name for warning in self.warnings[:MOST_SHOWN]) or "none"
        return [("file", self.path), ("claims", f"{len(self.claims)}, {found}"), ("warnings", warnings)]

    @property
    def ok(self) -> bool:
        """Whether every claim holds."""
        return bool(self.claims) and all(claim.ok for claim in self.claims)

    @property
    def failed(self) -> tuple[Claim, ...]:
        """The claims that do not hold."""
        return tuple(claim for claim in self.claims if not claim.ok)

    def __str__(self) -> str:
        n_failed = len(self.failed)
        end = "every claim holds" if self.ok else f"{n_failed} of {len(self.claims)} claims failed"
        reach = [f"{heading}: {words}" for heading, words in self.extent.lines()]
        lines = [*map(str, self.claims), *(f"note    {note}" for note in self.notes), *map(str, self.warnings), *reach]
        return "\n".join([*lines, f"{self.path}: {end}"])


class UnverifiedModel(ModelNotAvailable):
    """The model is not available, but all claims that need no model hold; `verification` is the result so far."""

    def __init__(self, message: str, verification: Verification) -> None:
        super().__init__(message)
        self.verification = verification


@dataclass(frozen=True)
class Ledger:
    """The claims and notes collected while a file is checked."""

    claims: list[Claim] = field(default_factory=list[Claim])
    notes: list[str] = field(default_factory=list[str])

    def equal(self, name: str, got: object, expected: object, detail: str = "") -> bool:
        """Whether both are equal; the result is recorded as a claim."""
        ok = got == expected
        self.claims.append(Claim(name, ok, _short(expected), _short(got), "" if ok else detail))
        return ok

    def close(self, name: str, got: object, expected: object, tolerance: Tolerance) -> bool:
        """Whether one number, or each of several, is within the tolerance; the result is recorded as a claim."""
        ok = _close(got, expected, tolerance)
        limit = f"tolerance {tolerance.absolute:g} + {tolerance.relative:g} of the stated value"
        self.claims.append(Claim(name, ok, _short(expected), _short(got), "" if ok else limit))
        return ok

    def holds(self, name: str, ok: bool, expected: str, got: str) -> None:
        """Record a claim with its result."""
        self.claims.append(Claim(name, ok, expected, got))

    def failed(self, name: str, detail: str) -> None:
        """Record a claim that failed or could not be checked, with the reason."""
        self.claims.append(Claim(name, False, detail=detail))

    def attempt(self, name: str, make: Callable[[], T]) -> T | None:
        """The result of `make`; None after an error of this package, which is recorded as the failure of the claim."""
        try:
            return make()
        except MechInterpError as error:
            self.failed(name, str(error))
            return None

    @contextmanager
    def claimed(self, name: str) -> Iterator[None]:
        """Record an error of this package inside the block as the failure of claim `name`."""
        try:
            yield
        except MechInterpError as error:
            self.failed(name, str(error))


def _close(got: object, expected: object, tolerance: Tolerance) -> bool:
    if isinstance(got, Sequence) and isinstance(expected, Sequence):
        return len(got) == len(expected) and all(
            _close(one, other, tolerance) for one, other in zip(got, expected, strict=True)
        )
    if isinstance(got, (int, float)) and isinstance(expected, (int, float)):
        return abs(got - expected) <= tolerance.absolute + tolerance.relative * abs(expected)
    return got is None and expected is None


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple) and all(isinstance(part, float) for part in value):
        return "(" + ", ".join(f"{part:.6g}" for part in value) + ")"
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
