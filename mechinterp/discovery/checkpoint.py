"""The state of a long run in one file, written whole, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mechinterp.atomic import write_whole
from mechinterp.errors import InputError
from mechinterp.graph import Graph
from mechinterp.hooks import HookManager
from mechinterp.scores import Parameter
from mechinterp.tasks.pairs import Pairs

EVERY_SECONDS = 30.0
MOST_BYTES = 2**31


@dataclass
class Checkpoint:
    """Tensors by name in a safetensors file; without a path nothing is kept."""

    path: Path | None = None
    key: str = ""
    """What the run was asked for; a state of another run is refused."""
    last: float = field(default_factory=time.monotonic)

    def load(self) -> dict[str, Tensor] | None:
        """The state that was saved, or None. Raises InputError for a damaged file and for one of another run."""
        if self.path is None or not self.path.exists():
            return None
        if self.path.stat().st_size > MOST_BYTES:
            raise InputError(f"{self.path} is too large to be the state of a run; give another file.")
        try:
            with safe_open(self.path, "pt") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    raise InputError(
                        f"{self.path} is the state of another run (other model, pairs or settings); delete it, or give "
                        "another file."
                    )
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
        except SafetensorError as error:
            raise InputError(f"{self.path} is no state of a run ({error}); delete it, or give another file.") from error

    def save(self, state: Mapping[str, Tensor], *, now: bool = False) -> None:
        """Return None after writing the state, if the last time is half a minute ago (or `now`)."""
        if self.path is None or (not now and time.monotonic() - self.last < EVERY_SECONDS):
            return
        write_whole(self.path, save({k: v.contiguous() for k, v in state.items()}, {"key": self.key}))
        self.last = time.monotonic()

    def clear(self) -> None:
        """Return None after deleting the file: the run is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def open_checkpoint(
    path: str | os.PathLike[str] | None,
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    method: str,
    metric: str,
    settings: Mapping[str, Parameter],
    batch_size: int,
) -> Checkpoint:
    """The checkpoint of one run; its key is a digest of all that decides the result."""
    if path is None:
        return Checkpoint()
    asked = [
        model.info.weights_sha256(),
        graph.digest(),
        pairs.digest(),
        method,
        metric,
        sorted((name, str(value)) for name, value in settings.items()),
        batch_size,
    ]
    return Checkpoint(Path(path), hashlib.sha256(json.dumps(asked).encode()).hexdigest())
